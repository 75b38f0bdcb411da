"""Changing a layer's settings while it works."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmmw.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llmmw.engine.home import Home
    from llmmw.layers.base import Bound


class Changing:
    """An engine's method that changes settings; from any thread."""

    _bounds: Sequence[tuple[str, Bound]]
    _home: Home

    def reconfigure(self, role: str, **changes: Any) -> None:
        """Change settings of the layer of that role, at every endpoint, effective at once: `("limit", rpm=1200)`.

        What was learnt, spent and queued stays. Only some layers can: the RateLimiter, whose limits can be raised and
        lowered (not added or removed).

        Raises:
            ConfigError: the stack has no such layer, it cannot change, or a value cannot work; nothing is changed.
        """
        bounds = [bound for name, bound in self._bounds if name == role]
        if not bounds:
            present = ", ".join(dict.fromkeys(name for name, _ in self._bounds)) or "none"
            raise ConfigError(f"reconfigure({role!r}): this engine has no such layer; it has: {present}")

        def here() -> None:
            for bound in bounds:
                bound.reconfigure(**changes)

        async def there() -> None:
            here()

        if self._home.loop is None or self._home.is_here():
            here()
        else:
            self._home.run_sync(there)

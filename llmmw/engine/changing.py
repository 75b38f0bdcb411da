"""Changing a layer's settings while it works."""

from __future__ import annotations

from typing import Any

from llmmw.engine.onhome import OnHome
from llmmw.errors import ConfigError


class Changing(OnHome):
    """An engine's method that changes settings; from any thread."""

    def reconfigure(self, role: str, **changes: Any) -> None:
        """Change settings of the layer of that role, at every endpoint, effective at once: `("limit", rpm=1200)`.

        What was learnt, spent and queued stays. Only some layers can: the RateLimiter, whose limits can be raised and
        lowered (not added or removed), and the Balancer, whose `weights` go by the names of replicas.

        Raises:
            ConfigError: the stack has no such layer, it cannot change, or a value cannot work; nothing is changed.
        """
        bounds = [bound for name, bound in self._bounds if name == role]
        if not bounds:
            present = ", ".join(dict.fromkeys(name for name, _ in self._bounds)) or "none"
            raise ConfigError(f"reconfigure({role!r}): this engine has no such layer; it has: {present}")

        def change() -> None:
            for effect in [bound.change(bounds, **changes) for bound in bounds]:
                effect()

        self._on_home(change)

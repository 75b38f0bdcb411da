"""What an engine does to all its layers at once, from any thread."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from llmmw.engine.home import Home
    from llmmw.layers.base import Bound

T = TypeVar("T")


class OnHome:
    """The part of an engine that its groups of methods share."""

    _bounds: Sequence[tuple[str, Bound]]
    _home: Home

    def _on_home(self, work: Callable[[], T]) -> T:
        """Do something that takes no time on the home loop; here, where there is none."""

        async def there() -> T:
            return work()

        return work() if self._home.loop is None or self._home.is_here() else self._home.run_sync(there)

"""What an engine does on its home loop for callers from any thread."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, TypeVar

from llmmw.call import Party
from llmmw.engine.atwork import AtWork
from llmmw.engine.closing import closed_error
from llmmw.errors import Closed

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

    from llmmw.engine.home import Home
    from llmmw.env import Env
    from llmmw.layers.base import Bound

T = TypeVar("T")


class OnHome(AtWork):
    """The part of an engine that its groups of methods share."""

    _bounds: Sequence[tuple[str, Bound]]
    _home: Home
    _closed: bool
    env: Env

    def _on_home(self, work: Callable[[], T]) -> T:
        """Do something that takes no time on the home loop; here, where there is none."""

        async def there() -> T:
            return work()

        return work() if self._home.loop is None or self._home.is_here() else self._home.run_sync(there)

    def run_sync(self, make: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run a coroutine on the home loop and wait, from plain code.

        Raises:
            ConfigError: called on the home loop's own thread.
            Closed: the engine was closed.
        """
        if self._closed:
            raise closed_error()
        return self._home.run_sync(make, repeat=False)

    def party(self, size: int | None = None) -> Party | None:
        """For calls made together on the home loop; None elsewhere: calls that are bridged one by one do not meet."""
        with contextlib.suppress(Closed):
            return Party(size) if self._home.adopt() else None
        return None

    def tick(self) -> None:
        """Every agent of the step has asked: flush what waits for batch mates. From any thread."""
        loop = self._home.loop
        if loop is not None and not loop.is_closed():
            for _, bound in self._bounds:
                flush = getattr(bound, "tick", None)
                if flush is not None:
                    loop.call_soon_threadsafe(flush)

"""Time under a test's control: a clock that moves when told, and an event loop that lives on it.

On `ManualLoop` every wait of asyncio (`sleep`, `timeout`, `call_later`) and everything that reads loop time
(aiolimiter) runs on the manual clock: when nothing is ready, the clock jumps to the next timer. A minute of
back-off takes no time, and a run is the same every time. Not for sockets or threads: while those work in
real time, the jump would make their time-outs fire (jobs given to `run_in_executor` are waited for).
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import selectors
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

from llmmw.env import set_ambient_clock

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

P = ParamSpec("P")
T = TypeVar("T")

_REAL_WAIT_S = 0.05


class ManualClock:
    """A `Clock` that stands still until `advance` (or a ManualLoop) moves it."""

    def __init__(self, start: float = 1000.0, *, wall: float = 1_800_000_000.0) -> None:
        self._now = start
        self._wall_offset = wall - start

    def monotonic(self) -> float:
        """Seconds on the manual scale."""
        return self._now

    def wall(self) -> float:
        """The matching wall-clock time."""
        return self._now + self._wall_offset

    def advance(self, seconds: float) -> None:
        """Move time forward; on a ManualLoop, timers that became due run in the next turn."""
        self._now += seconds

    async def sleep(self, delay: float, /) -> None:
        """Wait on the running loop."""
        await asyncio.sleep(delay)

    def run(self, main: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on a ManualLoop with this clock, also as the ambient clock; leftover tasks are cancelled."""
        restore = set_ambient_clock(self)
        try:
            with asyncio.Runner(loop_factory=lambda: ManualLoop(self)) as runner:
                return runner.run(main)
        finally:
            restore()

    def __repr__(self) -> str:
        return f"ManualClock({self._now:.6f})"


class _JumpingSelector(selectors.DefaultSelector):
    """Instead of waiting for the next timer, moves the clock to it."""

    def __init__(self, clock: ManualClock) -> None:
        super().__init__()
        self._clock = clock
        self.jobs = 0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None or timeout <= 0:
            return super().select(timeout)
        ready = super().select(_REAL_WAIT_S if self.jobs else 0)
        if not ready and not self.jobs:
            self._clock.advance(timeout)
        return ready


class ManualLoop(asyncio.SelectorEventLoop):
    """An event loop whose time is a ManualClock's."""

    def __init__(self, clock: ManualClock) -> None:
        self._selector_of_jobs = _JumpingSelector(clock)
        super().__init__(self._selector_of_jobs)
        self._clock = clock

    def time(self) -> float:
        """The manual clock's reading."""
        return self._clock.monotonic()

    def run_in_executor(  # type: ignore[override]  # the same signature, spelled without type variables
        self, executor: Any, func: Any, *args: Any
    ) -> asyncio.Future[Any]:
        """As usual; the clock does not jump while the job runs."""
        future = super().run_in_executor(executor, func, *args)
        self._selector_of_jobs.jobs += 1
        future.add_done_callback(self._job_done)
        return future

    def _job_done(self, _: asyncio.Future[Any]) -> None:
        self._selector_of_jobs.jobs -= 1


def manual_time(test: Callable[Concatenate[ManualClock, P], Awaitable[None]]) -> Callable[P, None]:
    """Turn `async def test(clock, ...fixtures)` into a test that runs on a ManualLoop."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        clock = ManualClock()

        async def main() -> None:
            await test(clock, *args, **kwargs)

        clock.run(main())

    parameters = list(inspect.signature(test).parameters.values())[1:]
    setattr(run, "__signature__", inspect.Signature(parameters))  # noqa: B010 — pytest reads fixtures from it
    del run.__wrapped__  # pytest would unwrap to the coroutine function
    return run

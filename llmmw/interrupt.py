"""Interrupting a wait at a moment: `Until` for one awaitable, `TimedChunks` for every read of a stream.

Unlike `asyncio.timeout` the timer is armed only when the work first suspends (an answer that is at hand pays for
none), the moment may move later while it runs, and the task's own `cancelling()` count is never touched: what is
cancelled is the future the work waits for.
"""

from __future__ import annotations

import asyncio
from math import inf
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from llmmw.errors import DeadlineExceeded, UpstreamTimeout

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Generator

    from llmmw.answer import Usage
    from llmmw.call import Chunk, Chunks
    from llmmw.env import Clock

T = TypeVar("T")

_SLACK_S = 0.001
"""A loop may fire a timer this much early (uvloop rounds to milliseconds); that is due, not a reason to wait again."""

_UNSENT = "llmmw_unsent"


def mark_unsent(cancelled: asyncio.CancelledError) -> None:
    """Note on a cancellation that the request it ends had not begun to be sent."""
    setattr(cancelled, _UNSENT, True)


def is_unsent(error: object) -> bool:
    """Whether this is a cancellation that came before anything was sent."""
    return isinstance(error, asyncio.CancelledError) and getattr(error, _UNSENT, False) is True


class Alarms:
    """One timer for many waits, most of which come due in the order in which they began (those of one length do).

    A timer of its own costs each wait 2 µs, and the loop a longer heap.
    """

    __slots__ = ("_clock", "_last", "_rings_at", "_timer", "_waits", "loop")

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.loop: asyncio.AbstractEventLoop | None = None
        """The loop that all waits are on, since the first of them; asking for the running one is a system call."""
        self._timer: asyncio.TimerHandle | None = None
        self._waits: dict[Until[Any], float] = {}
        self._last = self._rings_at = -inf

    def add(self, wait: Until[Any], due: float) -> bool:
        """Interrupt this wait when it is due; False if it is due before one that was added earlier, or never."""
        if due == inf or (due < self._last and self._waits):
            return False
        self._waits[wait] = self._last = due
        if self._timer is not None and due < self._rings_at:  # it was set for a wait that is over
            self._timer.cancel()
            self._timer = None
        if self._timer is None:
            self._set_timer(due, self._clock.monotonic())
        return True

    def rehome(self) -> None:
        """The loop is gone, and all waits with it."""
        self.loop = self._timer = None
        self._waits = {}

    def discard(self, wait: Until[Any]) -> None:
        """The wait is over. The timer stays as it is: the next wait may need it."""
        self._waits.pop(wait, None)

    def _ring(self) -> None:
        self._timer = None
        now = self._clock.monotonic()
        expired: list[Until[Any]] = []
        for wait, due in self._waits.items():
            if due - now > _SLACK_S:
                self._set_timer(due, now)
                break
            expired.append(wait)
        for wait in expired:
            del self._waits[wait]
            wait.fire()

    def _set_timer(self, due: float, now: float) -> None:
        self._rings_at = due
        if self.loop is None:
            self.loop = asyncio.get_running_loop()
        self._timer = self.loop.call_later(max(0.0, due - now), self._ring)


class Until(Generic[T]):
    """Awaits `work`, but not beyond the moment `due()` names; then `work` is cancelled and `error()` raised.

    Args:
        work: what to await, once.
        clock: the scale of `due`.
        due: monotonic seconds (`math.inf` for never); asked when the work suspends and again when that moment came.
        error: makes the exception for the caller.
        alarms: rings for this wait instead of a timer of its own, where that is in turn.

    An error with `sent` tells whether anything had been sent, where the work says so (`mark_unsent`).

    Work that finishes, or fails with an error of its own, in the moment of the interruption keeps its outcome, and a
    real cancellation of the task stays one.
    """

    _handle: asyncio.TimerHandle | None = None
    _waiting: asyncio.Future[Any] | None = None
    _expired = _told = _unsent = False

    def __init__(
        self,
        work: Awaitable[T],
        clock: Clock,
        due: Callable[[], float],
        error: Callable[[], BaseException],
        *,
        alarms: Alarms | None = None,
    ) -> None:
        self._work = work
        self._clock = clock
        self._due = due
        self._error = error
        self._alarms = alarms

    def __await__(self) -> Generator[Any, Any, T]:
        """Run the work to its first suspension, arm the timer, then pass everything through by hand."""
        step = self._work.__await__()
        try:
            waiting = next(step)
        except StopIteration as done:
            return done.value  # type: ignore[no-any-return]  # StopIteration is not generic
        task = asyncio.current_task(None if self._alarms is None else self._alarms.loop)
        pending = 0 if task is None else task.cancelling()
        try:
            self._watch()
            while True:
                self._waiting = waiting
                bare = False
                if self._expired:
                    bare = waiting is None and not self._told
                    self._interrupt()
                try:
                    sent = yield waiting
                except BaseException as raised:  # noqa: BLE001 — passed on into the work as it is
                    waiting = step.throw(raised)
                else:
                    self._told = self._told or bare
                    waiting = step.throw(asyncio.CancelledError()) if bare else step.send(sent)
        except StopIteration as done:
            return done.value  # type: ignore[no-any-return]  # as above
        except asyncio.CancelledError as cancelled:
            if not self._expired or (task is not None and task.cancelling() > pending):
                raise
            self._unsent = is_unsent(cancelled)
        finally:
            waiting = None  # this frame stays with an error, and the future would keep what the work failed of
            self._rest()
        # Out here the error has no context: the cancellation came through the frames that hold the connection.
        error = self._error()
        if self._unsent and isinstance(error, UpstreamTimeout | DeadlineExceeded):
            error.sent = False
        raise error

    def _watch(self) -> None:
        if self._alarms is None or not self._alarms.add(self, self._due()):
            self._alarms = None
            self._arm()

    def _rest(self) -> None:
        self._waiting = None
        if self._handle is not None:
            self._handle.cancel()
        if self._alarms is not None:
            self._alarms.discard(self)

    def _arm(self) -> None:
        delay = self._due() - self._clock.monotonic()
        self._handle = None
        if delay != inf:
            self._handle = asyncio.get_running_loop().call_later(max(0.0, delay), self.fire)

    def fire(self) -> None:
        """The moment came, unless it moved."""
        if self._due() - self._clock.monotonic() > _SLACK_S:
            self._arm()
        else:
            self._expired = True
            self._interrupt()

    def _interrupt(self) -> None:
        """Cancel what the work waits for, once; a future that is done already is let through to the work."""
        if not self._told and self._waiting is not None:
            self._told = self._waiting.cancel()


class TimedChunks:
    """A stream whose every read ends at a moment; after an interruption the stream is closed.

    From the second read on, the moment counts also where the next chunk is at hand: a server that is faster than its
    reader would else never be interrupted. (The first may have been waiting for a reader who came late.)

    Args:
        inner: the stream.
        clock: the scale of `due`.
        due: as for `Until`, asked at each read.
        error: makes the exception for the reader.
        until: the fixed moment, where there is one, by which a second guard for the same moment can be spared.
    """

    def __init__(
        self,
        inner: Chunks,
        clock: Clock,
        due: Callable[[], float],
        error: Callable[[], BaseException],
        *,
        until: float | None = None,
    ) -> None:
        self._inner = inner
        self._clock = clock
        self._due = due
        self._error = error
        self._begun = False
        self.until = until

    @property
    def usage(self) -> Usage:
        """What the stream reported so far."""
        return self._inner.usage

    def __aiter__(self) -> TimedChunks:
        return self

    async def __anext__(self) -> Chunk:
        if self._begun and self._due() <= self._clock.monotonic():
            await self._inner.aclose()
            raise self._error()
        expired = False

        def error() -> BaseException:
            nonlocal expired
            expired = True
            return self._error()

        try:
            chunk = await Until(self._inner.__anext__(), self._clock, self._due, error)
        finally:
            if expired:
                await self._inner.aclose()
        self._begun = True
        return chunk

    async def aclose(self) -> None:
        """Close the stream."""
        await self._inner.aclose()


def until_deadline(inner: Chunks, clock: Clock, until: float, error: Callable[[], BaseException]) -> Chunks:
    """The stream guarded by a fixed deadline; one that is guarded by the same deadline stays as it is."""
    if isinstance(inner, TimedChunks) and inner.until == until:
        return inner
    return TimedChunks(inner, clock, lambda: until, error, until=until)

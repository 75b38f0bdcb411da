"""Calls in flight: who they belong to, waiting until they are over, cancelling those that are not."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import weakref
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from llmmw.engine.readers import GuardedChunks

_CLOSED = "the engine was closed before this stream was read to its end"
_BREAK_S = 5.0
"""Closing a stream takes no time, unless a user's generator has something long to clean up."""


class InFlight:
    """The calls that one engine has not finished. Lives on the home loop."""

    def __init__(self) -> None:
        self._tasks: dict[int, asyncio.Task[Any] | None] = {}
        self._streams: weakref.WeakValueDictionary[int, GuardedChunks] = weakref.WeakValueDictionary()
        self._last = 0
        self._idle: asyncio.Future[None] | None = None
        self._cancelled: set[asyncio.Task[Any]] = set()

    def __len__(self) -> int:
        return len(self._tasks)

    def begin(self, task: asyncio.Task[Any] | None) -> int:
        """A call started in this task; returns its number."""
        self._last = number = self._last + 1
        self._tasks[number] = task
        return number

    def hand_over(self, number: int, stream: GuardedChunks) -> None:
        """The call goes on as a stream, which any task may read; one that is dropped must not be kept alive here."""
        self._tasks[number] = None
        self._streams[number] = stream

    def end(self, number: int) -> None:
        """The call is over (told once or more)."""
        if self._tasks.pop(number, None) is None:
            self._streams.pop(number, None)
        if self._idle is not None and not self._tasks and not self._idle.done():
            self._idle.set_result(None)

    def forget(self, task: asyncio.Task[Any] | None = None) -> None:
        """Do not wait for the calls of this task; without one, for any (their loop is gone)."""
        if task is None:
            self._tasks.clear()
            self._streams.clear()
            self._cancelled.clear()
            self._idle = None
        else:
            for number in [number for number, owner in self._tasks.items() if owner is task]:
                del self._tasks[number]

    async def drain(self, timeout_s: float, closer: object) -> None:
        """Wait until every call is over; after the time-out, cancel those that a task still waits for.

        Args:
            timeout_s: for the waiting, and again for what was cancelled.
            closer: who waits here (`whose()`): a stream that it reads itself would never end, so it is broken off now.
        """
        await self._break_off(lambda stream: stream.reader == closer)
        if self._streams:
            gc.collect()  # a stream that was dropped within a cycle of references would be waited for in vain
        if not self._tasks:
            return
        self._idle = asyncio.get_running_loop().create_future()
        await asyncio.wait([self._idle], timeout=timeout_s)
        tasks = {task for task in self._tasks.values() if task is not None}
        self._cancelled |= tasks
        for task in tasks:
            task.cancel()
        await self._break_off(lambda _: True)
        if tasks:
            await asyncio.wait([self._idle], timeout=timeout_s)

    async def _break_off(self, which: Callable[[GuardedChunks], bool]) -> None:
        ending = [stream.break_off(_CLOSED) for stream in list(self._streams.values()) if which(stream)]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_BREAK_S):
                await asyncio.gather(*ending, return_exceptions=True)

    def was_cancelled_here(self, task: asyncio.Task[Any] | None) -> bool:
        """Whether a CancelledError in this task is `drain`'s doing alone; takes that cancellation back."""
        if task is None or task not in self._cancelled:
            return False
        self._cancelled.discard(task)
        return task.uncancel() == 0

"""Answers of the I/O thread on their way to the loop that waits for them."""

from __future__ import annotations

import contextlib
from collections import deque
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import asyncio

    from llmmw.stores.keeper import Keeper

_SLACK_S = 0.001
"""A loop may fire a timer this much early."""


class Mailbox:
    """Reads that one loop waits for: results come in batches, with one wake-up, under one timer for all.

    Args:
        loop: whose reads these are.
        keeper: told of each read that is not there in time.
        late: number of the latest such read.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, keeper: Keeper, late: int) -> None:
        self.loop = loop
        self.late = late
        self._keeper = keeper
        self._posted: deque[tuple[asyncio.Future[Any], object]] = deque()
        self._expected: deque[tuple[asyncio.Future[Any], int, float]] = deque()
        """In the order in which the thread answers; those that are answered go when they come to the front."""
        self._timer: asyncio.TimerHandle | None = None

    def expect(self, number: int, budget_s: float) -> asyncio.Future[Any]:
        """What the caller waits for; None after so many seconds."""
        found: asyncio.Future[Any] = self.loop.create_future()
        due = self.loop.time() + budget_s
        if self._timer is not None and self._timer.when() > due:  # the first read of all has more time
            self._timer.cancel()
            self._timer = None
        if self._timer is None:
            self._timer = self.loop.call_at(due, self._check)
        self._expected.append((found, number, due))
        return found

    def post(self, found: asyncio.Future[Any], result: object) -> None:
        """From the I/O thread, which calls `wake` when it has nothing more to read."""
        self._posted.append((found, result))

    def wake(self) -> None:
        """From the I/O thread: have delivered what was posted."""
        with contextlib.suppress(RuntimeError):  # the loop closed meanwhile: nobody waits
            self.loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        while self._posted:
            found, result = self._posted.popleft()
            if not found.done():
                found.set_result(result)
        self._forget_answered()

    def _forget_answered(self) -> None:
        # The timer stays: it costs one turn of the loop per budget, and a new one for every read ten times as much.
        while self._expected and self._expected[0][0].done():
            self._expected.popleft()

    def _check(self) -> None:
        self._timer = None
        now = self.loop.time()
        for found, number, due in self._expected:
            if due > now + _SLACK_S:
                break
            if not found.done():
                self.late = number
                self._keeper.trouble("slow", "the cache directory answers slowly; calls go on without it")
                found.set_result(None)
        self._forget_answered()
        if self._expected:
            self._timer = self.loop.call_at(self._expected[0][2], self._check)

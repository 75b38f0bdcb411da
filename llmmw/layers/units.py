"""The request rate: units from aiolimiter, one at a time, with a memory that outlives its loop.

aiolimiter's own queue is left alone: it orders waiters by amount, keeps the slot of a cancelled one, costs 19 to
67 µs per waiter, and its timer spins when rounding leaves a 1e-17th of a unit missing. So a unit is taken only when
`has_capacity` says that it is there, and the caller sets one timer for the moment when it will be. What is taken
cannot be handed back to aiolimiter; an unused unit is kept as a credit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiolimiter import AsyncLimiter

from llmmw.algo.bucket import burst_of, prefill, steady_time

if TYPE_CHECKING:
    from collections.abc import Callable

    from llmmw.algo.bucket import Ledger

_HALVINGS = 20


class Units:
    """Units of the request rate whose use the ledger of requests records.

    Args:
        record: what was admitted; gives the limit, the window, and the start level of a new limiter.
        burst: how many may leave at once; None for the usual share of the limit.
        clock: monotonic seconds.
    """

    def __init__(self, record: Ledger, burst: int | None, clock: Callable[[], float]) -> None:
        self._record = record
        self._asked_burst = burst
        self._clock = clock
        self._limiter: AsyncLimiter | None = None
        self._burst = 1
        self._credit = 0

    def take(self) -> bool:
        """One unit, if there is one."""
        limiter = self._limiter or self._new()
        if self._credit:
            if not limiter.has_capacity(self._burst):
                self._credit -= 1
                return True
            self._credit = 0  # the bucket ran empty, so a whole burst is free: a credit would come on top of it
        return limiter.has_capacity(1) and _acquire(limiter, 1)

    def ready(self) -> bool:
        """Whether `take` would give one."""
        return self._credit > 0 or (self._limiter or self._new()).has_capacity(1)

    def unused(self) -> None:
        """A unit that was taken but not spent."""
        self._credit += 1

    def predict(self, amount: int, now: float) -> float:
        """When that many units could have been taken, if nobody else takes any."""
        limiter = self._limiter or self._new()
        short = amount - self._credit - self._free(limiter)
        return now + max(0.0, short) * limiter.time_period / limiter.max_rate

    def renew(self, burst: int | None) -> None:
        """The limit or the loop changed: the next unit comes from a new limiter, filled from the record."""
        self._asked_burst = burst
        self._limiter = None

    def _new(self) -> AsyncLimiter:
        limit, window = self._record.limit, self._record.window
        self._burst = burst = burst_of(limit, self._asked_burst)
        self._credit = 0
        self._limiter = limiter = AsyncLimiter(burst, steady_time(limit, burst, window))
        level = prefill(self._record.record(self._clock()), limit, burst, window)
        if level > 0:
            _acquire(limiter, level)
        return limiter

    def _free(self, limiter: AsyncLimiter) -> float:
        """How much the limiter would give at once, to a millionth of its burst (it does not tell its level)."""
        low, high = 0.0, float(self._burst)
        if limiter.has_capacity(high):
            return high
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if limiter.has_capacity(middle) else (low, middle)
        return high


def _acquire(limiter: AsyncLimiter, amount: float) -> bool:
    """Take what the limiter has capacity for: its `acquire` then ends without suspending, so no task is needed."""
    try:
        limiter.acquire(amount).send(None)
    except StopIteration:
        return True
    raise AssertionError("AsyncLimiter.acquire suspended although has_capacity was true")  # pragma: no cover

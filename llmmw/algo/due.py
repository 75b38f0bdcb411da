"""Whose time comes first: many moments, one timer. Moments may move later; that is noticed when they come."""

from __future__ import annotations

from heapq import heapify, heappop, heappush, heapreplace
from itertools import count
from math import inf
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

_FEW = 16


class Due(Generic[T]):
    """Things with a moment each, the earliest at hand in O(log n).

    Args:
        moment: when a thing is due now (monotonic seconds, infinity for never); None once it is over. It may become
            later while the thing is here, never earlier.
    """

    __slots__ = ("_heap", "_moment", "_order", "_over")

    def __init__(self, moment: Callable[[T], float | None]) -> None:
        self._moment = moment
        self._heap: list[tuple[float, int, T]] = []
        self._order = count()
        self._over = 0

    def __len__(self) -> int:
        """Things that are here, some of them perhaps over."""
        return len(self._heap)

    def add(self, thing: T) -> None:
        """Mind this one from now on."""
        at = self._moment(thing)
        if at is not None and at != inf:
            heappush(self._heap, (at, next(self._order), thing))

    def discard(self) -> None:
        """One of them is over: its place is cleared when it comes to the top, or when half of all are over."""
        self._over += 1
        if self._over > _FEW and 2 * self._over > len(self._heap):
            self._heap = [place for place in self._heap if self._moment(place[2]) is not None]
            heapify(self._heap)
            self._over = 0

    def next(self) -> float:
        """The earliest moment, infinity where there is none."""
        heap = self._heap
        while heap:
            at = self._moment(heap[0][2])
            if at is not None and at == heap[0][0]:
                return at
            self._mend(at)
        return inf

    def pop(self, until: float) -> list[T]:
        """Take out all that are due at that moment or before."""
        found: list[T] = []
        while self.next() <= until and self._heap:
            found.append(heappop(self._heap)[2])
        return found

    def _mend(self, at: float | None) -> None:
        if at is None or at == inf:
            heappop(self._heap)
            self._over = max(0, self._over - 1)
        else:
            _, order, thing = self._heap[0]
            heapreplace(self._heap, (at, order, thing))

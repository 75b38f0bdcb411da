"""What a full cache gives up: GreedyDual-Size-Frequency (Cherkasova, HPL-98-69R1), priced in seconds.

An item is worth `floor + hits * cost_s / size`: how often it was asked for, times the seconds of service it saves,
per byte it occupies. `floor` is the worth of the last item given up when this one was last touched, so what nobody
asks for any more is overtaken by what comes in (aging without dividing by age).
"""

from __future__ import annotations

from heapq import heappop, heappush

MIN_COST_S = 0.001
"""An answer of unknown cost counts as a millisecond: then popularity and size still decide."""

_SLACK = 64
_STEP = 4
"""Accounts moved per write while the heap is being cleared of closed ones: all at once would hold the loop up."""
_TRIES = 32
"""Accounts looked at per eviction; 16 save as much as all on the traces of benchmarks/eviction.py. After many hits and
no eviction all are out of date, and to look at all at once would hold the loop up."""


class Slot:
    """One item's account. `hits` and `floor` may be written by any thread: a lost count costs nothing but accuracy."""

    __slots__ = ("alive", "cost_s", "floor", "hits", "key", "size")

    def __init__(self, key: bytes, size: int, cost_s: float, floor: float, hits: int) -> None:
        self.key = key
        self.size = size
        self.cost_s = max(MIN_COST_S, cost_s)
        self.floor = floor
        self.hits = hits
        self.alive = True

    def worth(self) -> float:
        """What the item is worth now."""
        return self.floor + self.hits * self.cost_s / self.size


class GDSF:
    """Which item goes next. Hits only mark their slot; the heap catches up when something must go."""

    def __init__(self) -> None:
        self.floor = 0.0
        self._heap: list[tuple[float, int, Slot]] = []
        self._former: list[tuple[float, int, Slot]] = []
        """The heap before this one, until all that is alive in it has moved."""
        self._count = 0
        self._live = 0

    def __len__(self) -> int:
        return self._live

    def add(self, key: bytes, size: int, cost_s: float, *, hits: int = 1) -> Slot:
        """Open an account.

        Args:
            key: of the item.
            size: bytes it occupies, above 0.
            cost_s: seconds of service that a hit saves.
            hits: how often it was asked for so far.
        """
        slot = Slot(key, size, cost_s, self.floor, hits)
        self._live += 1
        self._push(slot)
        return slot

    def touch(self, slot: Slot) -> None:
        """The item was asked for."""
        slot.hits += 1
        slot.floor = self.floor

    def remove(self, slot: Slot) -> None:
        """The item is gone for another reason (expired, replaced, invalidated)."""
        slot.alive = False
        self._live -= 1
        if not self._former and len(self._heap) > 2 * self._live + _SLACK:
            self._former, self._heap = self._heap, []
        if self._former:
            self._move()

    def evict(self) -> Slot | None:
        """Close the account of the item worth least; None when there is none.

        Where the first 32 were all asked for since they were last looked at, the least of these.
        """
        least: Slot | None = None
        worth = 0.0
        for _ in range(_TRIES):
            entry = self._pop()
            if entry is None:
                break
            recorded, _, slot = entry
            now = slot.worth()
            if least is None or now < worth:
                least, worth = slot, now
            # Worth only grows, so what stands in the heap is a lower bound, and the least is found exactly.
            if now <= recorded:
                least, worth = slot, now
                break
            self._push(slot)
        if least is not None:
            least.alive = False
            self._live -= 1
            self.floor = max(self.floor, worth)
        return least

    def _pop(self) -> tuple[float, int, Slot] | None:
        """The open account that was worth least when it was last looked at."""
        while self._heap or self._former:
            is_first = bool(self._heap) and (not self._former or self._heap[0] < self._former[0])
            entry = heappop(self._heap if is_first else self._former)
            if entry[2].alive:
                return entry
        return None

    def _push(self, slot: Slot) -> None:
        self._count = count = self._count + 1
        heappush(self._heap, (slot.worth(), count, slot))
        if self._former:
            self._move()

    def _move(self) -> None:
        for _ in range(_STEP):
            if not self._former:
                return
            entry = self._former.pop()  # the last of a heap can go without disturbing it
            if entry[2].alive:
                heappush(self._heap, entry)

"""What a full cache gives up: GreedyDual-Size-Frequency (Cherkasova, HPL-98-69R1), priced in seconds.

An item is worth `floor + hits * cost_s / size`: how often it was asked for, times the seconds of service it saves,
per byte it occupies. `floor` is the worth of the last item given up when this one was last touched, so what nobody
asks for any more is overtaken by what comes in (aging without dividing by age).
"""

from __future__ import annotations

import heapq

MIN_COST_S = 0.001
"""An answer of unknown cost counts as a millisecond: then popularity and size still decide."""

_SLACK = 64


class Slot:
    """One item's account. `hits` and `floor` may be written by any thread: a lost count costs nothing but accuracy."""

    __slots__ = ("alive", "cost_s", "floor", "hits", "key", "size")

    def __init__(self, key: bytes, size: int, cost_s: float, floor: float, hits: int) -> None:
        self.key = key
        self.size = size
        self.cost_s = max(cost_s, MIN_COST_S)
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
        if len(self._heap) > 2 * self._live + _SLACK:
            self._heap = [entry for entry in self._heap if entry[2].alive]
            heapq.heapify(self._heap)

    def evict(self) -> Slot | None:
        """Close the account of the item worth least; None when there is none."""
        while self._heap:
            recorded, _, slot = heapq.heappop(self._heap)
            if not slot.alive:
                continue
            # Worth only grows, so what stands in the heap is a lower bound and the least is found exactly.
            if slot.worth() > recorded:
                self._push(slot)
                continue
            slot.alive = False
            self._live -= 1
            self.floor = recorded
            return slot
        return None

    def _push(self, slot: Slot) -> None:
        self._count += 1
        heapq.heappush(self._heap, (slot.worth(), self._count, slot))

"""What is over when: keys in drawers, one drawer for a span of time; every step costs the same however many keys.

A heap would keep the keys of what went early until it was rebuilt, which holds the loop up for a third of a second at
100,000 keys (measured). A drawer is opened when its whole span has passed, so a key comes up to 1/64 of its lifetime
late; whoever reads an entry looks at its own time anyway.
"""

from __future__ import annotations

from heapq import heappop, heappush
from math import frexp, ldexp

_SPANS = 7
"""A span is the lifetime over 64 to 128, a power of two: some hundred drawers whatever the lifetime."""


class Calendar:
    """Keys by the time at which they are over."""

    def __init__(self) -> None:
        self._drawers: dict[float, set[bytes]] = {}
        self._order: list[float] = []

    def __len__(self) -> int:
        """How many keys there are; those that came up do not count."""
        return sum(map(len, self._drawers.values()))

    def add(self, key: bytes, end: float, now: float) -> float:
        """Enter a key; returns its drawer, by which it is taken out again.

        Args:
            key: entered once at a time.
            end: when it is over, in seconds, after `now`.
            now: on the same scale.
        """
        span = ldexp(1.0, frexp(end - now)[1] - _SPANS)
        drawer = -(-end // span) * span
        keys = self._drawers.get(drawer)
        if keys is None:
            keys = self._drawers[drawer] = set()
            heappush(self._order, drawer)
        keys.add(key)
        return drawer

    def remove(self, key: bytes, drawer: float) -> None:
        """Take a key out before its time; nothing where it came up already."""
        keys = self._drawers.get(drawer)
        if keys is not None:
            keys.discard(key)

    def over(self, now: float, most: int) -> list[bytes]:
        """Take out keys whose time has passed, the earliest drawer first, at most so many."""
        found: list[bytes] = []
        while self._order and self._order[0] <= now and len(found) < most:
            keys = self._drawers[self._order[0]]
            while keys and len(found) < most:
                found.append(keys.pop())
            if not keys:
                del self._drawers[heappop(self._order)]
        return found

"""When a group of waiting calls goes: size, bytes, tokens, interval, deadline, or because somebody says so. Pure.

`batchmates.py` says who belongs to one group.
"""

from __future__ import annotations

import heapq
from itertools import count
from typing import TYPE_CHECKING, Generic, TypeVar

import msgspec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

L = TypeVar("L")
K = TypeVar("K")
T = TypeVar("T")

_FEW_STALE = 64
"""So many outdated moments are kept before the heap is made anew."""


class Limits(msgspec.Struct, frozen=True):
    """When a group is full; None is no limit."""

    max_size: int = 20
    max_bytes: int | None = None
    max_tokens: int | None = None
    interval_s: float = 0.02

    def excess(self, size_bytes: int, tokens: int) -> str:
        """Which limit a group of that much would exceed; "" for none."""
        if self.max_bytes is not None and size_bytes > self.max_bytes:
            return "bytes"
        return "tokens" if self.max_tokens is not None and tokens > self.max_tokens else ""


class Due(msgspec.Struct, frozen=True):
    """Until when an item may wait."""

    at: float
    hurried: bool = False
    """The deadline says so rather than the interval."""


def when_due(now: float, interval_s: float, deadline: float | None) -> Due:
    """An item waits for the interval, but leaves at least half of the time until its deadline for its answer."""
    if deadline is not None and (deadline - now) / 2 < interval_s:
        return Due(now + max(deadline - now, 0.0) / 2, hurried=True)
    return Due(now + interval_s)


class Flush(msgspec.Struct, Generic[T], frozen=True):
    """A group that goes now."""

    cause: str
    items: tuple[T, ...]


class _Group(Generic[T]):
    """Items that go together, in order of arrival, and how much they are."""

    __slots__ = ("members", "size_bytes", "tokens")

    def __init__(self) -> None:
        self.members: dict[int, T] = {}
        self.size_bytes = 0
        self.tokens = 0


class _Entry(Generic[L, K]):
    """Where an item waits, what it adds to its group, and until when it may wait."""

    __slots__ = ("due", "key", "lane", "size_bytes", "tokens")

    def __init__(self, lane: L, key: K, due: Due, size_bytes: int, tokens: int) -> None:
        self.lane = lane
        self.key = key
        self.due = due
        self.size_bytes = size_bytes
        self.tokens = tokens


class Plan(Generic[L, K, T]):
    """What waits, by lane and group. Decides who goes when; sends nothing itself.

    What an item costs, coming and going, does not depend on how many wait. A lane is what `drain` lets go as a whole.

    Args:
        limits: when a group is full.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.max_size = limits.max_size
        """May be lowered (to 1 at least) and raised again while running."""
        self._lanes: dict[L, dict[K, _Group[T]]] = {}
        self._entries: dict[int, _Entry[L, K]] = {}
        self._number_of: dict[T, int] = {}
        self._numbers = count()
        self._moments: list[tuple[float, int]] = []
        """A heap of when each item is due. A moment whose item left, or is due earlier by now, is outdated."""

    def __len__(self) -> int:
        return len(self._entries)

    def has(self, lane: L) -> bool:
        """Whether anything waits in a lane."""
        return lane in self._lanes

    def add(self, lane: L, key: K, item: T, due: Due, *, size_bytes: int = 0, tokens: int = 0) -> list[Flush[T]]:
        """Take in an item; what is full goes, before it if it no longer fits. One above a limit goes alone.

        Args:
            lane: its lane.
            key: its group in the lane.
            item: any hashable object, not waiting here yet.
            due: until when it may wait.
            size_bytes: what it adds to a request.
            tokens: likewise.
        """
        flushes: list[Flush[T]] = []
        group = self._lanes.get(lane, {}).get(key)
        if group is not None:
            too_much = self.limits.excess(group.size_bytes + size_bytes, group.tokens + tokens)
            if too_much:
                flushes += self._take(lane, (key,), too_much)
        alone = self.limits.excess(size_bytes, tokens)
        if alone:
            return [*flushes, Flush(alone, (item,))]
        group = self._lanes.setdefault(lane, {}).setdefault(key, _Group())
        number = next(self._numbers)
        group.members[number] = item
        group.size_bytes += size_bytes
        group.tokens += tokens
        self._entries[number] = _Entry(lane, key, due, size_bytes, tokens)
        self._number_of[item] = number
        heapq.heappush(self._moments, (due.at, number))
        if len(group.members) >= self.max_size:
            flushes += self._take(lane, (key,), "size")
        return flushes

    def hasten(self, item: T, due: Due) -> None:
        """An item that waits here may wait no longer than that."""
        number = self._number_of.get(item)
        if number is not None and due.at < self._entries[number].due.at:
            self._entries[number].due = due
            heapq.heappush(self._moments, (due.at, number))

    def remove(self, item: T) -> bool:
        """An item leaves; whether it was still here."""
        number = self._number_of.pop(item, None)
        if number is None:
            return False
        entry = self._entries.pop(number)
        groups = self._lanes[entry.lane]
        group = groups[entry.key]
        del group.members[number]
        group.size_bytes -= entry.size_bytes
        group.tokens -= entry.tokens
        if not group.members:
            del groups[entry.key]
            if not groups:
                del self._lanes[entry.lane]
        self._tidy()
        return True

    def due(self, now: float) -> list[Flush[T]]:
        """Groups with an item that has waited long enough."""
        flushes: list[Flush[T]] = []
        while self._moments and self._moments[0][0] <= now:
            entry = self._entry_of(*heapq.heappop(self._moments))
            if entry is not None:
                flushes += self._take(entry.lane, (entry.key,), "deadline" if entry.due.hurried else "interval")
        return flushes

    def next_at(self) -> float | None:
        """When `due` has something to say; None while nothing waits."""
        while self._moments and self._entry_of(*self._moments[0]) is None:
            heapq.heappop(self._moments)
        return self._moments[0][0] if self._moments else None

    def drain(self, cause: str, lane: L) -> list[Flush[T]]:
        """All groups of a lane."""
        return self._take(lane, tuple(self._lanes.get(lane, ())), cause)

    def drain_all(self, cause: str, where: Callable[[K], bool] | None = None) -> list[Flush[T]]:
        """All groups of all lanes, or those whose key is accepted."""
        flushes: list[Flush[T]] = []
        for lane, groups in list(self._lanes.items()):
            flushes += self._take(lane, [key for key in groups if where is None or where(key)], cause)
        return flushes

    def _entry_of(self, at: float, number: int) -> _Entry[L, K] | None:
        entry = self._entries.get(number)
        return entry if entry is not None and entry.due.at == at else None

    def _take(self, lane: L, keys: Iterable[K], cause: str) -> list[Flush[T]]:
        groups = self._lanes.get(lane, {})
        flushes: list[Flush[T]] = []
        for key in keys:
            members = groups.pop(key).members
            for number, item in members.items():
                del self._entries[number], self._number_of[item]
            flushes.append(Flush(cause, tuple(members.values())))
        if not groups:
            self._lanes.pop(lane, None)
        self._tidy()
        return flushes

    def _tidy(self) -> None:
        # Each new heap was paid for by as many departures as it drops.
        if len(self._moments) > 2 * len(self._entries) + _FEW_STALE:
            self._moments = [(entry.due.at, number) for number, entry in self._entries.items()]
            heapq.heapify(self._moments)

"""When a group of waiting calls goes: size, bytes, tokens, interval, deadline, or because somebody says so. Pure.

`batchmates.py` says who belongs to one group.
"""

from __future__ import annotations

import heapq
from itertools import count
from typing import TYPE_CHECKING, Generic, TypeVar

import msgspec

if TYPE_CHECKING:
    from collections.abc import Callable

L = TypeVar("L")
K = TypeVar("K")
T = TypeVar("T")

_SINGLES = 16
"""So many single answers before two are tried together again."""
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


class GroupSize:
    """How large a group may be: lower than the limit while larger ones are refused.

    Args:
        limit: calls in a group.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._singles = 0
        self._now = limit
        self.cap = limit
        """What else bounds it at the moment."""

    @property
    def now(self) -> int:
        """The largest group."""
        return min(self._now, self.cap)

    def refused(self, size: int) -> None:
        """A group of that size was more than the server takes: half of it may do.

        Of several that were refused at one time none halves what another has halved already.
        """
        self._now = max(1, min(self._now, size // 2))
        self._singles = 0

    def accepted(self, size: int) -> None:
        """A group of that size was answered: one more may do.

        After single calls that is tried less often: where the server takes no two, each try costs two refusals.
        """
        if self._now < self._limit:
            self._singles += size == 1
            if size > 1 or self._singles >= _SINGLES:
                self._now += 1
                self._singles = 0


class _Group(Generic[K, T]):
    """Items that go together, in order of arrival, and how much they are."""

    __slots__ = ("key", "members", "size_bytes", "tokens")

    def __init__(self, key: K) -> None:
        self.key = key
        self.members: dict[T, None] = {}
        self.size_bytes = 0
        self.tokens = 0


class _Entry(Generic[L, K, T]):
    """Where an item waits, what it adds to its group, and until when it may wait."""

    __slots__ = ("due", "group", "lane", "number", "size_bytes", "tokens")

    def __init__(self, lane: L, group: _Group[K, T], number: int, due: Due, size_bytes: int, tokens: int) -> None:
        self.lane = lane
        self.group = group
        self.number = number
        self.due = due
        self.size_bytes = size_bytes
        self.tokens = tokens


class Plan(Generic[L, K, T]):
    """What waits, by lane and group. Decides who goes when; sends nothing itself.

    What an item costs, coming and going, does not depend on how many wait. A lane is what `drain` lets go as a whole.

    Args:
        limits: when a group is full.
        size: how large a group the server takes; others may tell it. Default: as the limit says.
    """

    def __init__(self, limits: Limits, size: GroupSize | None = None) -> None:
        self.limits = limits
        self._size = size or GroupSize(limits.max_size)
        self._lanes: dict[L, dict[K, _Group[K, T]]] = {}
        self._entries: dict[T, _Entry[L, K, T]] = {}
        self._numbers = count()
        self._moments: list[tuple[float, int, T]] = []
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
        groups = self._lanes.get(lane)
        group = None if groups is None else groups.get(key)
        if group is not None:
            too_much = self.limits.excess(group.size_bytes + size_bytes, group.tokens + tokens)
            if too_much:
                flushes.append(self._take(lane, group, too_much))
                group = None
        alone = self.limits.excess(size_bytes, tokens)
        if alone:
            return [*flushes, Flush(alone, (item,))]
        if group is None:
            group = self._lanes.setdefault(lane, {})[key] = _Group(key)
        number = next(self._numbers)
        group.members[item] = None
        group.size_bytes += size_bytes
        group.tokens += tokens
        self._entries[item] = _Entry(lane, group, number, due, size_bytes, tokens)
        heapq.heappush(self._moments, (due.at, number, item))
        if len(group.members) >= self._size.now:
            flushes.append(self._take(lane, group, "size"))
        return flushes

    def hasten(self, item: T, due: Due) -> None:
        """An item that waits here may wait no longer than that."""
        entry = self._entries.get(item)
        if entry is not None and due.at < entry.due.at:
            entry.due, entry.number = due, next(self._numbers)
            heapq.heappush(self._moments, (due.at, entry.number, item))

    def remove(self, item: T) -> bool:
        """An item leaves; whether it was still here."""
        entry = self._entries.pop(item, None)
        if entry is None:
            return False
        group = entry.group
        del group.members[item]
        group.size_bytes -= entry.size_bytes
        group.tokens -= entry.tokens
        if not group.members:
            self._forget(entry.lane, group)
        self._tidy()
        return True

    def due(self, now: float) -> list[Flush[T]]:
        """Groups with an item that has waited long enough."""
        flushes: list[Flush[T]] = []
        while self._moments and self._moments[0][0] <= now:
            entry = self._entry_of(heapq.heappop(self._moments))
            if entry is not None:
                flushes.append(self._take(entry.lane, entry.group, "deadline" if entry.due.hurried else "interval"))
        return flushes

    def next_at(self) -> float | None:
        """When `due` has something to say; None while nothing waits."""
        while self._moments and self._entry_of(self._moments[0]) is None:
            heapq.heappop(self._moments)
        return self._moments[0][0] if self._moments else None

    def drain(self, cause: str, lane: L, *, at_least: int = 1) -> list[Flush[T]]:
        """All groups of a lane, or those with so many items."""
        groups = list(self._lanes.get(lane, {}).values())
        return [self._take(lane, group, cause) for group in groups if len(group.members) >= at_least]

    def drain_all(self, cause: str, where: Callable[[K], bool] | None = None) -> list[Flush[T]]:
        """All groups of all lanes, or those whose key is accepted."""
        found = [(lane, group) for lane, groups in self._lanes.items() for group in groups.values()]
        return [self._take(lane, group, cause) for lane, group in found if where is None or where(group.key)]

    def _entry_of(self, moment: tuple[float, int, T]) -> _Entry[L, K, T] | None:
        entry = self._entries.get(moment[2])
        return entry if entry is not None and entry.number == moment[1] else None

    def _take(self, lane: L, group: _Group[K, T], cause: str) -> Flush[T]:
        self._forget(lane, group)
        for item in group.members:
            del self._entries[item]
        self._tidy()
        return Flush(cause, tuple(group.members))

    def _forget(self, lane: L, group: _Group[K, T]) -> None:
        groups = self._lanes[lane]
        del groups[group.key]
        if not groups:
            del self._lanes[lane]

    def _tidy(self) -> None:
        # Each new heap was paid for by as many departures as it drops.
        if len(self._moments) > 2 * len(self._entries) + _FEW_STALE:
            self._moments = [(entry.due.at, entry.number, item) for item, entry in self._entries.items()]
            heapq.heapify(self._moments)

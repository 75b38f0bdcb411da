"""Who is next: priority, fair shares between tenants and between agents, first come first served, nobody starves.

Fairness is start-time fair queueing (Goyal, Vin, Cheng 1996): each flow carries a virtual start time that advances
by 1/weight per grant, and a flow that was idle starts at the present virtual time, so it neither saves up shares
nor waits behind another flow's backlog. It applies twice: between tenants, and between the agents of one tenant.
Pushing, taking and removing are O(log n).
"""

from __future__ import annotations

from collections import OrderedDict
from heapq import heapify, heappop, heappush, heapreplace
from itertools import chain, count, islice
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

T = TypeVar("T")

Flow = str | tuple[str, str]
"""Who shares: an agent (or whoever is without one), or a tenant and an agent of his."""

_AGED_TURN = 8
"""Past the age bound, every eighth grant goes to whoever waits longest: a queue that is always over the bound would
otherwise lose its priorities altogether."""
_LOOK_AHEAD = 8
"""How many smaller ones are tried while a large head waits for tokens."""
_MAX_REMEMBERED = 1024
_MAX_COUNTED = 64
"""More priorities than this are not added up for `ahead`, which then tells less than it could."""


class Entry(Generic[T]):
    """One waiter. `item` belongs to the caller."""

    __slots__ = ("arrived", "flow", "item", "priority", "returned", "seq")

    def __init__(self, item: T, priority: int, flow: Flow, arrived: float, seq: int, *, returned: bool) -> None:
        self.item = item
        self.priority = priority
        self.flow = flow
        self.arrived = arrived
        self.seq = seq
        self.returned = returned


class _Line(Generic[T]):
    """First come first served; who had been served in vain and came back goes before."""

    __slots__ = ("entries", "returned", "start", "weight")

    def __init__(self, start: float, weight: float) -> None:
        self.entries: OrderedDict[int, Entry[T]] = OrderedDict()
        self.returned: OrderedDict[int, Entry[T]] | None = None
        self.start = start
        self.weight = weight

    def __len__(self) -> int:
        return len(self.entries) + (len(self.returned) if self.returned else 0)

    def __iter__(self) -> Iterator[Entry[T]]:
        return chain(self.returned.values() if self.returned else (), self.entries.values())

    def first(self) -> Entry[T]:
        return next(iter(self.returned.values() if self.returned else self.entries.values()))

    def add(self, entry: Entry[T], path: tuple[str, ...], weights: Mapping[str, float]) -> None:
        del path, weights
        if not entry.returned:
            self.entries[entry.seq] = entry
            return
        if self.returned is None:
            self.returned = OrderedDict()
        self.returned[entry.seq] = entry

    def drop(self, entry: Entry[T], path: tuple[str, ...], *, served: bool) -> None:
        del path, served
        del (self.returned if entry.returned and self.returned is not None else self.entries)[entry.seq]

    def behind(self, path: tuple[str, ...]) -> int:
        del path
        return len(self)


class _Shared(Generic[T]):
    """Flows that take turns by their weights; a flow is a line, or flows again."""

    __slots__ = ("_finished", "_flows", "_heap", "_order", "_size", "_virtual", "start", "weight")

    def __init__(self, start: float = 0.0, weight: float = 1.0) -> None:
        self.start = start
        self.weight = weight
        self._flows: dict[tuple[str, int], _Line[T] | _Shared[T]] = {}
        self._heap: list[tuple[float, int, _Line[T] | _Shared[T]]] = []
        """One place per flow. Its start may have advanced since: that is mended when the place comes to the top."""
        self._order = count()
        self._size = 0
        self._virtual = 0.0
        self._finished: dict[tuple[str, int], float] = {}

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Entry[T]]:
        """Entries of the flows whose turn is next, as far as the top of the heap tells."""
        near = [flow for _, _, flow in self._heap[: 2 * _LOOK_AHEAD] if len(flow)]
        near.sort(key=lambda flow: flow.start)
        return chain.from_iterable(islice(flow, _LOOK_AHEAD) for flow in near)

    def first(self) -> Entry[T]:
        heap = self._heap
        while True:
            start, _, flow = heap[0]
            if not len(flow):
                heappop(heap)
            elif flow.start != start:
                heapreplace(heap, (flow.start, next(self._order), flow))
            else:
                return flow.first()

    def add(self, entry: Entry[T], path: tuple[str, ...], weights: Mapping[str, float]) -> None:
        name, rest = path[0], path[1:]
        key = (name, len(path))  # an agent may be called like a tenant
        flow = self._flows.get(key)
        if flow is None:
            start = max(self._virtual, self._finished.pop(key, 0.0))
            make = _Shared[T] if rest else _Line[T]
            flow = self._flows[key] = make(start, weights.get(name, 1.0))
            if len(self._heap) > 2 * len(self._flows) + _LOOK_AHEAD:  # flows that came and went
                self._heap = [place for place in self._heap if len(place[2])]
                heapify(self._heap)
            heappush(self._heap, (start, next(self._order), flow))
        flow.add(entry, rest, weights)
        self._size += 1

    def drop(self, entry: Entry[T], path: tuple[str, ...], *, served: bool) -> None:
        key = (path[0], len(path))
        flow = self._flows[key]
        flow.drop(entry, path[1:], served=served)
        self._size -= 1
        if served:
            self._virtual = max(self._virtual, flow.start)
            flow.start += 1 / flow.weight
        if not len(flow):
            del self._flows[key]
            if flow.start > self._virtual:
                self._remember(key, flow.start)

    def behind(self, path: tuple[str, ...]) -> int:
        """How many stand in the line where a waiter with this path would join."""
        flow = self._flows.get((path[0], len(path)))
        return 0 if flow is None else flow.behind(path[1:])

    def _remember(self, key: tuple[str, int], start: float) -> None:
        """A flow that comes back at once must not skip the share it has just used."""
        self._finished[key] = start
        if len(self._finished) > _MAX_REMEMBERED:
            kept = {flow: tag for flow, tag in self._finished.items() if tag > self._virtual}
            self._finished = kept if len(kept) <= _MAX_REMEMBERED // 2 else {}


class FairQueue(Generic[T]):
    """Waiters in the order in which they are to be served.

    Args:
        weights: share of a tenant or agent against the others of its priority; who is not named weighs 1.
        age_bound: seconds after which a waiter may no longer be passed by smaller ones of its priority, and after
            which the longest waiter takes every eighth grant whatever its priority.
    """

    def __init__(self, *, weights: Mapping[str, float] | None = None, age_bound: float = 10.0) -> None:
        self.weights = weights or {}
        self.age_bound = age_bound
        self._classes: dict[int, _Shared[T]] = {}
        self._priorities: list[int] = []
        """A heap; it may name priorities that nobody has any more."""
        self._arrivals: OrderedDict[int, Entry[T]] = OrderedDict()
        self._seq = count()
        self._since_aged = 0

    def __len__(self) -> int:
        return len(self._arrivals)

    def __iter__(self) -> Iterator[Entry[T]]:
        """All waiters, in order of arrival."""
        return iter(list(self._arrivals.values()))

    def push(self, item: T, *, priority: int, flow: Flow, now: float, since: float | None = None) -> Entry[T]:
        """Add a waiter; the entry is the handle for `take`, `remove` and `move`.

        One that was served in vain and comes back tells `since` when it has waited; it goes before its flow.
        """
        returned = since is not None
        entry = Entry(item, priority, flow, now if since is None else since, next(self._seq), returned=returned)
        self._arrivals[entry.seq] = entry
        if returned:
            self._arrivals.move_to_end(entry.seq, last=False)
        self._place(entry)
        return entry

    def head(self, now: float) -> Entry[T] | None:
        """Who is to be served next."""
        if not self._arrivals:
            return None
        if self._since_aged >= _AGED_TURN - 1:
            oldest = next(iter(self._arrivals.values()))
            if now - oldest.arrived > self.age_bound:
                return oldest
        classes, priorities = self._classes, self._priorities
        while priorities[0] not in classes:
            heappop(priorities)
        return classes[priorities[0]].first()

    def passing(self, head: Entry[T], now: float) -> Iterator[Entry[T]]:
        """A few others of the head's priority that may go before it while it waits for many tokens."""
        if now - head.arrived > self.age_bound:
            return
        yield from islice((entry for entry in self._classes[head.priority] if entry is not head), _LOOK_AHEAD)

    def take(self, entry: Entry[T]) -> None:
        """Serve this waiter: it leaves the queue and its flow pays for the grant."""
        aged = entry.seq == next(iter(self._arrivals))
        self._since_aged = 0 if aged else self._since_aged + 1
        self._withdraw(entry, served=True)
        del self._arrivals[entry.seq]

    def remove(self, entry: Entry[T]) -> bool:
        """The waiter gave up; False if it had left the queue before."""
        if self._arrivals.pop(entry.seq, None) is None:
            return False
        self._withdraw(entry, served=False)
        return True

    def move(self, entry: Entry[T], priority: int) -> None:
        """Change the priority of a waiter; no effect once it was served."""
        if entry.seq in self._arrivals and entry.priority != priority:
            self._withdraw(entry, served=False)
            entry.priority = priority
            self._place(entry)

    def ahead(self, priority: int, flow: Flow) -> int:
        """How many grants at least come before a waiter that joins this flow now."""
        own, classes = self._classes.get(priority), self._classes
        few = len(classes) <= _MAX_COUNTED
        before = sum(len(line) for level, line in classes.items() if level < priority) if few else 0
        return before if own is None else before + own.behind(_path(flow))

    def _place(self, entry: Entry[T]) -> None:
        level = self._classes.get(entry.priority)
        if level is None:
            level = self._classes[entry.priority] = _Shared()
            if len(self._priorities) > 2 * len(self._classes) + _LOOK_AHEAD:
                self._priorities = list(self._classes)
                heapify(self._priorities)
            else:
                heappush(self._priorities, entry.priority)
        level.add(entry, _path(entry.flow), self.weights)

    def _withdraw(self, entry: Entry[T], *, served: bool) -> None:
        level = self._classes[entry.priority]
        level.drop(entry, _path(entry.flow), served=served)
        if not len(level):
            del self._classes[entry.priority]


def _path(flow: Flow) -> tuple[str, ...]:
    return (flow,) if isinstance(flow, str) else flow

"""Who is next: priority, fair shares between flows, first come first served within a flow, and nobody starves.

Fairness is start-time fair queueing (Goyal, Vin, Cheng 1996): each flow carries a virtual start time that advances
by 1/weight per grant, and a flow that was idle starts at the present virtual time, so it neither saves up shares
nor waits behind another flow's backlog. Pushing, taking and removing are O(log n).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import OrderedDict
from heapq import heappop, heappush
from itertools import chain, count, islice
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

T = TypeVar("T")

_AGED_TURN = 8
"""Past the age bound, every eighth grant goes to whoever waits longest: a queue that is always over the bound would
otherwise lose its priorities altogether."""
_LOOK_AHEAD = 8
"""How many smaller ones are tried while a large head waits for tokens."""
_MAX_REMEMBERED = 1024


class Entry(Generic[T]):
    """One waiter. `item` belongs to the caller."""

    __slots__ = ("arrived", "flow", "item", "priority", "returned", "seq")

    def __init__(self, item: T, priority: int, flow: str, arrived: float, seq: int, *, returned: bool) -> None:
        self.item = item
        self.priority = priority
        self.flow = flow
        self.arrived = arrived
        self.seq = seq
        self.returned = returned


class _Flow(Generic[T]):
    __slots__ = ("entries", "returned", "start", "weight")

    def __init__(self, start: float, weight: float) -> None:
        self.entries: OrderedDict[int, Entry[T]] = OrderedDict()
        self.returned: OrderedDict[int, Entry[T]] = OrderedDict()
        """Who had been served and came back; goes first."""
        self.start = start
        self.weight = weight

    def __len__(self) -> int:
        return len(self.entries) + len(self.returned)

    def __iter__(self) -> Iterator[Entry[T]]:
        return chain(self.returned.values(), self.entries.values())


class _Class(Generic[T]):
    """The flows of one priority."""

    __slots__ = ("_finished", "_heap", "_order", "_virtual", "flows")

    def __init__(self) -> None:
        self.flows: dict[str, _Flow[T]] = {}
        self._heap: list[tuple[float, int, _Flow[T]]] = []
        self._order = count()
        self._virtual = 0.0
        self._finished: dict[str, float] = {}

    def add(self, entry: Entry[T], weight: float) -> None:
        flow = self.flows.get(entry.flow)
        if flow is None:
            start = max(self._virtual, self._finished.pop(entry.flow, 0.0))
            flow = self.flows[entry.flow] = _Flow(start, weight)
            heappush(self._heap, (start, next(self._order), flow))
        (flow.returned if entry.returned else flow.entries)[entry.seq] = entry

    def first(self) -> Entry[T]:
        heap = self._heap
        while not heap[0][2] or heap[0][0] != heap[0][2].start:
            heappop(heap)
        return next(iter(heap[0][2]))

    def drop(self, entry: Entry[T], *, served: bool) -> None:
        flow = self.flows[entry.flow]
        del (flow.returned if entry.returned else flow.entries)[entry.seq]
        if served:
            self._virtual = max(self._virtual, flow.start)
            flow.start += 1 / flow.weight
            if flow:
                heappush(self._heap, (flow.start, next(self._order), flow))
        if not flow:
            del self.flows[entry.flow]
            if flow.start > self._virtual:
                self._remember(entry.flow, flow.start)

    def _remember(self, name: str, start: float) -> None:
        """A flow that comes back at once must not skip the share it has just used."""
        self._finished[name] = start
        if len(self._finished) > _MAX_REMEMBERED:
            kept = {flow: tag for flow, tag in self._finished.items() if tag > self._virtual}
            self._finished = kept if len(kept) <= _MAX_REMEMBERED // 2 else {}


class FairQueue(Generic[T]):
    """Waiters in the order in which they are to be served.

    Args:
        weights: share of a flow against the others of its priority; flows not named weigh 1.
        age_bound: seconds after which a waiter may no longer be passed by smaller ones of its priority, and after
            which the longest waiter takes every eighth grant whatever its priority.
    """

    def __init__(self, *, weights: Mapping[str, float] | None = None, age_bound: float = 10.0) -> None:
        self._weights = weights or {}
        self._age_bound = age_bound
        self._classes: dict[int, _Class[T]] = {}
        self._priorities: list[int] = []
        self._arrivals: OrderedDict[int, Entry[T]] = OrderedDict()
        self._seq = count()
        self._since_aged = 0

    def __len__(self) -> int:
        return len(self._arrivals)

    def __iter__(self) -> Iterator[Entry[T]]:
        """All waiters, in order of arrival."""
        return iter(list(self._arrivals.values()))

    def push(self, item: T, *, priority: int, flow: str, now: float, since: float | None = None) -> Entry[T]:
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
            if now - oldest.arrived > self._age_bound:
                return oldest
        return self._classes[self._priorities[0]].first()

    def passing(self, head: Entry[T], now: float) -> Iterator[Entry[T]]:
        """A few others of the head's priority that may go before it while it waits for many tokens."""
        if now - head.arrived > self._age_bound:
            return
        flows = self._classes[head.priority].flows.values()
        others = (entry for flow in flows for entry in islice(flow, _LOOK_AHEAD))
        yield from islice((entry for entry in others if entry is not head), _LOOK_AHEAD)

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

    def ahead(self, priority: int, flow: str) -> int:
        """How many grants at least come before a waiter that joins this flow now (aged turns left out)."""
        own = self._classes.get(priority)
        before = sum(
            len(line)
            for level in self._priorities[: bisect_left(self._priorities, priority)]
            for line in self._classes[level].flows.values()
        )
        if own is None or flow not in own.flows:
            return before
        return before + len(own.flows[flow])

    def _place(self, entry: Entry[T]) -> None:
        level = self._classes.get(entry.priority)
        if level is None:
            level = self._classes[entry.priority] = _Class()
            insort(self._priorities, entry.priority)
        level.add(entry, self._weights.get(entry.flow, 1.0))

    def _withdraw(self, entry: Entry[T], *, served: bool) -> None:
        level = self._classes[entry.priority]
        level.drop(entry, served=served)
        if not level.flows:
            del self._classes[entry.priority]
            del self._priorities[bisect_left(self._priorities, entry.priority)]

"""The breaker's table: a line per model of an endpoint, or per credential there."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from typing import TYPE_CHECKING

from llmmw.algo.circuit import Circuit

if TYPE_CHECKING:
    from llmmw.algo.circuit import CircuitRules
    from llmmw.call import Reply

_MAX_CIRCUITS = 1024
"""Model names come from callers; beyond so many, the circuit that was not needed for longest is forgotten."""

_SPARED = 8
"""So many circuits that are not closed stay when it is their turn to be forgotten; more, and one must go."""

_REMEMBERED_EXCHANGES = 64


class Line:
    """A circuit with what belongs to it: one of an endpoint's model, or of a credential there."""

    __slots__ = ("circuit", "exchanges", "refusal", "told", "waiters", "why")

    def __init__(self, rules: CircuitRules) -> None:
        self.circuit = Circuit(rules)
        self.told = "closed"
        self.exchanges: deque[int] | None = None
        self.refusal: Reply | Exception | None = None
        self.why = ""
        self.waiters: set[asyncio.Future[None]] = set()

    def news(self) -> asyncio.Future[None]:
        """Done as soon as the circuit has heard of something (a probe's end)."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.waiters.add(waiter)
        waiter.add_done_callback(self.waiters.discard)
        return waiter

    def wake(self) -> None:
        """Tell those who wait for news."""
        for waiter in list(self.waiters):
            if not waiter.done():
                waiter.set_result(None)

    def renew(self) -> None:
        """Begin anew for another model; calls under way for the old one are not heard any more."""
        self.wake()
        self.circuit.renew()
        self.told, self.refusal, self.why = "closed", None, ""

    def is_known(self, exchange: int) -> bool:
        """Whether this shared request has been judged; from now on it is."""
        if self.exchanges is None:
            self.exchanges = deque(maxlen=_REMEMBERED_EXCHANGES)
        known = exchange in self.exchanges
        self.exchanges.append(exchange)
        return known


class Lines(OrderedDict[tuple[str, ...], Line]):
    """Circuits by key, bounded; the least recently used comes first."""

    def __init__(self, rules: CircuitRules) -> None:
        super().__init__()
        self._rules = rules

    def find(self, key: tuple[str, ...]) -> Line | None:
        """The line, which is used now."""
        line = self.get(key)
        if line is not None:
            self.move_to_end(key)
        return line

    def of(self, key: tuple[str, ...]) -> Line:
        """The line; a new one takes the place of the least recently used, where one that is not closed rather stays.

        The old object is used again: endless model names would else cost twice as much a call as a few.
        """
        line = self.get(key)
        if line is not None:
            self.move_to_end(key)
            return line
        if len(self) < _MAX_CIRCUITS:
            line = self[key] = Line(self._rules)
            return line
        oldest, line = self.popitem(last=False)
        for _ in range(_SPARED):
            if line.circuit.state == "closed":
                break
            self[oldest] = line
            oldest, line = self.popitem(last=False)
        line.renew()
        self[key] = line
        return line

"""A bounded number of calls inside: who comes when it is full waits outside, in order of arrival, or is refused."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from llmmw.call import Call


class Entrance:
    """Counts calls in and out on one event loop.

    Args:
        capacity: calls inside at a time.
        is_inside: whether the running code is part of a call inside; what that waits for may not wait for room.
    """

    def __init__(self, capacity: int, is_inside: Callable[[], bool]) -> None:
        self._capacity = capacity
        self._is_inside = is_inside
        self._outside: dict[asyncio.Future[None], Call] = {}
        self._is_open = False
        self.inside = 0

    @property
    def full(self) -> bool:
        """Whether a newcomer would have to wait."""
        crowded = self.inside >= self._capacity or bool(self._outside)
        return crowded and not self._is_open and not self._is_inside()

    async def enter(self, call: Call) -> None:
        """Go in, after waiting for room; every `enter` that returns needs one `leave`."""
        if not self.full:
            self.inside += 1
            return
        gate: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._outside[gate] = call

        def joined() -> None:
            if self._is_inside():
                self._admit(gate)

        end = None if call.urgency is None else call.urgency.watch(joined)
        try:
            await gate
        except asyncio.CancelledError:
            if gate.done() and not gate.cancelled() and gate.exception() is None:
                self.leave()
            else:
                self._outside.pop(gate, None)
            raise
        finally:
            if end is not None:
                end()

    def leave(self) -> None:
        """Go out; the first who waits comes in."""
        self.inside -= 1
        self._let_in()

    def open(self) -> None:
        """No bound any more: everybody comes in."""
        self._is_open = True
        self._let_in()

    def turn_away(self, call: Call, make_error: Callable[[], Exception]) -> int:
        """Who waits outside for the same endpoint and model gets an error; how many."""
        dead = (call.target, call.model)
        doomed = [gate for gate, found in self._outside.items() if (found.target, found.model) == dead]
        for gate in doomed:
            del self._outside[gate]
        waiting = [gate for gate in doomed if not gate.done()]
        for gate in waiting:
            gate.set_exception(make_error())
        return len(waiting)

    def _let_in(self) -> None:
        while self._outside and (self._is_open or self.inside < self._capacity):
            self._admit(next(iter(self._outside)))

    def _admit(self, gate: asyncio.Future[None]) -> None:
        self._outside.pop(gate, None)
        if not gate.done():
            self.inside += 1
            gate.set_result(None)

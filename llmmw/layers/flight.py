"""A flight: one call under way for all who asked the same question. The coalescer's table holds them."""

from __future__ import annotations

import contextvars
import weakref
from typing import TYPE_CHECKING

from llmmw.call import Urgency
from llmmw.endpoints.running import bare_context
from llmmw.errors import DeadlineExceeded
from llmmw.interrupt import until_deadline
from llmmw.stream.copies import NotCopyable, own_error, own_reply

if TYPE_CHECKING:
    import asyncio

    from llmmw.call import Call, Chunks, Reply
    from llmmw.env import Clock
    from llmmw.stream.tee import Tee

    Key = tuple[bytes, bool]
    """Sharing key, and whether the answer is a stream."""
    Landed = Reply | BaseException | None
    """What a waiter is woken with; None tells a follower to make the call itself, for the answer exists only once."""

_inside: contextvars.ContextVar[weakref.ref[Flight] | None] = contextvars.ContextVar("llmmw_flight", default=None)
"""Weakly: a context lives on in connections opened and timers set during a flight, and would keep its answer alive."""


class Flight:
    """One shared call: who waits for it, how urgently, and what became of it so far.

    Args:
        key: its place in the table.
        call: the first caller's.
        owner: the coalescer.
        outlives: it goes on when nobody waits any more, so nobody's deadline is its own.
    """

    __slots__ = (
        "__weakref__",
        "call",
        "elections",
        "key",
        "leader",
        "over",
        "owner",
        "reply",
        "task",
        "tee",
        "urgency",
        "waiters",
        "waits_on",
    )

    def __init__(self, key: Key, call: Call, owner: object, *, outlives: bool = False) -> None:
        self.key = key
        self.owner = owner
        self.call = call
        self.urgency = Urgency(call.context.priority, None if outlives else call.context.deadline)
        self.waiters: dict[asyncio.Future[Landed], Call] = {}
        self.leader: asyncio.Future[Landed] | None = None
        """Who gets the answer itself; everybody else gets copies."""
        self.task: asyncio.Task[None] | None = None
        self.reply: Reply | None = None
        """A stream's head, once it is there."""
        self.tee: Tee | None = None
        self.over = False
        self.elections = 0
        """How often the task was made anew."""
        self.waits_on: list[Flight] = []
        """Flights that code inside this one waits for."""

    @property
    def joinable(self) -> bool:
        """Whether a newcomer would get the whole answer."""
        return self.tee is None or self.tee.joinable

    @property
    def runs(self) -> bool:
        """Whether its task has not ended."""
        return self.task is not None or not self.over

    @property
    def awaited(self) -> bool:
        """Whether anybody waits for it or reads its stream."""
        return bool(self.waiters) or (self.tee is not None and self.tee.readers > 0)

    def leave(self, waiter: asyncio.Future[Landed]) -> bool:
        """One waits no longer; whether it led."""
        self.waiters.pop(waiter, None)
        led = waiter is self.leader
        if led and self.over:
            self.leader = None  # it holds the outcome, and the traceback of an error holds the flight
        return led

    def alive(self) -> list[asyncio.Future[Landed]]:
        """Those who still wait: neither answered nor cancelled."""
        return [waiter for waiter in self.waiters if not waiter.done()]

    def reaches(self, other: Flight) -> bool:
        """Whether this flight is `other`, or waits for it, directly or through others."""
        seen: set[Flight] = set()
        todo: list[Flight] = [self]
        while todo:
            flight = todo.pop()
            if flight is other:
                return True
            if flight not in seen:
                seen.add(flight)
                todo += flight.waits_on
        return False

    def context(self) -> contextvars.Context:
        """Context variables for the task: the leader's for a user's function, none for an endpoint of ours."""
        context = contextvars.copy_context() if self.call.inherits_context else bare_context()
        context.run(_inside.set, weakref.ref(self))
        return context


def current_flight() -> Flight | None:
    """The innermost flight that the running code is part of; None once all of it is over."""
    found = _inside.get()
    return None if found is None else found()


def own_outcome(outcome: Reply | BaseException) -> Landed:
    """A follower's own copy of what the leader gets."""
    if isinstance(outcome, BaseException):
        return own_error(outcome)
    try:
        return own_reply(outcome)
    except NotCopyable:
        return None


async def discard(landed: Landed) -> None:
    """Close the stream of an answer that nobody took."""
    if landed is not None and not isinstance(landed, BaseException) and landed.chunks is not None:
        await landed.chunks.aclose()


def reader_of(reply: Reply, tee: Tee, call: Call, clock: Clock, *, own: bool) -> Reply:
    """A shared stream from its beginning, under the caller's own deadline; `own`: a follower's copy."""
    chunks: Chunks = tee.reader(own=own)
    if call.context.deadline is not None:
        chunks = until_deadline(chunks, clock, call.context.deadline, late)
    return reply.replace(chunks=chunks, source="coalesced", native=None) if own else reply.replace(chunks=chunks)


def expire(waiter: asyncio.Future[Landed]) -> None:
    """Wake one whose own deadline has come."""
    if not waiter.done():
        waiter.set_result(late())


def late() -> DeadlineExceeded:
    """For who waits for a shared call, when its own deadline has come."""
    return DeadlineExceeded("the deadline passed before the shared call was complete", sent=True)

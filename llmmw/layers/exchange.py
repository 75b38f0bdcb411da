"""One request of the batcher: who is in it, and how its answer becomes everybody's own."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import msgspec

from llmmw.algo.batchmates import HAVE_JOINT_FORM, bisect_budget, joint_call, pieces_of, split_answer, urgency_of
from llmmw.call import Context, Reply
from llmmw.errors import (
    AmbiguousOutcome,
    LLMMWError,
    ProtocolError,
    RateLimited,
    ResponseTooLarge,
    UpstreamTimeout,
)
from llmmw.events import UsageShared
from llmmw.fault import FaultKind, classify
from llmmw.layers.attempt import make_attempt
from llmmw.stream.copies import own_error, own_reply

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterator, Sequence

    from llmmw.algo.batchmates import Grouping
    from llmmw.algo.batchplan import GroupSize
    from llmmw.call import Call, Handler, Party, Urgency
    from llmmw.env import Clock, Env

    Lane = int | Party | str | None
    """A step, a party, what waits for nothing, or whatever else shares a moment."""

_numbers = itertools.count(1)

_ONE_IS_BAD = frozenset({FaultKind.INVALID, FaultKind.CONTEXT_LENGTH, FaultKind.CONTENT_FILTER})
_NO_SUCH_CALL = frozenset({404, 405, 501})
_OVERLOADED = 503
TOO_MUCH_AT_ONCE = (ResponseTooLarge, UpstreamTimeout)
"""Errors of a joint request that a smaller one may be spared."""
HELPED_BY_PARTING = (ResponseTooLarge, RateLimited)
"""Errors that single calls would not have had: together their answers, or their tokens, were more than is allowed."""
_OF_THE_JOINT_BODY = frozenset({"content-length", "content-encoding", "etag"})


class Item:
    """A call in the batcher, with everybody who waits for its answer (several where they ask the same)."""

    __slots__ = ("call", "exchange", "group", "lane", "waiters")

    def __init__(self, call: Call, lane: Lane, group: Grouping, waiter: asyncio.Future[Any]) -> None:
        self.call = call
        self.lane = lane
        self.group = group
        self.waiters: dict[asyncio.Future[Any], Call] = {waiter: call}
        self.exchange: Exchange | None = None

    @property
    def awaited(self) -> bool:
        """Whether anybody still waits."""
        return any(not waiter.done() for waiter in self.waiters)

    def waiting(self) -> Iterator[tuple[asyncio.Future[Any], Call]]:
        """Who still waits, each with the call as they made it."""
        return ((waiter, call) for waiter, call in list(self.waiters.items()) if not waiter.done())

    def leave(self, waiter: asyncio.Future[Any]) -> bool:
        """One stops waiting; whether it was the last."""
        self.waiters.pop(waiter, None)
        return not self.awaited

    def give(self, outcome: Reply | Exception) -> None:
        """Wake everybody; each gets a copy of its own."""
        first = True
        for waiter, _ in self.waiting():
            if first:
                own: Reply | Exception = outcome
            elif isinstance(outcome, Reply):
                own = outcome if outcome.data is None else own_reply(outcome)
            else:
                own = own_error(outcome)
            first = False
            waiter.set_result(own)
        self.waiters.clear()  # they hold their outcome, and this item and its exchange each other

    def fail(self, make_error: Callable[[], Exception]) -> int:
        """Wake everybody with an error of their own; how many."""
        waiting = list(self.waiting())
        for waiter, _ in waiting:
            waiter.set_result(make_error())
        self.waiters.clear()
        return len(waiting)


class JointOps:
    """Which operations can be sent jointly now: what the endpoint says of itself, less what it did not know after all.

    Args:
        mode: "auto", "on" (it need not say so), "off".
        env: its capabilities.
    """

    def __init__(self, mode: str, env: Env) -> None:
        self._mode = mode
        self._env = env
        self._unknown: set[str] = set()

    def __contains__(self, op: str) -> bool:
        if self._mode == "off" or op in self._unknown or op not in HAVE_JOINT_FORM:
            return False
        return self._mode == "on" or f"batch:{op}" in self._env.capabilities

    def __bool__(self) -> bool:
        return any(op in self for op in HAVE_JOINT_FORM)

    def discard(self, op: str) -> None:
        """The endpoint refused it as unknown."""
        self._unknown.add(op)


class Search:
    """What requests that came out of one group share: how many more the search for its bad items may take.

    Args:
        size: items of the group.
        start: sends some of them in a request of their own.
    """

    def __init__(self, size: int, start: Callable[[Sequence[Item], Search], None]) -> None:
        self.budget = bisect_budget(size)
        self._start = start

    def divide(self, items: Sequence[Item]) -> None:
        """Send a refused group again, in parts."""
        parts = pieces_of(len(items), self.budget)
        self.budget = max(0, self.budget - len(parts))
        rest = iter(items)
        for size in parts:
            self._start(tuple(itertools.islice(rest, size)), self)

    def each_alone(self, items: Sequence[Item]) -> None:
        """Send every item on its own."""
        for item in items:
            self._start((item,), self)


class Exchange:
    """One request for some items (or for one that several wait for), until each has its outcome or another request.

    Args:
        inner: the handler below the batcher.
        env: clock for judging refusals.
        items: of one group.
        search: how to go on when the request is refused because of one of them.
        joint_ops: operations that may be sent jointly; what the endpoint turns out not to know is taken out.
        group_size: told what the server takes.
    """

    def __init__(
        self,
        inner: Handler,
        env: Env,
        items: Sequence[Item],
        search: Search,
        *,
        joint_ops: JointOps,
        group_size: GroupSize,
    ) -> None:
        self._inner = inner
        self._env = env
        self._items = items
        self._search = search
        self._joint_ops = joint_ops
        self._group_size = group_size
        self.task: asyncio.Task[None] | None = None
        for item in items:
            item.exchange = self

    def cancel_if_forsaken(self) -> None:
        """Stop the request when the last caller has left."""
        if self.task is not None and not any(item.awaited for item in self._items):
            self.task.cancel()

    def settle(self, make_closed: Callable[[], Exception] | None) -> None:
        """The task has ended: whoever has no outcome and no other request yet gets what ended it.

        Args:
            make_closed: the error where the batcher itself cancelled the task; None: it was somebody else.
        """
        broken = None if self.task is None or self.task.cancelled() else self.task.exception()

        def error() -> Exception:
            if isinstance(broken, Exception):
                return own_error(broken)
            return AmbiguousOutcome("the joint request was cancelled") if make_closed is None else make_closed()

        for item in self._items:
            if item.exchange is self:
                item.fail(error)

    async def run(self) -> None:
        """Send, take apart, deliver."""
        items = self._items = [item for item in self._items if item.awaited]
        if not items:
            return
        everybody = [call for item in items for _, call in item.waiting()]
        urgency = urgency_of(everybody)
        call = items[0].call
        if len(items) > 1:
            call = joint_call([item.call for item in items], urgency)
        elif len(everybody) > 1:
            call = call.replace(urgency=urgency)
        outcome = await ask_for_all(self._inner, call, urgency, everybody, self._env.clock)
        if len(items) == 1:
            items[0].give(outcome)
            return
        number = next_number()
        if isinstance(outcome, Exception):
            self._failed(outcome, items, number)
        elif outcome.ok:
            self._group_size.accepted(len(items))
            for item, part in zip(items, parts_of(outcome, items, self._env, number), strict=True):
                item.give(part)
        else:
            self._refused(outcome, items, number)

    def _failed(self, error: Exception, items: Sequence[Item], number: int) -> None:
        if isinstance(error, TOO_MUCH_AT_ONCE):
            self._group_size.refused(len(items))
        if isinstance(error, HELPED_BY_PARTING):
            self._search.divide(items)
            return
        for item in items:
            item.give(_numbered(own_error(error) if item is not items[0] else error, number))

    def _refused(self, refusal: Reply, items: Sequence[Item], number: int) -> None:
        fault = classify(refusal, wall=self._env.clock.wall())
        if refusal.status in _NO_SUCH_CALL:
            # Without an error object it is the path that is unknown; the items themselves may be fine.
            if refusal.status != 404 or fault is None or fault.code is None:  # noqa: PLR2004 — HTTP
                self._joint_ops.discard(items[0].call.op)
            self._search.each_alone(items)
        elif fault is not None and fault.kind in _ONE_IS_BAD:
            self._search.divide(items)
        else:
            if refusal.status == _OVERLOADED:
                # vLLM's queue cap counts members and refuses the whole: the same size would be refused for ever.
                self._group_size.refused(len(items))
            for item in items:
                item.give(refusal.replace(exchange=number))


async def ask_for_all(
    inner: Handler, call: Call, urgency: Urgency, everybody: Sequence[Call], clock: Clock
) -> Reply | Exception:
    """Make the attempt; while it waits for its turn, flights among the callers may become more urgent."""

    def listener(member: Call) -> Callable[[], None]:
        return lambda: urgency.join(Context(priority=member.priority, deadline=member.deadline))

    flights = [(member.urgency, listener(member)) for member in everybody if member.urgency is not None]
    ends = [flight.subscribe(listen) for flight, listen in flights if call.urgency is urgency]
    try:
        outcome = await make_attempt(inner, call, clock)
    finally:
        for end in ends:
            end()
    if isinstance(outcome, Reply) and outcome.chunks is not None:
        await outcome.chunks.aclose()
        return ProtocolError("a stream in answer to a request without one", endpoint=outcome.endpoint)
    return outcome


def parts_of(answer: Reply, items: Sequence[Item], env: Env, number: int) -> list[Reply | ProtocolError]:
    """Everybody's part of a joint answer, or why there is none; agents are told what theirs cost."""
    headers = tuple(pair for pair in answer.headers if pair[0] not in _OF_THE_JOINT_BODY)
    whole = answer.replace(data=None, native=None, headers=headers, source="batch", exchange=number)
    try:
        body = answer.body
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        body = None
    found: list[Reply | ProtocolError] = []
    for item, part in zip(items, split_answer(body, [item.call for item in items]), strict=True):
        if isinstance(part, str):
            error = ProtocolError(part, endpoint=answer.endpoint)
            error.exchange = number
            found.append(error)
            continue
        own, usage = part
        agent = item.call.context.agent
        if agent is not None:
            env.emit(UsageShared(agent, usage))
        found.append(whole.replace(data=msgspec.json.encode(own), usage=usage))
    return found


def next_number() -> int:
    """For a request that carries several calls."""
    return next(_numbers)


def _numbered(error: Exception, number: int) -> Exception:
    if isinstance(error, LLMMWError):
        error.exchange = number
    return error

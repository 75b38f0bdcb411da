"""One joint request of the batcher: who is in it, and how its answer becomes everybody's own."""

from __future__ import annotations

import asyncio
import itertools
from typing import TYPE_CHECKING, Any

import msgspec

from llmmw.algo.batchplan import bisect_budget, joint_call, split_answer
from llmmw.call import Reply
from llmmw.errors import LLMMWError, ProtocolError
from llmmw.fault import FaultKind, classify
from llmmw.layers.attempt import make_attempt
from llmmw.stream.copies import own_error, own_reply

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from llmmw.algo.batchplan import Grouping, Plan
    from llmmw.call import Call, Handler
    from llmmw.env import Env

_numbers = itertools.count(1)

_ONE_IS_BAD = frozenset({FaultKind.INVALID, FaultKind.CONTEXT_LENGTH, FaultKind.CONTENT_FILTER})
_NO_SUCH_CALL = frozenset({404, 405, 501})
_OVERLOADED = 503
_OF_THE_JOINT_BODY = frozenset({"content-length", "content-encoding", "etag"})


class Item:
    """A call in the batcher, with everybody who waits for its answer."""

    __slots__ = ("call", "exchange", "group", "place", "waiters")

    def __init__(self, call: Call, place: Any, group: Grouping, waiter: asyncio.Future[Any]) -> None:
        self.call = call
        self.place = place
        self.group = group
        self.waiters = [waiter]
        self.exchange: Exchange | None = None

    @property
    def awaited(self) -> bool:
        """Whether anybody still waits."""
        return any(not waiter.done() for waiter in self.waiters)

    def leave(self, waiter: asyncio.Future[Any]) -> bool:
        """One stops waiting; whether it was the last."""
        self.waiters.remove(waiter)
        return not self.awaited

    def give(self, outcome: Reply | Exception) -> None:
        """Wake everybody; each gets a copy of its own."""
        first = True
        for waiter in self.waiters:
            if waiter.done():
                continue
            if first:
                own: Reply | Exception = outcome
            elif isinstance(outcome, Reply):
                own = outcome if outcome.data is None else own_reply(outcome)
            else:
                own = own_error(outcome)
            first = False
            waiter.set_result(own)

    def fail(self, make_error: Callable[[], Exception]) -> int:
        """Wake everybody with an error of their own; how many."""
        waiting = [waiter for waiter in self.waiters if not waiter.done()]
        for waiter in waiting:
            waiter.set_result(make_error())
        return len(waiting)


class Exchange:
    """The items of one joint request (or one item that several wait for), until each has its outcome.

    Args:
        inner: the handler below the batcher.
        env: clock for judging refusals.
        items: of one group.
        joint_ops: operations that may be sent jointly; what the endpoint turns out not to know is taken out.
        plan: told how large a joint request may be.
    """

    def __init__(
        self, inner: Handler, env: Env, items: tuple[Item, ...], joint_ops: set[str], plan: Plan[Any, Item]
    ) -> None:
        self._inner = inner
        self._env = env
        self._items = items
        self._joint_ops = joint_ops
        self._plan = plan
        self._budget = bisect_budget(len(items))
        self.task: asyncio.Task[None] | None = None
        for item in items:
            item.exchange = self

    def cancel_if_forsaken(self) -> None:
        """Stop the request when the last caller has left."""
        if self.task is not None and not any(item.awaited for item in self._items):
            self.task.cancel()

    def settle(self, make_closed: Callable[[], Exception]) -> None:
        """The task has ended: whoever has no outcome yet gets what ended it, or Closed where it was cancelled."""
        broken = None if self.task is None or self.task.cancelled() else self.task.exception()
        for item in self._items:
            item.fail(lambda: own_error(broken) if isinstance(broken, Exception) else make_closed())

    async def run(self) -> None:
        """Send, take apart, deliver."""
        await self._send(self._items)

    async def _send(self, items: Sequence[Item]) -> None:
        items = [item for item in items if item.awaited]
        if not items:
            return
        if len(items) == 1:
            items[0].give(await make_attempt(self._inner, items[0].call))
            return
        outcome = await make_attempt(self._inner, joint_call([item.call for item in items]))
        number = next(_numbers)
        if isinstance(outcome, Exception):
            for item in items:
                item.give(_numbered(own_error(outcome) if item is not items[0] else outcome, number))
        elif outcome.ok:
            self._plan.max_size = min(self._plan.max_size + 1, self._plan.limits.max_size)
            _hand_out(outcome, items, number)
        else:
            await self._refused(outcome, items, number)

    async def _refused(self, refusal: Reply, items: Sequence[Item], number: int) -> None:
        fault = classify(refusal, wall=self._env.clock.wall())
        if refusal.status in _NO_SUCH_CALL:
            # Without an error object it is the path that is unknown; the items themselves may be fine.
            if refusal.status != 404 or fault is None or fault.code is None:  # noqa: PLR2004 — HTTP
                self._joint_ops.discard(items[0].call.op)
            await self._send_each(items)
        elif fault is not None and fault.kind in _ONE_IS_BAD:
            if self._budget < 2:  # noqa: PLR2004 — two halves
                await self._send_each(items)
                return
            self._budget -= 2
            middle = len(items) // 2
            await asyncio.gather(self._send(items[:middle]), self._send(items[middle:]))
        else:
            if refusal.status == _OVERLOADED:
                # vLLM's queue cap counts members and refuses the whole: the same size would be refused for ever.
                self._plan.max_size = max(1, min(self._plan.max_size, len(items)) // 2)
            for item in items:
                item.give(refusal.replace(exchange=number))

    async def _send_each(self, items: Sequence[Item]) -> None:
        await asyncio.gather(*(self._send([item]) for item in items))


def _hand_out(answer: Reply, items: Sequence[Item], number: int) -> None:
    """Everybody's part of a joint answer."""
    headers = tuple(pair for pair in answer.headers if pair[0] not in _OF_THE_JOINT_BODY)
    whole = answer.replace(data=None, native=None, headers=headers, source="batch", exchange=number)
    try:
        body = answer.body
    except msgspec.DecodeError:
        body = None
    for item, part in zip(items, split_answer(body, [item.call for item in items]), strict=True):
        if isinstance(part, str):
            item.give(_numbered(ProtocolError(part, endpoint=answer.endpoint), number))
        else:
            own, usage = part
            item.give(whole.replace(data=msgspec.json.encode(own), usage=usage))


def _numbered(error: Exception, number: int) -> Exception:
    if isinstance(error, LLMMWError):
        error.exchange = number
    return error

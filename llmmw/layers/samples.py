"""Several samples of one question in one request: `Coalescer(merge_samples=True)`.

Calls of one loop turn that ask the same, and are entitled to an answer each, go as one call with `n`, whose prompt is
paid for once; choice k is the k-th caller's. A server that will have no `n` costs one request more, once per model.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from llmmw.algo.batchmates import Grouping, sampled_call, sampling, urgency_of
from llmmw.algo.batchplan import GroupSize
from llmmw.call import Reply, Urgency
from llmmw.endpoints.running import bare_context
from llmmw.errors import AmbiguousOutcome, Closed
from llmmw.events import BatchFlushed
from llmmw.fault import FaultKind, classify
from llmmw.layers.exchange import HELPED_BY_PARTING, TOO_MUCH_AT_ONCE, Item, ask_for_all, next_number, parts_of
from llmmw.stream.copies import own_error

if TYPE_CHECKING:
    from collections.abc import Coroutine, Sequence

    from llmmw.algo.batchmates import Kind
    from llmmw.call import Call, Handler
    from llmmw.env import Env

MAX_SAMPLES = 128
"""OpenAI takes no larger n."""
_MAX_REMEMBERED = 1000
_OVERLOADED = 503

T = TypeVar("T")

_GO = object()
"""What a waiter is woken with who makes the call itself."""


class Samples:
    """Stands between the coalescer and what is inside it; lives on one loop at a time.

    Args:
        inner: the handler inside.
        env: sinks, clock, and whether all endpoints inside can do "n".
    """

    def __init__(self, inner: Handler, env: Env) -> None:
        self._inner = inner
        self._env = env
        self._gathering: dict[Kind, list[Item]] = {}
        self._tasks: dict[asyncio.Task[object], Sequence[Item]] = {}
        self._forsaken: list[asyncio.Task[object]] = []
        self._alone: dict[tuple[str, str], None] = {}
        """Where n was refused: endpoint and model."""
        self._sizes: dict[tuple[str, str], GroupSize] = {}
        """How many samples at a time are not too many, where some were."""
        self._closed = False

    async def __call__(self, call: Call, /) -> Reply:
        """Answer, together with others of the same loop turn that ask the same.

        Raises:
            Closed: the engine was closed meanwhile.
        """
        kind = sampling(call) if "n" in self._env.capabilities else None
        if kind is None or _place(call) in self._alone:
            return await self._inner(call)
        if self._closed:
            raise _closed()
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[Any] = loop.create_future()
        item = Item(call, None, Grouping(kind, joint=True), waiter)
        found = self._gathering.setdefault(kind, [])
        found.append(item)
        if len(found) == 1:
            loop.call_soon(self._flush, kind, found)
        try:
            landed = await waiter
        except asyncio.CancelledError:
            item.leave(waiter)
            self._cancel_forsaken(item)
            raise
        if landed is _GO:
            return await self._inner(call)
        if isinstance(landed, BaseException):
            try:
                raise landed
            finally:
                del landed, waiter, item, found  # an error that its traceback leads back to waits for the collector
        reply: Reply = landed
        return reply

    def _flush(self, kind: Kind, gathered: list[Item]) -> None:
        """The loop turn is over."""
        if self._gathering.get(kind) is not gathered:
            return  # of a loop before this one
        del self._gathering[kind]
        items = [item for item in gathered if item.awaited]
        size = self._sizes.get(_place(gathered[0].call))
        while items:
            most = MAX_SAMPLES if size is None else size.now
            bunch, items = items[:most], items[most:]
            if len(bunch) > 1:
                self._start(bunch)
                continue
            if size is not None:
                size.accepted(1)
            for waiter, _ in bunch[0].waiting():
                waiter.set_result(_GO)

    def _start(self, items: Sequence[Item]) -> None:
        self._env.emit(BatchFlushed(len(items), "samples"))
        for item in items:
            if item.call.place is not None:
                item.call.place.settle()  # these will not come to the batcher
        self._begin(self._obtain(items), items)

    def _begin(self, work: Coroutine[Any, Any, object], items: Sequence[Item]) -> asyncio.Task[object]:
        # Joint work belongs to none of its callers: no context variables of theirs.
        task = asyncio.get_running_loop().create_task(work, context=bare_context())
        self._tasks[task] = items
        task.add_done_callback(partial(self._over, items))
        return task

    def _over(self, items: Sequence[Item], task: asyncio.Task[object]) -> None:
        """Whoever has no outcome yet gets what ended the task."""
        self._tasks.pop(task, None)
        broken = None if task.cancelled() else task.exception()

        def error() -> Exception:
            if isinstance(broken, Exception):
                return own_error(broken)
            return _closed() if self._closed else AmbiguousOutcome("the request for several samples was cancelled")

        for item in items:
            item.fail(error)

    def _cancel_forsaken(self, left: Item) -> None:
        """Stop the request of one who has left, if that was the last."""
        for task, items in self._tasks.items():
            if left in items and not any(item.awaited for item in items):
                task.cancel()

    # ── asking ──────────────────────────────────────────────────────────────────────────────────────────────────

    async def _obtain(self, items: Sequence[Item]) -> None:
        """Ask for all of them at once; whoever that does not help asks alone."""
        calls = [item.call for item in items]
        urgency = urgency_of(calls)
        outcome = await ask_for_all(self._inner, sampled_call(calls, urgency), urgency, calls, self._env.clock)
        if not isinstance(outcome, Reply):
            if isinstance(outcome, TOO_MUCH_AT_ONCE):
                self._too_many(items)
            if isinstance(outcome, HELPED_BY_PARTING):
                await self._each_alone(items)
            else:
                _give_all(items, outcome)
        elif not outcome.ok:
            await self._refused(outcome, items)
        else:
            await self._each_alone(self._hand_out(outcome, items))

    def _hand_out(self, answer: Reply, items: Sequence[Item]) -> list[Item]:
        """Everybody's own sample; those for whom there was none."""
        place = _place(items[0].call)
        parts = parts_of(answer, items, self._env, next_number())
        without = [item for item, part in zip(items, parts, strict=True) if not isinstance(part, Reply)]
        if len(without) == len(items):
            without = []  # not even one: that is no answer, and no reason to ask so often
        elif without:
            _remember(self._alone, place, None)
        elif place in self._sizes:
            self._sizes[place].accepted(len(items))
        for item, part in zip(items, parts, strict=True):
            if item not in without:
                item.give(part)
        return without

    async def _refused(self, refusal: Reply, items: Sequence[Item]) -> None:
        """Was it n? Then the same question alone is answered, and the others ask alone too."""
        fault = classify(refusal, wall=self._env.clock.wall())
        # vLLM's queue cap counts samples: the same n would be refused for ever.
        too_many = refusal.status == _OVERLOADED
        items = [item for item in items if item.awaited]
        if not items or not (too_many or (fault is not None and fault.kind is FaultKind.INVALID)):
            _give_all(items, refusal)
            return
        first, *rest = items
        outcome, place = await self._one(first), _place(first.call)
        if isinstance(outcome, Reply) and outcome.status == refusal.status:
            _give_all(rest, outcome)
            return
        if isinstance(outcome, Reply) and outcome.ok:
            if too_many:
                self._too_many(items)
            else:
                _remember(self._alone, place, None)
        await self._each_alone(rest)

    def _too_many(self, items: Sequence[Item]) -> None:
        place = _place(items[0].call)
        _remember(self._sizes, place, self._sizes.get(place) or GroupSize(MAX_SAMPLES)).refused(len(items))

    async def _each_alone(self, items: Sequence[Item]) -> None:
        """Each in a task of its own, which ends with whoever waits for it."""
        tasks = [self._begin(self._one(item), (item,)) for item in items]
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _one(self, item: Item) -> Reply | Exception | None:
        """The outcome of one, which is given to it; None: nobody waits for it any more."""
        if not item.awaited:
            return None
        outcome = await ask_for_all(self._inner, item.call, Urgency(), (), self._env.clock)
        item.give(outcome)
        return outcome

    # ── ending ──────────────────────────────────────────────────────────────────────────────────────────────────

    def rehome(self) -> None:
        """What waited belongs to a dead loop."""
        self._forsaken += self._tasks  # kept from the garbage collector, as the coalescer keeps its own
        self._gathering, self._tasks = {}, {}

    async def aclose(self) -> None:
        """Cancel what is under way; who waits gets Closed."""
        self._closed = True
        for item in [item for found in self._gathering.values() for item in found]:
            item.fail(_closed)
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)


def _place(call: Call) -> tuple[str, str]:
    return call.target, call.model


def _remember(where: dict[tuple[str, str], T], place: tuple[str, str], value: T) -> T:
    """Keep something about an endpoint and model, of which there are never many."""
    if len(where) >= _MAX_REMEMBERED:
        where.clear()
    where[place] = value
    return value


def _give_all(items: Sequence[Item], outcome: Reply | Exception) -> None:
    for index, item in enumerate(items):
        item.give(own_error(outcome) if index and isinstance(outcome, Exception) else outcome)


def _closed() -> Closed:
    return Closed("closed while the request for several samples was under way")

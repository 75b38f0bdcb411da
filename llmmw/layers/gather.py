"""What the batcher of one endpoint holds on one event loop: who waits for batch mates, and what is under way."""

from __future__ import annotations

import asyncio
import contextvars
from typing import TYPE_CHECKING, Any, NamedTuple

from llmmw.algo.batchplan import Plan, when_due
from llmmw.algo.estimate import output_cap, prompt_tokens
from llmmw.errors import Closed
from llmmw.events import BatchFlushed
from llmmw.layers.entrance import Entrance
from llmmw.layers.exchange import Exchange, Item

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from llmmw.algo.batchplan import Flush, Grouping, Kind, Limits
    from llmmw.call import Call, Handler
    from llmmw.env import Env

_MAX_STEPS = 64
_TICK_S = 0.001

GO = object()
"""What a waiter is woken with who makes the call itself, in its own task and context."""


def closed_error() -> Closed:
    """For who waits while the engine closes."""
    return Closed("the engine was closed before this call was answered")


class Place(NamedTuple):
    """The key of a group in the plan."""

    step: int | None
    """The step whose barrier holds it; None for a group that an idle endpoint gets at once."""
    kind: Kind


class Gathering:
    """Submitting, flushing and starting; every method runs on one loop.

    Args:
        inner: the handler below the batcher.
        env: clock and event sinks.
        limits: when a group is full or due.
        max_calls: calls inside at a time; the bound is kept by who uses `entrance`.
        barrier: how many agents make a step complete; None: steps do not matter.
        joint_ops: operations that may share a request; may shrink when the endpoint turns out not to know one.
    """

    def __init__(
        self, inner: Handler, env: Env, limits: Limits, *, max_calls: int, barrier: int | None, joint_ops: set[str]
    ) -> None:
        self._inner = inner
        self._env = env
        self._limits = limits
        self._barrier = barrier
        self._joint_ops = joint_ops
        self._plan: Plan[Place, Item] = Plan(limits)
        self._twins: dict[tuple[Place, bytes], Item] = {}
        self._active = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self._turn: asyncio.Handle | None = None
        self._asked: dict[int, set[object]] = {}
        self._closed = False
        self.entrance = Entrance(max_calls)

    # ── one item ────────────────────────────────────────────────────────────────────────────────────────────────

    def submit(self, call: Call, group: Grouping, waiter: asyncio.Future[Any]) -> Item:
        """Have a call wait for batch mates; `waiter` gets GO, a Reply or an exception as its result."""
        step = None if self._barrier is None else call.context.step
        place = Place(step, group.kind)
        twin = None if group.twin is None else self._twins.get((place, group.twin))
        if twin is not None:
            twin.waiters.append(waiter)
            return twin
        item = Item(call, place, group, waiter)
        if group.twin is not None:
            self._twins[place, group.twin] = item
        size, tokens = self._measure(call)
        due = when_due(self._env.clock.monotonic(), self._limits.interval_s, call.deadline)
        self._release(self._plan.add(place, item, due, size_bytes=size, tokens=tokens))
        if step is not None:
            self._count_in(step, call.context.agent or item)
        else:
            self._flush_when_idle()
        self._arm(due.at)
        return item

    def withdraw(self, item: Item) -> None:
        """Nobody waits for this item any more."""
        if item.exchange is not None:
            item.exchange.cancel_if_forsaken()
        elif self._plan.remove(item.place, item):
            self._forget_twin(item)

    def over(self) -> None:
        """A call that was released to its caller has ended."""
        self._active -= 1
        self._flush_when_idle()

    def _measure(self, call: Call) -> tuple[int, int]:
        size = tokens = 0
        if self._limits.max_bytes is not None:
            size = len(repr(call.payload.get("messages", call.payload.get("prompt"))).encode())
        if self._limits.max_tokens is not None:
            tokens = prompt_tokens(call.payload) + (output_cap(call.payload) or 0)
        return size, tokens

    def _forget_twin(self, item: Item) -> None:
        if item.group.twin is not None:
            self._twins.pop((item.place, item.group.twin), None)

    # ── flushing ────────────────────────────────────────────────────────────────────────────────────────────────

    def tick(self) -> None:
        """Every agent of the step has asked: let everything go."""
        self._asked.clear()
        self._release(self._plan.drain("barrier"))

    def _count_in(self, step: int, who: object) -> None:
        asked = self._asked.setdefault(step, set())
        asked.add(who)
        if self._barrier is not None and len(asked) >= self._barrier:
            del self._asked[step]
            self._release(self._plan.drain("barrier", lambda place: place.step == step))
        elif len(self._asked) > _MAX_STEPS:  # steps that never became complete
            del self._asked[next(iter(self._asked))]

    def _flush_when_idle(self) -> None:
        # The others of this loop turn are collected; longer nobody waits, for the endpoint has nothing else to do.
        if self._active == 0 and self._turn is None and len(self._plan) and not self._closed:
            self._turn = asyncio.get_running_loop().call_soon(self._idle)

    def _idle(self) -> None:
        # Also if a full group went in the same turn: the rest of a burst that found the endpoint idle goes with it.
        self._turn = None
        self._release(self._plan.drain("idle", lambda place: place.step is None))

    def _arm(self, at: float | None) -> None:
        """Have the timer ring at that moment, or earlier."""
        if at is None or not len(self._plan) or (self._timer is not None and self._timer_at <= at):
            return
        if self._timer is not None:
            self._timer.cancel()
        wait_s = max(at - self._env.clock.monotonic(), 0.0)
        self._timer, self._timer_at = asyncio.get_running_loop().call_later(wait_s, self._ring), at

    def _ring(self) -> None:
        self._timer = None
        # A timer may ring a clock tick early; what is due within a millisecond goes too.
        self._release(self._plan.due(self._env.clock.monotonic() + _TICK_S))
        self._arm(self._plan.next_at())

    def _release(self, flushes: Sequence[Flush[Item]]) -> None:
        for flush in flushes:
            for item in flush.items:
                self._forget_twin(item)
            self._env.emit(BatchFlushed(len(flush.items), flush.cause))
            first = flush.items[0]
            if len(flush.items) > 1 and first.group.joint and first.call.op in self._joint_ops:
                self._start(flush.items)
                continue
            for item in flush.items:
                self._start_alone(item)

    def _start_alone(self, item: Item) -> None:
        """One caller makes its own call; for several of the same question a task does."""
        waiting = [waiter for waiter in item.waiters if not waiter.done()]
        if len(waiting) == 1:
            self._active += 1
            waiting[0].set_result(GO)
        elif waiting:
            self._start((item,))

    def _start(self, items: tuple[Item, ...]) -> None:
        self._active += 1
        exchange = Exchange(self._inner, self._env, items, self._joint_ops, self._plan)
        # Joint work belongs to none of its callers: no context variables of theirs.
        task = asyncio.get_running_loop().create_task(exchange.run(), context=contextvars.Context())
        exchange.task = task
        self._tasks.add(task)

        def done(_: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            exchange.settle(closed_error)
            self.over()

        task.add_done_callback(done)

    # ── ending ──────────────────────────────────────────────────────────────────────────────────────────────────

    def shed(self, call: Call, make_error: Callable[[], Exception]) -> int:
        """Fail what waits for the same endpoint and model; how many calls."""
        wanted = (call.target, call.model)
        return self._fail(
            self._plan.drain("shed", lambda place: (place.kind.target, place.kind.model) == wanted), make_error
        )

    def close(self, *, send: bool) -> None:
        """Nobody waits for mates any more: send what waits, or fail it with Closed; who comes later walks through."""
        flushes = self._plan.drain("close")
        if send:
            self._release(flushes)
        else:
            self._fail(flushes, closed_error)
        self.entrance.open()

    async def aclose(self) -> None:
        """Fail what waits and cancel what is under way."""
        self._closed = True
        self.close(send=False)
        for handle in (self._timer, self._turn):
            if handle is not None:
                handle.cancel()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    def gauges(self) -> dict[str, object]:
        """Calls that wait, and requests or released calls under way."""
        return {"waiting": len(self._plan), "active": self._active}

    def _fail(self, flushes: Sequence[Flush[Item]], make_error: Callable[[], Exception]) -> int:
        failed = 0
        for flush in flushes:
            for item in flush.items:
                self._forget_twin(item)
                failed += item.fail(make_error)
        return failed

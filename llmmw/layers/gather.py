"""What the batcher of one endpoint holds on one event loop: who waits for batch mates, and what is under way."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import itertools
from typing import TYPE_CHECKING, Any

from llmmw.algo.batchmates import weight
from llmmw.algo.batchplan import Plan, when_due
from llmmw.errors import Closed
from llmmw.events import BatchFlushed
from llmmw.layers.exchange import Exchange, Item, Search
from llmmw.stream.copies import own_error

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from llmmw.algo.batchmates import Grouping, Kind
    from llmmw.algo.batchplan import Flush, GroupSize, Limits
    from llmmw.call import Call, Handler, Party
    from llmmw.env import Env
    from llmmw.layers.entrance import Entrance
    from llmmw.layers.exchange import JointOps, Lane

_MAX_STEPS = 64
_TICK_S = 0.001
_ALONE = "alone"
"""The lane of what no mate could help; only the calls of one loop turn are released together."""

GO = object()
"""What a waiter is woken with who makes the call itself, in its own task and context."""


def closed_error() -> Closed:
    """For who waits while the engine closes."""
    return Closed("the engine was closed before this call was answered")


class Gathering:
    """Submitting, flushing and starting; every method but `gauges` runs on one loop.

    A lane of the plan is a step, whose barrier holds its calls; a party, whose calls wait for those of it that are on
    their way; or None, what an idle endpoint gets at once. Nobody waits where fewer calls than a joint request is worth
    are inside: among so few agents, each of whom waits for an answer, no such group can come about.

    Args:
        inner: the handler below the batcher.
        env: clock and event sinks.
        limits: when a group is full or due.
        entrance: counts the calls inside; its bound is kept by who calls `submit`.
        barrier: how many agents make a step complete; None: steps do not matter.
        joint_ops: operations that may share a request.
        group_size: what was learned about the size of groups, perhaps on another loop.
        worth: calls from which on a joint request is worth it.
        tells: whether calls that go one by one are told as a group, too.
    """

    def __init__(
        self,
        inner: Handler,
        env: Env,
        limits: Limits,
        entrance: Entrance,
        *,
        barrier: int | None,
        joint_ops: JointOps,
        group_size: GroupSize,
        worth: int,
        tells: bool,
    ) -> None:
        self._inner = inner
        self._env = env
        self._limits = limits
        self._barrier = barrier
        self._joint_ops = joint_ops
        self._plan: Plan[Lane, Kind, Item] = Plan(limits, group_size)
        self._group_size = group_size
        self._worth = worth
        self._tells = tells
        self._parties: dict[Party, None] = {}
        """Those that have calls here."""
        self._weighs = limits.max_bytes is not None or limits.max_tokens is not None
        self._twins: dict[tuple[Lane, Kind, bytes], Item] = {}
        self._active = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self._turn: asyncio.Handle | None = None
        self._asked: dict[int, set[object]] = {}
        self._complete: dict[int, None] = {}
        """Steps whose barrier has opened, the newest last: what they ask later (again, perhaps) waits for nobody."""
        self._strangers = itertools.count()
        self._closed = False
        self.entrance = entrance

    # ── one item ────────────────────────────────────────────────────────────────────────────────────────────────

    def submit(self, call: Call, group: Grouping, waiter: asyncio.Future[Any]) -> Item:
        """Have a call wait for batch mates; `waiter` gets GO, a Reply or an exception as its result."""
        lane = self._lane_of(call, group)
        due = when_due(self._env.clock.monotonic(), self._limits.interval_s, call.deadline)
        item = None if group.twin is None else self._twins.get((lane, group.kind, group.twin))
        if item is not None:
            item.waiters[waiter] = call
            self._plan.hasten(item, due)
        else:
            size, tokens = weight(call, group) if self._weighs else (0, 0)
            item = Item(call, lane, group, waiter)
            if group.twin is not None:
                self._twins[lane, group.kind, group.twin] = item
            self._release(self._plan.add(lane, group.kind, item, due, size_bytes=size, tokens=tokens))
        if isinstance(lane, int):
            self._count_in(lane, call.context.agent)
        else:
            self._look()
        self._arm(due.at)
        return item

    def _lane_of(self, call: Call, group: Grouping) -> Lane:
        party = None if call.place is None else call.place.settle()
        step = None if self._barrier is None else call.context.step
        if step is not None and step not in self._complete:
            return step
        if not (group.joint and call.op in self._joint_ops):
            return _ALONE
        if party is not None and party not in self._parties:
            party.watch(self._look)
            self._parties[party] = None
        return party

    def withdraw(self, item: Item) -> None:
        """Nobody waits for this item any more."""
        if item.exchange is not None:
            item.exchange.cancel_if_forsaken()
        elif self._plan.remove(item):
            self._forget_twin(item)

    def over(self, *, accepted: bool = False) -> None:
        """A call that was released to its caller has ended; whether the server took it."""
        if accepted:
            self._group_size.accepted(1)
        self._active -= 1
        self._look()

    def _forget_twin(self, item: Item) -> None:
        if item.group.twin is not None:
            self._twins.pop((item.lane, item.group.kind, item.group.twin), None)

    # ── flushing ────────────────────────────────────────────────────────────────────────────────────────────────

    def tick(self) -> None:
        """Every agent of the step has asked: let everything go."""
        for step in list(self._asked):
            self._open(step)
        self._release(self._plan.drain_all("barrier"))

    def forget_steps(self) -> None:
        """The steps that follow are others, whatever their numbers; what waits for its step goes at its interval."""
        self._asked.clear()
        self._complete.clear()

    def _count_in(self, step: int, agent: str | None) -> None:
        asked = self._asked.setdefault(step, set())
        asked.add(next(self._strangers) if agent is None else agent)
        if self._barrier is not None and len(asked) >= self._barrier:
            self._open(step)
            self._release(self._plan.drain("barrier", step))
        elif len(self._asked) > _MAX_STEPS:  # steps that never became complete
            del self._asked[next(iter(self._asked))]

    def _open(self, step: int) -> None:
        del self._asked[step]
        self._complete[step] = None
        if len(self._complete) > _MAX_STEPS:
            del self._complete[next(iter(self._complete))]

    def _look(self) -> None:
        # The others of this loop turn are collected before anything is decided.
        if self._turn is None and not self._closed and (self._parties or self._hurries()):
            self._turn = asyncio.get_running_loop().call_soon(self._end_turn, self._active == 0)

    def _hurries(self) -> bool:
        """Whether something waits that nothing is gained by holding any longer."""
        pointless = self._active == 0 or self.entrance.inside < self._worth
        return self._plan.has(_ALONE) or (pointless and self._plan.has(None))

    def _end_turn(self, was_idle: bool) -> None:  # noqa: FBT001 — a callback of the loop
        # Also if a full group went in the same turn: the rest of a burst that found the endpoint idle goes with it.
        self._turn = None
        self._flush(lambda: self._ripe(idle=was_idle or self._active == 0))

    def _ripe(self, *, idle: bool) -> list[Flush[Item]]:
        """What goes at the end of a turn."""
        plan, cause = self._plan, "idle" if idle else "few"
        flushes = plan.drain(cause, _ALONE)
        if idle or self.entrance.inside < self._worth:
            flushes += plan.drain(cause, None)
        for party in list(self._parties):
            if not party.coming:
                least = 1 if idle or party.is_whole else self._worth
                flushes += plan.drain("together", party, at_least=least)
            if not plan.has(party):
                del self._parties[party]
        return flushes

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
        self._flush(lambda: self._plan.due(self._env.clock.monotonic() + _TICK_S))
        self._arm(self._plan.next_at())

    def _flush(self, decide: Callable[[], Sequence[Flush[Item]]]) -> None:
        """Flush from a callback of the loop, where an error would reach nobody: it fails who waits, and we go on."""
        try:
            self._release(decide())
        except Exception as error:  # noqa: BLE001 — whatever it was, nobody may wait for ever because of it
            self._fail(self._plan.drain_all("failed"), functools.partial(own_error, error))

    def _release(self, flushes: Sequence[Flush[Item]]) -> None:
        """Send groups. One that cannot even be started fails its callers and nobody else, and flushing goes on."""
        for flush in flushes:
            for item in flush.items:
                self._forget_twin(item)
            jointly = self._goes_jointly(flush.items)
            if jointly or self._tells:
                self._env.emit(BatchFlushed(len(flush.items), flush.cause))
            try:
                self._send(flush.items, jointly=jointly)
            except Exception as error:  # noqa: BLE001 — as above
                self._fail([flush], functools.partial(own_error, error))

    def _goes_jointly(self, items: Sequence[Item]) -> bool:
        first = items[0]
        return len(items) >= max(self._worth, 2) and first.group.joint and first.call.op in self._joint_ops

    def _send(self, items: Sequence[Item], *, jointly: bool) -> None:
        if jointly:
            items = sorted(items, key=lambda item: item.group.prompt)
            self._start(items, Search(len(items), self._start))
            return
        for item in items:
            waiting = [waiter for waiter, _ in item.waiting()]
            if len(waiting) == 1:  # the caller makes the call, in its own context; of several nobody does
                self._active += 1
                waiting[0].set_result(GO)
            elif waiting:
                self._start((item,), Search(1, self._start))

    def _start(self, items: Sequence[Item], search: Search) -> None:
        exchange = Exchange(
            self._inner, self._env, items, search, joint_ops=self._joint_ops, group_size=self._group_size
        )
        # Joint work belongs to none of its callers: no context variables of theirs.
        task = asyncio.get_running_loop().create_task(exchange.run(), context=contextvars.Context())
        exchange.task = task
        self._active += 1
        self._tasks.add(task)

        def done(_: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            exchange.settle(closed_error if self._closed else None)
            self.over()

        task.add_done_callback(done)

    # ── ending ──────────────────────────────────────────────────────────────────────────────────────────────────

    def shed(self, call: Call, make_error: Callable[[], Exception]) -> int:
        """Fail what waits for the same endpoint and model; how many calls."""
        wanted = (call.target, call.model)
        return self._fail(self._plan.drain_all("shed", lambda kind: (kind.target, kind.model) == wanted), make_error)

    def close(self, *, send: bool) -> None:
        """Nobody waits for mates any more: send what waits, or fail it with Closed; who comes later walks through."""
        flushes = self._plan.drain_all("close")
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

"""One bucket of the rate limiter at work: its queue, and the single place where permits are granted.

Nothing polls and nothing is held while waiting: `drain` runs on arrival, release, settlement and when the one timer
says that what the head of the queue lacks will be there; then everything a permit needs is taken in one step.
No cost grows with the number of waiters: the queue and the deadlines are heaps.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from math import inf
from typing import TYPE_CHECKING
from weakref import ref

from llmmw.algo.due import Due
from llmmw.algo.queue import Entry, FairQueue
from llmmw.errors import Closed, RateLimited
from llmmw.layers.allowance import Allowance, Limits
from llmmw.layers.leases import Leases

if TYPE_CHECKING:
    from collections.abc import Callable

    from llmmw.algo.headers import Reading
    from llmmw.algo.queue import Flow
    from llmmw.answer import Usage
    from llmmw.call import Call
    from llmmw.env import Env
    from llmmw.layers.permit import Permit
    from llmmw.layers.shared import SharedCounter
    from llmmw.stores.counter import CounterStore

_TIMER_S = 0.001
"""Timers are set at least this far ahead: one that rounds to just before its time must not spin."""
_MAX_REMEMBERED = 256


class Waiting:
    """A call in the queue."""

    __slots__ = ("amounts", "call", "future")

    def __init__(self, call: Call, amounts: tuple[int, ...], future: asyncio.Future[Permit]) -> None:
        self.call = call
        self.amounts = amounts
        self.future = future


class Gate:
    """Permits of one bucket, in order. Runs on the home loop only."""

    def __init__(self, limits: Limits, env: Env) -> None:
        self.allowance = Allowance(limits, env)
        self.queue: FairQueue[Waiting] = FairQueue(weights=limits.weights, age_bound=limits.age_bound)
        self._env = env
        self._clock = env.clock.monotonic
        self._timer: asyncio.TimerHandle | None = None
        self._due: Due[Entry[Waiting]] = Due(_deadline_of)
        self._alarm: asyncio.TimerHandle | None = None
        self._alarm_at = inf
        self._refused: OrderedDict[int, tuple[ref[Call], float]] = OrderedDict()
        """Calls the server refused, and since when they waited: one that is repeated keeps its place in the queue."""

    # -- granting -----------------------------------------------------------------------------------------------

    def admit(self, amounts: tuple[int, ...], width: int = 1) -> Permit | None:
        """A permit if one is free and nobody waits; costs no task and no future."""
        if self.queue:
            return None
        allowance, now = self.allowance, self._clock()
        if (
            allowance.opens_at(now) > now
            or not allowance.tokens_fit(amounts, now)
            or (allowance.leases is not None and allowance.lease_at(amounts, now) > now)
            or not allowance.take_unit()
        ):
            return None
        return allowance.grant(amounts, now, width)

    def share(self, options: SharedCounter, store: CounterStore, bucket: bytes) -> None:
        """From now on take what is granted from a counter shared with other processes."""
        self.allowance.leases = Leases(options, store, bucket, self._env, self._news)
        self.allowance.tell_leases()

    def _news(self) -> None:
        if self.queue:
            self.drain()

    def enqueue(self, waiting: Waiting, *, priority: int, flow: Flow) -> Entry[Waiting]:
        """Join the queue; the permit comes through the future."""
        before = self._refused.pop(id(waiting.call), None)
        since = before[1] if before is not None and before[0]() is waiting.call else None
        entry = self.queue.push(waiting, priority=priority, flow=flow, now=self._clock(), since=since)
        if waiting.call.deadline is not None:
            self._due.add(entry)
        self.drain()
        if waiting.call.deadline is not None and not waiting.future.done():
            self._set_alarm()
        return entry

    def _set_alarm(self) -> None:
        """Tell waiters of their deadline when that comes, not when the next permit is free.

        A moment late: where a Deadline layer waits for the same moment, its error is the one to hear.
        """
        at = self._due.next()
        if self._alarm is not None:
            if self._alarm_at <= at:
                return  # it will look again then
            self._alarm.cancel()
            self._alarm = None
        if at != inf:
            self._alarm_at = at
            self._alarm = asyncio.get_running_loop().call_later(max(0.0, at - self._clock()) + _TIMER_S, self._ring)

    def _ring(self) -> None:
        self._alarm = None
        late_ones = self._due.pop(self._clock())
        for entry in late_ones:
            self.queue.remove(entry)
            entry.item.future.set_exception(RateLimited("the deadline passed while waiting for a permit"))
        self._set_alarm()
        if late_ones:
            self.drain()

    def leave(self, entry: Entry[Waiting]) -> None:
        """A waiter gave up; a permit that reached it meanwhile goes to the next."""
        future = entry.item.future
        if future.done() and not future.cancelled() and future.exception() is None:
            self.give_back(future.result())
        elif self.queue.remove(entry):
            if entry.item.call.deadline is not None:
                self._due.discard()
            self.drain()

    def drain(self) -> None:
        """Grant what can be granted now, and see to it that this runs again when more can be."""
        allowance = self.allowance
        while (head := self.queue.head(now := self._clock())) is not None:
            if self._is_stale(head, now):
                self.queue.remove(head)
                continue
            opens = allowance.opens_at(now)
            if opens > now:
                self._nobody_before(opens, now)
                return
            chosen = self._fitting(head, now)
            if chosen is None:
                fits = allowance.tokens_at(head.item.amounts, now)
                if self._refuse(head, fits, now):
                    continue
                self._wake_at(fits, now)
                return
            if allowance.leases is not None and (opens := allowance.lease_at(chosen.item.amounts, now)) > now:
                if opens != inf and self._refuse(chosen, opens, now):
                    continue
                self._wake_at(opens, now)
                return
            if not allowance.take_unit():
                self._nobody_before(allowance.unit_at(now), now)
                return
            self.queue.take(chosen)
            chosen.item.future.set_result(allowance.grant(chosen.item.amounts, now, chosen.item.call.width))
            if chosen.item.call.deadline is not None:
                self._due.discard()

    def _nobody_before(self, at: float, now: float) -> None:
        """No permit can be granted before then: who has less time learns it now."""
        if at != inf:
            for entry in self._due.pop(at):
                self._refuse(entry, at, now)
        self._wake_at(at, now)

    def _refuse(self, entry: Entry[Waiting], at: float, now: float) -> bool:
        """Tell a waiter that its permit would come too late, if so."""
        deadline = entry.item.call.deadline
        if deadline is None or deadline > at or not self.queue.remove(entry):
            return False
        if not entry.item.future.done():
            entry.item.future.set_exception(late(at, now))
        return True

    def _is_stale(self, head: Entry[Waiting], now: float) -> bool:
        """Whether this waiter was cancelled, or can no longer be in time."""
        future, deadline = head.item.future, head.item.call.deadline
        if not future.done() and deadline is not None and deadline <= now:
            future.set_exception(RateLimited("the deadline passed while waiting for a permit"))
        return future.done()

    def _fitting(self, head: Entry[Waiting], now: float) -> Entry[Waiting] | None:
        if self.allowance.tokens_fit(head.item.amounts, now):
            return head
        for entry in self.queue.passing(head, now):
            if self.allowance.tokens_fit(entry.item.amounts, now) and not self._is_stale(entry, now):
                return entry
        return None

    def _wake_at(self, at: float, now: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if at != inf:
            self._timer = asyncio.get_running_loop().call_later(max(at - now, _TIMER_S), self._woken)

    def _woken(self) -> None:
        self._timer = None
        self.drain()

    # -- giving back --------------------------------------------------------------------------------------------

    def finish(self, permit: Permit, usage: Usage, *, well: bool) -> None:
        """The call is over and was sent."""
        if self.allowance.finish(permit, usage, well=well) and self.queue:
            self.drain()

    def give_back(self, permit: Permit) -> None:
        """The call was never sent."""
        if self.allowance.give_back(permit) and self.queue:
            self.drain()

    def refused(self, call: Call, permit: Permit, wait_s: float | None) -> float:
        """The server refused the call for its rate.

        Returns:
            Seconds of the pause that this began; 0 if the gate had been closed before.
        """
        allowance, now = self.allowance, self._clock()
        pauses = allowance.pauses
        if not allowance.refused(permit, wait_s):
            return 0.0
        self._refused[id(call)] = (ref(call), permit.started)  # no prompt is kept for a call that does not come back
        if len(self._refused) > _MAX_REMEMBERED:
            self._refused.popitem(last=False)
        until = allowance.pace.until
        for entry in self._due.pop(until):  # also where the slots are taken and nothing would be granted anyway
            self._refuse(entry, until, now)
        if self.queue:
            self.drain()
        return max(0.0, until - now) if allowance.pauses > pauses else 0.0

    def hear(self, readings: tuple[Reading, ...], started: float) -> None:
        """What the server's headers said in the answer to a call granted at `started`."""
        self.allowance.hear(readings, started)
        if self.queue:
            self.drain()

    # -- waiters ------------------------------------------------------------------------------------------------

    def predict(self, amounts: tuple[int, ...], priority: int, flow: Flow) -> float:
        """A time before which a call that joins the queue now surely gets no permit (slots apart)."""
        return self.allowance.predict(amounts, self.queue.ahead(priority, flow), self._clock())

    def move(self, entry: Entry[Waiting]) -> None:
        """The call of a waiter became more urgent, or may take longer."""
        self.queue.move(entry, entry.item.call.priority)
        self.drain()

    def shed(self, target: str, model: str, make_error: Callable[[], Exception]) -> int:
        """Fail the waiters for this target and model."""
        doomed = [entry for entry in self.queue if (entry.item.call.target, entry.item.call.model) == (target, model)]
        return self._fail(doomed, make_error)

    def resize(self, limits: Limits) -> None:
        """New limits of the same kinds, effective at once; records and waiters stay."""
        self.allowance.resize(limits)
        self.queue.weights, self.queue.age_bound = limits.weights, limits.age_bound
        self.drain()

    def rehome(self) -> None:
        """The loop died: its waiters are gone."""
        self.allowance.rehome()
        self._refused.clear()
        self._timer = self._alarm = None
        self._due = Due(_deadline_of)
        for entry in self.queue:
            self.queue.remove(entry)

    async def aclose(self) -> None:
        """Refuse everybody who still waits; drop the timers; leave the counter shared with others."""
        self._fail(list(self.queue), lambda: Closed("the rate limiter was closed"))
        for timer in (self._timer, self._alarm):
            if timer is not None:
                timer.cancel()
        self._timer = self._alarm = None
        if self.allowance.leases is not None:
            await self.allowance.leases.aclose()

    def _fail(self, doomed: list[Entry[Waiting]], make_error: Callable[[], Exception]) -> int:
        for entry in doomed:
            self.queue.remove(entry)
            if not entry.item.future.done():
                entry.item.future.set_exception(make_error())
        if self.queue:
            self.drain()
        return len(doomed)


def _deadline_of(entry: Entry[Waiting]) -> float | None:
    """The deadline of a waiter now; None when it waits no more."""
    if entry.item.future.done():
        return None
    deadline = entry.item.call.deadline
    return inf if deadline is None else deadline


def late(retry_at: float, now: float) -> RateLimited:
    """The refusal of a call that would get its permit after its deadline."""
    wait = max(0.0, retry_at - now)
    return RateLimited(
        f"no permit before the deadline: the next may come in {wait:.3g} s", retry_at=retry_at, retry_after_s=wait
    )

"""Hedging: a request that is slower than 95 of 100 gets a second one beside it, and the first answer counts."""

from __future__ import annotations

import asyncio
import math
from typing import TYPE_CHECKING, Any

from llmmw.algo.hedge import HedgePlan
from llmmw.call import Attempt, Reply
from llmmw.fault import Fault, FaultKind, classify
from llmmw.keys import is_deterministic
from llmmw.layers.attempt import attempt_of, make_attempt, passed_deadline

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llmmw.algo.service import Kind
    from llmmw.call import Call, Handler
    from llmmw.env import Clock, Env


class Hedger:
    """Makes first attempts that may be doubled.

    A second request goes only where two answers are as good as one (`duplicate_ok`, or a deterministic request),
    within a budget of its own (5 % of the requests), never in the seconds after a 429, and only if it gets its
    permits at once: one that would queue for them helps nobody. Time counts from when the first was sent.

    Args:
        inner: what is asked.
        env: clock.
        duplicate_ok: double also what is not deterministic.
    """

    def __init__(self, inner: Handler, env: Env, *, duplicate_ok: bool) -> None:
        self._inner = inner
        self._clock = env.clock
        self._duplicate_ok = duplicate_ok
        self._plan = HedgePlan()
        self._leaving: set[asyncio.Task[None]] = set()
        self._won = 0

    def suits(self, call: Call) -> bool:
        """Whether two requests for this call do no harm."""
        enough = call.tries_left is None or call.tries_left > 1 or call.beside is not None
        return enough and (self._duplicate_ok or is_deterministic(call))

    def refused(self, fault: Fault) -> None:
        """An attempt failed; after a 429 nothing is doubled for a while."""
        if fault.kind is FaultKind.RATE:
            self._plan.refused(self._clock.monotonic(), fault.retry_after_s)

    def gauges(self) -> dict[str, object]:
        """Second requests, and how many of them answered first."""
        return {"hedges": self._plan.sent, "hedges_won": self._won}

    def rehome(self) -> None:
        """Whoever was leaving belonged to the dead loop."""
        self._leaving.clear()

    async def aclose(self) -> None:
        """Wait for requests that were given up."""
        if self._leaving:
            await asyncio.wait(self._leaving)

    async def attempt(self, call: Call) -> tuple[Reply | Exception, tuple[Attempt, ...]]:
        """Ask, a second time where the first takes too long.

        Returns:
            What became of the call, and the attempt whose outcome did not count (if there were two).

        Raises:
            asyncio.CancelledError: the caller was cancelled, and both requests with it.
        """
        kind = (f"{call.op} stream" if call.stream else call.op, call.model)
        self._plan.began()
        first = _Request(self._inner, call, self._clock)
        delay = self._plan.delay(kind, self._clock.monotonic())
        if delay is None:
            outcome = await make_attempt(self._inner, first.call, self._clock)
            self._learn(kind, first, answered=isinstance(outcome, Reply) and outcome.ok)
            return outcome, ()
        requests, winner = [first], None
        try:
            await first.slow_or_done(delay)
            if not first.done and self._plan.take(self._clock.monotonic()):
                await self._double(call, requests)
            winner = await _best(requests)
            outcome = winner.outcome()
        except asyncio.CancelledError:
            late = passed_deadline(call, self._clock)
            if late is None:
                raise
            return late, ()
        finally:
            await self._see_off([request for request in requests if request is not winner], wait=winner is None)
        self._learn(kind, first, answered=winner.answered)
        self._won += winner is not first
        return outcome, tuple(self._told(request, call) for request in requests if request is not winner)

    async def _double(self, call: Call, requests: list[_Request]) -> None:
        """Send the second request, unless something holds it back."""
        second = _Request(call.beside or self._inner, call, self._clock)  # another replica, where there is one
        requests.append(second)
        _ = second.task
        await self._clock.sleep(0)  # its first step takes it to the endpoint, or to where it would have to wait
        if second.sent_at is None:
            requests.remove(second)
            self._plan.unsent()
            await self._see_off([second], wait=False)

    def _learn(self, kind: Kind, first: _Request, *, answered: bool) -> None:
        # Where the second won, the first took at least as long: without it p95 would sink with every hedge.
        if answered and first.sent_at is not None:
            now = self._clock.monotonic()
            self._plan.learn(kind, now, now - first.sent_at)

    def _told(self, request: _Request, call: Call) -> Attempt:
        """The history entry of the request that did not count."""
        outcome = request.outcome() if request.done and not (request.cancelled or request.interrupted) else None
        fault = None if outcome is None else classify(outcome, wall=self._clock.wall())
        if outcome is None or fault is None:
            return Attempt(call.target, FaultKind.CANCELLED.value, None, "hedged")
        self.refused(fault)
        return attempt_of(outcome, fault, call.target)

    async def _see_off(self, requests: Sequence[_Request], *, wait: bool) -> None:
        """Cancel the requests; whoever has an answer already need not wait until they are gone."""
        leaving = [asyncio.create_task(request.leave()) for request in requests]
        for task in leaving:
            self._leaving.add(task)
            task.add_done_callback(self._left)
        if wait and leaving:
            await asyncio.wait(leaving)  # whoever is cancelled again stops waiting, and does not stop the leaving

    def _left(self, task: asyncio.Task[None]) -> None:
        self._leaving.discard(task)
        if not task.cancelled():
            task.exception()  # nobody is told: the call has its outcome


class _Request:
    """One of the requests for a call, in a task of its own."""

    def __init__(self, inner: Handler, call: Call, clock: Clock) -> None:
        self._inner = inner
        self._clock = clock
        self.call = call.replace(on_sent=self._on_sent)
        self.sent_at: float | None = None
        self._delay = math.inf
        self._slow: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[Reply | BaseException] | None = None

    @property
    def done(self) -> bool:
        """Whether it has its outcome."""
        return self._task is not None and self._task.done()

    @property
    def cancelled(self) -> bool:
        """Whether it ended in a cancellation (the user's function may raise one)."""
        return self._task is not None and self._task.cancelled()

    @property
    def answered(self) -> bool:
        """Whether the server accepted it."""
        found = None if not self.done or self.cancelled else self.task.result()
        return isinstance(found, Reply) and found.ok

    @property
    def interrupted(self) -> bool:
        """Whether the user's function raised KeyboardInterrupt, SystemExit or their like."""
        found = None if not self.done or self.cancelled else self.task.result()
        return isinstance(found, BaseException) and not isinstance(found, Exception)

    @property
    def task(self) -> asyncio.Task[Reply | BaseException]:
        """The request under way; made when it is first asked for."""
        if self._task is None:
            self._task = asyncio.create_task(self._ask())
        return self._task

    async def _ask(self) -> Reply | BaseException:
        try:
            return await make_attempt(self._inner, self.call, self._clock)
        except asyncio.CancelledError:
            raise
        except BaseException as interrupt:  # noqa: BLE001 — a task that raises it would end the loop, not the call
            return interrupt

    def outcome(self) -> Reply | Exception:
        """What became of it, once it is done; an interrupt is raised."""
        found = self.task.result()
        if isinstance(found, Reply | Exception):
            return found
        raise found

    async def slow_or_done(self, delay: float) -> None:
        """Send it; returns when it is done, or when it was sent `delay` seconds ago."""
        loop = asyncio.get_running_loop()
        self._delay, self._slow = delay, loop.create_future()
        try:
            either: set[asyncio.Future[Any]] = {self.task, self._slow}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._slow.cancel()
            if self._timer is not None:
                self._timer.cancel()

    async def leave(self) -> None:
        """Cancel it, and close the stream of one that was answered all the same."""
        self.task.cancel()
        await asyncio.wait({self.task})
        if self.answered:
            outcome = self.outcome()
            if isinstance(outcome, Reply) and outcome.chunks is not None:
                await outcome.chunks.aclose()

    def _on_sent(self) -> None:
        if self.sent_at is None:
            self.sent_at = self._clock.monotonic()
            if self._slow is not None:
                self._timer = asyncio.get_running_loop().call_later(self._delay, self._ring)

    def _ring(self) -> None:
        if self._slow is not None and not self._slow.done():
            self._slow.set_result(None)


async def _best(requests: Sequence[_Request]) -> _Request:
    """The first that is answered (or interrupted); if none is, the first of all, whose failure is the call's."""
    while True:
        for request in requests:
            if request.answered or request.interrupted:
                return request
        under_way = {request.task for request in requests if not request.done}
        if not under_way:
            return requests[0]
        await asyncio.wait(under_way, return_when=asyncio.FIRST_COMPLETED)

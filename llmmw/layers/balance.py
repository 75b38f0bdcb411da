"""Balancer: one endpoint made of several like servers."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable  # noqa: TC003 — help() and signature() evaluate it
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from llmmw.algo.balance import BalanceRules
from llmmw.call import Reply
from llmmw.errors import ConfigError, RateLimited, Refused
from llmmw.events import Rerouted
from llmmw.fault import HURTS_CREDENTIAL, HURTS_ENDPOINT, Fault, FaultKind, classify
from llmmw.layers.attempt import at_delivered_end, begun, exchange_of, failure_of, is_late
from llmmw.layers.base import Bound, Positioned
from llmmw.layers.breaker import BoundBreaker, CircuitBreaker
from llmmw.layers.chooser import Chooser
from llmmw.layers.misses import Miss, attempts_of, sent, tried, verdict_on
from llmmw.layers.routes import answer_of, goes_elsewhere, route_to
from llmmw.order import Role
from llmmw.settings import number, seconds, settings, whole

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llmmw.call import Call, Handler
    from llmmw.endpoints.replicas import Replicas
    from llmmw.env import Env
    from llmmw.layers.routes import Route
    from llmmw.stream import End

_RATE_WAIT_S = 0.25
"""While another replica could answer, a longer wait for a rate limit is not worth it; a shorter one keeps an agent
where its prompts are known."""
_HURTS = HURTS_ENDPOINT | HURTS_CREDENTIAL


@settings
class Balancer(Positioned):
    """Spreads calls over replicas: servers that would give the same answers, such as several vLLM with one model.

        client = Client(["http://10.0.0.1:8000/v1", "http://10.0.0.2:8000/v1"])       # has one by itself
        engine = Stack(Balancer(affinity="none"), CircuitBreaker()).bind([Replica(big, weight=2), small])

    A call of an agent (`using(agent=)`) goes to the replica that is the agent's own, which depends on the names only:
    what that server has in its prefix cache is used again. While its own has more than `spill` times its share of the
    work (and more than `room` calls), the next in the agent's order is asked. A call of nobody goes to the less busy
    of two replicas drawn at random. Work is calls under way, plus what the server says is waiting in its queue.

    What is inside stands once for each replica, so each has a circuit, limits and connections of its own (a circuit
    also where the stack has no CircuitBreaker). One whose circuit is open gets nothing; when its rest is over it gets a
    single call, and after that a part of its share that grows within `slow_start`. One where three deadlines in a row
    have passed (which opens no circuit) gets one call at a time every five seconds. A call that failed in a way that
    another server may not share is made again at another replica, at once, as an ErrorRouter would at a fallback; the
    last replica asked repeats as a Retry inside allows. Fallbacks follow when no replica answers.

    To the cache the replicas are one server: the same question to either is the same question. A Batcher gathers for
    each replica by itself, so its `barrier` would wait in vain for agents who are elsewhere: end steps with `tick()`.

    Args:
        affinity: "agent", "none", or a function from a `Call` to a text (or None): calls of one text have one home.
        spill: the most work of an agent's own replica, as a multiple of its share.
        room: calls that no replica is too busy for.
        slow_start: until a replica that comes back has its whole share (seconds or text); 0: at once.
        attempts: replicas asked for one call.
        duplicate_ok: make also a call again that may be done already. Servers on this machine allow that anyway.

    Raises:
        ConfigError: a value that cannot work.
        CircuitOpen: from a call, where every replica rests. Else the last failure comes as it is, with all attempts.
    """

    role: ClassVar[Role] = Role.BALANCE
    affinity: str | Callable[[Call], str | None] = "agent"
    spill: float = 1.25
    room: int = 8
    slow_start: float | str = 30.0
    attempts: int = 3
    duplicate_ok: bool = False

    def __post_init__(self) -> None:
        if self.affinity not in ("agent", "none") and not callable(self.affinity):
            raise ConfigError(f'Balancer(affinity={self.affinity!r}): must be "agent", "none" or a function of a Call')
        number("Balancer(spill=)", self.spill, low=1)
        whole("Balancer(room=)", self.room, low=0)
        whole("Balancer(attempts=)", self.attempts)
        object.__setattr__(self, "slow_start", seconds("Balancer(slow_start=)", self.slow_start))

    def bind(self, inner: Handler, env: Env) -> Bound:
        """Over one endpoint there is nothing to choose."""
        return Bound(inner, env)

    def bind_group(self, handlers: Sequence[Handler], replicas: Replicas, env: Env) -> BoundBalancer:
        """Running state over one handler per replica."""
        found = [_guarded(handler, env) for handler in handlers] if len(handlers) > 1 else handlers
        return BoundBalancer(found, replicas, env, self)


def _guarded(handler: Handler, env: Env) -> Handler:
    """The handler, with a circuit where it has none: that is what a sick replica is ejected by."""
    has_one = isinstance(route_to(handler, None, None).breaker, BoundBreaker)
    return handler if has_one else CircuitBreaker().bind(handler, env)


class BoundBalancer(Bound):
    """The replicas of one endpoint. To layers outside it is that endpoint: it has a name, capabilities and a health."""

    def __init__(self, handlers: Sequence[Handler], replicas: Replicas, env: Env, rules: Balancer) -> None:
        super().__init__(handlers[0], env)
        self.name = replicas.name
        self.names = replicas.labels
        self._members = replicas.members
        self._routes: tuple[Route, ...] = tuple(route_to(handler, None, None) for handler in handlers)
        self._hedged = tuple(_has(handler, "hedges") for handler in handlers)
        self._patient = tuple(_has(handler, "paces") or _has(handler, "repeats") for handler in handlers)
        self._rules = rules
        self._key_of = rules.affinity if callable(rules.affinity) else _KEYS[rules.affinity]
        breakers = [route.breaker for route in self._routes]
        unasked = CircuitBreaker().bind(self, env)  # of a sole endpoint, which nobody asked to give a circuit
        self._breakers = tuple(found if isinstance(found, BoundBreaker) else unasked for found in breakers)
        found = BalanceRules(spill=rules.spill, room=rules.room, slow_start_s=float(rules.slow_start))
        self._chooser = Chooser(replicas, self._breakers, env, found)
        self.rests_since = self._chooser.rests_since
        self.news = self._chooser.news

    @property
    def capabilities(self) -> frozenset[str]:
        """What every replica can do now."""
        told = [frozenset[str](getattr(member, "capabilities", ())) for member in self._members]
        return told[0].intersection(*told[1:])

    async def __call__(self, call: Call, /) -> Reply:
        """Answer from one of the replicas.

        Raises:
            CircuitOpen: all of them rest.
        """
        key = self._key_of(call)
        index = self._chooser.first(call, key)
        failures: list[Miss] = []
        asked: list[int] = []
        outcome: Reply | Exception | None = None
        try:
            while True:
                index = self._last_resort(call, asked, failures) if index is None else index
                if index is None:
                    break
                route = self._routes[index]
                if failures and failures[-1].route is not route:
                    self.env.emit(Rerouted(failures[-1].route.name, route.name, failures[-1].fault.kind.value))
                asked.append(index)
                addressed = self._addressed(call, index, asked, failures)
                outcome = await self._ask(index, addressed)
                if isinstance(outcome, Reply) and outcome.ok:
                    return answer_of(outcome, route, attempts_of(failures), fallback=False) if failures else outcome
                fault = classify(outcome, wall=self.env.clock.wall())
                assert fault is not None  # noqa: S101 — only a success is without fault
                failures.append(Miss(route, addressed, outcome, fault, self._again_at(outcome, fault)))
                self._learn(index, call.model, outcome, fault)
                if not self._goes_on(call, index, failures):
                    break
                index = self._chooser.next(call, key, asked) if sent(failures) < self._rules.attempts else None
            outcome = verdict_on(failures)
            if isinstance(outcome, Reply):
                return outcome
            raise outcome
        finally:
            outcome = None  # an exception whose traceback leads back to this frame would wait for the collector
            failures.clear()

    def _goes_on(self, call: Call, index: int, failures: list[Miss]) -> bool:
        """Whether another replica is asked after the last of these failures."""
        fault, left = failures[-1].fault, math.inf if call.tries_left is None else call.tries_left
        if tried(failures) >= min(self._rules.attempts, left) or fault.kind is FaultKind.CONTEXT_LENGTH:
            return False
        return goes_elsewhere(fault, duplicate_ok=self._rules.duplicate_ok or self._routes[index].idempotent)

    def _last_resort(self, call: Call, asked: list[int], failures: list[Miss]) -> int | None:
        """No other is left. Whose rate limit is over first gets it after all; else, where all rest, one is probed."""
        pairs = zip(failures, asked, strict=True)
        full = [(miss.again_at, index) for miss, index in pairs if self._waits(call, miss, index)]
        if full:
            return min(full)[1] if len(set(asked)) == len(asked) else None
        return None if tried(failures) else self._chooser.resting(call, asked)

    def _waits(self, call: Call, miss: Miss, index: int) -> bool:
        """Whether the call may wait there for its turn, longer than it did."""
        given, allowed = miss.call.rate_wait_s, math.inf if call.rate_wait_s is None else call.rate_wait_s
        if not self._patient[index] or given is None or given >= allowed:
            return False
        return miss.fault.kind is FaultKind.RATE or isinstance(miss.outcome, RateLimited)

    def _again_at(self, outcome: object, fault: Fault) -> float:
        if isinstance(outcome, Refused) and outcome.retry_at is not None:
            return outcome.retry_at
        return math.inf if fault.retry_after_s is None else self.env.clock.monotonic() + fault.retry_after_s

    def _addressed(self, call: Call, index: int, asked: list[int], failures: list[Miss]) -> Call:
        """The call as this replica gets it: one attempt while another could answer."""
        left, wait, beside = call.tries_left, call.rate_wait_s, None
        if left is not None and failures:
            left = max(1, left - tried(failures))
        if sent(failures) + 1 < self._rules.attempts and self._chooser.has_well(call.model, asked):
            left, wait = 1, _RATE_WAIT_S if wait is None else min(wait, _RATE_WAIT_S)
            beside = partial(self._beside, index) if self._hedged[index] else None
        elif failures and index not in asked[:-1]:
            # The others said when they can answer: whoever could later than that is no better.
            sooner = min(miss.again_at for miss in failures)
            if sooner < math.inf:
                wait = min(math.inf if wait is None else wait, max(0.0, sooner - self.env.clock.monotonic()))
        # The first of those that all rest is probed at a pace, unless somebody outside could answer.
        only = not failures and (call.alone or call.rate_wait_s is None)
        alone = only and self._chooser.is_resting(index, call.model)
        target = self._routes[index].name
        return call.replace(target=target, tries_left=left, rate_wait_s=wait, alone=alone, beside=beside)

    async def _ask(self, index: int, call: Call) -> Reply | Exception:
        generation = self._chooser.begin(index)
        try:
            reply: Reply = await self._routes[index].handler(call)
            if reply.chunks is not None:
                reply = await begun(reply, call)
        except BaseException as error:
            self._chooser.end(index, generation)
            if not isinstance(error, asyncio.CancelledError | Exception):
                raise
            if is_late(error, call, self.env.clock):
                self._chooser.missed(index)
            return failure_of(error, call, self.env.clock)
        # What was asked beside has spoken for the replica that answered; this one was only slow.
        speaks = reply.ok and not (self._hedged[index] and reply.endpoint not in {"", self._routes[index].name})
        if reply.chunks is None:
            self._chooser.end(index, generation)
            if speaks:
                self._chooser.succeeded(index, call.model)
            return reply
        return at_delivered_end(reply, partial(self._ended, index, generation, call.model if speaks else None))

    def _ended(self, index: int, generation: int, model: str | None, end: End) -> None:
        """A stream is over; `model` is None where that says nothing about the replica."""
        self._chooser.end(index, generation)
        if model is None:
            return
        if end.how == "finished":
            self._chooser.succeeded(index, model)
        elif end.how == "failed" and end.error is not None:
            fault = classify(end.error, wall=self.env.clock.wall())
            if fault is not None:
                self._learn(index, model, end.error, fault)

    def _learn(self, index: int, model: str, outcome: Reply | BaseException, fault: Fault) -> None:
        if fault.kind in _HURTS and not fault.local:
            self._chooser.failed(index, model, exchange_of(outcome))
        elif isinstance(outcome, Refused) and not getattr(outcome, "sent", False):
            self._chooser.refused(index, model)

    async def _beside(self, index: int, call: Call) -> Reply:
        """A second request for what this replica is slow to answer, at another one."""
        other = self._chooser.next(call, None, (index,))
        other = index if other is None else other
        outcome = await self._ask(other, call.replace(target=self._routes[other].name, tries_left=1, beside=None))
        fault = None if isinstance(outcome, Reply) and outcome.ok else classify(outcome, wall=self.env.clock.wall())
        if fault is not None:
            self._learn(other, call.model, outcome, fault)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def reconfigure(self, **changes: Any) -> None:
        """Change `weights`, a mapping from names of replicas to numbers; at 0 a replica gets no further call.

        Raises:
            ConfigError: any other setting, an unknown name, a weight below 0, or none above.
        """
        self.change((), **changes)()

    def change(self, beside: Sequence[Bound], **changes: Any) -> Callable[[], None]:
        """As `reconfigure`; a name may be that of a replica of another balancer beside this one."""
        if set(changes) != {"weights"}:
            super().reconfigure(**changes)
        others = {name for other in beside if isinstance(other, BoundBalancer) for name in other.names}
        return self._chooser.weighing(changes["weights"], others)

    def rehome(self) -> None:
        """What was under way is lost."""
        self._chooser.rehome()
        for breaker in self._breakers:
            breaker.rehome()

    def gauges(self) -> dict[str, object]:
        """Calls at their agent's home, and per replica: calls, failures, whether it is ejected, what counts of it."""
        return self._chooser.gauges()


def _agent(call: Call) -> str | None:
    return call.context.agent


def _nobody(_: Call) -> str | None:
    return None


_KEYS: dict[str, Callable[[Call], str | None]] = {"agent": _agent, "none": _nobody}


def _has(handler: Handler, name: str) -> bool:
    """Whether a layer inside says that of itself."""
    while isinstance(handler, Bound):
        if getattr(handler, name, False):
            return True
        handler = handler.inner
    return False

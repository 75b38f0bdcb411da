"""Retry: repeats at the same endpoint what can help, is allowed, affordable and in time."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, ClassVar

from llmmw.algo.backoff import Progress, Room, Rules, cost_of, decide
from llmmw.algo.budget import RetryBudget
from llmmw.call import Attempt, Reply
from llmmw.errors import AmbiguousTimeout, UpstreamTimeout
from llmmw.events import RetryScheduled
from llmmw.fault import classify
from llmmw.layers.attempt import after, annotate, attempt_of, begun, exchange_of, failure_of
from llmmw.layers.base import Bound, Positioned
from llmmw.layers.hedge import Hedger
from llmmw.order import Role
from llmmw.settings import positive_seconds, seconds, settings, whole

if TYPE_CHECKING:
    from llmmw.algo.backoff import Verdict
    from llmmw.call import Call, Handler
    from llmmw.env import Env
    from llmmw.fault import Fault

_AT_FIRST = Progress()


@settings
class Retry(Positioned):
    """Repeats failed attempts with full jitter, obeying Retry-After, the caller's deadline and a budget.

    What is repeated is in the table of fault classes: lost connections before sending, 429, 5xx and answers that are
    none. A call that was sent and then lost may be done and billed, so it is repeated only with `duplicate_ok` (or
    once at an endpoint that says repeating is free, such as a local vLLM) and else ends as AmbiguousOutcome.
    A stream is repeated only before its first token; later it ends with StreamInterrupted.

    A 429 does not use up an attempt while all waits for 429s together stay within `rate_patience`. With a RateLimiter
    inside, its gate does that waiting, in order of priority; a wait beyond the deadline fails at once.

    Args:
        attempts: tries in all, the first included; 1 repeats nothing but 429s.
        backoff: the i-th wait is uniform in [0, min(max_backoff, backoff * 2^i)].
        max_backoff: longest wait of our own choosing; a server's Retry-After may be longer.
        rate_patience: how long one call may wait for 429s in all before they count as attempts; 0: they always do.
        budget: tokens of the retry budget per endpoint; a repetition costs 5 (10 for lost or broken answers), a
            success earns 1. When it is empty only a tenth of the traffic or one call per second is repeated.
        duplicate_ok: repeat also what the server may have done already.
        hedge: send a second request beside one that is slower than 95 of 100 (a stream's first token counts), if the
            call is deterministic (or `duplicate_ok`); at most 5 % more requests, none in the seconds after a 429 or
            where it would have to queue. The first answer counts, the other request is cancelled.

    Raises:
        ConfigError: a value that cannot work.
    """

    role: ClassVar[Role] = Role.RETRY
    attempts: int = 3
    backoff: float | str = 0.5
    max_backoff: float | str = 20.0
    rate_patience: float | str = 60.0
    budget: int = 500
    duplicate_ok: bool = False
    hedge: bool = False

    def __post_init__(self) -> None:
        whole("Retry(attempts=)", self.attempts, low=1, high=100)
        whole("Retry(budget=)", self.budget, low=0)
        object.__setattr__(self, "backoff", positive_seconds("Retry(backoff=)", self.backoff))
        object.__setattr__(self, "max_backoff", positive_seconds("Retry(max_backoff=)", self.max_backoff))
        object.__setattr__(self, "rate_patience", seconds("Retry(rate_patience=)", self.rate_patience))

    def bind(self, inner: Handler, env: Env) -> BoundRetry:
        """Running state: the budget."""
        rules = Rules(
            attempts=self.attempts,
            base_s=float(self.backoff),
            cap_s=float(self.max_backoff),
            rate_patience_s=float(self.rate_patience),
            duplicate_ok=self.duplicate_ok,
            idempotent="idempotent" in env.capabilities,
        )
        hedger = Hedger(inner, env, duplicate_ok=self.duplicate_ok) if self.hedge else None
        return BoundRetry(inner, env, rules, RetryBudget(self.budget), hedger)


class BoundRetry(Bound):
    """The loop of attempts at one endpoint."""

    repeats: ClassVar[bool] = True

    def __init__(
        self, inner: Handler, env: Env, rules: Rules, budget: RetryBudget, hedger: Hedger | None = None
    ) -> None:
        super().__init__(inner, env)
        self._hedger = hedger
        self._rules = rules
        self._budget = budget
        self.hedges = hedger is not None
        self._paced = _is_paced(inner)
        self._over_budget = 0

    async def __call__(self, call: Call, /) -> Reply:
        """Answer, repeating what may be repeated; the last refusal is returned, the last exception raised unchanged.

        Raises:
            AmbiguousOutcome: sent, lost, and not to be repeated.
            StreamInterrupted: from the reply's chunks, when a stream breaks after its first token.
        """
        self._budget.call_began()
        progress, attempts, cost = _AT_FIRST, tuple[Attempt, ...](), 0
        outcome: Reply | Exception | None = None
        try:
            while True:
                if self._hedger is not None and not attempts and self._hedger.suits(call):
                    outcome, attempts = await self._hedger.attempt(call)
                    progress = Progress(counted=len(attempts))
                else:
                    try:
                        outcome = await self.inner(call)
                        if outcome.chunks is not None:
                            outcome = await begun(outcome, call)
                    except (asyncio.CancelledError, Exception) as error:  # noqa: BLE001 — classified below
                        outcome = failure_of(error, call, self.env.clock)
                if isinstance(outcome, Reply) and outcome.ok:
                    self._budget.call_succeeded(cost)
                    return after(outcome, attempts) if attempts else outcome
                fault = classify(outcome, wall=self.env.clock.wall())
                assert fault is not None  # noqa: S101 — only a success is without fault
                if self._hedger is not None:
                    self._hedger.refused(fault)
                verdict = self._judge(call, progress, fault)
                cost = cost_of(fault, paced=self._paced)
                again = verdict.again and self._budget.take(cost, self.env.clock.monotonic(), exchange_of(outcome))
                wait_s = verdict.wait_s if again else 0.0
                attempts += (attempt_of(outcome, fault, call.target, wait_s),)
                if not again:
                    self._over_budget += verdict.again
                    return self._give_up(outcome, attempts)
                self.env.emit(RetryScheduled(attempts[-1].endpoint, fault.kind.value, wait_s))
                progress, outcome = verdict.progress, None
                await self.env.clock.sleep(wait_s)
        finally:
            outcome = None  # an exception whose traceback leads back to itself would wait for the garbage collector

    def gauges(self) -> dict[str, object]:
        """Tokens left in the budget, how many repetitions it refused, and second requests where there are any."""
        found: dict[str, object] = {"budget": self._budget.level, "budget_refusals": self._over_budget}
        return found if self._hedger is None else {**found, **self._hedger.gauges()}

    def rehome(self) -> None:
        """Requests that were given up belonged to the dead loop."""
        if self._hedger is not None:
            self._hedger.rehome()

    async def aclose(self) -> None:
        """Wait for requests that were given up."""
        if self._hedger is not None:
            await self._hedger.aclose()

    def _judge(self, call: Call, progress: Progress, fault: Fault) -> Verdict:
        deadline = call.deadline
        room = Room(
            left_s=None if deadline is None else deadline - self.env.clock.monotonic(),
            tries_left=call.tries_left,
            rate_wait_s=call.rate_wait_s,
            paced=self._paced,
        )
        return decide(self._rules, progress, fault, draw=self.env.rng.random(), room=room)

    def _give_up(self, outcome: Reply | Exception, attempts: tuple[Attempt, ...]) -> Reply:
        if isinstance(outcome, Reply):
            return outcome.replace(attempts=attempts)
        repeatable = self._rules.duplicate_ok or self._rules.idempotent
        if isinstance(outcome, UpstreamTimeout) and outcome.sent and not repeatable:
            said = outcome.message or "no complete answer in time"
            why = "not repeated, because the server may have done the work: Retry(duplicate_ok=True) allows it"
            raise AmbiguousTimeout(f"{said}; {why}", endpoint=outcome.endpoint, attempts=attempts) from outcome
        annotate(outcome, attempts)
        try:
            raise outcome
        finally:
            del outcome  # as in the loop


def _is_paced(inner: Handler) -> bool:
    """Whether a limiter stands inside, up to the endpoint."""
    while isinstance(inner, Bound):
        if inner.paces:
            return True
        inner = inner.inner
    return False

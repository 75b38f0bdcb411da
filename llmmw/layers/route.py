"""ErrorRouter: asks another endpoint when the first cannot answer, each at most once."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, ClassVar

from llmmw.call import Attempt, Reply
from llmmw.endpoints.replicas import PLACES, place_of
from llmmw.errors import AllEndpointsFailed, CircuitOpen, Closed, ConfigError, DeadlineExceeded
from llmmw.events import FellBack
from llmmw.fault import Fault, FaultKind, classify
from llmmw.fault.bodies import context_limit
from llmmw.layers.attempt import after, annotate, begun, failure_of, make_attempt
from llmmw.layers.base import Bound, Positioned
from llmmw.layers.routes import Failure, Route, answer_of, goes_elsewhere, history, route_to, words
from llmmw.order import Role
from llmmw.settings import seconds, settings, text, whole
from llmmw.wire import HTTPRequest

if TYPE_CHECKING:
    from collections.abc import Coroutine, Sequence

    from llmmw.call import Call, Handler
    from llmmw.env import Env

_ENDS_THE_CALL = (DeadlineExceeded, Closed)
"""Refusals that no endpoint can help: the caller is told this one, with everything that was tried before."""

_UNCOUNTED = frozenset({FaultKind.RATE.value, FaultKind.REFUSED.value})
"""Attempts that do not count against `max_total_attempts`: the server said when, or nothing was sent."""

_SHORTEST_WAIT_S = 0.05


@settings
class Fallback:
    """One fallback with its own model name and size.

    Args:
        endpoint: an `Endpoint`, a base URL, an async callable or a list of replicas, as `Stack.bind` takes it.
        model: name of the model there; by default the call's own.
        max_context: its context length in tokens. A prompt too long elsewhere is sent there only if this is larger
            than what was too small (or unknown).
    """

    endpoint: Any
    model: str | None = None
    max_context: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "endpoint", place_of("Fallback(endpoint=)", self.endpoint))
        if self.model is not None:
            text("Fallback(model=)", self.model)
        if self.max_context is not None:
            whole("Fallback(max_context=)", self.max_context)


@settings
class ErrorRouter(Positioned):
    """Falls back to other endpoints, in the order given, by class of the failure.

    Another endpoint is asked after lost connections, 5xx, answers that are none, rate limits with a long wait,
    refused credentials and spent quotas, open circuits, and prompts too long for the one before (a larger one only).
    It is not asked after a bad request, nor after a call that may be done already (unless `duplicate_ok`, or the
    endpoint that lost it says that repeating is free, such as a local vLLM).

    Each endpoint is asked once (with its own retries). An answer by another than the first has `reply.fallback` set
    and the answering endpoint in `reply.endpoint`. If all circuits are open and the call has a deadline, the earliest
    is waited for.

    Args:
        fallbacks: endpoints, base URLs, async callables, lists of such (replicas of one fallback), or
            `Fallback(endpoint, model=, max_context=)`.
        max_total_attempts: attempts over all endpoints; waits for a rate limit and refusals of our own do not count.
        rate_wait: while another endpoint could answer, a longer wait for a rate limit sends the call there.
        duplicate_ok: also send elsewhere what may be done already.
        on_content_filter: also send elsewhere what a content filter stopped; if nobody does better, the filtered
            answer is given.
        max_context: context length of the first endpoint in tokens, where its error messages do not name it.

    Raises:
        ConfigError: a value that cannot work.
        AllEndpointsFailed: from a call, when more than one endpoint was asked; one error for each. With one endpoint
            asked its own refusal or exception comes back unchanged, and a deadline that passes stays DeadlineExceeded.
    """

    role: ClassVar[Role] = Role.ROUTE
    fallbacks: Sequence[Any] = ()
    max_total_attempts: int = 6
    rate_wait: float | str = 2.0
    duplicate_ok: bool = False
    on_content_filter: bool = False
    max_context: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.fallbacks, list | tuple):
            raise ConfigError(f"ErrorRouter(fallbacks={self.fallbacks!r}): must be a list of {PLACES} or Fallback(...)")
        option = "ErrorRouter(fallbacks=)"
        found = tuple(entry if isinstance(entry, Fallback) else place_of(option, entry) for entry in self.fallbacks)
        whole("ErrorRouter(max_total_attempts=)", self.max_total_attempts)
        if self.max_context is not None:
            whole("ErrorRouter(max_context=)", self.max_context)
        object.__setattr__(self, "rate_wait", seconds("ErrorRouter(rate_wait=)", self.rate_wait))
        object.__setattr__(self, "fallbacks", found)

    @property
    def targets(self) -> tuple[object, ...]:
        """The fallbacks' endpoints, as `Stack.bind` needs them."""
        return tuple(entry.endpoint if isinstance(entry, Fallback) else entry for entry in self.fallbacks)

    def bind(self, inner: Handler, env: Env) -> BoundRouter:
        """Over one endpoint only, as in a stack without fallbacks."""
        return self.bind_fork([inner], env)

    def bind_fork(self, targets: Sequence[Handler], env: Env) -> BoundRouter:
        """Running state over one handler per endpoint, the engine's own first."""
        if len(targets) != 1 + len(self.fallbacks):
            raise ConfigError(f"ErrorRouter: {len(self.fallbacks)} fallbacks but {len(targets) - 1} bound handlers")
        routes = [route_to(targets[0], None, self.max_context)]
        for entry, handler in zip(self.fallbacks, targets[1:], strict=True):
            found = entry if isinstance(entry, Fallback) else Fallback(entry)
            routes.append(route_to(handler, found.model, found.max_context))
        return BoundRouter(routes, env, self)


class BoundRouter(Bound):
    """The endpoints in order; nothing is kept between calls."""

    def __init__(self, routes: Sequence[Route], env: Env, rules: ErrorRouter) -> None:
        super().__init__(routes[0].handler, env)
        self._routes = tuple(routes)
        self._rules = rules
        self._is_sole = len(routes) == 1 and not rules.on_content_filter

    async def __call__(self, call: Call, /) -> Reply:
        """Answer from the first endpoint that can.

        Raises:
            AllEndpointsFailed: several were asked and none could.
        """
        first: Reply | Exception | None = None
        if self._is_sole:  # only a failure needs what follows, and nearly every call comes this way
            try:
                first = await self.inner(call)
                if first.chunks is None and first.endpoint and first.ok:
                    return first
                first = await begun(first, call)
            except (asyncio.CancelledError, Exception) as error:  # noqa: BLE001 — judged below
                first = failure_of(error, call, self.env.clock)
        while True:
            failures: list[Failure] = []
            try:
                found = await self._ask_in_turn(call, failures, first)
                if found is not None:
                    return found
                rest = self._until_earliest(call, failures)
                if rest is None:
                    return self._fail(failures)
            finally:
                first = None
                failures.clear()  # exceptions whose tracebacks lead back to this frame
            await rest

    async def _ask_in_turn(self, call: Call, failures: list[Failure], first: Reply | Exception | None) -> Reply | None:
        """Ask each endpoint once while its predecessors' failures allow; None if none answered.

        Args:
            call: as the caller made it.
            failures: to be filled.
            first: what the first endpoint said, where it was asked already.
        """
        too_small, attempts = 0, tuple[Attempt, ...]()
        for index, route in enumerate(self._routes):
            if too_small and route.max_context is not None and route.max_context <= too_small:
                continue
            left = self._rules.max_total_attempts - sum(attempt.fault not in _UNCOUNTED for attempt in attempts)
            if left < 1:
                return None
            if failures:
                source = failures[-1].route.name or call.target
                self.env.emit(FellBack(source, route.name, failures[-1].fault.kind.value))
            addressed = self._addressed(call, index, left)
            if self._is_alone(call, index, addressed):
                addressed = addressed.replace(alone=True)
            asked = first if index == 0 else None
            outcome = await make_attempt(route.handler, addressed, self.env.clock) if asked is None else asked
            if isinstance(outcome, Reply) and outcome.ok and not self._rules.on_content_filter:
                return answer_of(outcome, route, attempts, fallback=index > 0)
            fault = classify(outcome, wall=self.env.clock.wall())
            if isinstance(outcome, Reply) and (fault is None or (outcome.ok and not self._goes_on(fault, index))):
                return answer_of(outcome, route, attempts, fallback=index > 0)
            assert fault is not None  # noqa: S101 — only a reply can be without fault
            failures.append(Failure(route, addressed, outcome, fault))
            attempts += history(failures[-1])
            if not self._goes_on(fault, index):
                return None
            if fault.kind is FaultKind.CONTEXT_LENGTH:
                too_small = max(too_small, context_limit(fault.message) or route.max_context or 0)
        return None

    def _goes_on(self, fault: Fault, index: int) -> bool:
        """Whether the next endpoint is asked after this failure."""
        if index + 1 == len(self._routes):
            return False
        if fault.kind is FaultKind.CONTENT_FILTER:
            return self._rules.on_content_filter
        return goes_elsewhere(fault, duplicate_ok=self._rules.duplicate_ok or self._routes[index].idempotent)

    def _addressed(self, call: Call, index: int, left: int) -> Call:
        """The call as this endpoint gets it."""
        if len(self._routes) == 1:
            return call
        rate_wait_s = float(self._rules.rate_wait) if index + 1 < len(self._routes) else None
        if index == 0:
            return call.replace(tries_left=left, rate_wait_s=rate_wait_s)
        route = self._routes[index]
        model = route.model or call.model
        payload = {**call.payload, "model": model} if route.model and call.op != "function" else call.payload
        # An HTTP edge's own request holds the first endpoint's URL and credential: nothing of it may go elsewhere.
        native = None if isinstance(call.native, HTTPRequest) else call.native
        return call.replace(
            target=route.name, model=model, payload=payload, native=native, tries_left=left, rate_wait_s=rate_wait_s
        )

    def _is_alone(self, call: Call, index: int, addressed: Call) -> bool:
        """Whether this endpoint rests like all others, and since the least time: then there is nobody better."""
        breaker = self._routes[index].breaker
        since = None if breaker is None or len(self._routes) == 1 else breaker.rests_since(addressed)
        if since is None:
            return False
        for other, route in enumerate(self._routes):
            if other != index:
                rests = None if route.breaker is None else route.breaker.rests_since(self._addressed(call, other, 1))
                if rests is None or (rests, -other) > (since, -index):
                    return False
        return True

    def _until_earliest(self, call: Call, failures: list[Failure]) -> Coroutine[Any, Any, None] | None:
        """The wait for the first open circuit that may be asked again, where all are open and the deadline allows."""
        deadline, now = call.deadline, self.env.clock.monotonic()
        moments = [failure.outcome.retry_at for failure in failures if isinstance(failure.outcome, CircuitOpen)]
        known = [moment for moment in moments if moment is not None]
        if deadline is None or not known or len(known) != len(failures):
            return None
        if max(min(known) - now, _SHORTEST_WAIT_S) >= deadline - now:
            return None
        news: list[asyncio.Future[None]] = []
        for index, failure in enumerate(failures):
            probed = None if failure.route.breaker is None else failure.route.breaker.news(failure.call)
            if probed is not None:  # the probe's end is worth waiting for, however long that takes
                known[index] = probed[0]
                news.append(probed[1])
        return self._rest(max(min(*known, deadline) - now, _SHORTEST_WAIT_S), news)

    async def _rest(self, wait_s: float, news: list[asyncio.Future[None]]) -> None:
        if not news:
            await self.env.clock.sleep(wait_s)
            return
        try:
            await asyncio.wait(news, timeout=wait_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for one in news:
                one.cancel()

    def _fail(self, failures: list[Failure]) -> Reply:
        attempts = tuple(attempt for failure in failures for attempt in history(failure))
        filtered = next((f for f in failures if isinstance(f.outcome, Reply) and f.outcome.ok), None)
        if filtered is not None:
            return after(filtered.outcome, attempts).replace(fallback=filtered.route is not self._routes[0])
        outcome = failures[-1].outcome
        if len(failures) == 1 or isinstance(outcome, _ENDS_THE_CALL):
            if isinstance(outcome, Reply):
                return outcome.replace(attempts=attempts)
            annotate(outcome, attempts)
            try:
                raise outcome
            finally:
                del outcome  # its traceback leads back to this frame
        told = "; ".join(f"{failure.route.name or 'the endpoint'}: {words(failure)}" for failure in failures)
        errors = [failure.as_error(self.env.clock.wall()) for failure in failures]
        raise AllEndpointsFailed(f"all {len(failures)} endpoints failed: {told}", errors, attempts=attempts)

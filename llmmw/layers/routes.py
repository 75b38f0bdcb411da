"""What the router keeps of an endpoint, and of its failure to answer one call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import msgspec

from llmmw.call import Attempt, Reply
from llmmw.fault import Fault, FaultKind, error_of
from llmmw.layers.attempt import after, attempt_of
from llmmw.layers.base import Bound

if TYPE_CHECKING:
    import asyncio

    from llmmw.call import Call, Handler

_ELSEWHERE = frozenset({
    FaultKind.NOT_SENT, FaultKind.RATE, FaultKind.QUOTA, FaultKind.AUTH, FaultKind.SERVER, FaultKind.MALFORMED,
    FaultKind.CONTEXT_LENGTH,
})  # fmt: skip
"""Classes that another endpoint (another credential, a larger context) may not share."""

_REFUSED_ELSEWHERE = frozenset({"CircuitOpen", "RateLimited", "QueueFull"})
"""Our own refusals that concern one endpoint; a deadline or a closed engine concerns all."""


def goes_elsewhere(fault: Fault, *, duplicate_ok: bool) -> bool:
    """Whether another endpoint may be asked after this failure (`duplicate_ok`: also where it may be done already)."""
    if fault.kind is FaultKind.AMBIGUOUS:
        return duplicate_ok
    if fault.kind is FaultKind.REFUSED:
        return fault.code in _REFUSED_ELSEWHERE
    return fault.kind in _ELSEWHERE


@runtime_checkable
class Resting(Protocol):
    """A layer that stops asking its endpoint for a while: a circuit breaker, or a balancer over several."""

    def rests_since(self, call: Call) -> float | None:
        """Until when the endpoint was well for calls like this one; None where it is asked."""
        ...

    def news(self, call: Call) -> tuple[float, asyncio.Future[None]] | None:
        """While a probe is under way: until when it is waited for, and a future that is done when it has ended."""
        ...


class Route(msgspec.Struct, frozen=True):
    """An endpoint, as the router sees it."""

    handler: Any
    """The outermost layer towards it."""
    name: str
    model: str | None
    """Its own name for the model; None: the call's."""
    max_context: int | None
    idempotent: bool
    """What got lost there may be asked again elsewhere."""
    breaker: Resting | None


class Failure(msgspec.Struct, frozen=True):
    """Why one endpoint did not answer."""

    route: Route
    call: Call
    """As the endpoint got it."""
    outcome: Any
    """The refusal (a Reply) or the exception."""
    fault: Fault

    def as_error(self, wall: float) -> Exception:
        """The refusal as an exception; `wall` is the wall-clock time now."""
        if isinstance(self.outcome, Reply):
            return error_of(self.outcome, wall=wall)
        found: Exception = self.outcome
        return found


def answer_of(reply: Reply, route: Route, before: tuple[Attempt, ...], *, fallback: bool) -> Reply:
    """The endpoint's answer, with its name and what was tried before."""
    if not fallback and not before and reply.endpoint:
        return reply
    told = after(reply, before + reply.attempts)
    return told.replace(endpoint=reply.endpoint or route.name, fallback=fallback)


def history(failure: Failure) -> tuple[Attempt, ...]:
    """The attempts that a Retry inside recorded, or this one."""
    known: tuple[Attempt, ...] = getattr(failure.outcome, "attempts", ())
    return known or (attempt_of(failure.outcome, failure.fault, failure.route.name),)


def words(failure: Failure) -> str:
    """The failure in a few words."""
    fault = failure.fault
    if isinstance(failure.outcome, Reply):
        said = f" ({fault.message})" if fault.message else ""
        return f"{fault.kind.value}, status {failure.outcome.status}{said}"
    later = f", again in {fault.retry_after_s:.1f} s" if fault.retry_after_s else ""
    return f"{fault.kind.value}, {type(failure.outcome).__name__}{later}"


def route_to(handler: Handler, model: str | None, max_context: int | None) -> Route:
    """What the layers towards an endpoint, and the endpoint, say about themselves."""
    endpoint, breaker = handler, None
    while isinstance(endpoint, Bound):
        breaker = endpoint if isinstance(endpoint, Resting) else breaker
        if hasattr(endpoint, "capabilities"):
            break  # it speaks for several endpoints
        endpoint = endpoint.inner
    name = getattr(endpoint, "name", "")
    idempotent = "idempotent" in getattr(endpoint, "capabilities", ())
    return Route(handler, name if isinstance(name, str) else "", model, max_context, idempotent, breaker)

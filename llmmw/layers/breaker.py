"""CircuitBreaker: stops asking an endpoint that does not answer, and a credential that is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import msgspec

from llmmw.algo.circuit import CircuitRules
from llmmw.call import Reply
from llmmw.errors import CircuitOpen
from llmmw.events import CircuitChanged, RefusedEarly
from llmmw.fault import HURTS_CREDENTIAL, HURTS_ENDPOINT, Fault, FaultKind, classify
from llmmw.layers.attempt import exchange_of
from llmmw.layers.base import Bound, Positioned
from llmmw.layers.lines import Line, Lines
from llmmw.order import Role
from llmmw.settings import number, positive_seconds, settings, whole
from llmmw.stream import at_end
from llmmw.stream.copies import own_error

if TYPE_CHECKING:
    import asyncio

    from llmmw.algo.circuit import Result, Standing, Ticket
    from llmmw.call import Call, Handler
    from llmmw.env import Env
    from llmmw.stream import End


@settings
class CircuitBreaker(Positioned):
    """One circuit per endpoint and model: opens when it fails, then lets single probes through.

    Failures are lost or refused connections, 5xx, time-outs and answers that are none; a bad request, a 429, a full
    pool and a cancelled call say nothing about the endpoint. A refused credential (401, 402, spent quota; 403 after
    `consecutive` in a row) rests alone, and its callers get the server's own refusal again without a request.

    Under an ErrorRouter whose endpoints all rest, the one that was well last is probed every `open_for` seconds,
    however long its rest is: there is nobody else to ask.

    Args:
        window: seconds looked back.
        min_calls: fewer outcomes in the window open nothing.
        failure_share: share of failures among the calls of the window, those under way included, that opens.
        consecutive: failures in a row, in the order of the calls, that open.
        open_for: first rest; doubles with each failed probe (or as long as the server's Retry-After).
        max_open: longest rest.
        probe_timeout: a probe without outcome for so long no longer keeps others from probing.

    Raises:
        ConfigError: a value that cannot work.
        CircuitOpen: from a call, with `retry_at`.
    """

    role: ClassVar[Role] = Role.BREAKER
    window: float | str = 30.0
    min_calls: int = 10
    failure_share: float = 0.5
    consecutive: int = 5
    open_for: float | str = 5.0
    max_open: float | str = 60.0
    probe_timeout: float | str = 30.0

    def __post_init__(self) -> None:
        for name in ("window", "open_for", "max_open", "probe_timeout"):
            object.__setattr__(self, name, positive_seconds(f"CircuitBreaker({name}=)", getattr(self, name)))
        whole("CircuitBreaker(min_calls=)", self.min_calls)
        whole("CircuitBreaker(consecutive=)", self.consecutive)
        number("CircuitBreaker(failure_share=)", self.failure_share, high=1, open_low=True)
        number("CircuitBreaker(max_open=)", float(self.max_open), low=float(self.open_for))

    def bind(self, inner: Handler, env: Env) -> BoundBreaker:
        """Running state: the circuits."""
        rules = CircuitRules(
            window_s=float(self.window),
            min_calls=self.min_calls,
            failure_share=self.failure_share,
            consecutive=self.consecutive,
            open_s=float(self.open_for),
            max_open_s=float(self.max_open),
            lease_s=float(self.probe_timeout),
        )
        return BoundBreaker(inner, env, rules)


class _Admitted(msgspec.Struct, frozen=True):
    """A call that was let through, and to whom its outcome is owed."""

    call: Call
    line: Line
    ticket: Ticket
    credential: Line | None
    own_ticket: Ticket | None


_ABANDONED = Fault(FaultKind.CANCELLED)


def _speaks(fault: Fault) -> Result:
    """What a failure says about the endpoint."""
    return "failed" if fault.kind in HURTS_ENDPOINT and not fault.local else "neutral"


class BoundBreaker(Bound):
    """The circuits of one endpoint."""

    def __init__(self, inner: Handler, env: Env, rules: CircuitRules) -> None:
        super().__init__(inner, env)
        self._endpoints = Lines(rules)
        self._credentials = Lines(rules)

    async def __call__(self, call: Call, /) -> Reply:
        """Answer, unless the endpoint rests; its outcome is taken in at the end of the body.

        Raises:
            CircuitOpen: the endpoint, or this credential there, is not asked now.
        """
        now = self.env.clock.monotonic()
        credential = self._credentials.find((call.target, call.model, call.namespace)) if self._credentials else None
        own_ticket = None
        if credential is not None:
            own_ticket = credential.circuit.admit(now)
            if own_ticket is None:
                return self._refused_again(call, credential, now)
        key = (call.target, call.model)
        line = self._endpoints.of(key)
        ticket = line.circuit.admit(now, alone=call.alone)
        if ticket is None:
            if credential is not None and own_ticket is not None:
                credential.circuit.record(own_ticket, "neutral", now)
            self.env.emit(RefusedEarly("breaker", "circuit open"))
            raise self._open_error(call, line)
        if line.circuit.state != line.told:
            self._tell(call, line)
        try:
            reply = await self.inner(call)
        except BaseException as error:
            self._judge(_Admitted(call, line, ticket, credential, own_ticket), error)
            raise
        if reply.chunks is None and reply.ok and credential is None and not reply.exchange:  # as nearly always
            self._take_in(call, line, ticket, "ok", self.env.clock.monotonic())
            return reply
        admitted = _Admitted(call, line, ticket, credential, own_ticket)
        if reply.chunks is None:
            self._judge(admitted, reply)
            return reply
        return at_end(reply, lambda end: self._ended(admitted, reply, end))

    def rests_since(self, call: Call) -> float | None:
        """Until when the endpoint was well for calls like this one; None where its circuit is closed."""
        line = self._endpoints.get((call.target, call.model))
        return None if line is None or line.circuit.state == "closed" else line.circuit.well_until

    def standing(self, target: str, model: str) -> Standing:
        """What would become of such a call now: let through, a probe, or refused."""
        line = self._endpoints.get((target, model))
        return "well" if line is None else line.circuit.standing(self.env.clock.monotonic())

    def news(self, call: Call) -> tuple[float, asyncio.Future[None]] | None:
        """While a probe is under way: until when it is waited for, and a future that is done when it has ended."""
        line = self._endpoints.get((call.target, call.model))
        until = None if line is None else line.circuit.leased_until()
        return None if line is None or until is None else (until, line.news())

    def rehome(self) -> None:
        """Probes in flight are gone, and so is who waited for them."""
        for line in (*self._endpoints.values(), *self._credentials.values()):
            line.circuit.release()
            line.waiters = set()

    def gauges(self) -> dict[str, object]:
        """How many circuits are not closed."""
        lines, credentials = list(self._endpoints.values()), list(self._credentials.values())
        return {
            "not_closed": sum(line.circuit.state != "closed" for line in lines),
            "credentials_not_closed": sum(line.circuit.state != "closed" for line in credentials),
        }

    def _ended(self, admitted: _Admitted, reply: Reply, end: End) -> None:
        if end.how == "finished":
            self._judge(admitted, reply)
        elif end.how == "failed" and end.error is not None:
            self._judge(admitted, end.error)
        else:
            # The reader left: the endpoint was answering, but nobody knows whether it would have to the end.
            self._settle(admitted, _ABANDONED, 0, reply)

    def _judge(self, admitted: _Admitted, outcome: Reply | BaseException) -> None:
        reply = outcome if isinstance(outcome, Reply) else None
        # Whatever a content filter did to an answer, its endpoint answers.
        well = reply is not None and reply.ok
        fault = None if well else classify(outcome, wall=self.env.clock.wall())
        self._settle(admitted, fault, exchange_of(outcome), outcome)

    def _settle(self, admitted: _Admitted, fault: Fault | None, exchange: int, outcome: Reply | BaseException) -> None:
        now, draw = self.env.clock.monotonic(), 0.0 if fault is None else self.env.rng.random()
        call, line = admitted.call, admitted.line
        asked = None if fault is None else fault.retry_after_s
        result: Result = "ok" if fault is None else _speaks(fault)
        if exchange:
            # One request that failed for many calls is one failure.
            result = "neutral" if line.is_known(exchange) else result
        self._take_in(call, line, admitted.ticket, result, now, draw, asked)
        if fault is not None or admitted.credential is not None:
            self._settle_credential(admitted, fault, outcome, now, draw)

    def _take_in(
        self,
        call: Call,
        line: Line,
        ticket: Ticket,
        result: Result,
        now: float,
        draw: float = 0.0,
        asked_s: float | None = None,
    ) -> None:
        """What the endpoint's circuit learns, and who hears of what that changes."""
        line.circuit.record(ticket, result, now, draw=draw, asked_s=asked_s)
        if line.circuit.state != line.told and self._tell(call, line) == "open":
            self._shed(call, line)
        if line.waiters:
            line.wake()

    def _settle_credential(
        self, admitted: _Admitted, fault: Fault | None, outcome: Reply | BaseException, now: float, draw: float
    ) -> None:
        # Which key a user's function uses is its own secret; one of several must not stop the others.
        hurts = fault is not None and fault.kind in HURTS_CREDENTIAL and admitted.call.op != "function"
        line, ticket = admitted.credential, admitted.own_ticket
        if line is None and hurts:
            call = admitted.call
            key = (call.target, call.model, call.namespace)
            line = self._credentials.of(key)
            ticket = line.circuit.admit(now)
        if line is None or ticket is None:
            return
        if fault is not None and hurts:
            # Without the SDK's own exception, which holds a request with its key.
            line.refusal = outcome.replace(native=None) if isinstance(outcome, Reply) else _keepable(outcome)
            line.why = fault.kind.value if fault.status is None else f"{fault.kind.value}, status {fault.status}"
        # A 403 may be about one prompt only, and a 400 is known by its words, which may quote one.
        decisive = fault is not None and fault.status not in {400, 403}
        result: Result = "failed" if hurts else "ok" if fault is None else "neutral"
        line.circuit.record(ticket, result, now, draw=draw, decisive=decisive)
        self._tell(admitted.call, line, " (credential)")

    def _tell(self, call: Call, line: Line, whose: str = "") -> str:
        """Emit a change of state; the new state, or "" where it is the same."""
        state = line.circuit.state
        if state == line.told:
            return ""
        line.told = state
        self.env.emit(CircuitChanged(call.target + whose, state))
        return state

    def _shed(self, call: Call, line: Line) -> None:
        """Fail at once what waits below for the endpoint that was just declared dead."""
        inner = self.inner
        while isinstance(inner, Bound):
            inner.shed(call, lambda: self._open_error(call, line))
            inner = inner.inner

    def _open_error(self, call: Call, line: Line) -> CircuitOpen:
        now = self.env.clock.monotonic()
        retry_at = line.circuit.retry_at(now, alone=call.alone)
        where = call.target or "the endpoint"
        return CircuitOpen(
            f"{where} failed too often for model {call.model!r}; asked again in {retry_at - now:.1f} s",
            retry_at=retry_at,
            retry_after_s=retry_at - now,
        )

    def _refused_again(self, call: Call, line: Line, now: float) -> Reply:
        """What the server would say: its own refusal, without asking it."""
        self.env.emit(RefusedEarly("breaker", "credential refused"))
        if isinstance(line.refusal, Reply):
            return line.refusal
        if line.refusal is not None:
            raise _keepable(line.refusal) or line.refusal
        retry_at = line.circuit.retry_at(now)
        where = call.target or "the endpoint"
        raise CircuitOpen(
            f"{where} refused this credential ({line.why}); asked again in {retry_at - now:.1f} s",
            retry_at=retry_at,
            retry_after_s=retry_at - now,
        )


def _keepable(error: BaseException) -> Exception | None:
    """A copy without traceback and cause, so that it keeps no request alive; None where it cannot be copied."""
    found = own_error(error)
    if found is error or not isinstance(found, Exception):
        return None
    found.__cause__ = None
    return found

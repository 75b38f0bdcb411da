"""The rate limiter at work: which bucket a call belongs to, what it needs, and what its outcome gives back.

How permits are granted: `gate.py`; what a bucket may spend: `allowance.py`.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections import OrderedDict
from functools import partial
from hashlib import sha256
from itertools import islice
from typing import TYPE_CHECKING, Any

import msgspec

from llmmw import fault as faults
from llmmw.algo import estimate
from llmmw.algo.headers import feedback
from llmmw.algo.throttle import LOCAL_RAMP_PERIOD_S
from llmmw.answer import NO_USAGE, Usage
from llmmw.call import Reply
from llmmw.endpoints.running import run_inside
from llmmw.errors import ConfigError, DeadlineExceeded, RateLimited, UpstreamTimeout
from llmmw.events import LimiterPaused, LimiterWaited, RefusedEarly
from llmmw.fault import FaultKind
from llmmw.interrupt import is_unsent
from llmmw.layers.base import Bound, endpoint_below
from llmmw.layers.firsttoken import FirstToken
from llmmw.layers.gate import Gate, Waiting, late
from llmmw.stream import at_end

if TYPE_CHECKING:
    from collections.abc import Callable

    from llmmw.algo.queue import Flow
    from llmmw.call import Call, Handler
    from llmmw.env import Env
    from llmmw.layers.allowance import Limits
    from llmmw.layers.limit import RateLimiter
    from llmmw.layers.permit import Permit
    from llmmw.stream import End

_BUSY = frozenset({503, 529})
_MAX_BUCKETS = 1000
"""More are kept only while they hold something back."""
_LOOKED_AT = 4
"""Buckets that a new one beyond that many looks at: more than one, so that a table that grew large shrinks again."""
_NOT_SENT = frozenset({FaultKind.NOT_SENT, FaultKind.REFUSED})


class BoundLimiter(Bound):
    """A rate limiter at work in front of one endpoint."""

    paces = True

    def __init__(self, layer: RateLimiter, inner: Handler, env: Env) -> None:
        super().__init__(inner, env)
        self._layer = layer
        self._limits = self._limits_of(layer)
        self._gates: OrderedDict[object, Gate] = OrderedDict()
        self._endpoint = endpoint_below(inner)
        self._counter = None if layer.shared is None else layer.shared.open()
        self._ignored = 0
        self._estimated = 0

    async def __call__(self, call: Call, /) -> Reply:
        """Wait for a permit, make the call, and give back what it did not use.

        Raises:
            RateLimited: no permit can come before the call's deadline, or it needs more tokens than the limit.
        """
        gate = self._gate(call)
        around = run_inside(self._endpoint)
        if around is not None and around not in gate.allowance.lent:
            gate.allowance.lent.add(around)
            around.at_end(partial(gate.allowance.lent.discard, around))
        amounts, choices = self._needs(gate, call) if gate.allowance.tokens else ((), 1)
        permit = gate.admit(amounts, call.width) or await self._wait(gate, call, amounts)
        permit.choices = choices
        try:
            reply = await self.inner(call)
        except BaseException as error:
            self._failed(gate, permit, call, error)
            raise
        if reply.status >= 400:  # noqa: PLR2004 — HTTP's own boundary
            self._failed(gate, permit, call, reply)
        elif reply.chunks is None:
            self._succeeded(gate, permit, reply)
        else:
            self._hear(gate, permit, reply)
            judged = self._limits.gradient
            told = FirstToken(call.op, partial(gate.allowance.first_token, permit)).read if judged else None
            return at_end(reply, partial(self._stream_ended, gate, permit, call), told)
        return reply

    def reconfigure(self, **changes: Any) -> None:
        """Change settings while running (on the home loop), effective at once; records and waiters stay.

        Which limits there are stays as it was: a limit can be raised or lowered, not added or removed.

        Raises:
            ConfigError: a value that cannot work, or a limit added or removed.
        """
        try:
            layer = dataclasses.replace(self._layer, **changes)
        except TypeError as error:
            raise ConfigError(f"reconfigure(): {error}") from None
        limits = self._limits_of(layer)
        if _shape(limits) != _shape(self._limits) or (layer.per, layer.shared) != (self._layer.per, self._layer.shared):
            raise ConfigError("reconfigure(): limits can be raised or lowered while running, not added or removed")
        self._layer, self._limits = layer, limits
        for gate in self._gates.values():
            gate.resize(limits)

    def most_at_once(self, call: Call) -> int | None:
        """The slots there are now for calls like this one."""
        aimd = self._gate(call).allowance.aimd
        return super().most_at_once(call) if aimd is None else aimd.limit

    def shed(self, call: Call, make_error: Callable[[], Exception]) -> int:
        """Fail the waiters for this call's target and model."""
        return sum(gate.shed(call.target, call.model, make_error) for gate in self._gates.values())

    def rehome(self) -> None:
        """Drop waiters, timers and limiters of the dead loop; keep what was spent and learnt."""
        for gate in self._gates.values():
            gate.rehome()

    async def aclose(self) -> None:
        """Refuse whoever still waits."""
        await asyncio.gather(*(gate.aclose() for gate in self._gates.values()))
        if self._counter is not None:
            await self._counter.aclose()

    def gauges(self) -> dict[str, object]:
        """Readings, summed over the buckets."""
        gates = list(self._gates.values())
        held = [gate.allowance for gate in gates]
        now = self.env.clock.monotonic()
        found: dict[str, object] = {
            "buckets": len(gates),
            "in_use": sum(each.in_use for each in held),
            "waiting": sum(len(gate.queue) for gate in gates),
            "pauses": sum(each.pauses for each in held),
            "paused_s": max([0.0, *(each.pace.until - now for each in held)]),
            "usage_estimated": self._estimated,
            "headers_ignored": self._ignored,
        }
        slots = [each.aimd.limit for each in held if each.aimd is not None]
        if slots:
            found["concurrency"] = sum(slots)
        rates = [each.pace.learnt for each in held if each.pace.learnt is not None]
        if rates:
            found["learnt_per_s"] = sum(rates)
        leases = [each.leases for each in held if each.leases is not None]
        if leases:
            found["shared_by"] = max(each.members for each in leases)
            found["shared_lost"] = sum(each.is_lost for each in leases)
        for name, ledger in (pair for each in held for pair in each.ledgers()):
            key = f"{name}_in_window"
            found[key] = int(str(found.get(key, 0))) + sum(units for _, units in ledger.record(now))
        return found

    def _limits_of(self, layer: RateLimiter) -> Limits:
        limits = layer.limits()
        if limits.ramp_s and "idempotent" in self.env.capabilities:  # a local server: refusals come at once
            return msgspec.structs.replace(limits, ramp_s=LOCAL_RAMP_PERIOD_S)
        return limits

    # -- a call's way -------------------------------------------------------------------------------------------

    def _gate(self, call: Call) -> Gate:
        per = self._layer.per
        key: object
        if per == "key+model":
            key = (call.namespace, call.model)
        else:
            key = call.namespace if per == "key" else call.model if per == "model" else None
        gate = self._gates.get(key)
        if gate is None:
            if len(self._gates) >= _MAX_BUCKETS:
                self._forget_idle()
            gate = self._gates[key] = Gate(self._limits, self.env)
            if self._counter is not None and self._layer.shared is not None:
                measures = tuple(name for name, _ in gate.allowance.ledgers())
                told = repr((call.target, per, key, measures, self._limits.window))
                gate.share(self._layer.shared, self._counter, sha256(told.encode("utf-8", "replace")).digest())
        return gate

    def _forget_idle(self) -> None:
        """Keys come and go (a tenant each): buckets that hold nothing back need not be remembered."""
        now, gates = self.env.clock.monotonic(), self._gates
        for key, gate in [*islice(gates.items(), _LOOKED_AT)]:
            if gate.queue or not gate.allowance.idle(now):
                gates.move_to_end(key)
                continue
            del gates[key]
            if gate.allowance.leases is not None:
                gate.allowance.leases.retire()

    def _needs(self, gate: Gate, call: Call) -> tuple[tuple[int, ...], int]:
        """Tokens to reserve, one figure per token limit, and how many answers the call asks for.

        Raises:
            RateLimited: more than a whole limit, with oversize="refuse".
        """
        payload = call.payload
        prompt, choices = estimate.prompt_tokens(payload), estimate.choices(payload)
        cap = estimate.output_cap(payload)
        told = cap is not None and self._layer.reserve == "max"
        output = (cap if cap is not None and told else gate.allowance.learned.expect(cap)) * choices
        found = tuple(
            [
                prompt + output if name == "total" else prompt if name == "input" else output
                for name, _ in gate.allowance.tokens
            ]
        )
        if self._layer.oversize == "refuse":
            for (name, ledger), amount in zip(gate.allowance.tokens, found, strict=True):
                if amount > ledger.limit:
                    self.env.emit(RefusedEarly("limit", "oversize"))
                    raise RateLimited(f"about {amount} {name} tokens: more than the whole limit of {ledger.limit}")
        return found, choices

    async def _wait(self, gate: Gate, call: Call, amounts: tuple[int, ...]) -> Permit:
        began = self.env.clock.monotonic()
        tenant, agent = call.context.tenant, call.context.agent or ""
        flow = (tenant, agent) if tenant else agent
        self._refuse_hopeless(gate, call, amounts, flow, began)
        waiting = Waiting(call, amounts, asyncio.get_running_loop().create_future())
        entry = gate.enqueue(waiting, priority=call.priority, flow=flow)
        urgency = call.urgency
        unsubscribe = None if urgency is None else urgency.subscribe(lambda: gate.move(entry))
        try:
            permit = await waiting.future
        except RateLimited:
            self.env.emit(RefusedEarly("limit", "deadline"))
            raise
        except BaseException:
            gate.leave(entry)
            raise
        finally:
            if unsubscribe is not None:
                unsubscribe()
        waited = self.env.clock.monotonic() - began
        if waited > 0:
            self.env.emit(LimiterWaited(call.target, waited, call.context.agent))
        return permit

    def _refuse_hopeless(self, gate: Gate, call: Call, amounts: tuple[int, ...], flow: Flow, now: float) -> None:
        """A call whose permit cannot come in time learns it now, when there is still time for something else."""
        deadline, patience = call.deadline, call.rate_wait_s
        if deadline is None and patience is None:
            return
        soonest = gate.predict(amounts, call.priority, flow)
        too_late = deadline is not None and soonest >= deadline
        if too_late or (patience is not None and soonest - now > patience):
            self.env.emit(RefusedEarly("limit", "deadline" if too_late else "another endpoint is sooner"))
            raise late(soonest, now)

    def _succeeded(self, gate: Gate, permit: Permit, reply: Reply) -> None:
        usage = reply.usage
        if permit.amounts and not usage.reported:
            self._estimated += 1
        if reply.headers:
            self._hear(gate, permit, reply)
        gate.finish(permit, usage, well=True)

    def _failed(self, gate: Gate, permit: Permit, call: Call, outcome: Reply | BaseException) -> None:
        if isinstance(outcome, Reply):
            self._hear(gate, permit, outcome)
        self._judge(gate, permit, call, outcome, NO_USAGE)

    def _stream_ended(self, gate: Gate, permit: Permit, call: Call, end: End) -> None:
        if permit.amounts and not (end.usage.reported and end.how == "finished"):
            self._estimated += 1
        if end.error is None:
            gate.finish(permit, end.usage, well=end.how == "finished")
        else:
            self._judge(gate, permit, call, end.error, end.usage)

    def _judge(self, gate: Gate, permit: Permit, call: Call, outcome: Reply | BaseException, usage: Usage) -> None:
        """Give back what this failure entitles to (SPEC 4, Refund).

        A call that was cancelled after it went inside counts as sent, unless the pool has noted that it was not.
        """
        fault = faults.classify(outcome, wall=self.env.clock.wall())
        kind = None if fault is None else fault.kind
        if fault is not None and kind is FaultKind.RATE:
            pause = gate.refused(call, permit, fault.retry_after_s)
            if pause:
                self.env.emit(LimiterPaused(call.target, pause))
        elif is_unsent(outcome) or (kind in _NOT_SENT and not (isinstance(outcome, DeadlineExceeded) and outcome.sent)):
            gate.give_back(permit)
        else:
            if isinstance(outcome, UpstreamTimeout) or (fault is not None and fault.status in _BUSY):
                gate.allowance.overloaded(permit)
            gate.finish(permit, usage, well=fault is None)

    def _hear(self, gate: Gate, permit: Permit, reply: Reply) -> None:
        """Apply the server's own figures."""
        if not self._layer.headers or not reply.headers:
            return
        told = feedback(reply.headers, self.env.clock.wall())
        self._ignored += told.ignored
        if told.readings:
            gate.hear(told.readings, permit.started)
        allowance = gate.allowance
        if told.waiting is not None and allowance.aimd is not None and reply.ok:
            allowance.aimd.queued(told.waiting, allowance.in_use, self.env.clock.monotonic())


def _shape(limits: Limits) -> tuple[object, ...]:
    measures = [name for name, _ in limits.tokens]
    return limits.rpm is None, measures, limits.slots is None, limits.gradient, limits.window

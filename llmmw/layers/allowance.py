"""What one bucket may spend: requests, tokens and slots, taken together and given back exactly once.

`gate.py` decides who gets it.
"""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING

import msgspec

from llmmw.algo.aimd import Aimd
from llmmw.algo.bucket import Ledger, burst_of
from llmmw.algo.estimate import LearnedOutput
from llmmw.algo.gradient import Gradient2
from llmmw.algo.pace import Pace
from llmmw.layers.permit import Permit
from llmmw.layers.units import Units

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from llmmw.algo.headers import Reading
    from llmmw.answer import Usage
    from llmmw.env import Env
    from llmmw.layers.leases import Leases

_MAX_JITTER_S = 5.0
_JITTER = 0.1
"""Re-admission is spread over a tenth of the pause, so that processes behind one key do not come back together."""
_LEARNT_FOR_S = 3600.0
"""What was learnt of a bucket that nobody used for so long need not be remembered."""
_RAISE_EVERY_S = 1.0
_RAISE_SHARE = 0.02
_MEASURES = {"requests": "requests", "total": "tokens", "input": "input_tokens", "output": "output_tokens"}


class Limits(msgspec.Struct, frozen=True):
    """Checked settings of one bucket."""

    rpm: int | None
    tokens: tuple[tuple[str, int], ...]
    """("total" | "input" | "output", tokens per window)."""
    slots: tuple[int, int, int] | None
    """Floor, start and ceiling of the calls under way."""
    ramp_s: float
    """Period of the gentle start; 0 for none."""
    window: float
    burst: int | None
    age_bound: float
    weights: Mapping[str, float]
    cached_free: bool
    gradient: bool

    def of(self, name: str) -> int:
        """Units per window of a limit that there is."""
        return (self.rpm or 0) if name == "requests" else dict(self.tokens)[name]


class Allowance:
    """The limits of one bucket and what was spent of them. Knows no queue and never waits."""

    def __init__(self, limits: Limits, env: Env) -> None:
        self.limits = limits
        self.requests = Ledger(limits.rpm, limits.window) if limits.rpm is not None else None
        self.tokens = tuple((name, Ledger(units, limits.window)) for name, units in limits.tokens)
        self.aimd = None if limits.slots is None else (Gradient2 if limits.gradient else Aimd)(*limits.slots)
        self.pace = Pace(ramp_s=limits.ramp_s)
        self.learned = LearnedOutput()
        self.in_use = 0
        self.lent: set[object] = set()
        """Work under way that makes calls of its own, which may use its slot: it would wait for them for ever."""
        self.pauses = 0
        self._clock = env.clock.monotonic
        self._rng = env.rng
        self._epoch = 0
        self._heard = -inf
        self._raised = -inf
        self.units = Units(self.requests, limits.burst, self._clock) if self.requests is not None else None
        self.leases: Leases | None = None
        """What other processes spend of the same limit, where they share one."""

    def ledgers(self) -> tuple[tuple[str, Ledger], ...]:
        """Every sliding window with its name."""
        return self.tokens if self.requests is None else (("requests", self.requests), *self.tokens)

    def idle(self, now: float) -> bool:
        """Whether forgetting this bucket would let nothing through that it holds back, or knows to be too much."""
        if self.in_use or self.pace.until > now or any(ledger.used(now) for _, ledger in self.ledgers()):
            return False
        told = any(ledger.limit != self.limits.of(name) for name, ledger in self.ledgers())
        return now - self.pace.last_grant > _LEARNT_FOR_S or (self.pace.learnt is None and not told)

    # -- taking -------------------------------------------------------------------------------------------------

    def opens_at(self, now: float) -> float:
        """When one more request fits (its tokens and unit apart); infinity while no slot is free."""
        if self.aimd is not None and self.in_use >= self.aimd.limit + len(self.lent):
            return inf
        opens = self.pace.opens_at(now, self.in_use)
        if self.requests is not None and not self.requests.fits(1, now):
            opens = max(opens, self.requests.when(1, now))
        return opens

    def tokens_fit(self, amounts: tuple[int, ...], now: float) -> bool:
        """Whether these reservations fit now."""
        for (_, ledger), amount in zip(self.tokens, amounts, strict=True) if amounts else ():
            if not ledger.fits(amount, now):
                return False
        return True

    def tokens_at(self, amounts: tuple[int, ...], now: float) -> float:
        """When these reservations would fit if nothing else were spent."""
        times = (ledger.when(amount, now) for (_, ledger), amount in zip(self.tokens, amounts, strict=True))
        return max(times, default=now)

    def take_unit(self) -> bool:
        """The last thing a permit needs: a unit of the request rate."""
        return self.units is None or self.units.take()

    def lease_at(self, amounts: tuple[int, ...], now: float) -> float:
        """When the counter shared with other processes lets this call go; infinity where it will wake the gate.

        Asked only when nothing else is missing: a lease must be used soon.
        """
        if self.leases is None or (self.units is not None and not self.units.ready()):
            return now
        return self.leases.opens_at(self._measured(amounts), now)

    def _measured(self, amounts: Sequence[int], requests: int = 1) -> tuple[int, ...]:
        """Requests and tokens as the shared counter knows them."""
        return tuple(amounts) if self.requests is None else (requests, *amounts)

    def unit_at(self, now: float) -> float:
        """When the next unit of the request rate will be there."""
        return now if self.units is None else self.units.predict(1, now)

    def grant(self, amounts: tuple[int, ...], now: float, width: int = 1) -> Permit:
        """Take everything but the unit, which has been taken.

        Whoever needs several slots goes when one is free, and others wait until they are no more than there may be.
        """
        permit = Permit(amounts, now, self._epoch, width)
        self.in_use += width
        if self.requests is not None:
            permit.request = self.requests.spend(1, now)
        if amounts:
            pairs = zip(self.tokens, amounts, strict=True)
            permit.cells = [ledger.spend(amount, now) for (_, ledger), amount in pairs]
        if self.leases is not None:
            permit.lease = self.leases.take(self._measured(amounts), now)
        self.pace.granted(now)
        return permit

    def predict(self, amounts: tuple[int, ...], ahead: int, now: float) -> float:
        """A time before which a call with that many ahead of it surely gets no permit (slots apart)."""
        soonest = max(now, self.pace.until, self.tokens_at(amounts, now))
        if self.units is None or self.requests is None:
            return soonest
        first = self.requests.when(min(ahead + 1, self.requests.limit), now)
        return max(soonest, first, self.units.predict(ahead + 1, now))

    # -- giving back --------------------------------------------------------------------------------------------

    def finish(self, permit: Permit, usage: Usage, *, well: bool) -> bool:
        """The call is over and was sent: the slot is free, tokens are settled where the server reported them.

        Like all three ways of giving back, False if the permit had been given back before.
        """
        if permit.epoch < 0:
            return False
        if permit.amounts and usage.reported:
            self._settle(permit, self._spent(permit, usage, well=well))
            if well:
                self.learned.learn(usage.output_tokens // permit.choices)
        if well:
            saturated = self.aimd is not None and self.in_use >= self.aimd.limit
            for _ in range(permit.width):
                self.pace.answered(self.in_use)
                if self.aimd is not None and not permit.sampled:
                    self.aimd.succeeded(saturated=saturated)
        self._release(permit)
        return True

    def give_back(self, permit: Permit) -> bool:
        """The call was never sent: everything comes back, the unit of the request rate as a credit."""
        if permit.epoch < 0:
            return False
        if permit.request is not None and self.requests is not None and self.units is not None:
            self.requests.settle(permit.request, 1, 0, self._clock())
            self.units.unused()
        self._settle(permit, [0] * len(permit.amounts), requests=0)
        self.pace.unsent()
        self._release(permit)
        return True

    def refused(self, permit: Permit, wait_s: float | None) -> bool:
        """The server refused the call for its rate: tokens come back, the gate closes for everybody."""
        if permit.epoch < 0:
            return False
        now = self._clock()
        self._settle(permit, [0] * len(permit.amounts))
        self.pauses += self.pace.refused(permit.started, now, wait_s)
        if wait_s is not None:
            self.pace.hold(now + wait_s + self._rng.uniform(0, min(_MAX_JITTER_S, _JITTER * wait_s)))
        self.overloaded(permit)
        self._release(permit)
        return True

    def first_token(self, permit: Permit) -> None:
        """A stream has its first token."""
        if isinstance(self.aimd, Gradient2) and permit.epoch == self._epoch:
            permit.sampled = True
            self.aimd.first_token(self._clock() - permit.started, self.in_use)

    def overloaded(self, permit: Permit) -> None:
        """The server was too busy for this call: fewer at once from now on."""
        if self.aimd is not None and self.aimd.floor < self.aimd.ceiling:
            self.aimd.overloaded(permit.started, self._clock())

    def _spent(self, permit: Permit, usage: Usage, *, well: bool) -> list[int]:
        """What an answer really cost of each token limit."""
        output, prompt = usage.output_tokens, usage.input_tokens
        if self.limits.cached_free:
            prompt = max(0, prompt - usage.cached_tokens)
        found: list[int] = []
        for (name, _), reserved in zip(self.tokens, permit.amounts, strict=True):
            if name == "input":
                found.append(prompt)
                continue
            spent = output if name == "output" else prompt + output
            # A stream that was cut has told what it had produced by then, or (Anthropic) nothing but a 1.
            found.append(spent if well else max(reserved, spent))
        return found

    def _settle(self, permit: Permit, spent: Sequence[int], requests: int = 1) -> None:
        """Replace the reservation by what the call cost in truth."""
        now = self._clock()
        for (_, ledger), cell, amount, actual in zip(self.tokens, permit.cells, permit.amounts, spent, strict=True):
            ledger.settle(cell, amount, actual, now)
        if permit.lease is not None:
            permit.lease.settle(self._measured(spent, requests))

    def _release(self, permit: Permit) -> None:
        if permit.epoch == self._epoch:
            self.in_use -= permit.width
        permit.epoch = -1

    # -- changing -----------------------------------------------------------------------------------------------

    def hear(self, readings: tuple[Reading, ...], started: float) -> None:
        """The server's own figures, in the answer to a call granted at `started`; older views are not applied."""
        if started < self._heard:
            return
        self._heard = started
        now = self._clock()
        may_raise = now - self._raised >= _RAISE_EVERY_S
        for name, ledger in self.ledgers():
            measure = _MEASURES[name]
            for reading in readings:
                if reading.measure == measure:
                    if reading.limit and reading.limit != ledger.limit:
                        told = min(reading.limit, self.limits.of(name))
                        self._relimit(name, ledger, told, may_raise=may_raise)
                    if reading.remaining is not None:
                        ledger.observe(reading.remaining, started, now, reading.reset_s)

    def _relimit(self, name: str, ledger: Ledger, told: int, *, may_raise: bool) -> None:
        """Lower at once, raise by 2 % a second: a raised limit may belong to another replica of the provider."""
        target = told
        if told > ledger.limit:
            if not may_raise:
                return
            target = min(told, ledger.limit + max(1, int(ledger.limit * _RAISE_SHARE)))
            self._raised = self._clock()
        if target != ledger.limit:
            ledger.limit = target
            if name == "requests" and self.units is not None:
                self.units.renew(self.limits.burst)
            self.tell_leases()

    def tell_leases(self) -> None:
        """The limits in force, for the counter shared with other processes."""
        if self.leases is not None:
            limits = tuple(ledger.limit for _, ledger in self.ledgers())
            burst = 0 if self.requests is None else burst_of(self.requests.limit, self.limits.burst)
            self.leases.configure(limits, burst, self.limits.window)

    def resize(self, limits: Limits) -> None:
        """New limits of the same kinds; records stay."""
        self.limits = limits
        if self.requests is not None and self.units is not None and limits.rpm is not None:
            self.requests.limit = limits.rpm
            self.units.renew(limits.burst)
        for (_, ledger), (_, units) in zip(self.tokens, limits.tokens, strict=True):
            ledger.limit = units
        if self.aimd is not None and limits.slots is not None:
            self.aimd.bounds(*limits.slots)
        self.tell_leases()

    def rehome(self) -> None:
        """The loop died: its calls are gone, records stay."""
        self._epoch += 1
        self.in_use = 0
        self.lent.clear()
        if self.units is not None:
            self.units.renew(self.limits.burst)
        if self.leases is not None:
            self.leases.rehome()

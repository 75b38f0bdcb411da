"""A bucket's dealings with a counter that several processes share.

What the counter decides and what a process may do without it: `algo/shared.py`. Where it is kept: `stores/counter.py`.
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from itertools import count
from math import inf
from typing import TYPE_CHECKING

from llmmw.algo.shared import MEMBER_S, Answer, Ask, Share, step
from llmmw.events import Warned
from llmmw.settings import positive_seconds

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from llmmw.algo.shared import Amounts
    from llmmw.env import Env
    from llmmw.layers.shared import SharedCounter
    from llmmw.stores.counter import CounterStore

_REPORT_S = 0.1
"""What came back is told with the next question, or after this time. A member with nothing to ask looks in after the
same time, then after twice as long and so on, to learn who else has come, and leaves when it had no calls for long."""
_FIRST_PROBE_S, _LONGEST_PROBE_S = 1.0, 16.0
_MAX_CHANGES = 4096
_serial = count()


class Lease:
    """What one call may spend of the shared limit."""

    __slots__ = ("_own", "amounts", "cell", "expires", "leases")

    def __init__(self, leases: Leases, amounts: Amounts, cell: float | None, expires: float = inf) -> None:
        self.leases = leases
        self.amounts = amounts
        self.cell = cell
        """The counter's receipt; None for what is spent without it."""
        self.expires = expires
        self._own: list[int] | None = None

    def on_own_account(self) -> list[int]:
        """The amounts as a record that a settlement changes."""
        self._own = list(self.amounts)
        return self._own

    def settle(self, actual: Sequence[int]) -> None:
        """The call cost this much in truth."""
        if self._own is not None:
            self._own[:] = actual
        if self.cell is not None:
            self.leases.report(self.cell, tuple(is_ - was for is_, was in zip(actual, self.amounts, strict=True)))


class Leases:
    """What one bucket may spend of a shared limit. One question at a time, one lease at hand.

    Args:
        options: the setting.
        store: where the counter is.
        bucket: name of the bucket there.
        env: clock and events.
        wake: called when there is news.
    """

    def __init__(
        self, options: SharedCounter, store: CounterStore, bucket: bytes, env: Env, wake: Callable[[], object]
    ) -> None:
        self._store = store
        self._bucket = bucket
        self._env = env
        self._clock = env.clock.monotonic
        self._wake = wake
        self._patience_s = positive_seconds("patience", options.patience)
        self._processes = options.processes
        self._share = Share(options.processes)
        self._serial = f"{next(_serial)}-{env.rng.getrandbits(32):08x}"
        self._limits: Amounts = ()
        self._burst = 0
        self._window = self._hold_s = 1.0
        self._lease: Lease | None = None
        self._task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._changes: deque[tuple[float, Amounts]] = deque(maxlen=_MAX_CHANGES)
        self._not_before = -inf
        self._wanted_at, self._next_s = -inf, _REPORT_S
        self._probe_at, self._probe_s = -inf, _FIRST_PROBE_S
        self._warned = False
        self._serving = True
        self._pid = os.getpid()

    @property
    def members(self) -> int:
        """How many processes share the limit, as far as is known."""
        return self._share.members

    @property
    def is_lost(self) -> bool:
        """Whether the counter did not answer last time."""
        return self._share.is_lost

    def configure(self, limits: Amounts, burst: int, window: float) -> None:
        """The limits in force; `burst` is 0 where requests are not limited."""
        if limits != self._limits:
            self._not_before = -inf
        self._limits, self._burst = limits, burst
        self._hold_s = max(0.1, window / 60)
        self._window = window + self._hold_s

    # -- taking -------------------------------------------------------------------------------------------------

    def opens_at(self, amounts: Amounts, now: float) -> float:
        """When `take` may be called for these amounts; infinity where `wake` will be called first."""
        share = self._share
        opens = share.opens_at(self._ask(), amounts, now) if share.binds(now) else now
        if share.is_lost:
            return min(opens, self._probe(now)) if opens > now else self._probe_besides(now)
        if opens > now:
            return opens
        lease = self._lease
        if lease is not None:
            if now < lease.expires and all(have >= need for have, need in zip(lease.amounts, amounts, strict=True)):
                return now
            self._drop_lease()
        if self._task is None:
            if now < self._not_before:
                return self._not_before
            self._begin(amounts)
        return inf

    def take(self, amounts: Amounts, now: float) -> Lease:
        """The lease for a call that goes out now."""
        held, self._lease = self._lease, None
        if self._share.is_lost or held is None:
            lease = Lease(self, amounts, None)
        else:
            lease = Lease(self, amounts, held.cell)
            Lease(self, held.amounts, held.cell).settle(amounts)
        if self._share.binds(now):
            self._share.spend(lease.on_own_account(), now, self._ask())
        return lease

    def report(self, cell: float, change: Amounts) -> None:
        """A grant cost more or less than was granted."""
        if not any(change):
            return
        self._changes.append((cell, change))
        if self._next_s > _REPORT_S:
            self._next_s = _REPORT_S
            self._set_timer(None)
        self._schedule()

    # -- asking -------------------------------------------------------------------------------------------------

    def _ask(self, amounts: Amounts | None = None, *, leaving: bool = False) -> Ask:
        return Ask(f"{os.getpid()}-{self._serial}", self._limits, self._window, self._burst, amounts, leaving=leaving)

    def _probe(self, now: float) -> float:
        """Ask the lost counter whether it is back, where that is due; when to come again."""
        if self._task is not None:
            return inf
        if now < self._probe_at:
            return self._probe_at
        self._begin(None)
        return inf

    def _probe_besides(self, now: float) -> float:
        self._probe(now)
        return now

    def _schedule(self) -> None:
        """Look in again, unless something else comes first."""
        if self._timer is None and self._task is None and not self.is_lost and self._serving:
            self._set_timer(asyncio.get_running_loop().call_later(self._next_s, self._look_in))

    def _look_in(self) -> None:
        self._timer = None
        self._next_s *= 2
        leaving = self._clock() - self._wanted_at > MEMBER_S / 2 and not self._changes
        if self._task is None and not self.is_lost:
            self._begin(None, leaving=leaving)

    def _set_timer(self, timer: asyncio.TimerHandle | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = timer

    def _begin(self, amounts: Amounts | None, *, leaving: bool = False) -> None:
        self._set_timer(None)
        if amounts is not None:
            self._wanted_at, self._next_s = self._clock(), _REPORT_S
        self._task = asyncio.get_running_loop().create_task(self._exchange(self._ask(amounts, leaving=leaving)))

    async def _exchange(self, ask: Ask) -> None:
        asked_at = self._clock()
        changes = tuple(self._changes)
        self._changes.clear()
        ask = Ask(
            ask.member, ask.limits, ask.window, ask.burst, ask.amounts, changes,
            self._share.spent(ask, asked_at), ask.leaving,
        )  # fmt: skip
        try:
            async with asyncio.timeout(self._patience_s):
                answer = await self._store.update(self._bucket, lambda old, now: step(old, ask, now))
        except Exception as error:  # noqa: BLE001 — whatever a store raises must not reach a call
            self._changes.extendleft(reversed(changes))
            self._lose(error)
        else:
            self._hear(ask, answer, asked_at)
        self._task = None
        if self._changes or not ask.leaving:
            self._schedule()
        self._wake()

    def _hear(self, ask: Ask, answer: Answer, asked_at: float) -> None:
        now = self._clock()
        self._share.heard(ask, answer, asked_at, now)
        self._probe_s = _FIRST_PROBE_S
        if answer.cell is not None and ask.amounts is not None:
            self._lease = Lease(self, ask.amounts, answer.cell, asked_at + self._hold_s)
        elif ask.amounts is not None:
            self._not_before = now + answer.wait_s

    def _lose(self, error: Exception) -> None:
        now = self._clock()
        self._drop_lease()
        self._share.lost(now)
        self._probe_at, self._probe_s = now + self._probe_s, min(2 * self._probe_s, _LONGEST_PROBE_S, self._window / 2)
        if not self._warned:
            self._warned = True
            why = f"{type(error).__name__}: {error}"[:200]
            part = f"this process keeps to its part, about 1/{self._share.members} of the limit"
            self._env.emit(Warned("shared-counter", f"the shared counter is lost, {part} ({why})"))

    def _drop_lease(self) -> None:
        lease, self._lease = self._lease, None
        if lease is not None:
            lease.settle((0,) * len(lease.amounts))

    # -- lifetime -----------------------------------------------------------------------------------------------

    def rehome(self) -> None:
        """The loop died, or the process forked: what was asked there is not answered here."""
        lease, self._lease = self._lease, None
        self._task = self._timer = None
        if self._pid != os.getpid():
            self._pid = os.getpid()
            self._share = Share(self._processes)  # another member, who was told nothing yet
            self._changes.clear()  # the parent tells them
        elif lease is not None and lease.cell is not None:
            self._changes.append((lease.cell, tuple(-amount for amount in lease.amounts)))

    def retire(self) -> None:
        """The bucket is forgotten: look in no more."""
        self._serving = False
        self._set_timer(None)

    async def aclose(self) -> None:
        """Leave: give back what was not used, if the counter listens."""
        self.retire()
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait([task])
        self._drop_lease()
        if self._limits and not self.is_lost:
            self._wake = _nothing
            await self._exchange(self._ask(leaving=True))


def _nothing() -> None:
    """Nobody waits any more."""

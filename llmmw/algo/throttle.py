"""Spaces calls: as a ramp towards an unknown server, as so many per window, or at a rate. Tries a little more in time.

What was learnt is exceeded after some clean cycles, by a share that halves and with a patience that doubles each
time the trial is refused: the search narrows like a bisection, and a limit that was raised is found again.
"""

from __future__ import annotations

from collections import deque
from math import inf

_RAMP_START = 8
RAMP_PERIOD_S = 0.2
LOCAL_RAMP_PERIOD_S = 0.05
"""An unknown server gets 8 calls at first. From then on whatever comes first lets more go: each good answer admits two
(the number under way doubles per round trip, and calls made one after the other never wait), and each period of 200 ms
(50 ms on this machine) that was full and clean twice as many as the one before, so that hundreds are out after a second
even where answers take minutes. Refusals come within milliseconds, so few calls are wasted."""
_RAMP_TOP_PER_S = 640
"""Nor by time faster than this during the first second at that rate: the sender itself then needs 100s of ms to get its
calls out (a call costs it about a ms), and would have sent hundreds before it hears the first refusal."""
_RAMP_TOP = 640
"""A server that answers so many at once well is not unknown any more."""
SURE = 4
"""At most: 3 % more after 16 clean cycles. At trust 0, where a single call hints at the limit: half more after one."""
_STEP = 1.1
_CUT = 0.85
_CATCH_UP_S = 0.01
"""Timers are late by about a millisecond; calls due in the last 10 ms go out together."""
_MAX_GRANTS = 4096


class Throttle:
    """When the next call may go out, as far as the pace is concerned. Open until something was learnt.

    Args:
        ramp_s: period of a gentle start; 0 for none.
    """

    __slots__ = (
        "_at_top", "_cap", "_cycle", "_doubling_s", "_goal", "_good", "_next", "_period", "_raised", "_ramp_s", "_rate",
        "_slack", "_trust", "_under_way", "grants", "settled",
    )  # fmt: skip

    def __init__(self, *, ramp_s: float) -> None:
        self.grants: deque[float] = deque(maxlen=_MAX_GRANTS)
        self.settled = False
        """Whether a limit was learnt (while ramping or doubling it is only being looked for)."""
        self._ramp_s = ramp_s or RAMP_PERIOD_S
        self._cap = self._under_way = _RAMP_START if ramp_s else 0
        self._period = self._ramp_s
        self._at_top = 0.0
        self._rate = self._doubling_s = self._goal = self._cycle = 0.0
        self._good: float | None = None
        self._next = self._raised = -inf
        self._slack = _CATCH_UP_S
        self._trust = 0

    @property
    def per_s(self) -> float | None:
        """Calls per second let through at most; None where nothing was learnt."""
        if self._rate:
            return self._rate
        return self._cap / self._period if self._cap and self.settled else None

    def opens_at(self, now: float, under_way: int) -> float:
        """When the next call may go out besides those under way; a time that has passed when it may now."""
        if self._rate:
            return self._next
        if self._cap and len(self.grants) >= self._cap and (self.settled or under_way >= self._under_way):
            return self.grants[-self._cap] + self._period
        return now

    def granted(self, now: float) -> None:
        """A call goes out."""
        if self._rate:
            self._advance(now)
        elif self._cap:
            self._count_period(now)
        self.grants.append(now)

    def answered(self, under_way: int) -> None:
        """One of the calls under way was answered well."""
        if not self._cap or self.settled or 2 * under_way < self._under_way:
            return  # few at once do not show that many would be admitted
        self._under_way += 1
        if self._under_way > _RAMP_TOP:
            self._cap = 0

    def ramp(self, now: float) -> None:
        """Start (again) gently."""
        self._rate, self._cap, self._period, self._raised, self.settled = 0.0, 2, self._ramp_s, now, False
        self._at_top, self._under_way = 0.0, 2

    def look_for(self, rate: float, doubling_s: float, now: float) -> None:
        """Begin at this rate and double it in so many seconds (as long as calls wait for it)."""
        self._rate, self._cap, self._doubling_s, self._goal, self.settled = rate, 0, doubling_s, 0.0, False
        self._next = now

    def set_rate(
        self, rate: float, now: float, *, cycle: float, trust: int, goal: float = 0.0, slack: float = 0.0
    ) -> None:
        """This rate was learnt.

        Args:
            rate: calls per second.
            now: present time.
            cycle: seconds of the episode it was learnt from: the unit of patience.
            trust: from 0 to SURE.
            goal: a rate that is approached quickly, where the episode only gave bounds.
            slack: seconds' worth of calls that may leave at once.
        """
        self._rate, self._cap, self._doubling_s, self._goal = rate, 0, 0.0, goal
        self._next, self._slack = self._after_last(now) - slack, max(slack, _CATCH_UP_S)
        self._settle(now, cycle, trust)

    def set_window(self, cap: int, period: float, now: float, *, trust: int) -> None:
        """So many calls per period were learnt."""
        self._rate, self._cap, self._period = 0.0, cap, period
        self._settle(now, period, trust)

    def overshot(self, now: float, at_most: float) -> None:
        """The learnt limit was refused: back to what went well, or below it; `at_most` per second in any case."""
        current = self.per_s or at_most
        if self._good is not None:
            target, self._trust = self._good, min(SURE, self._trust + 1)
        else:
            target = current * _CUT
        target = min(target, at_most)
        if self._rate:
            self._rate = target
        else:
            self._period = self._cap / target
        self._goal = 0.0
        self._next = self._after_last(now)
        self._settle(now, self._cycle, self._trust)

    def again_at(self, now: float) -> float:
        """When to try again after a refusal, if the limit that went well still holds."""
        per_s = self._good or self.per_s or inf
        if self._rate:
            return now + 2 / per_s
        return self.grants[-self._cap] + self._cap / per_s if len(self.grants) > self._cap > 0 else now

    def _after_last(self, now: float) -> float:
        return self.grants[-1] + 1 / self._rate if self._rate and self.grants else now

    def _settle(self, now: float, cycle: float, trust: int) -> None:
        self._cycle, self._trust, self._raised, self._good, self.settled = cycle, trust, now, None, True

    def _count_period(self, now: float) -> None:
        patience = self._period * (2**self._trust if self.settled else 1)
        if len(self.grants) < self._cap or now - self._raised < patience:
            return
        self._raised = now
        if self.grants[-self._cap] + 1.5 * self._period < now:
            return  # the window was not full, so nothing shows that more would have been admitted
        if self.settled:
            self._good = self._cap / self._period
            self._period /= self._growth()
            return
        top = int(_RAMP_TOP_PER_S * self._period)
        self._cap = min(2 * self._cap, top)
        self._at_top += self._period if self._cap == top else 0.0
        if self._at_top > 1.0:
            self._cap = 0

    def _advance(self, now: float) -> None:
        self._next = max(self._next, now - self._slack) + 1 / self._rate
        self._slack = max(_CATCH_UP_S, min(self._slack, now - self._next))
        if self._doubling_s:
            self._rate *= 2 ** min(1.0, 1 / (self._rate * self._doubling_s))
        elif self._rate < self._goal:
            self._good = self._good or self._rate
            self._rate = min(self._goal, self._rate * _STEP)
        elif now - self._raised >= self._cycle * 2**self._trust:
            self._raised = now
            self._good = self._rate
            self._rate *= self._growth()

    def _growth(self) -> float:
        return 1 + 2.0 ** -(self._trust + 1)

"""How fast to go on after a refusal, when nobody told the limit: the pause, then a pace learnt from what was granted.

Time is cut into episodes: one begins when calls go out again after a pause and ends with the next refusal. What an
episode admitted (A) until its first refusal (after T), and when the next one could begin (after D), tell the limit:
A / D is a rate that the server surely sustains, A / T one that it refused. Two models fit what providers do:

- a leaky bucket of size B and rate r admits at most B + r t in any time t, with equality from the moment it was last
  full until the refusal; two episodes give both unknowns;
- a window admits A per D whatever the spacing; it shows in a fitted rate far below A / D.
"""

from __future__ import annotations

from collections import deque
from math import inf, sqrt

_PROBE_S = 0.5
_PROBE_SHARE = 0.2
"""Without Retry-After the next try comes after half a second or a fifth of the time waited so far: finding the end
of a window costs at most a fifth of it, and a number of calls that grows only with its logarithm."""
_RAMP_START = 8
_RAMP_PERIOD_S = 0.25
"""An unknown server gets 8 calls in the first 250 ms, and twice as many after each such period that was full and
clean: refusals come within milliseconds, so few calls are wasted, and hundreds are out after a second even where
answers take minutes."""
_RAMP_END = 1024
_RAISE = 1.05
_RAISE_AFTER_PERIODS = 8
_RAISE_AFTER_S = 10.0
_CUT = 0.85
_SAFETY = 0.97
"""Share of a fitted rate that is used: the fit is exact only for exact timings."""
_CATCH_UP_S = 0.01
"""Timers are late by about a millisecond; calls due in the last 10 ms go out together."""
_MAX_GRANTS = 4096
_NEVER = -inf


class _Episode:
    __slots__ = ("began", "granted", "refused", "refused_start")

    def __init__(self, began: float) -> None:
        self.began = began
        self.granted = 0
        self.refused = 0
        self.refused_start = inf
        """When the earliest of the refused calls was granted."""

    @property
    def admitted(self) -> int:
        return self.granted - self.refused


class Pace:
    """Decides when the next call may go out. One per bucket; without refusals only the ramp holds calls back.

    Args:
        ramp: start an unknown server with few calls and double their number (off where the limit was told).
    """

    __slots__ = (
        "_cap", "_doubling", "_episode", "_finished", "_full", "_grants", "_known", "_latency", "_next", "_period",
        "_probe_until", "_raised", "_rate", "_stalled", "until",
    )  # fmt: skip

    def __init__(self, *, ramp: bool) -> None:
        self.until = _NEVER
        """End of the pause; in the past when there is none."""
        self._episode: _Episode | None = None
        self._finished: _Episode | None = None
        self._known: tuple[int, float] | None = None
        self._grants: deque[float] = deque(maxlen=_MAX_GRANTS)
        self._latency = 0.02
        self._stalled = 0.0
        self._probe_until = _NEVER
        self._rate, self._next, self._doubling, self._raised = 0.0, 0.0, 0.0, 0.0
        self._cap = float(_RAMP_START) if ramp else 0.0
        self._period, self._full = _RAMP_PERIOD_S, 0

    @property
    def learnt(self) -> float | None:
        """Calls per second that are let through at most, once something was learnt."""
        if self._rate:
            return self._rate
        return self._cap / self._period if self._cap and self._known else None

    def opens_at(self, now: float) -> float:
        """When the next call may go out; a time that has passed when it may now."""
        if now < self.until:
            return self.until
        if self._probe_until != _NEVER:
            if now < self._probe_until:
                return self._probe_until
            self._confirm(now)
        if self._rate:
            return self._next
        if self._cap:
            cap = int(self._cap)
            return self._grants[-cap] + self._period if len(self._grants) >= cap else now
        return now

    def granted(self, now: float) -> None:
        """A call goes out."""
        episode = self._episode
        if episode is None or episode.refused:
            if episode is not None:
                self._finished = episode if episode.admitted > 0 else self._finished
                self._probe_until = now + 2 * self._latency
            episode = self._episode = _Episode(now)
        episode.granted += 1
        if self._cap:
            self._count_period(now)
        elif self._rate:
            self._advance(now)
        self._grants.append(now)

    def unsent(self) -> None:
        """The latest grant was given back."""
        if self._episode is not None and self._episode.granted > self._episode.refused:
            self._episode.granted -= 1

    def refused(self, started: float, now: float, wait_s: float | None) -> bool:
        """A call granted at `started` was refused for its rate; whether that began a pause (and not only confirmed it).

        Args:
            started: when it was granted.
            now: seconds on the same scale.
            wait_s: what the server asked to wait, if anything.
        """
        if wait_s is not None:
            self.until = max(self.until, now + wait_s)
        episode = self._episode
        if episode is None or started < episode.began:
            return False
        self._latency = min(0.5, max(0.7 * self._latency, now - started))
        first = not episode.refused
        episode.refused += 1
        episode.refused_start = min(episode.refused_start, started)
        if first:
            if self._probe_until == _NEVER or not self._stalled:
                self._stalled = now
            self._probe_until = _NEVER
            if wait_s is None:
                self.until = max(self.until, self._guess(episode, now))
        return first

    def hold(self, until: float) -> None:
        """Extend the pause."""
        self.until = max(self.until, until)

    def _guess(self, episode: _Episode, now: float) -> float:
        """When to try again where the server does not say: as long after the start as it took last time, else soon."""
        if episode.granted > 1 and self._known is not None and self._cap and self._period:
            due = episode.began + self._period
            if due > now:
                return due
        return now + max(_PROBE_S, _PROBE_SHARE * (now - self._stalled))

    def _confirm(self, now: float) -> None:
        """The first call after a pause was not refused: learn from the episode before the pause."""
        self._probe_until = _NEVER
        self._stalled = 0.0
        finished, self._finished = self._finished, None
        episode = self._episode
        if finished is None or episode is None:
            self._rate, self._cap, self._period, self._full = 0.0, 2.0, _RAMP_PERIOD_S, 0
            return
        self._next = self._raised = now
        lasted = episode.began - finished.began
        steady = finished.admitted / lasted
        ended = min(finished.refused_start, episode.began)
        times = [at for at in self._grants if finished.began <= at < ended]
        until_refusal = max(ended - finished.began, 0.0)
        fitted = self._fit(times, ended)
        if fitted is None:
            shortest = max(until_refusal, self._latency)
            self._rate, self._doubling = sqrt(steady * max(steady, finished.admitted / shortest)), finished.admitted
            self._cap = 0.0
        elif fitted < steady / 2:
            self._rate, self._cap, self._period, self._full = 0.0, float(finished.admitted), lasted, 0
        else:
            ceiling = self._rate * _CUT if self._rate and not self._doubling else inf
            self._rate, self._doubling, self._cap = max(steady, min(fitted * _SAFETY, ceiling)), 0.0, 0.0
        self._known = (max(1, len(times)), until_refusal)

    def _fit(self, times: list[float], ended: float) -> float | None:
        """Rate of the bucket that admitted these calls and the episode before them; None after a single episode.

        For every s in the episode A(s, T) <= B + r (T - s), with equality for one s; B follows from the other one.
        """
        if self._known is None:
            return None
        burst_admitted, burst_time = self._known
        rate = 0.0
        for _ in range(8):
            size = burst_admitted - rate * burst_time
            rate = max(
                ((len(times) - index - size) / (ended - at) for index, at in enumerate(times) if ended > at),
                default=0.0,
            )
            rate = max(rate, 0.0)
        return rate

    def _count_period(self, now: float) -> None:
        """After enough periods that were full and clean the window admits more: twice while ramping, else a little."""
        cap = int(self._cap)
        if len(self._grants) < cap or self._grants[-cap] + 1.5 * self._period < now:
            self._full = 0
            return
        self._full += 1
        needed = 1 if self._known is None else _RAISE_AFTER_PERIODS * cap
        if self._full >= needed:
            self._full = 0
            self._cap *= 2 if self._known is None else _RAISE
            if self._known is None and self._cap > _RAMP_END:
                self._cap = 0.0

    def _advance(self, now: float) -> None:
        self._next = max(self._next, now - _CATCH_UP_S) + 1 / self._rate
        if self._doubling:
            self._rate *= 2 ** (1 / self._doubling)
        elif now - self._raised > _RAISE_AFTER_S:
            self._raised = now
            self._rate *= _RAISE

"""How fast to go on after a refusal, when nobody told the limit: the pause, then a pace learnt from what was granted.

Time is cut into episodes: one begins when calls go out again after a pause and ends with the next refusal. What an
episode admitted (A) until its first refusal (after T), and when the next one could begin (after D), tell the limit:
A / D is a rate that the server surely sustains, A / T one that it refused. Two models fit what providers do:

- a leaky bucket of size B and rate r admits at most B + r t in any time t, with equality from the moment it was last
  full until the refusal; two episodes give both unknowns;
- a window admits A per D whatever the spacing; it shows in a fitted rate far below A / D.
"""

from __future__ import annotations

from math import inf, sqrt

from llmmw.algo.throttle import SURE, Throttle

_PROBE_S = 0.5
_PROBE_SHARE = 0.2
"""Without Retry-After the next try comes after half a second or a fifth of the time waited so far: finding the end
of a window costs at most a fifth of it, and a number of calls that grows only with its logarithm."""
_LONGEST_PROBE_S = 300.0
"""However long it has refused: a server that is well again after a day should not stay unasked for hours."""
_SAFETY = 0.95
"""Share of a fitted rate that is used: the fit is exact only for exact timings."""
_BURST_SHARE = 0.8
"""Part of a fitted bucket that may leave at once after a pause in which it filled again."""
_SAME = 0.8
_CREDIBLE = 0.7
"""A fit far below the rate that went well for a while is the work of timings, not of the server."""
_DOUBLING = 1.0
"""Looking for the rate, it doubles in as long as the last pause took. A pause is what another refusal costs, so the
search may take about as long; and an episode that lasts longer than the first by much gives an exact fit."""
_MAX_POINTS = 128
_HALVINGS = 24
_NEVER = -inf

_Shape = list[tuple[float, float]]


class _Episode:
    __slots__ = ("began", "granted", "refused", "refused_first", "refused_start")

    def __init__(self, began: float) -> None:
        self.began = began
        self.granted = 0
        self.refused = 0
        self.refused_start = inf
        """When the earliest of the refused calls were granted, and how many those are."""
        self.refused_first = 0

    @property
    def admitted(self) -> int:
        return self.granted - self.refused

    def refuse(self, started: float) -> None:
        self.refused += 1
        if started < self.refused_start:
            self.refused_start, self.refused_first = started, 0
        self.refused_first += started == self.refused_start


class Pace:
    """Decides when the next call may go out. One per bucket; without refusals only the ramp holds calls back.

    Args:
        ramp_s: start an unknown server with few calls and double their number with each round of answers, or each such
            period where answers take longer; 0: do not.
    """

    __slots__ = (
        "_cycle", "_episode", "_finished", "_first", "_last_admitted", "_latency", "_probe_until", "_probes",
        "_stalled", "_throttle", "until",
    )  # fmt: skip

    def __init__(self, *, ramp_s: float) -> None:
        self.until = _NEVER
        """End of the pause; in the past when there is none."""
        self._throttle = Throttle(ramp_s=ramp_s)
        self._episode: _Episode | None = None
        self._finished: _Episode | None = None
        self._first: _Shape | None = None
        """Shape of the first episode, which began with a full bucket."""
        self._cycle, self._last_admitted = 0.0, 0
        self._latency = 0.02
        self._stalled = 0.0
        self._probes = 0
        self._probe_until = _NEVER

    @property
    def learnt(self) -> float | None:
        """Calls per second that are let through at most, once something was learnt."""
        return self._throttle.per_s

    @property
    def last_grant(self) -> float:
        """When the last call went out."""
        return self._throttle.grants[-1] if self._throttle.grants else _NEVER

    def opens_at(self, now: float, under_way: int) -> float:
        """When the next call may go out besides those under way; a time that has passed when it may now."""
        if now < self.until:
            return self.until
        if self._probe_until != _NEVER:
            if now < self._probe_until:
                return self._probe_until
            self._confirm(now)
        if self._episode is not None and self._episode.refused:
            return now
        return self._throttle.opens_at(now, under_way)

    def granted(self, now: float) -> None:
        """A call goes out."""
        episode = self._episode
        if episode is None or episode.refused:
            if episode is not None:
                self._finished = episode if episode.admitted > 0 else self._finished
                self._probe_until = now + 2 * self._latency
            episode = self._episode = _Episode(now)
        episode.granted += 1
        self._throttle.granted(now)

    def answered(self, under_way: int) -> None:
        """One of the calls under way (itself among them) was answered well."""
        self._throttle.answered(under_way)

    def unsent(self) -> None:
        """A grant was given back."""
        if self._episode is not None and self._episode.granted > self._episode.refused:
            self._episode.granted -= 1

    def refused(self, started: float, now: float, wait_s: float | None) -> bool:
        """A call was refused for its rate; whether that began a pause (and did not only confirm it).

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
        episode.refuse(started)
        if first:
            if self._probe_until == _NEVER:
                self._stalled, self._probes = now, 0
            else:
                self._probes += wait_s is None
            self._probe_until = _NEVER
            if wait_s is None:
                self.until = max(self.until, self._guess(episode, now))
        return first

    def hold(self, until: float) -> None:
        """Extend the pause."""
        self.until = max(self.until, until)

    def _guess(self, episode: _Episode, now: float) -> float:
        """When to try again where the server does not say: when it should work by what is known, else soon."""
        if self._throttle.settled and not self._probes:
            return self._throttle.again_at(now)
        if self._first is not None and self._is_like_the_last(episode):
            due = episode.began + self._cycle
            if due > now:
                return due
        return now + min(max(_PROBE_S, _PROBE_SHARE * (now - self._stalled)), _LONGEST_PROBE_S)

    def _is_like_the_last(self, episode: _Episode) -> bool:
        """Whether it admitted as much as the one before it, although it took another time: the mark of a window."""
        return episode.granted > 1 and episode.admitted >= _SAME * self._last_admitted

    def _confirm(self, now: float) -> None:
        """The first call after a pause was not refused: learn from the episode before the pause."""
        self._probe_until = _NEVER
        finished, self._finished = self._finished, None
        episode = self._episode
        if finished is None or episode is None:
            self._throttle.ramp(now)
            return
        lasted = episode.began - finished.began
        if self._throttle.settled:
            at_most = 1.5 * finished.admitted / lasted if self._probes else inf
            self._throttle.overshot(now, min(at_most, self._refit(finished, lasted)))
        else:
            self._learn(finished, lasted, now)
        self._cycle, self._last_admitted = lasted, finished.admitted

    def _learn(self, finished: _Episode, lasted: float, now: float) -> None:
        admitted, steady = finished.admitted, finished.admitted / lasted
        ended = min(finished.refused_start, finished.began + lasted)
        shape = self._shape(finished, ended)
        refused = admitted / max(ended - finished.began, self._latency)
        if self._first is None:
            self._first = shape
            pause = finished.began + lasted - ended
            self._throttle.look_for(sqrt(steady * max(steady, refused)), _DOUBLING * pause, now)
            return
        tried = self._throttle.per_s or inf
        rate = min(_fit(self._first, shape, admitted / self._latency), tried)  # it was refused at that rate
        if rate >= steady / 2:
            pause = finished.began + lasted - ended
            slack = min(pause, _BURST_SHARE * _size(self._first, rate) / rate)
            self._throttle.set_rate(max(steady, rate * _SAFETY), now, cycle=lasted, trust=SURE // 2, slack=slack)
        elif self._is_like_the_last(finished):
            self._throttle.set_window(admitted, lasted, now, trust=min(SURE, admitted - 1))
        else:
            goal = _SAFETY * (admitted + 1) / lasted
            self._throttle.set_rate(steady, now, cycle=lasted, trust=SURE // 2, goal=goal)

    def _refit(self, finished: _Episode, lasted: float) -> float:
        """The rate that an episode at a learnt rate tells beside the first one; infinity where it tells nothing."""
        if self._first is None or not self._throttle.per_s:
            return inf
        shape = self._shape(finished, min(finished.refused_start, finished.began + lasted))
        rate = _fit(self._first, shape, finished.admitted / self._latency) * _SAFETY
        return rate if rate >= _CREDIBLE * self._throttle.per_s else inf

    def _shape(self, episode: _Episode, ended: float) -> _Shape:
        """(t, A): in the last t seconds before its first refusal the episode admitted A; at most 128 points.

        What it admitted after that refusal, while the word of it was under way, does not belong here.
        """
        times = [at for at in self._throttle.grants if episode.began <= at <= ended]
        admitted = min(episode.admitted, len(times) - episode.refused_first)
        step = len(times) // _MAX_POINTS + 1
        shape = [(ended - at, float(admitted - i)) for i, at in enumerate(times) if i % step == 0 and i < admitted]
        return [*shape, (0.0, 0.0)]


def _fit(first: _Shape, second: _Shape, most: float) -> float:
    """The rate of one bucket that fits two episodes; 0 where none does.

    A bucket of size B and rate r admits at most B + r t in the last t seconds before a refusal, with equality for
    the t since it was last full. So each episode gives B as a falling function of r, and r is where the two meet.
    """
    if _size(second, 0.0) <= _size(first, 0.0):
        return 0.0  # it did not admit more although it had more time
    low, high = 0.0, most
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if _size(second, middle) > _size(first, middle) else (low, middle)
    return low


def _size(shape: _Shape, rate: float) -> float:
    return max(admitted - rate * time for time, admitted in shape)

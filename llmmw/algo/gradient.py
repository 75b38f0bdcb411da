"""How many calls may be under way at once, judged by the time to the first token: the Gradient2 rule.

Source: Netflix concurrency-limits, `Gradient2Limit.java` and its defaults. The time to the first token grows with a
server's queue; the total latency grows with the length of the outputs and tells nothing (SPEC limit-13).
"""

from __future__ import annotations

from llmmw.algo.aimd import Aimd

_SAMPLES = 10
"""First tokens per update: the shortest window of the source."""
_TOLERANCE = 1.5
"""The time to the first token may rise by half before fewer calls are let through."""
_QUEUE = 4.0
"""Calls more per update while the server keeps up: how large a queue is allowed to form."""
_SMOOTHING = 0.2
_LEAST_GRADIENT = 0.5
_LONG_WINDOW, _WARM_UP = 600, 10
_DRIFT, _RECOVERY = 2.0, 0.95
"""A long average of more than twice the short one comes from a slow time that is over, and is let go."""


class Gradient2(Aimd):
    """Aimd for calls without a first token (whole answers) and for overload; streams move it by their gradient."""

    __slots__ = ("_long", "_peak", "_short", "_updates")

    def __init__(self, floor: int, start: int, ceiling: int) -> None:
        super().__init__(floor, start, ceiling)
        self._short: list[float] = []
        self._peak = 0
        self._long = 0.0
        self._updates = 0

    def first_token(self, took_s: float, in_use: int) -> None:
        """A stream's first token came that long after its permit, while so many calls were under way."""
        self._short.append(took_s)
        self._peak = max(self._peak, in_use)
        if len(self._short) < _SAMPLES:
            return
        short, peak = sum(self._short) / len(self._short), self._peak
        self._short, self._peak = [], 0
        long = self._average(short)
        if short <= 0 or peak < self._limit / 2:
            return  # few calls at once show nothing about many
        gradient = max(_LEAST_GRADIENT, min(1.0, _TOLERANCE * long / short))
        target = self._limit * gradient + _QUEUE
        smoothed = self._limit * (1 - _SMOOTHING) + target * _SMOOTHING
        self._limit = max(float(self.floor), min(smoothed, float(self.ceiling)))

    def _average(self, short: float) -> float:
        self._updates += 1
        weight = 1 / self._updates if self._updates <= _WARM_UP else 2 / (_LONG_WINDOW + 1)
        self._long += (short - self._long) * weight
        if self._long > _DRIFT * short:
            self._long *= _RECOVERY
        return self._long

"""How many calls may be under way at once: additive increase, multiplicative decrease (the rule of TCP Reno).

Only overload, and a queue that the server itself reports, move the limit down. Latency does not: it follows the length
of the outputs (SPEC limit-13).
"""

from __future__ import annotations

_CUT = 0.7
"""Cut to this share: deeper than TCP CUBIC's because a 429 is an explicit refusal, milder than a half because many
429s come from a per-minute quota, where fewer calls at once change nothing."""
_ROOM = 8
"""An eighth of the limit, at least 2, may wait in the server's queue: enough to fill the places that come free in one
step of its engine. The limit moves by at most as much at a time (by a quarter, where half of all calls wait), so no
step leads past the band between an empty queue and a full one, and the limit comes to rest there."""
_GAP_S = 0.05
"""Calls that end in one step of the engine all tell of the same queue: it moves the limit once."""
_HOLD = 64
"""Windows of calls for which a queue keeps successes from growing the limit: not each answer tells of it, and a server
may cease to."""
_LEAST_SHARE = 8
"""Where no floor is named, a queue takes at most 7/8 of the start: what waits may be the calls of somebody who never
yields."""


class Aimd:
    """A concurrency limit between `floor` and `ceiling`."""

    __slots__ = ("_clean", "_cut_at", "_hold", "_least", "_limit", "_moved_at", "_ramping", "ceiling", "floor")

    def __init__(self, floor: int, start: int, ceiling: int) -> None:
        self.floor = floor
        self.ceiling = ceiling
        self._least = _least(floor, start)
        self._limit = float(start)
        self._clean = self._hold = 0
        self._cut_at = self._moved_at = float("-inf")
        self._ramping = start < ceiling

    @property
    def limit(self) -> int:
        """Calls that may be under way."""
        return int(self._limit)

    def succeeded(self, *, saturated: bool) -> None:
        """A call ended well. Only one that ran while every slot was taken says that more would have gone well too.

        Until the first overload each such call adds one (a doubling per round trip), later one full window of them.
        """
        if self._hold:
            self._hold -= 1
            return
        if not saturated or self._limit >= self.ceiling:
            return
        self._clean += 1
        if self._ramping or self._clean >= self._limit:
            self._clean = 0
            self._limit = min(self._limit + 1, float(self.ceiling))

    def overloaded(self, started: float, now: float) -> bool:
        """A call that started then was refused or timed out; whether that cut the limit.

        Calls that were already under way at the last cut report the same overload again and cut nothing.
        """
        if started < self._cut_at:
            return False
        self._cut_at = now
        self._clean = 0
        self._ramping = False
        self._limit = max(float(self.floor), int(self._limit * _CUT))
        return True

    def queued(self, waiting: int, in_use: int, now: float) -> None:
        """The server had so many calls in its queue when it answered one of the `in_use` under way here.

        An empty queue lets more through where every slot is taken; a long one fewer, once an earlier change has taken
        effect, and only where the calls under way here are many enough to be what waits.
        """
        limit = self.limit
        room = max(2, limit // _ROOM)
        self._hold = _HOLD * limit if waiting else 0
        if waiting:
            self._ramping = False
            self._clean = 0
        if now - self._moved_at < _GAP_S:
            return
        if not waiting and in_use >= limit:
            self._limit = min(self._limit + room, float(self.ceiling))
        elif waiting > room and limit <= 2 * in_use and in_use <= limit:
            step = min(waiting - room, room)
            lowered = limit - (max(step, limit // 4) if waiting > limit / 2 else step)
            self._limit = float(max(lowered, min(limit, self._least)))
        if self.limit != limit:
            self._moved_at = now

    def bounds(self, floor: int, start: int, ceiling: int) -> None:
        """New bounds while running; the limit moves only where they force it, or starts again from a new `start`."""
        fresh = (floor, ceiling) != (self.floor, self.ceiling)
        self.floor, self.ceiling, self._least = floor, ceiling, _least(floor, start)
        self._limit = float(start) if fresh else max(float(floor), min(self._limit, float(ceiling)))


def _least(floor: int, start: int) -> int:
    """How far down a queue may lead."""
    return floor if floor > 1 else max(1, start // _LEAST_SHARE)

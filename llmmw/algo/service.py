"""How long service took lately: whether an attempt can still be done in the time that is left."""

from __future__ import annotations

import math
from collections import deque

Kind = tuple[str, str]
"""Operation and model: what is worth comparing."""

KEPT = 64
"""Durations remembered per operation and model; a tenth of 64 is steady enough to refuse by."""
MIN_SAMPLES = 16
"""Fewer say too little: a refusal must not rest on one slow start."""
MAX_AGE_S = 60.0
"""Older durations are forgotten, so refusing everything (which measures nothing) ends by itself."""
_MAX_KINDS = 256


class ServiceTimes:
    """Recent durations of successful service, per operation and model."""

    def __init__(self) -> None:
        self._by_kind: dict[Kind, deque[tuple[float, float]]] = {}

    def add(self, kind: Kind, now: float, took_s: float) -> None:
        """Remember that an answer of this kind took so long (seconds), until now."""
        found = self._by_kind.get(kind)
        if found is None:
            if len(self._by_kind) >= _MAX_KINDS:
                del self._by_kind[next(iter(self._by_kind))]
            found = self._by_kind[kind] = deque(maxlen=KEPT)
        found.append((now, took_s))

    def quantile(self, kind: Kind, now: float, share: float) -> float | None:
        """What this share of recent answers of this kind took at most; None while too little is known."""
        found = self._recent(kind, now)
        if found is None:
            return None
        return sorted(took_s for _, took_s in found)[math.ceil(share * len(found)) - 1]

    def lacks(self, kind: Kind, now: float, left_s: float) -> bool:
        """Whether nine of ten recent answers of this kind took longer than `left_s`; no while too little is known."""
        found = self._recent(kind, now)
        if found is None:
            return False
        wanted = len(found) // 10 + 1
        for _, took_s in found:  # ends after a few where there is time, which is nearly always
            if took_s <= left_s:
                wanted -= 1
                if not wanted:
                    return False
        return True

    def _recent(self, kind: Kind, now: float) -> deque[tuple[float, float]] | None:
        found = self._by_kind.get(kind)
        while found and now - found[0][0] > MAX_AGE_S:
            found.popleft()
        return found if found is not None and len(found) >= MIN_SAMPLES else None

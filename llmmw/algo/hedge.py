"""When a slow request gets a second one beside it, and how many may. Pure: time is given."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmmw.algo.service import ServiceTimes

if TYPE_CHECKING:
    from llmmw.algo.service import Kind

EXTRA_SHARE = 0.05
"""Second requests per request, at most."""
QUANTILE = 0.95
"""A request slower than so many of its kind is worth a second one (Dean and Barroso, The Tail at Scale, 2013)."""
REST_S = 10.0
"""After a 429 without a wait nothing is added for so long: the server has less to give than is asked already."""
_MAX_SPARE = 5.0
"""Second requests saved up while none was needed; more at once would be a burst."""


class HedgePlan:
    """The budget of one endpoint, and how long its first tokens took."""

    __slots__ = ("_rests_until", "_spare", "_times", "sent")

    def __init__(self) -> None:
        self._times = ServiceTimes()
        self._spare = 0.0
        self._rests_until = float("-inf")
        self.sent = 0
        """Second requests so far."""

    def began(self) -> None:
        """A request that may get a second one went out."""
        self._spare = min(self._spare + EXTRA_SHARE, _MAX_SPARE)

    def learn(self, kind: Kind, now: float, took_s: float) -> None:
        """The first token took so long, or as long as this when it was given up for the second request's."""
        self._times.add(kind, now, took_s)

    def delay(self, kind: Kind, now: float) -> float | None:
        """Seconds after which a request of this kind is slow; None while too little is known."""
        return self._times.quantile(kind, now, QUANTILE)

    def refused(self, now: float, retry_after_s: float | None) -> None:
        """The server refused for its rate limit."""
        self._rests_until = max(self._rests_until, now + (retry_after_s or REST_S))

    def take(self, now: float) -> bool:
        """Whether a second request may go now; if so it is counted."""
        if now < self._rests_until or self._spare < 1.0:
            return False
        self._spare -= 1.0
        self.sent += 1
        return True

    def unsent(self) -> None:
        """One that was taken did not go."""
        self._spare = min(self._spare + 1.0, _MAX_SPARE)
        self.sent -= 1

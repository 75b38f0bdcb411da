"""A retry budget (AWS's retry quota): repetitions may not add more load than a sick endpoint can bear."""

from __future__ import annotations

from collections import OrderedDict

SHARE_OF_TRAFFIC = 0.1
"""With an empty budget one repetition per ten calls still passes, so that a recovered endpoint is noticed."""
_MAX_SPARE = 10.0
_REMEMBERED_EXCHANGES = 256


class RetryBudget:
    """Tokens of one endpoint. Full at the start; a repetition takes its cost, a success gives something back.

    Simulated at 100 / 50 / 20 % failures, three naive attempts load an endpoint 3.00 / 1.75 / 1.24 times; with such
    a quota 1.00 / 1.20 / 1.24 times (SPEC 7).

    Args:
        capacity: tokens when full.
    """

    __slots__ = ("_capacity", "_exchanges", "_last_free", "_spare", "level")

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._spare = 0.0
        self._last_free: float | None = None
        self._exchanges: OrderedDict[int, bool] = OrderedDict()
        self.level = float(capacity)
        """Tokens left."""

    def call_began(self) -> None:
        """A first attempt goes out: a tenth of one earns a repetition that passes even without tokens."""
        if self._spare < _MAX_SPARE:
            self._spare = min(self._spare + SHARE_OF_TRAFFIC, _MAX_SPARE)

    def call_succeeded(self, last_cost: int) -> None:
        """A call succeeded: at once (`last_cost` 0), which earns a token, or repeated, which gets the cost back."""
        if self.level < self._capacity:
            self.level = min(self.level + (last_cost or 1), self._capacity)

    def take(self, cost: int, now: float, exchange: int = 0) -> bool:
        """Whether a repetition may go.

        Args:
            cost: tokens.
            now: seconds, for the one repetition per second that always passes.
            exchange: number of the request that failed for several calls at once; it is paid for once.
        """
        known = self._exchanges.get(exchange) if exchange else None
        if known is not None:
            return known
        allowed = self._pay(cost, now)
        if exchange:
            self._exchanges[exchange] = allowed
            if len(self._exchanges) > _REMEMBERED_EXCHANGES:
                self._exchanges.popitem(last=False)
        return allowed

    def _pay(self, cost: int, now: float) -> bool:
        if self.level >= cost:
            self.level -= cost
            return True
        if self._last_free is None or now - self._last_free >= 1.0:
            self._last_free = now
            return True
        if self._spare >= 1.0:
            self._spare -= 1.0
            return True
        return False

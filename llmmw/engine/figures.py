"""What an engine did, as figures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from llmmw.engine.onhome import OnHome
from llmmw.events import CallEnded, CallStarted
from llmmw.stats import cache_hit, result_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from llmmw.call import Reply
    from llmmw.endpoints.base import Endpoint
    from llmmw.engine.inflight import InFlight
    from llmmw.stats import Stats


_LARGEST = frozenset({"paused_s", "shared_by", "server_kv_cache_usage"})
"""Readings of which the largest says something about several endpoints, and the sum nothing."""


class Figures(OnHome):
    """An engine's methods for its statistics; from any thread."""

    _calls: InFlight
    _endpoints: Sequence[Endpoint]
    _stats: Stats

    def get_performance_stats(self) -> dict[str, Any]:
        """Counters, sums and percentiles since the engine was made, as plain values; see the README for each key."""
        gauges: dict[str, dict[str, object]] = {}
        parts: list[tuple[str, Any]] = [*self._bounds, *(("pool", endpoint) for endpoint in self._endpoints)]
        for name, part in parts:
            read: Callable[[], dict[str, object]] | None = getattr(part, "gauges", None)
            if read is not None and (found := read()):
                _add(gauges.setdefault(name, {}), found)
        return self._stats.snapshot(len(self._calls), gauges)

    def _tell_hit(self, reply: Reply, took_s: float, agent: str | None) -> None:
        """What happened, to everybody who listens."""
        emit = self.env.emit
        if reply.source == "cache":
            emit(cache_hit(reply, agent))
        emit(CallStarted(agent))
        result, error_name = result_of(reply)
        emit(CallEnded(result, took_s, agent, reply.usage, error_name))


def _add(known: dict[str, object], found: dict[str, object]) -> None:
    """The readings of one more layer of a kind: counts add up, what is told of each by name is told of all."""
    for name, value in found.items():
        before = known.get(name)
        if isinstance(value, dict) and isinstance(before, dict):
            known[name] = {**cast("dict[str, object]", before), **cast("dict[str, object]", value)}
        elif isinstance(value, bool) or not (isinstance(value, int | float) and isinstance(before, int | float)):
            known[name] = value or before or value
        else:
            known[name] = max(before, value) if name in _LARGEST else before + value

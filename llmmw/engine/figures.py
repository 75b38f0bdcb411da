"""What an engine did, as figures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmmw.engine.onhome import OnHome

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from llmmw.endpoints.base import Endpoint
    from llmmw.engine.inflight import InFlight
    from llmmw.stats import Stats


class Figures(OnHome):
    """An engine's method for its statistics; from any thread."""

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
                gauges.setdefault(name, {}).update(found)
        return self._stats.snapshot(len(self._calls), gauges)

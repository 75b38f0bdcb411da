"""Events folded into `get_performance_stats()`.

Counting happens on whichever thread a call ends on, so every fold holds a lock (0.1 µs). Hits in memory are counted
many at once.
"""

from __future__ import annotations

import math
import threading
from collections import defaultdict, deque
from typing import TYPE_CHECKING, Any

from llmmw import events as ev

if TYPE_CHECKING:
    from collections.abc import Callable

    from llmmw.answer import Usage
    from llmmw.call import Reply, Source
    from llmmw.events import CallResult, Event

_BUCKETS_PER_OCTAVE = 32
"""Latencies are counted in buckets 2.2 % wide, so memory stays constant and a percentile is within about 1 %."""

_log2 = math.log2
_SHORTEST_S = 1e-9
_FIRST_BUCKET = _log2(_SHORTEST_S) * _BUCKETS_PER_OCTAVE // 1


class LatencyHistogram:
    """Counts durations in logarithmic buckets; percentiles without keeping the values."""

    def __init__(self) -> None:
        self._counts: defaultdict[float, int] = defaultdict(int)

    def add(self, duration_s: float) -> None:
        """Count one duration (negative ones as zero)."""
        # To the nearest, in half the time that `round` takes.
        bucket = (_log2(duration_s) * _BUCKETS_PER_OCTAVE + 0.5) // 1 if duration_s > _SHORTEST_S else _FIRST_BUCKET
        self._counts[bucket] += 1

    def percentile(self, share: float) -> float:
        """The duration that `share` (0 to 1) of all stay below, in seconds; 0.0 when nothing was counted."""
        rank, seen = math.ceil(share * sum(self._counts.values())), 0
        for bucket in sorted(self._counts):
            seen += self._counts[bucket]
            if seen >= rank:
                return math.exp2(bucket / _BUCKETS_PER_OCTAVE)
        return 0.0


_ENDINGS = {
    "hit": "cache_hits",
    "coalesced": "coalesced",
    "upstream": "answered_upstream",
    "failed": "errors",
    "cancelled": "cancelled",
}
_HITS = {"memory": "memory hits", "disk": "disk hits"}
_ENDINGS_BY_AGENT = frozenset({"hit", "coalesced", "failed"})

_COUNTERS = (
    "request_count", "cache_hits", "cache_misses", "coalesced", "answered_upstream", "errors", "cancelled",
    "in_flight", "upstream_requests", "upstream_failures", "batch_count", "batched_requests", "retries", "fallbacks",
    "tokens_in", "tokens_out", "tokens_saved", "connections_opened", "connections_reused",
)  # fmt: skip
_SECONDS = ("rate_limit_wait_s", "time_saved_s")
_TOGETHER = 256
_AGENT = ("request_count", "cache_hits", "coalesced", "upstream_requests", "errors", "tokens_in", "tokens_out")


def _counters() -> defaultdict[str, int]:
    return defaultdict(int)


class Stats:
    """An event sink that keeps the figures of one engine."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._n: dict[str, int] = dict.fromkeys(_COUNTERS, 0)
        self._s: dict[str, float] = dict.fromkeys(_SECONDS, 0.0)
        self._latency = LatencyHistogram()
        self._uncounted: deque[tuple[Usage, float, float, str | None]] = deque()
        """Hits: tokens, seconds saved, seconds taken, agent."""
        self._layers: defaultdict[str, defaultdict[str, int]] = defaultdict(_counters)
        self._agents: dict[str, dict[str, int]] = {}
        self._errors: dict[str, int] = {}
        self._warnings: dict[str, str] = {}
        self._fold: dict[type, Callable[[Any], None]] = {
            ev.CallEnded: self._call_ended,
            ev.CacheHit: self._cache_hit,
            ev.CacheMiss: self._cache_missed,
            ev.CacheStored: self._cache_stored,
            ev.CacheSkipped: lambda e: self._layer("cache", f"skipped: {e.reason}"),
            ev.CacheTrouble: lambda e: self._layer("cache", f"trouble: {e.kind}"),
            ev.Coalesced: lambda _: self._layer("coalesce", "joined"),
            ev.UpstreamStarted: self._upstream_started,
            ev.UpstreamEnded: self._upstream_ended,
            ev.UsageShared: self._usage_shared,
            ev.RetryScheduled: self._retry,
            ev.FellBack: self._fell_back,
            ev.Rerouted: lambda e: self._layer("balance", f"rerouted: {e.fault}"),
            ev.CircuitChanged: lambda e: self._layer("breaker", e.state),
            ev.LimiterWaited: self._limiter_waited,
            ev.LimiterPaused: lambda _: self._layer("limit", "paused"),
            ev.RefusedEarly: lambda e: self._layer(e.layer, f"refused: {e.reason}"),
            ev.BatchFlushed: self._batch_flushed,
            ev.ConnectionOpened: lambda _: self._add("connections_opened"),
            ev.ConnectionReused: lambda _: self._add("connections_reused"),
            ev.Warned: self._warned,
        }

    def __call__(self, event: Event) -> None:
        """Fold one event; an event of an unknown type is somebody's own and is ignored."""
        fold = self._fold.get(type(event))
        if fold is not None:
            with self._lock:
                fold(event)

    def hit(self, reply: Reply, duration_s: float, agent: str | None) -> None:
        """Count what `cache_hit` and CallEnded would tell of a fresh answer from memory. From any thread.

        Where calls take no more than a few microseconds, counting one by one takes a tenth of that; many at once take
        half, and need no lock for each.
        """
        self._uncounted.append((reply.usage, reply.service_s, duration_s, agent))
        if len(self._uncounted) >= _TOGETHER:
            with self._lock:
                self._count_hits()

    def _count_hits(self) -> None:
        tokens, saved_s = 0, 0.0
        add, take = self._latency.add, self._uncounted.popleft
        hits = len(self._uncounted)  # other threads may add to them; they are taken under the lock
        for _ in range(hits):
            usage, cost_s, duration_s, agent = take()
            tokens += usage.input_tokens + usage.output_tokens
            saved_s += cost_s
            add(duration_s)
            if agent is not None:
                self._agent_ended(agent, "hit")
        if hits:
            self._n["cache_hits"] += hits
            self._saved("memory", tokens, saved_s, hits)

    def after_fork(self) -> None:
        """The lock may have been held by a thread that does not exist in the child."""
        self._lock = threading.Lock()

    def snapshot(self, in_flight: int = 0, gauges: dict[str, dict[str, object]] | None = None) -> dict[str, Any]:
        """The figures as plain values.

        Args:
            in_flight: calls that have not ended; counted as requests like those that have.
            gauges: readings per layer, merged into `layers`.
        """
        with self._lock:
            self._count_hits()
            counts, sums = dict(self._n), dict(self._s)
            layers: dict[str, dict[str, Any]] = {name: dict(found) for name, found in self._layers.items()}
            agents = {name: dict(found) for name, found in self._agents.items()}
            percentiles = {f"latency_p{p}_s": self._latency.percentile(p / 100) for p in (50, 95, 99)}
            errors, warnings = dict(self._errors), dict(self._warnings)
        for name, readings in (gauges or {}).items():
            layers.setdefault(name, {}).update(readings)
        counts["in_flight"] = in_flight
        counts["request_count"] = in_flight + sum(counts[name] for name in _ENDINGS.values())
        looked = counts["cache_hits"] + counts["cache_misses"]
        return {
            **counts,
            **sums,
            **percentiles,
            "cache_hit_rate": counts["cache_hits"] / looked if looked else 0.0,
            "errors_by_type": errors,
            "warnings": warnings,
            "layers": layers,
            "by_agent": agents,
        }

    def _add(self, name: str) -> None:
        self._n[name] += 1

    def _layer(self, layer: str, name: str) -> None:
        self._layers[layer][name] += 1

    def _agent(self, agent: str, name: str, amount: int = 1) -> None:
        counts = self._agents.get(agent)
        if counts is None:
            counts = self._agents[agent] = dict.fromkeys(_AGENT, 0)
        counts[name] += amount

    # Most calls have no agent, and every call passes through the next six: they ask before they call `_agent`.

    def _cache_missed(self, _: ev.CacheMiss) -> None:
        self._n["cache_misses"] += 1

    def _cache_stored(self, _: ev.CacheStored) -> None:
        self._layers["cache"]["stored"] += 1

    def _call_ended(self, event: ev.CallEnded) -> None:
        counts, result = self._n, event.result
        counts[_ENDINGS[result]] += 1
        self._latency.add(event.duration_s)
        if result == "coalesced":
            counts["tokens_saved"] += event.usage.total_tokens
        elif result == "failed":
            self._errors[event.error] = self._errors.get(event.error, 0) + 1
        if event.agent is not None:
            self._agent_ended(event.agent, result)

    def _agent_ended(self, agent: str, result: CallResult) -> None:
        self._agent(agent, "request_count")
        if result in _ENDINGS_BY_AGENT:
            self._agent(agent, _ENDINGS[result])

    def _cache_hit(self, event: ev.CacheHit) -> None:
        self._saved(event.tier, event.usage.total_tokens, event.saved_s, 1)
        if event.stale:
            self._layers["cache"]["stale hits"] += 1

    def _saved(self, tier: str, tokens: int, saved_s: float, hits: int) -> None:
        self._n["tokens_saved"] += tokens
        self._s["time_saved_s"] += saved_s
        self._layers["cache"][_HITS.get(tier) or f"{tier} hits"] += hits

    def _upstream_started(self, event: ev.UpstreamStarted) -> None:
        self._n["upstream_requests"] += 1
        self._layers["endpoints"][event.endpoint] += 1
        if event.agent is not None:
            self._agent(event.agent, "upstream_requests")

    def _upstream_ended(self, event: ev.UpstreamEnded) -> None:
        counts, usage = self._n, event.usage
        if not event.ok:
            counts["upstream_failures"] += 1
        counts["tokens_in"] += usage.input_tokens
        counts["tokens_out"] += usage.output_tokens
        if event.agent is not None:
            self._agent_tokens(event.agent, usage)

    def _usage_shared(self, event: ev.UsageShared) -> None:
        self._agent_tokens(event.agent, event.usage)

    def _agent_tokens(self, agent: str, usage: Usage) -> None:
        self._agent(agent, "tokens_in", usage.input_tokens)
        self._agent(agent, "tokens_out", usage.output_tokens)

    def _retry(self, event: ev.RetryScheduled) -> None:
        self._n["retries"] += 1
        self._layer("retry", event.fault)

    def _fell_back(self, event: ev.FellBack) -> None:
        self._n["fallbacks"] += 1
        self._layer("route", event.fault)

    def _limiter_waited(self, event: ev.LimiterWaited) -> None:
        self._s["rate_limit_wait_s"] += event.wait_s
        self._layer("limit", "waited")

    def _batch_flushed(self, event: ev.BatchFlushed) -> None:
        self._n["batch_count"] += 1
        self._n["batched_requests"] += event.size
        self._layer("batch", f"flushed by {event.cause}")

    def _warned(self, event: ev.Warned) -> None:
        self._warnings[event.kind] = event.message


_RESULTS: dict[Source, tuple[CallResult, str]] = {
    "cache": ("hit", ""), "coalesced": ("coalesced", ""), "upstream": ("upstream", ""), "batch": ("upstream", ""),
}  # fmt: skip


def cache_hit(reply: Reply, agent: str | None, tier: str = "memory") -> ev.CacheHit:
    """What tells of an answer from the cache."""
    return ev.CacheHit(tier, reply.usage, reply.service_s, reply.stale, agent)


def result_of(reply: Reply) -> tuple[CallResult, str]:
    """As what a call with this reply counts, and for a failure the error's name."""
    return _RESULTS[reply.source] if reply.ok else ("failed", f"status {reply.status}")

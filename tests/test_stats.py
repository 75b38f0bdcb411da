"""Statistics tell the truth, before the first call and under hostile figures."""

from __future__ import annotations

import math
import threading

from hypothesis import given, settings
from hypothesis import strategies as st

from llmmw import events as ev
from llmmw.answer import Usage
from llmmw.call import Reply
from llmmw.env import Env
from llmmw.stats import LatencyHistogram, Stats, cache_hit


def numbers_in(value):
    if isinstance(value, dict):
        for inner in value.values():
            yield from numbers_in(inner)
    elif isinstance(value, int | float):
        yield value


def test_nothing_is_missing_or_nan_before_the_first_call():
    found = Stats().snapshot()
    assert all(math.isfinite(number) for number in numbers_in(found))
    assert found["cache_hit_rate"] == 0.0


@settings(max_examples=50, derandomize=True)
@given(st.lists(st.floats(0.0001, 1000), min_size=1, max_size=200), st.sampled_from([0.5, 0.95, 0.99]))
def test_a_percentile_is_within_two_percent_of_the_exact_one(durations, share):
    histogram = LatencyHistogram()
    for duration in durations:
        histogram.add(duration)
    exact = sorted(durations)[max(0, math.ceil(share * len(durations)) - 1)]
    assert abs(histogram.percentile(share) - exact) <= 0.02 * exact


def test_a_negative_duration_counts_as_zero():
    histogram = LatencyHistogram()
    histogram.add(-1.0)
    assert histogram.percentile(0.5) < 1e-6


def test_every_event_is_folded_where_the_design_says():
    stats = Stats()
    usage = Usage(10, 5, reported=True)
    for event in (
        ev.CallEnded("hit", 0.1, "a", usage),
        ev.CallEnded("coalesced", 0.1, "a", usage),
        ev.CallEnded("failed", 0.1, "a", error="ValueError"),
        ev.CallEnded("cancelled", 0.1),
        ev.CacheHit("memory", usage, 1.5, stale=True, agent="a"),
        ev.CacheMiss(),
        ev.CacheStored(100),
        ev.CacheSkipped("mode off"),
        ev.CacheTrouble("corrupt row"),
        ev.Coalesced("a"),
        ev.UpstreamStarted("e", "a"),
        ev.UpstreamEnded("e", ok=False, duration_s=1, usage=usage, agent="a"),
        ev.RetryScheduled("e", "server", 0.5),
        ev.FellBack("e", "f", "server"),
        ev.CircuitChanged("e", "open"),
        ev.LimiterWaited("e", 2.0, "a"),
        ev.LimiterPaused("e", 1.0),
        ev.RefusedEarly("limit", "deadline"),
        ev.BatchFlushed(3, "size"),
        ev.ConnectionOpened("o"),
        ev.ConnectionReused("o"),
        ev.Warned("kind", "message"),
    ):
        stats(event)
    found = stats.snapshot(2, {"limit": {"queue": 0}})
    expected = {
        "request_count": 6, "cache_hits": 1, "cache_misses": 1, "cache_hit_rate": 0.5, "coalesced": 1, "errors": 1,
        "cancelled": 1, "in_flight": 2, "upstream_requests": 1, "upstream_failures": 1, "retries": 1, "fallbacks": 1,
        "batch_count": 1, "batched_requests": 3, "tokens_in": 10, "tokens_out": 5, "tokens_saved": 30,
        "time_saved_s": 1.5, "rate_limit_wait_s": 2.0, "connections_opened": 1, "connections_reused": 1,
        "errors_by_type": {"ValueError": 1}, "warnings": {"kind": "message"},
    }  # fmt: skip
    assert {name: found[name] for name in expected} == expected
    assert found["by_agent"]["a"]["request_count"] == 3
    assert found["layers"]["limit"]["queue"] == 0
    assert all(math.isfinite(number) for number in numbers_in(found))


def test_hits_are_counted_exactly_however_many_come_at_once_from_several_threads():
    stats, told = Stats(), Stats()
    reply = Reply(data=b"x", source="cache", usage=Usage(3, 4), service_s=0.5)
    threads = [
        threading.Thread(target=lambda agent=agent: [stats.hit(reply, 0.25, agent) for _ in range(1001)])
        for agent in (None, None, "a", "b")
    ]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        found = stats.snapshot()  # which counts, too
        assert found["tokens_saved"] == 7 * found["cache_hits"]
    for agent in [None] * 2002 + ["a"] * 1001 + ["b"] * 1001:
        told(cache_hit(reply, agent))
        told(ev.CallEnded("hit", 0.25, agent, reply.usage))
    assert stats.snapshot() == told.snapshot()
    assert stats.snapshot()["request_count"] == 4004


def test_a_snapshot_is_the_callers_own():
    stats = Stats()
    stats(ev.CallEnded("hit", 0.1, "a"))
    stats.snapshot()["by_agent"]["a"]["request_count"] = 99
    assert stats.snapshot()["by_agent"]["a"]["request_count"] == 1


def test_a_sink_that_raises_never_breaks_a_call_and_is_dropped():
    seen = []

    def broken(_):
        raise RuntimeError

    env = Env(sinks=(broken, seen.append))
    env.emit(ev.CacheMiss())
    env.emit(ev.CacheMiss())
    assert len(seen) == 2
    env.add_sink(seen.append)
    env.emit(ev.CacheMiss())
    assert len(seen) == 4


def test_somebodys_own_event_is_ignored():
    class Mine(ev.Event, frozen=True):
        pass

    Stats()(Mine())

"""Service times: enough samples before a refusal rests on them, and forgotten soon enough to end one."""

from __future__ import annotations

from llmmw.algo.service import MAX_AGE_S, MIN_SAMPLES, ServiceTimes


def test_service_times_need_samples_and_forget():
    times = ServiceTimes()
    kind = ("chat", "m")
    for n in range(MIN_SAMPLES):
        assert not times.lacks(kind, 0, 0.5)
        times.add(kind, 0, 1 + n)
    assert times.lacks(kind, 0, 1.9)
    assert not times.lacks(kind, 0, 2)
    assert not times.lacks(("embed", "m"), 0, 0.5)
    assert not times.lacks(kind, MAX_AGE_S + 1, 0.5)


def test_service_times_stay_bounded():
    times = ServiceTimes()
    for n in range(10_000):
        times.add(("chat", str(n)), 0, 1)
        times.add(("chat", "9999999"), 0, 1)
    assert len(times._by_kind) <= 257
    assert max(len(found) for found in times._by_kind.values()) <= 64

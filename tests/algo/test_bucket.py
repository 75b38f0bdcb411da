"""The sliding window and the leaky bucket's arithmetic."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmmw.algo.bucket import Ledger, burst_of, leak_time, prefill, steady_time


@settings(max_examples=150, derandomize=True, deadline=None)
@given(
    limit=st.integers(1, 50),
    steps=st.lists(st.tuples(st.floats(0, 30), st.integers(1, 60)), max_size=60),
)
def test_no_window_ever_holds_more_than_the_limit(limit, steps):
    ledger, now, spent = Ledger(limit, 60.0), 100.0, []
    for wait, amount in steps:
        now += wait
        if ledger.fits(amount, now):
            ledger.spend(amount, now)
            spent.append((now, amount))
    for began, first in spent:
        inside = [amount for at, amount in spent if began <= at < began + 60.0]
        assert sum(inside) <= limit or (len(inside) == 1 and first > limit)


@settings(max_examples=150, derandomize=True, deadline=None)
@given(
    limit=st.integers(1, 50),
    steps=st.lists(st.tuples(st.floats(0, 30), st.integers(1, 60), st.integers(0, 80)), max_size=40),
    amount=st.integers(1, 60),
)
def test_when_is_the_first_moment_that_fits(limit, steps, amount):
    ledger, now = Ledger(limit, 60.0), 100.0
    for wait, reserved, actual in steps:
        now += wait
        ledger.settle(ledger.spend(reserved, now), reserved, actual, now)
        assert ledger.used(now) >= 0
    at = ledger.when(amount, now)
    assert now <= at <= now + 60.0
    if at > now:
        assert not ledger.fits(amount, now)
        assert not ledger.fits(amount, (now + at) / 2)
    assert ledger.fits(amount, at + 1e-6)


def test_memory_is_bounded_whatever_the_rate():
    ledger = Ledger(10**9, 60.0)
    for n in range(50_000):
        ledger.spend(1, 100 + n * 0.001)
    assert len(ledger._cells) < 1100
    assert ledger.used(150.0) == 50_000
    assert ledger.used(1000.0) == 0


def test_settling_after_the_window_gives_nothing_back():
    ledger = Ledger(100, 60.0)
    cell = ledger.spend(80, 0.0)
    ledger.settle(cell, 80, 10, 61.0)
    assert ledger.used(61.0) == 0
    ledger.settle(ledger.spend(10, 70.0), 10, 150, 71.0)
    assert ledger.used(72.0) == 150
    assert ledger.used(131.0) == 0


def test_others_use_counts_until_the_reset_and_not_what_started_later():
    ledger = Ledger(100, 60.0)
    ledger.spend(10, 0.0)
    ledger.spend(20, 5.0)
    ledger.observe(60, started=0.0, now=6.0, reset_s=10.0)  # 40 are gone, 10 of them ours
    assert ledger.used(6.0) == 60
    assert ledger.when(60, 6.0) == 16.0
    assert ledger.used(16.0) == 30
    ledger.observe(1000, started=5.0, now=20.0, reset_s=None)
    assert ledger.used(20.0) == 30
    assert ledger.record(21.0) == [(21.0, 10), (16.0, 20)]


@pytest.mark.parametrize(
    ("limit", "asked", "expected"),
    [(1, None, 1), (11, None, 1), (60, None, 5), (600, None, 50), (12_000, None, 50), (10, 3, 3), (10, 99, 10)],
)
def test_burst_is_a_twelfth_and_at_most_fifty(limit, asked, expected):
    assert burst_of(limit, asked) == expected


@pytest.mark.parametrize(
    ("limit", "burst", "share"),
    [(60, 5, 0.98), (50, 4, 0.98), (1, 1, 1.0), (600, 600, 0.98), (12_000, 50, 11_951 / 12_000)],
)
def test_beside_a_ledger_the_bucket_leaves_little_of_the_limit_free(limit, burst, share):
    assert burst / steady_time(limit, burst, 1.0) == pytest.approx(share * limit)


@settings(max_examples=150, derandomize=True, deadline=None)
@given(
    limit=st.integers(1, 60),
    ages=st.lists(st.floats(0, 59.9), max_size=60),
    burst=st.integers(1, 60),
    gaps=st.lists(st.floats(0, 5), min_size=100, max_size=100),
)
def test_limit_09_old_and_new_admissions_fit_one_limit(limit, ages, burst, gaps):
    ages = sorted(ages, reverse=True)[:limit]
    burst = min(limit, burst)
    level = prefill([(age, 1) for age in ages], limit, burst, 60.0)
    assert 0 <= level <= burst
    rate = burst / leak_time(limit, burst, 60.0)
    now, admitted = 0.0, [-age for age in ages]
    needs_ledger = prefill([(age, 1) for age in ages], limit, burst, 60.0) >= burst
    for gap in gaps:
        now += gap
        level = max(0.0, level - gap * rate)
        while level + 1 <= burst + 1e-12:
            level += 1
            admitted.append(now)
    if not needs_ledger:  # a full bucket is all it can say; beyond that the ledger of requests holds back
        for began in admitted:
            assert sum(1 for at in admitted if began <= at < began + 60.0 - 1e-6) <= limit

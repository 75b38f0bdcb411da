"""The concurrency limit."""

from hypothesis import given, settings
from hypothesis import strategies as st

from llmmw.algo.aimd import Aimd


def test_one_burst_of_refusals_is_one_cut():
    aimd = Aimd(1, 64, 64)
    assert aimd.overloaded(started=0.0, now=1.0)
    assert not any(aimd.overloaded(started=0.5, now=1.1) for _ in range(63))
    assert aimd.limit == 44
    assert aimd.overloaded(started=1.0, now=2.0)
    assert aimd.limit == 30


def test_growth_needs_a_full_window_of_saturated_successes():
    aimd = Aimd(1, 10, 20)
    aimd.overloaded(0.0, 0.0)
    assert aimd.limit == 7
    for _ in range(100):
        aimd.succeeded(saturated=False)
    assert aimd.limit == 7
    for _ in range(6):
        aimd.succeeded(saturated=True)
    assert aimd.limit == 7
    aimd.succeeded(saturated=True)
    assert aimd.limit == 8


def test_doubles_per_round_until_the_first_overload():
    aimd = Aimd(4, 20, 80)
    for _ in range(20):
        aimd.succeeded(saturated=True)
    assert aimd.limit == 40
    for _ in range(100):
        aimd.succeeded(saturated=True)
    assert aimd.limit == 80


def test_limit_09_new_bounds_hold_at_once():
    aimd = Aimd(1, 10, 10)
    aimd.bounds(1, 4, 4)
    assert aimd.limit == 4
    aimd.bounds(1, 30, 30)
    assert aimd.limit == 30
    aimd.overloaded(0.0, 0.0)
    aimd.bounds(1, 30, 30)
    assert aimd.limit == 21


@settings(max_examples=100, derandomize=True, deadline=None)
@given(events=st.lists(st.sampled_from(["good", "idle", "bad"]), max_size=200))
def test_limit_13_always_within_its_bounds(events):
    aimd = Aimd(2, 5, 9)
    for now, event in enumerate(events):
        if event == "bad":
            aimd.overloaded(now, now)
        else:
            aimd.succeeded(saturated=event == "good")
        assert 2 <= aimd.limit <= 9

"""The concurrency limit."""

from itertools import count

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


# ── the server's own queue ──────────────────────────────────────────────────────────────────────────────────────────


def settle(aimd, places, others=0, rounds=400):
    """Every slot taken, `places` sequences run at the server, the rest (and `others`) wait; the limits passed."""
    passed = []
    for now in range(rounds):
        waiting = max(0, aimd.limit + others - places)
        aimd.queued(waiting, in_use=aimd.limit, now=now)
        passed.append(aimd.limit)
    return passed


@settings(max_examples=100, derandomize=True, deadline=None)
@given(places=st.integers(1, 600), floor=st.integers(1, 40), more=st.integers(0, 200), yet_more=st.integers(0, 500))
def test_it_settles_at_the_servers_places_and_a_small_queue(places, floor, more, yet_more):
    start = floor + more
    aimd = Aimd(floor, start, start + yet_more)
    passed = settle(aimd, places)
    at_rest = passed[-50:]
    assert len({*at_rest}) == 1, "it does not swing"
    least, most = floor if floor > 1 else max(1, start // 8), start + yet_more
    wanted = min(max(places, least), most)
    assert wanted <= at_rest[-1] <= max(wanted, min(most, places + max(2, at_rest[-1] // 8)))
    assert all(least <= limit <= most for limit in passed)


def test_a_queue_within_bounds_changes_nothing_but_ends_growth():
    aimd = Aimd(4, 64, 256)
    aimd.queued(8, in_use=64, now=1.0)
    for _ in range(64 * 64):
        aimd.succeeded(saturated=True)
    assert aimd.limit == 64
    for _ in range(64):
        aimd.succeeded(saturated=True)
    assert aimd.limit == 65, "the server has ceased to tell"
    aimd.queued(1, in_use=65, now=2.0)
    aimd.queued(0, in_use=60, now=3.0)
    for _ in range(65):
        aimd.succeeded(saturated=True)
    assert aimd.limit == 66, "an empty queue ends it"


def test_an_empty_queue_lets_more_through_only_where_every_slot_is_taken():
    clock = count(1.0)
    aimd = Aimd(4, 64, 256)
    aimd.queued(0, in_use=63, now=next(clock))
    assert aimd.limit == 64
    aimd.queued(0, in_use=64, now=next(clock))
    assert aimd.limit == 72
    aimd.queued(0, in_use=64, now=next(clock))
    assert aimd.limit == 72, "the change has not taken effect yet"


def test_each_cut_waits_until_the_last_one_has_taken_effect():
    aimd = Aimd(4, 64, 64)
    for in_use in range(64, 56, -1):
        aimd.queued(30, in_use, now=64 - in_use)
    assert aimd.limit == 56
    aimd.queued(25, in_use=56, now=8.0)
    assert aimd.limit == 49


def test_where_half_of_the_calls_wait_it_falls_by_a_quarter():
    aimd = Aimd(8, 256, 512)
    passed = [256]
    while aimd.limit > 18:
        aimd.queued(aimd.limit - 16, in_use=aimd.limit, now=len(passed))
        passed.append(aimd.limit)
    assert passed[:3] == [256, 192, 144]
    assert len(passed) <= 13


def test_answers_of_one_moment_move_it_once():
    down, up = Aimd(1, 64, 64), Aimd(1, 64, 256)
    for n in range(50):
        down.queued(50, in_use=down.limit, now=n / 1000)
        up.queued(0, in_use=up.limit, now=n / 1000)
    assert (down.limit, up.limit) == (48, 72)


def test_a_queue_of_others_calls_changes_nothing():
    clock = count(1.0)
    aimd = Aimd(4, 64, 64)
    aimd.queued(500, in_use=3, now=next(clock))
    aimd.queued(500, in_use=31, now=next(clock))
    assert aimd.limit == 64
    aimd.queued(500, in_use=32, now=next(clock))
    assert aimd.limit == 48


def test_whoever_never_yields_leaves_the_floor_or_an_eighth():
    assert settle(Aimd(1, 64, 64), places=8, others=10_000)[-1] == 8
    assert settle(Aimd(20, 64, 64), places=8, others=10_000)[-1] == 20
    assert settle(Aimd(2, 64, 64), places=8, others=10_000)[-1] == 2, "a floor that is named is meant"
    refused = Aimd(1, 64, 64)
    for now in range(20):
        refused.overloaded(now, now)
    refused.queued(10_000, in_use=1, now=99.0)
    assert refused.limit == 1, "a queue never raises the limit"


def test_two_clients_share_the_places_without_a_long_queue():
    one, other = Aimd(1, 64, 256), Aimd(1, 64, 256)
    for _ in range(8):
        other.overloaded(_, _)
    for turn in range(4000):
        waiting = max(0, one.limit + other.limit - 100)
        (one, other)[turn % 2].queued(waiting, (one, other)[turn % 2].limit, now=turn)
        for aimd in (one, other):
            aimd.succeeded(saturated=True)
    assert 100 <= one.limit + other.limit <= 130


def test_new_bounds_hold_for_the_queue_too():
    aimd = Aimd(1, 64, 64)
    aimd.bounds(1, 16, 16)
    assert settle(aimd, places=1)[-1] == 3
    fixed = Aimd(64, 64, 64)
    assert settle(fixed, places=1)[-1] == 64

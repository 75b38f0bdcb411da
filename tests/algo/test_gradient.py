"""Gradient2: the number of calls under way follows the time to the first token."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from llmmw.algo.gradient import Gradient2


def drive(limit, delay, rounds):
    """Rounds of a server that is always asked as much as allowed; `delay(under way)` gives the first token's time."""
    for _ in range(rounds):
        under_way = limit.limit
        for _ in range(10):
            limit.first_token(delay(under_way), under_way)


def test_it_grows_while_first_tokens_come_as_fast_as_ever():
    limit = Gradient2(1, 4, 64)
    drive(limit, lambda under_way: 0.2, 200)
    assert limit.limit == 64


def test_it_settles_where_a_queue_begins_to_form():
    rng = random.Random(5)
    limit = Gradient2(1, 4, 200)
    drive(limit, lambda under_way: 0.2 * max(1.0, under_way / 20) * rng.uniform(0.9, 1.1), 400)
    assert 20 <= limit.limit <= 90


def test_it_falls_when_the_server_slows_down_and_comes_back():
    limit = Gradient2(1, 4, 64)
    drive(limit, lambda under_way: 0.2, 100)
    drive(limit, lambda under_way: 2.0, 20)
    fallen = limit.limit
    assert fallen < 20
    drive(limit, lambda under_way: 0.2, 100)
    assert limit.limit == 64


def test_few_calls_at_a_time_do_not_move_it():
    limit = Gradient2(1, 32, 64)
    for _ in range(1000):
        limit.first_token(0.2, 3)
    assert limit.limit == 32


def test_overload_cuts_as_with_aimd_and_whole_answers_raise_it():
    limit = Gradient2(1, 32, 64)
    assert limit.overloaded(5.0, 6.0)
    assert limit.limit == 22
    for _ in range(23):
        limit.succeeded(saturated=True)
    assert limit.limit == 23


@settings(max_examples=100, derandomize=True, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1e6), st.integers(0, 1000)), max_size=300), st.integers(1, 5))
def test_it_stays_within_its_bounds(samples, floor):
    limit = Gradient2(floor, floor + 3, floor + 20)
    for took, under_way in samples:
        limit.first_token(took, under_way)
        assert floor <= limit.limit <= floor + 20

"""Keys come up after their end, soon after it, once, and not after they were taken out."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from llmmw.algo.calendar import Calendar


def test_a_key_comes_up_after_its_end_and_at_most_a_64th_of_its_life_late():
    for life in (0.25, 1.0, 60.0, 300.0, 86400.0, 1e7):
        calendar = Calendar()
        now = 12345.678
        calendar.add(b"k", now + life, now)
        assert calendar.over(now + life * 0.999999, 9) == []
        assert calendar.over(now + life * (1 + 1 / 64), 9) == [b"k"]
        assert calendar.over(now + 9 * life, 9) == []


def test_few_drawers_hold_many_keys_whatever_their_lifetime():
    for life in (1.0, 300.0, 604800.0):
        calendar = Calendar()
        for number in range(5000):
            now = number * life / 5000
            calendar.add(number.to_bytes(4, "big"), now + life * (0.9 + number % 100 / 500), now)
        assert len(calendar._drawers) < 200
        assert len(calendar) == 5000


def test_a_span_that_passed_is_worked_off_in_parts():
    calendar = Calendar()
    for number in range(100):
        calendar.add(bytes([number]), 10.0, 0.0)
    parts = [calendar.over(20.0, 16) for _ in range(8)]
    assert [len(part) for part in parts] == [16] * 6 + [4, 0]
    assert len({key for part in parts for key in part}) == 100


@settings(max_examples=150, derandomize=True, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from("aaro"), st.integers(0, 15), st.floats(0.001, 5000), st.floats(0, 300)), max_size=80
    )
)
def test_against_a_plain_mapping(steps):
    calendar, held, now = Calendar(), {}, 0.0
    for action, number, life, passed in steps:
        key = bytes([number])
        now += passed
        if action == "a" and key not in held:
            held[key] = (now + life, calendar.add(key, now + life, now), life)
        elif action == "r" and key in held:
            calendar.remove(key, held.pop(key)[1])
        elif action == "o":
            for found in calendar.over(now, 3):
                assert held.pop(found)[0] <= now
        assert len(calendar) == len(held)
    for found in calendar.over(now + 10_000, 1000):
        del held[found]
    assert held == {}
    assert calendar._drawers == {}
    assert calendar._order == []

"""Whose time comes first."""

from math import inf

from hypothesis import given, settings
from hypothesis import strategies as st

from llmmw.algo.due import Due

KINDS = ["add", "add", "end", "move", "pop", "never"]


@settings(max_examples=150, derandomize=True, deadline=None)
@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(["add", "add", "end", "move", "pop", "never"]), st.integers(0, 50), st.integers(0, 99)
        ),
        max_size=120,
    )
)
def test_everybody_is_told_once_and_in_time(steps):
    moments, told, now = {}, [], 0.0
    due = Due(moments.get)
    for kind, number, pick in steps:
        here = [thing for thing, at in moments.items() if at is not None]
        if kind == "add":
            thing = len(moments)
            moments[thing] = now + number
            due.add(thing)
        elif here and kind == "end":
            moments[here[pick % len(here)]] = None
            due.discard()
        elif here and kind == "move":
            moments[here[pick % len(here)]] += number
        elif here and kind == "never":
            moments[here[pick % len(here)]] = inf
        elif kind == "pop":
            now += number / 10
            found = due.pop(now)
            assert all(moments[thing] <= now for thing in found)
            for thing in found:
                moments[thing] = None
            told += found
            assert not [thing for thing, at in moments.items() if at is not None and at <= now]
        assert due.next() == min([inf, *(at for at in moments.values() if at is not None)])
    assert len(told) == len(set(told))


def test_what_is_over_takes_no_room():
    moments = {}
    due = Due(moments.get)
    first = -1
    moments[first] = 0.0
    due.add(first)
    for thing in range(1000):
        moments[thing] = 1.0 + thing
        due.add(thing)
        moments[thing] = None
        due.discard()
    assert len(due) < 40

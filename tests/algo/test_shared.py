"""The counter that processes share: exact on its own clock, and safe without it."""

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmmw.algo.shared import MEMBER_S, Answer, Ask, Share, step

WINDOW = 61.0


def ask(member="a", amounts=(1,), limits=(60,), burst=5, **fields):
    return Ask(member, limits, WINDOW, burst, amounts, **fields)


@settings(max_examples=120, derandomize=True, deadline=None)
@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from([0.0, 0.001, 0.2, 1.0, 5.0, 40.0]),
            st.sampled_from("abcd"),
            st.sampled_from([(1, 5), (1, 40), (1, 90)]),
            st.sampled_from(["keep", "keep", "return", "less", "more"]),
        ),
        max_size=150,
    ),
    limits=st.sampled_from([(1, 100), (7, 100), (60, 1000)]),
)
def test_limit_11_no_window_sees_more_than_the_limit(steps, limits):
    state, now, granted = None, 100.0, []
    burst = max(1, limits[0] // 12)
    for wait, member, amounts, fate in steps:
        now += wait
        asked = ask(member, (1, min(amounts[1], limits[1])), limits, burst)
        state, answer = step(state, asked, now)
        if answer.cell is None:
            assert answer.wait_s > 0
            # what the counter foretells is no more than a hint, but a sound one: it does not grant before
            _, early = step(state, asked, now + answer.wait_s / 2)
            assert early.cell is None
            continue
        entry = [now, 1, asked.amounts[1]]
        granted.append(entry)
        change = {"return": (-1, -entry[2]), "less": (0, -(entry[2] // 2)), "more": (0, 3), "keep": None}[fate]
        if change is not None:
            state, _ = step(state, ask(member, None, limits, burst, changes=((answer.cell, change),)), now)
            entry[1] += change[0]
            entry[2] += min(0, change[1])
        for index, limit in ((1, limits[0]), (2, limits[1])):
            assert sum(each[index] for each in granted if each[0] > now - WINDOW) <= limit


def test_limit_11_bursts_of_all_processes_together_stay_small():
    state, at_once = None, 0
    for number in range(20):
        state, answer = step(state, ask(f"m{number % 4}"), 100.0)
        at_once += answer.cell is not None
    assert at_once == 5


def test_limit_11_parts_never_sum_up_to_more_than_the_whole():
    state, told, now = None, {}, 100.0
    for number, member in enumerate("abcabdaabcdeabcdeabcde"):
        now += number * 0.01
        state, answer = step(state, ask(member, None), now)
        told[member] = answer.part
        assert sum(told.values()) <= 1 + 1e-9
    assert all(part == pytest.approx(0.2) for part in told.values())
    state, answer = step(state, ask("e", None, leaving=True), now)
    assert answer.members == 4
    assert answer.part == 0.0
    state, answer = step(state, ask("a", None), now + MEMBER_S + 1)
    assert (answer.members, answer.part) == (1, 1.0)


@pytest.mark.parametrize(
    "state",
    [
        b"",
        b"\xc1",
        b"[]",
        msgspec.msgpack.encode([[[1.0, 1.0, [1, 2, 3]]], 0.0, {}]),
        msgspec.msgpack.encode([[[float("nan"), 1.0, [1]]], 0.0, {}]),
        msgspec.msgpack.encode([[], float("nan"), {}]),
        msgspec.msgpack.encode([[], 0.0, {"a": [float("inf"), 0.5]}]),
        msgspec.msgpack.encode([[], 0.0, {"a": [1.0, 7.0]}]),
        msgspec.msgpack.encode([[["x", 1.0, [1]]], 0.0, {}]),
    ],
)
def test_a_state_of_a_foreign_hand_counts_as_just_spent(state):
    state, answer = step(state, ask(), 100.0)
    assert answer.cell is None
    _, answer = step(state, ask(), 100.0 + WINDOW)
    assert answer.cell is not None


def test_a_clock_that_began_anew_counts_as_just_spent():
    state, _ = step(None, ask(), 1e9)
    state, _ = step(state, ask(limits=(1,), burst=1), 5.0)
    _, answer = step(state, ask(limits=(1,), burst=1), 5.0 + WINDOW - 1)
    assert answer.cell is None
    _, answer = step(state, ask(limits=(1,), burst=1), 5.0 + WINDOW)
    assert answer.cell is not None


def test_changes_of_another_shape_and_of_cells_that_are_gone_are_harmless():
    state, first = step(None, ask(), 100.0)
    changes = ((first.cell, (-1, -1)), (77.0, (-1,)), (first.cell, (-5,)))
    state, answer = step(state, ask(amounts=None, changes=changes), 101.0)
    assert [amounts for _, amounts in answer.cells] == [(0,)]


def test_limit_11_a_lost_counter_leaves_each_his_part_after_what_it_may_have_granted():
    share = Share(4)
    asked = ask(limits=(60,), burst=5)
    share.heard(asked, Answer(1.0, 0.0, 2, 0.5, ((10.0, (40,)), (1.0, (10,)))), 99.9, 100.0)
    assert not share.binds(100.0)
    share.lost(101.0)
    assert share.opens_at(asked, (1,), 101.0) == 101.0  # 50 told, 7 perhaps granted since: half of 3 is 1
    assert share.opens_at(asked, (2,), 101.0) > 101.0
    assert share.members == 2
    granted, now = 0, 101.0
    while now < 101.0 + WINDOW:
        opens = share.opens_at(asked, (1,), now)
        if opens > now:
            now = opens
            continue
        granted += 1
        share.spend([1], now, asked)
    assert 5 <= granted <= 30
    assert sum(amounts[0] for _, amounts in share.spent(asked, now)) <= 30


def test_limit_11_who_was_told_no_part_waits_for_the_counter():
    share = Share(4)
    asked = ask()
    share.heard(asked, Answer(None, 0.0, 3, 0.0, ()), 99.0, 99.0)
    share.lost(100.0)
    assert share.opens_at(asked, (1,), 1000.0) == float("inf")

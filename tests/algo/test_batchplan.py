from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmmw.algo.batchplan import Due, Flush, GroupSize, Limits, Plan, when_due

QUICK = settings(max_examples=150, derandomize=True, deadline=None)
LATER = Due(1e9)


# ── when ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_interval_and_deadline_say_how_long_to_wait() -> None:
    assert when_due(10.0, 0.5, None) == Due(10.5)
    assert when_due(10.0, 0.5, 100.0) == Due(10.5)
    assert when_due(10.0, 0.5, 10.05) == Due(10.025, hurried=True)
    assert when_due(10.0, 0.5, 9.0) == Due(10.0, hurried=True)


def causes(flushes: list[Flush[str]]) -> list[tuple[str, tuple[str, ...]]]:
    return [(flush.cause, flush.items) for flush in flushes]


def test_full_group_goes() -> None:
    plan: Plan[None, str, str] = Plan(Limits(max_size=2))
    assert plan.add(None, "k", "a", LATER) == []
    assert plan.add(None, "other", "x", LATER) == []
    assert causes(plan.add(None, "k", "b", LATER)) == [("size", ("a", "b"))]
    assert len(plan) == 1


@pytest.mark.parametrize("what", ["bytes", "tokens"])
def test_batch_02_item_that_no_longer_fits_goes_in_the_next_group(what: str) -> None:
    limits = Limits(max_bytes=10) if what == "bytes" else Limits(max_tokens=10)
    name = "size_bytes" if what == "bytes" else "tokens"
    plan: Plan[None, str, str] = Plan(limits)
    plan.add(None, "k", "a", LATER, **{name: 6})
    assert causes(plan.add(None, "k", "b", LATER, **{name: 6})) == [(what, ("a",))]
    assert causes(plan.add(None, "k", "huge", LATER, **{name: 11})) == [(what, ("b",)), (what, ("huge",))]
    assert len(plan) == 0


def test_late_groups_go_and_say_why() -> None:
    plan: Plan[None, str, str] = Plan(Limits())
    plan.add(None, "k", "a", Due(5.0))
    plan.add(None, "k", "b", Due(9.0))
    plan.add(None, "other", "c", Due(6.0, hurried=True))
    assert plan.next_at() == 5.0
    assert plan.due(4.9) == []
    assert causes(plan.due(6.0)) == [("interval", ("a", "b")), ("deadline", ("c",))]
    assert plan.next_at() is None


def test_chosen_groups_are_drained() -> None:
    plan: Plan[None, str, str] = Plan(Limits())
    plan.add(None, "k", "a", LATER)
    plan.add(None, "other", "b", LATER)
    assert causes(plan.drain_all("close", lambda key: key == "k")) == [("close", ("a",))]
    assert causes(plan.drain_all("close")) == [("close", ("b",))]
    assert not plan.remove("a")


steps = st.lists(
    st.tuples(
        st.sampled_from(["add", "add", "add", "remove", "due", "drain", "hasten", "shrink", "grow"]),
        st.sampled_from(["k1", "k2", "l1"]),
        st.integers(0, 8),
        st.integers(0, 8),
        st.floats(0, 3),
    ),
    max_size=80,
)


@QUICK
@given(steps, st.integers(1, 6), st.none() | st.integers(1, 12), st.none() | st.integers(1, 12))
def test_every_item_goes_exactly_once_in_order_and_within_the_limits(
    script: list[tuple[str, str, int, int, float]], max_size: int, max_bytes: int | None, max_tokens: int | None
) -> None:
    group_size = GroupSize(max_size)
    plan: Plan[str, str, tuple[str, int, int, int]] = Plan(Limits(max_size, max_bytes, max_tokens), group_size)
    waiting: dict[tuple[str, int, int, int], None] = {}
    now = 0.0

    def check(flushes: list[Flush[tuple[str, int, int, int]]], limit: int) -> None:
        for flush in flushes:
            keys = {item[0] for item in flush.items}
            assert len(keys) == 1
            assert list(flush.items) == [item for item in waiting if item[0] in keys][: len(flush.items)]
            for item in flush.items:
                del waiting[item]
            assert len(flush.items) <= limit
            if len(flush.items) > 1:
                assert max_bytes is None or sum(item[2] for item in flush.items) <= max_bytes
                assert max_tokens is None or sum(item[3] for item in flush.items) <= max_tokens

    for number, (action, key, size, tokens, gap) in enumerate(script):
        now += gap
        if action == "add":
            item = (key, number, size, tokens)
            waiting[item] = None
            check(plan.add(key[:1], key, item, Due(now + 2), size_bytes=size, tokens=tokens), max_size)
        elif action == "remove" and waiting:
            item = list(waiting)[number % len(waiting)]
            assert plan.remove(item)
            del waiting[item]
        elif action == "due":
            check(plan.due(now), max_size)
            at = plan.next_at()
            assert at is None or at > now
        elif action == "hasten" and waiting:
            plan.hasten(list(waiting)[number % len(waiting)], Due(now + gap, hurried=True))
            next_at = plan.next_at()
            assert next_at is not None
            assert next_at <= now + max(gap, 2)
        elif action == "drain":
            check(plan.drain("barrier", "k"), max_size)
        elif action == "shrink":
            group_size.refused(size)
        elif action == "grow":
            group_size.accepted(size)
        assert len(plan) == len(waiting)
        assert plan.has("k") == any(item[0] != "l1" for item in waiting)
    check(plan.drain_all("close"), max_size)
    assert not waiting


def test_an_item_that_is_in_a_hurry_takes_its_group_along() -> None:
    plan: Plan[None, str, str] = Plan(Limits())
    plan.add(None, "k", "a", Due(9.0))
    plan.add(None, "k", "b", Due(9.0))
    plan.hasten("b", Due(5.0, hurried=True))
    plan.hasten("b", Due(7.0))
    plan.hasten("gone", Due(1.0))
    assert plan.next_at() == 5.0
    assert causes(plan.due(5.0)) == [("deadline", ("a", "b"))]


def test_what_left_is_forgotten() -> None:
    plan: Plan[None, int, int] = Plan(Limits(max_size=10))
    for number in range(10_000):
        plan.add(None, number % 7, number, Due(1e9 + number))
        if number % 3:
            plan.remove(number - 1)
    assert len(plan._moments) <= 2 * len(plan) + 65
    assert plan.next_at() is not None
    plan.drain_all("close")
    assert plan.next_at() is None
    assert not plan._entries
    assert not plan._lanes


def test_groups_shrink_once_per_overload_and_grow_again() -> None:
    group_size = GroupSize(16)
    for _ in range(5):  # of one moment
        group_size.refused(16)
    assert group_size.now == 8
    group_size.refused(3)
    assert group_size.now == 1
    group_size.refused(1)
    assert group_size.now == 1
    for _ in range(15):
        group_size.accepted(1)
    assert group_size.now == 1
    group_size.accepted(1)
    assert group_size.now == 2
    for _ in range(100):
        group_size.accepted(2)
    assert group_size.now == 16

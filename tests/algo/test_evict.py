"""GDSF keeps what saves the most seconds per byte."""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from llmmw.algo.evict import GDSF, Slot


def test_what_saves_fewer_seconds_per_byte_goes_first():
    policy = GDSF()
    for key, size, cost in ((b"big", 1000, 1.0), (b"cheap", 10, 0.01), (b"dear", 10, 10.0)):
        policy.add(key, size, cost)
    order = [policy.evict().key for _ in range(3)]
    assert order == [b"big", b"cheap", b"dear"]
    assert policy.evict() is None


def test_what_is_asked_for_stays_longer():
    policy = GDSF()
    slots = [policy.add(bytes([index]), 10, 1.0) for index in range(3)]
    policy.touch(slots[0])
    assert [policy.evict().key for _ in range(3)] == [b"\x01", b"\x02", b"\x00"]


def test_what_nobody_asks_for_any_more_is_overtaken():
    policy = GDSF()
    once_hot = policy.add(b"hot", 10, 1.0)
    for _ in range(5):
        policy.touch(once_hot)
    for index in range(100):
        policy.add(bytes([index]), 10, 1.0)
        if policy.evict() is once_hot:
            break
    assert index < 20


def test_an_unknown_cost_counts_as_little_and_equals_go_in_order_of_arrival():
    policy = GDSF()
    for key in (b"a", b"b", b"c"):
        policy.add(key, 10, 0.0)
    policy.add(b"d", 10, 1.0)
    assert [policy.evict().key for _ in range(4)] == [b"a", b"b", b"c", b"d"]


def test_removed_items_are_never_evicted_and_take_no_room():
    policy = GDSF()
    for index in range(1000):
        policy.remove(policy.add(index.to_bytes(2, "big"), 10, 1.0))
    assert len(policy) == 0
    assert len(policy._heap) + len(policy._former) < 200
    assert policy.evict() is None


def test_after_a_storm_of_hits_an_eviction_looks_at_a_few_and_takes_the_least_of_them(monkeypatch):
    policy = GDSF()
    slots = [policy.add(index.to_bytes(4, "big"), 10, 1.0 + index % 7) for index in range(5000)]
    for slot in slots:
        policy.touch(slot)
    looked, worth = [], Slot.worth
    with monkeypatch.context() as watched:
        watched.setattr(Slot, "worth", lambda slot: (looked.append(slot), worth(slot))[1])
        found = policy.evict()
    assert len(looked) <= 2 * 32
    assert found.worth() == min(map(worth, looked)) == policy.floor
    assert not found.alive


def test_clearing_the_heap_is_spread_over_many_steps():
    policy = GDSF()
    slots = [policy.add(index.to_bytes(4, "big"), 10, 1.0) for index in range(10_000)]
    sizes = []
    for slot in slots[:9_000]:
        policy.remove(slot)
        sizes.append(len(policy._heap) + len(policy._former))
    assert max(a - b for a, b in itertools.pairwise(sizes)) <= 4
    assert [policy.evict().alive for _ in range(1000)] == [False] * 1000
    assert policy.evict() is None
    assert len(policy) == 0


@settings(max_examples=100, derandomize=True, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("atre"), st.integers(0, 9), st.integers(1, 50), st.floats(0, 5)), max_size=60)
)
def test_the_item_evicted_is_always_the_one_worth_least(steps):
    policy, live = GDSF(), {}
    for action, index, size, cost in steps:
        key = bytes([index])
        if action == "a" and key not in live:
            live[key] = policy.add(key, size, cost)
        elif action == "t" and key in live:
            policy.touch(live[key])
        elif action == "r" and key in live:
            policy.remove(live.pop(key))
        elif action == "e":
            least = min((slot.worth() for slot in live.values()), default=None)
            found = policy.evict()
            assert (found is None) == (least is None)
            if found is not None:
                assert found.worth() == least == policy.floor
                del live[found.key]
        assert len(policy) == len(live)

"""The memory tier stays within its bounds, in bytes, number and time."""

from __future__ import annotations

import gc
import tracemalloc

from hypothesis import given, settings
from hypothesis import strategies as st

from llmmw.stores.base import Match
from llmmw.stores.entry import Entry, Header
from llmmw.stores.memory import MemoryStore
from llmmw.stores.record import play
from llmmw.testing.fake import chat_call


def entry(size=100, cost=1.0, **fields):
    return Entry(Header(created=0.0, ttl_s=10.0, cost_s=cost, **fields), b"x" * size)


def put(store, key, found=None, *, ends=10.0, now=0.0):
    return store.put(key, found or entry(), ends, ends, now)


def test_an_entry_is_found_until_its_end():
    store = MemoryStore(100_000, 10)
    put(store, b"a")
    assert store.get(b"a", 9.9).entry.data == b"x" * 100
    assert store.get(b"a", 10.0) is None
    assert store.get(b"b", 0.0) is None


def test_the_number_of_entries_is_bounded():
    store = MemoryStore(10_000_000, 3)
    for index in range(10):
        put(store, bytes([index]))
    assert len(store) == 3
    assert store.evicted == 7


def test_an_entry_above_a_tenth_of_the_budget_is_refused_and_replaces_nothing_else():
    store = MemoryStore(100_000, 10)
    put(store, b"a")
    put(store, b"b")
    assert put(store, b"b", entry(20_000)) is None
    assert (store.get(b"a", 0) is None, store.get(b"b", 0) is None, store.refused) == (False, True, 1)


def test_replacing_an_entry_keeps_its_popularity_and_its_bytes_are_counted_once():
    store = MemoryStore(100_000, 10)
    put(store, b"a")
    for _ in range(5):
        store.get(b"a", 0)
    size = store.size
    assert put(store, b"a").slot.hits == 7
    assert store.size == size


def test_expired_entries_leave_when_something_is_written():
    store = MemoryStore(100_000, 1000)
    for index in range(20):
        put(store, bytes([index]), ends=5.0)
    put(store, b"new", now=6.0, ends=16.0)
    assert len(store) == 5
    put(store, b"newer", now=6.0, ends=16.0)
    assert len(store) == 2


def test_a_renewed_entry_outlives_its_former_end():
    store = MemoryStore(100_000, 10)
    put(store, b"a", ends=5.0)
    put(store, b"a", ends=20.0, now=4.0)
    put(store, b"b", ends=20.0, now=6.0)
    assert store.get(b"a", 6.0) is not None


def test_the_list_of_ends_does_not_grow_with_renewals():
    store = MemoryStore(100_000, 10)
    for _ in range(1000):
        put(store, b"a")
    assert len(store._ends) < 200


def test_entries_are_discarded_by_request_namespace_and_tag():
    store = MemoryStore(100_000, 100)
    put(store, b"1", entry(base=b"q"))
    put(store, b"2", entry(base=b"q", namespace="n"))
    put(store, b"3", entry(namespace="n", tags=("t", "u")))
    put(store, b"4", entry())
    assert store.discard(Match("base", b"q")) == 2
    assert store.discard(Match("namespace", "n")) == 1
    put(store, b"3", entry(namespace="n", tags=("t", "u")))
    assert store.discard(Match("tag", "u")) == 1
    assert len(store) == 1


@settings(max_examples=100, derandomize=True, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from("ppgd"), st.integers(0, 20), st.integers(0, 1500), st.integers(1, 20)), max_size=80
    )
)
def test_bytes_and_number_never_exceed_the_budget(steps):
    store = MemoryStore(30_000, 8)
    for now, (action, index, size, life) in enumerate(steps):
        key = bytes([index])
        if action == "p":
            put(store, key, entry(size), ends=now + life, now=now)
        elif action == "g":
            found = store.get(key, now)
            assert found is None or found.gone > now
        else:
            store.delete(key)
        assert store.size <= 30_000
        assert len(store) <= 8
        assert store.size == sum(found.entry.size for found in store._entries.values())


def test_what_is_accounted_is_about_what_is_taken():
    """By Python's own account."""
    store = MemoryStore(10**9, 10**6)
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for number in range(2000):
            key = number.to_bytes(32, "big")
            header = Header(1.5 + number, 300.5 + number, base=key, cost_s=0.1 * number, namespace=f"n{number}")
            found = Entry(header, b"%300d" % number)
            store.put(key, found, 300.0 + number, 300.0 + number, 0.0).reply = play(found, chat_call())
        taken = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert 0.5 < taken / store.size < 1.2

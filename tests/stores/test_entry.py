"""Entries come back as they were, and nothing else is taken for one."""

from __future__ import annotations

import contextlib

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmmw.answer import Usage
from llmmw.stores.entry import BadEntry, Entry, Header, NewerEntry, decode_entry, encode_entry

FULL = Entry(
    Header(
        created=1.5, ttl_s=2.5, base=b"b", namespace="n", tags=("t",), cost_s=0.5, usage=Usage(1, 2, 3, reported=True),
        status=404, content_type="text/event-stream", endpoint="e", cuts=(1, 0, 2), items=True, stream_usage=True,
    ),
    b"abc",
)  # fmt: skip


def test_an_entry_comes_back_as_it_was():
    assert decode_entry(encode_entry(FULL)) == FULL
    assert list(FULL.pieces()) == [b"a", b"", b"bc"]
    assert list(Entry(Header(0, 0), b"x").pieces()) == []


@settings(max_examples=200, derandomize=True, deadline=None)
@given(st.binary(max_size=80))
def test_arbitrary_bytes_are_refused(raw):
    with pytest.raises(BadEntry):
        decode_entry(raw)
    with pytest.raises((BadEntry, NewerEntry)):
        decode_entry(b"LMW" + raw)


@settings(max_examples=200, derandomize=True, deadline=None)
@given(st.integers(0, 200), st.integers(1, 255))
def test_a_changed_byte_gives_an_entry_or_a_refusal_never_another_error(position, change):
    raw = bytearray(encode_entry(FULL))
    raw[position % len(raw)] ^= change
    with contextlib.suppress(BadEntry, NewerEntry):
        decode_entry(bytes(raw))


def test_a_newer_schema_is_told_from_rubbish():
    raw = bytearray(encode_entry(FULL))
    raw[3] = 2
    with pytest.raises(NewerEntry):
        decode_entry(bytes(raw))


@pytest.mark.parametrize("cuts", [(1, 1), (4, -1), (99,), ()])
def test_chunks_must_add_up_to_the_body(cuts):
    broken = Entry(msgspec.structs.replace(FULL.header, cuts=cuts), FULL.data)
    with pytest.raises(BadEntry):
        decode_entry(encode_entry(broken))


def test_an_entry_from_the_future_has_no_time_left():
    entry = Entry(Header(created=100.0, ttl_s=10.0), b"")
    assert entry.remaining_s(104.0) == 6.0
    assert entry.remaining_s(96.0) == 14.0
    assert entry.remaining_s(94.0) < 0
    assert entry.remaining_s(111.0) < 0


@pytest.mark.parametrize("times", [{"created": float("nan")}, {"ttl_s": float("inf")}, {"cost_s": -1.0}])
def test_times_must_be_times(times):
    broken = Entry(msgspec.structs.replace(FULL.header, **times), FULL.data)
    with pytest.raises(BadEntry):
        decode_entry(encode_entry(broken))


def test_what_a_user_names_counts_as_well_as_what_a_server_sends():
    def size(**fields):
        return Entry(Header(0.0, 1.0, **fields), b"x" * 100).size

    assert size(namespace="n" * 1000) == size(tags=("t" * 400, "u" * 600)) == size() + 1000
    assert size(cuts=(50, 50)) == size() + 72

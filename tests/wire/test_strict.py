"""JSON from strangers, small and large: what is refused, and what judging it may cost."""

import asyncio
import re

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmmw.errors import ProtocolError, ResponseTooLarge
from llmmw.wire import read_any_answer
from llmmw.wire import strict as module
from llmmw.wire.sse import StreamWatch
from llmmw.wire.strict import MAX_DIGITS, MAX_WHOLE, decode_json, read_json, worth

LARGE = MAX_WHOLE + 1


def large(inside: bytes, key: bytes = b"pad") -> bytes:
    """An object that is walked in slices: a long text, then what is to be found."""
    return b'{"' + key + b'":"' + b"x" * LARGE + b'",' + inside + b"}"


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (large(b'"a":' + b"[" * 201 + b"]" * 201), "deeper"),
        (large(b'"a":' + b"1" * (MAX_DIGITS + 1)), "digits"),
        (large(b'"a":1,"a":2'), "twice"),
        (large(b'"pad":2'), "twice"),
        (large(b'"a":'), "not JSON"),
        (b'{"a":[' + b"[]," * 1_100_000 + b"1]}", "too many"),
        (b'{"a":[' + b'"",' * 3_500_000 + b"1]}", "too many"),
        (b"[" * LARGE, "deeper"),
    ],
)
def test_security_04_a_large_document_that_attacks_its_reader_is_refused(data, why):
    assert len(data) > MAX_WHOLE
    with pytest.raises(ValueError, match=why):
        read_json(data)


@pytest.mark.parametrize(
    "value",
    [
        {"text": "[{" * 200_000},
        {"text": '\\"' * 200_000, "deep": [[[1]]]},
        {"text": "9" * 300_000},
        {"text": "a:b,c " * 60_000, "k:l": {"m": ":"}},
        ["x" * LARGE],
        "x" * LARGE,
        {"floats": [0.123456789] * 50_000},
    ],
)
def test_a_large_document_is_read_as_it_is(value):
    data = msgspec.json.encode(value)
    assert len(data) > MAX_WHOLE
    assert read_json(data) == value


@settings(max_examples=150, derandomize=True, deadline=None)
@given(
    st.recursive(
        st.none() | st.integers(-(10**6), 10**6) | st.text(st.sampled_from('ab"\\[]{}:,9 é'), max_size=12),
        lambda inner: (
            st.lists(inner, max_size=4) | st.dictionaries(st.text(st.sampled_from('k"\\[:'), max_size=4), inner)
        ),
        max_leaves=25,
    ),
    st.integers(1, 40),
)
def test_slices_may_cut_anywhere(value, size):
    """The walk through slices of a few bytes finds the same depth as a look at the whole."""
    data = msgspec.json.encode(value)
    outside = re.sub(rb'"(?:[^"\\]|\\.)*"', b"", data)
    depth = level = 0
    for byte in outside:
        level += (byte in b"[{") - (byte in b"]}")
        depth = max(depth, level)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MAX_WHOLE", size)
        patch.setattr(module, "MAX_JSON_DEPTH", depth)
        module._walk(data)
        if depth:
            patch.setattr(module, "MAX_JSON_DEPTH", depth - 1)
            with pytest.raises(ValueError, match="deeper"):
                module._walk(data)


def test_security_04_a_long_text_costs_no_memory_and_no_time():
    """With the regular expression that stood here, a text of 64 MiB took 44 s and 8 GB."""
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    text = "lorem, ipsum: \\ \n" * 500_000
    data = msgspec.json.encode({"choices": [{"text": text}]})
    assert decode_json(data) == read_json(data) == {"choices": [{"text": text}]}
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024


async def test_security_04_a_large_body_does_not_hold_up_the_loop():
    """It is judged on another thread, piece by piece: the loop gets its turns meanwhile."""
    data = msgspec.json.encode({"choices": [{"text": '"lorem" [ipsum] ' * 600_000, "finish_reason": "stop"}]})
    assert len(data) > 10_000_000
    reading = asyncio.ensure_future(read_any_answer("complete", data))
    turns = 0
    while not reading.done():
        turns += 1
        await asyncio.sleep(0)
    assert turns > 20
    assert (await reading)["choices"][0]["finish_reason"] == "stop"
    with pytest.raises(ProtocolError, match="too many values"):
        await read_any_answer("chat", b'{"choices":[' + b"[]," * 1_100_000 + b"1]}")


def test_security_04_an_event_that_would_fill_the_memory_is_refused():
    watch = StreamWatch("chat")
    with pytest.raises(ResponseTooLarge, match="too many values"):
        watch.feed(b'data: {"choices":[' + b"[]," * 100_000 + b"1]}\n\n")
    text = "one, two [three] " * 10_000
    watch = StreamWatch("chat")
    watch.feed(b"data: " + msgspec.json.encode({"choices": [{"index": 0, "delta": {"content": text}}]}) + b"\n\n")
    assert watch.text == text


def test_the_estimate_is_not_below_what_decoding_takes():
    import tracemalloc

    for doc in (
        b"[" + b"[]," * 20_000 + b"1]",
        b"[" + b'{"a":1},' * 20_000 + b"1]",
        b"[" + b"0.12345," * 20_000 + b"1]",
    ):
        tracemalloc.start()
        value = msgspec.json.decode(doc)
        taken, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert value
        assert taken <= worth(doc) * 1.3

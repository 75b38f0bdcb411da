"""Server-sent events: any cut gives the same events, and a stream tells what it lacks."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmmw.answer import Usage
from llmmw.errors import ResponseTooLarge
from llmmw.testing.fake import chat_chunks, sse
from llmmw.wire.sse import ServerEvent, SSEParser, StreamWatch, error_in


def parse(*chunks, **options):
    parser = SSEParser(**options)
    return [event for chunk in chunks for event in parser.feed(chunk)] + parser.end()


def cut(data, places):
    edges = [0, *sorted(places), len(data)]
    return [data[start:stop] for start, stop in itertools.pairwise(edges)]


STREAM = (
    b"\xef\xbb\xbf: hello\r\n\r\nevent: one\r\ndata: a\r\ndata:b\r\n\r\n"
    b"data\n\nid: 7\nretry: 5\ndata:  c\n\n\revent: two\rdata: d\r\r\nunknown: x\ndata: [DONE]\n\n"
)
EVENTS = [
    ServerEvent("one", b"a\nb"),
    ServerEvent("", b""),
    ServerEvent("", b" c"),
    ServerEvent("two", b"d"),
    ServerEvent("", b"[DONE]"),
]


def test_every_form_that_the_standard_allows_is_read():
    assert parse(STREAM) == EVENTS


@settings(max_examples=200, derandomize=True, deadline=None)
@given(st.lists(st.integers(0, len(STREAM)), max_size=12))
def test_any_cut_gives_the_same_events(places):
    assert parse(*cut(STREAM, places)) == EVENTS


def test_byte_by_byte_gives_the_same_events():
    assert parse(*(STREAM[i : i + 1] for i in range(len(STREAM)))) == EVENTS


def test_an_event_without_its_blank_line_is_dropped():
    assert parse(b"data: a\n\ndata: b\n") == [ServerEvent("", b"a")]
    assert parse(b"data: a\n\ndata: b") == [ServerEvent("", b"a")]


def test_an_event_ended_by_a_lone_cr_at_the_end_counts():
    assert parse(b"data: a\r\r") == [ServerEvent("", b"a")]


@pytest.mark.parametrize(
    "chunks",
    [
        [b"data: " + b"x" * 2000],
        [b"data: "] + [b"x" * 100] * 20,
        [b"data: " + b"x" * 2000 + b"\n\n"],
        [b"data: " + b"x" * 300 + b"\n"] * 5,
        [b": " + b"x" * 2000 + b"\n"],
    ],
)
def test_security_04_an_endless_line_or_event_is_refused(chunks):
    with pytest.raises(ResponseTooLarge):
        parse(*chunks, max_line_bytes=1000)


def watch(op, *chunks):
    found = StreamWatch(op)
    for chunk in chunks:
        found.feed(chunk)
    return found


def test_a_whole_chat_stream_lacks_nothing():
    found = watch("chat", *chat_chunks("one two three"))
    assert found.missing() is None
    assert (found.text, found.has_token, found.error) == ("one two three", True, None)
    assert found.usage == Usage(3, 3, reported=True)


def test_a_completion_stream_is_read_too():
    chunks = [sse({"choices": [{"text": "a", "index": 0, "finish_reason": None}]})]
    chunks += [sse({"choices": [{"text": "b", "finish_reason": "stop"}]}), b"data: [DONE]\n\n"]
    found = watch("complete", *chunks)
    assert (found.missing(), found.text) == (None, "ab")


@pytest.mark.parametrize("drop", range(1, 5))
def test_cache_13_a_stream_cut_anywhere_lacks_something(drop):
    chunks = chat_chunks("one two")
    assert watch("chat", *chunks[:-drop]).missing() in {"no finish_reason", "no [DONE]"}


def test_every_choice_needs_its_finish_reason():
    chunks = [sse({"choices": [{"index": n, "delta": {"content": "x"}} for n in (0, 1)]})]
    chunks += [sse({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}), b"data: [DONE]\n\n"]
    assert watch("chat", *chunks).missing() == "no finish_reason"
    assert watch("chat", b"data: [DONE]\n\n").missing() == "no finish_reason"


@pytest.mark.parametrize("field", ["tool_calls", "reasoning_content", "refusal"])
def test_a_token_is_whatever_was_generated(field):
    found = watch("chat", sse({"choices": [{"index": "odd", "delta": {"role": "assistant", "content": ""}}]}))
    assert not found.has_token
    found.feed(sse({"choices": [{"delta": {field: ["x"]}}]}))
    assert (found.has_token, found.text) == (True, "")


def test_a_stream_of_anthropic_messages():
    events = [
        {"type": "message_start", "message": {"usage": {"input_tokens": 9, "output_tokens": 1}}},
        {"type": "ping"},
        {"type": "content_block_delta", "delta": {"type": "text_delta", "text": "hi"}},
        {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 5}},
    ]
    found = watch("messages", *(b"event: x\n" + sse(event) for event in events))
    assert found.missing() == "no message_stop"
    found.feed(sse({"type": "message_stop"}))
    assert (found.missing(), found.text, found.has_token) == (None, "hi", True)
    assert found.usage == Usage(9, 5, reported=True)


def test_a_stream_of_openai_responses():
    found = watch("responses", sse({"type": "response.created"}))
    assert (found.missing(), found.has_token) == ("no response.completed", False)
    found.feed(sse({"type": "response.output_text.delta", "delta": "hi"}))
    usage = {"input_tokens": 1, "output_tokens": 2}
    found.feed(sse({"type": "response.completed", "response": {"usage": usage}}))
    assert (found.missing(), found.text, found.has_token) == (None, "hi", True)
    assert found.usage.total_tokens == 3


def test_unknown_operations_are_read_for_usage_only():
    found = watch("/v1/other", sse({"usage": {"prompt_tokens": 4}}), sse(["odd"]))
    assert (found.missing(), found.usage.input_tokens) == (None, 4)


def test_an_event_that_is_not_json_is_told_at_the_end():
    assert watch("chat", b"data: {oops\n\n", *chat_chunks("a b")).missing() == "an event is not JSON"


@pytest.mark.parametrize(
    ("event", "error"),
    [
        ({"error": {"message": "m", "code": 429}}, {"error": {"message": "m", "code": 429}}),
        ({"error": "text"}, {"error": "text"}),
        ({"object": "error", "message": "m"}, {"error": {"object": "error", "message": "m"}}),
        ({"type": "error", "message": "m"}, {"error": {"type": "error", "message": "m"}}),
        ({"type": "response.failed", "response": {"error": {"code": "x"}}}, {"error": {"code": "x"}}),
        ({"type": "response.failed"}, {"error": "the response failed"}),
        ({"error": None, "choices": []}, None),
        ([], None),
    ],
)
def test_an_error_event_is_found_in_every_known_shape(event, error):
    assert error_in(event) == error
    found = watch("chat", sse(event))
    assert found.error == error


def test_the_first_error_counts():
    assert watch("chat", sse({"error": "one"}), sse({"error": "two"})).error == {"error": "one"}

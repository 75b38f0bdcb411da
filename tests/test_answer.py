"""Reading answers from servers that may send anything."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmmw.answer import (
    MAX_TOKENS_REPORTED,
    finish_reasons,
    problem_with,
    text_in,
    text_of,
    usage_of,
    why_not_storable,
)

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(
            ["choices", "message", "delta", "content", "text", "usage", "prompt_tokens", "finish_reason", "output",
             "tool_calls", "function", "arguments", "error", "data", "stop_reason", "prompt_tokens_details"]
        ),
        inner,
        max_size=4,
    ),
    max_leaves=15,
)  # fmt: skip


@settings(max_examples=200, derandomize=True)
@given(anything, st.sampled_from(["chat", "complete", "embed", "messages", "responses", "other"]))
def test_no_body_makes_the_readers_raise(body, op):
    assert isinstance(text_of(body), str)
    usage = usage_of(body)
    assert 0 <= usage.input_tokens <= MAX_TOKENS_REPORTED
    assert isinstance(finish_reasons(body), list)
    if problem_with(op, body) is not None:
        assert why_not_storable(op, body) is not None


def chat(**choice):
    return {"choices": [{"message": {"content": "hi"}, "finish_reason": "stop", **choice}]}


CUT = [{"function": {"name": "f", "arguments": '{"x": '}}]


@pytest.mark.parametrize(
    "body",
    [
        chat(finish_reason="length"),
        chat(finish_reason="content_filter"),
        chat(finish_reason=None),
        chat(message={"content": ""}),
        chat(message={"content": None}),
        chat(message={"content": "no", "refusal": "I will not"}),
        chat(message={"tool_calls": CUT}, finish_reason="tool_calls"),
        {"choices": []},
        {"error": {"message": "x"}, "choices": [{}]},
        "text",
    ],
    ids=str,
)
def test_cache_11_and_12_what_is_not_whole_is_not_storable(body):
    assert why_not_storable("chat", body) is not None


def test_whole_answers_of_every_shape_are_storable():
    whole = [{"function": {"name": "f", "arguments": '{"x": 1}'}}]
    assert why_not_storable("chat", chat()) is None
    assert (
        why_not_storable("chat", chat(message={"content": None, "tool_calls": whole}, finish_reason="tool_calls"))
        is None
    )
    assert why_not_storable("complete", {"choices": [{"text": "hi", "finish_reason": "stop"}]}) is None
    assert why_not_storable("embed", {"data": [{"embedding": [1.0]}]}) is None
    assert why_not_storable("messages", {"content": [{"text": "hi"}], "stop_reason": "end_turn"}) is None
    assert why_not_storable("messages", {"content": [{"text": "hi"}], "stop_reason": "max_tokens"}) is not None
    assert why_not_storable("responses", {"output": [{"content": [{"text": "x"}]}], "status": "completed"}) is None
    assert why_not_storable("messages", {"content": [], "stop_reason": "end_turn"}) is not None


def test_usage_of_each_provider():
    openai = {"usage": {"prompt_tokens": 3, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 1}}}
    assert usage_of(openai).cached_tokens == 1
    assert usage_of(openai).total_tokens == 5
    assert usage_of({"usage": {"input_tokens": 4, "output_tokens": 1, "cache_read_input_tokens": 2}}).cached_tokens == 2
    assert usage_of({"message": {"usage": {"input_tokens": 4}}}).input_tokens == 4
    assert usage_of({"response": {"usage": {"output_tokens": 4}}}).output_tokens == 4
    assert not usage_of({}).reported
    hostile = {"usage": {"prompt_tokens": 1e300, "completion_tokens": -5, "input_tokens": "9"}}
    assert (usage_of(hostile).input_tokens, usage_of(hostile).output_tokens) == (MAX_TOKENS_REPORTED, 0)


answers = st.fixed_dictionaries(
    {
        "choices": st.lists(
            st.fixed_dictionaries({"message": st.fixed_dictionaries({"content": st.text() | st.none()})})
        )
    },
    optional={"content": st.none() | st.text(), "output": anything, "usage": anything},
)


@settings(max_examples=200, derandomize=True)
@given(answers | anything)
def test_text_in_the_bytes_is_the_text_of_what_they_decode_to(body):
    data = msgspec.json.encode(body)
    assert text_in(data) == text_of(msgspec.json.decode(data))


def test_text_in_what_is_no_json_fails_as_decoding_does():
    with pytest.raises(msgspec.DecodeError):
        text_in(b"<html>")


def test_text_of_each_shape():
    assert text_of(chat()) == "hi"
    assert text_of({"choices": [{"text": "a"}, {"text": "b"}]}) == "a"
    assert text_of({"choices": [{"delta": {"content": "d"}}]}) == "d"
    assert text_of({"content": [{"type": "text", "text": "c"}]}) == "c"
    assert text_of({"output": [{"content": [{"text": "o"}]}]}) == "o"
    assert text_of({"data": [{"embedding": []}]}) == ""

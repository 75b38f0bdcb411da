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
    assert problem_with(op, body) is None or isinstance(problem_with(op, body), str)


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
    assert text_of({"choices": [{"message": {"content": "hi"}, "finish_reason": "stop"}]}) == "hi"
    assert text_of({"choices": [{"text": "a"}, {"text": "b"}]}) == "a"
    assert text_of({"choices": [{"delta": {"content": "d"}}]}) == "d"
    assert text_of({"content": [{"type": "text", "text": "c"}]}) == "c"
    assert text_of({"output": [{"content": [{"text": "o"}]}]}) == "o"
    assert text_of({"data": [{"embedding": []}]}) == ""


def test_route_08_answer_without_a_finish_reason_is_none():
    for op, choice in (("chat", {"message": {"content": "x"}}), ("complete", {"text": "x"})):
        assert problem_with(op, {"choices": [choice | {"finish_reason": "stop"}]}) is None
        assert problem_with(op, {"choices": [choice | {"finish_reason": "length"}]}) is None
        assert problem_with(op, {"choices": [choice]}) == "a choice has no finish_reason"
        assert problem_with(op, {"choices": [choice | {"finish_reason": None}]}) == "a choice has no finish_reason"
        assert problem_with(op, {"choices": [choice | {"finish_reason": "error"}]}) == "a choice ended in an error"
        whole, cut = choice | {"finish_reason": "stop"}, choice
        assert problem_with(op, {"choices": [whole, cut]}) == "a choice has no finish_reason"

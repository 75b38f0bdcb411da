"""A streamed answer and a plain one are the same answer."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmmw.answer import text_of, usage_of
from llmmw.testing.fake import chat_body, chat_chunks, sse
from llmmw.wire.assemble import DONE, assemble, cut, without_usage_event


def stream(*events):
    return b"".join(map(sse, events)) + DONE


def chat(delta, finish=None, **choice):
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish, **choice}]}


USAGE = {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 2}}


def test_texts_fields_and_usage_are_put_together():
    found = assemble(
        "chat",
        stream(
            {"id": "1", "created": 5, "model": "m", "object": "chat.completion.chunk", "system_fingerprint": None}
            | chat({"role": "assistant", "content": "", "reasoning_content": "hm"}),
            chat({"content": "a"}),
            chat({"content": "b"}, "stop", stop_reason=7),
            USAGE,
        ),
    )
    assert found.exact
    assert found.body == {
        "id": "1", "created": 5, "model": "m", "object": "chat.completion", "usage": USAGE["usage"],
        "choices": [{
            "index": 0, "logprobs": None, "finish_reason": "stop", "stop_reason": 7,
            "message": {"role": "assistant", "content": "ab", "reasoning_content": "hm"},
        }],
    }  # fmt: skip


def test_tool_calls_are_put_together_by_index():
    def part(index, arguments, **fields):
        return {"index": index, "function": {"arguments": arguments, **fields.pop("function", {})}, **fields}

    found = assemble(
        "chat",
        stream(
            chat({"tool_calls": [part(0, "", id="a", type="function", function={"name": "f"})]}),
            chat({"tool_calls": [part(0, '{"x"')]}),
            chat({"tool_calls": [part(1, "{}", id="b", function={"name": "g"})]}),
            chat({"tool_calls": [part(0, ":1}")]}, "tool_calls"),
            USAGE,
        ),
    )
    assert found.exact
    assert found.body["choices"][0]["message"]["tool_calls"] == [
        {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"x":1}'}},
        {"id": "b", "type": "function", "function": {"name": "g", "arguments": "{}"}},
    ]


def test_tool_calls_without_index_continue_the_last_one():
    calls = [{"id": "a", "function": {"name": "f", "arguments": "{"}}], [{"function": {"arguments": "}"}}]
    found = assemble("chat", stream(*(chat({"tool_calls": call}) for call in calls), USAGE))
    (call,) = found.body["choices"][0]["message"]["tool_calls"]
    assert call["function"] == {"name": "f", "arguments": "{}"}


def test_the_old_function_call_is_put_together():
    parts = [{"function_call": {"name": "f", "arguments": "{"}}, {"function_call": {"arguments": "}"}}]
    found = assemble("chat", stream(*map(chat, parts), USAGE))
    assert found.body["choices"][0]["message"]["function_call"] == {"name": "f", "arguments": "{}"}


def test_several_choices_keep_apart():
    events = [{"choices": [{"index": index, "text": text}]} for index, text in ((1, "x"), (0, "a"), (1, "y"))]
    found = assemble("complete", stream(*events, USAGE))
    assert [choice["text"] for choice in found.body["choices"]] == ["a", "xy"]
    assert found.body["object"] == "text_completion"


@pytest.mark.parametrize(
    "events",
    [
        [chat({"content": "a"}, "stop")],
        [chat({"content": "a"}, "stop", logprobs={"content": []}), USAGE],
        [chat({"content": "a", "audio": {"id": "x"}}, "stop"), USAGE],
    ],
)
def test_what_would_be_lost_makes_it_inexact(events):
    assert not assemble("chat", stream(*events)).exact


@pytest.mark.parametrize(
    "data",
    [b"data: {oops\n\n", stream(chat({"content": 3}), chat({"content": "x"})), b"data: " + b"[" * 99_999 + b"\n\n"],
)
def test_what_is_not_understood_is_none(data):
    assert assemble("chat", data) is None


def test_other_operations():
    assert assemble("embed", stream(USAGE)) is None
    done = {"type": "response.completed", "response": {"status": "completed", "output": []}}
    assert assemble("responses", stream({"type": "response.created"}, done)).body == done["response"]
    assert assemble("responses", stream({"type": "response.created"})) is None


def message_events(*deltas, start=None):
    yield {
        "type": "message_start",
        "message": {"id": "1", "role": "assistant", "content": [], "usage": {"input_tokens": 3, "output_tokens": 1}},
    }
    yield {"type": "content_block_start", "index": 0, "content_block": start or {"type": "text", "text": ""}}
    for delta in deltas:
        yield {"type": "content_block_delta", "index": 0, "delta": delta}
    yield {"type": "content_block_stop", "index": 0}
    yield {
        "type": "message_delta",
        "delta": {"stop_reason": "end_turn"},
        "usage": {"output_tokens": 9, "input_tokens": None},
    }
    yield {"type": "message_stop"}


def test_messages_are_put_together_from_their_blocks():
    deltas = [{"type": "text_delta", "text": "a"}, {"type": "text_delta", "text": "b"}]
    found = assemble("messages", stream(*message_events(*deltas)))
    assert found.exact
    assert found.body["content"] == [{"type": "text", "text": "ab"}]
    assert (found.body["stop_reason"], found.body["usage"]) == ("end_turn", {"input_tokens": 3, "output_tokens": 9})
    tool = {"type": "tool_use", "id": "t", "name": "f", "input": {}}
    deltas = [{"type": "input_json_delta", "partial_json": part} for part in ('{"x":', "1}")]
    assert assemble("messages", stream(*message_events(*deltas, start=tool))).body["content"] == [
        tool | {"input": {"x": 1}}
    ]
    assert assemble("messages", stream(*message_events(deltas[0], start=tool))) is None
    assert not assemble("messages", stream(*message_events({"type": "citations_delta", "citation": {}}))).exact
    assert assemble("messages", stream({"type": "message_stop"})) is None


def test_a_plain_answer_as_a_stream_says_the_same():
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    message = {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "hm", "annotations": []}
    body = {
        "id": "1", "object": "chat.completion", "model": "m", "usage": USAGE["usage"], "service_tier": None,
        "choices": [
            {"index": 0, "message": message, "finish_reason": "tool_calls", "logprobs": None, "stop_reason": 3},
        ],
    }  # fmt: skip
    chunks = cut("chat", msgspec.json.encode(body), usage=True)
    again = assemble("chat", b"".join(chunks))
    assert again.exact
    del message["annotations"], body["service_tier"]
    assert again.body == body
    message["function_call"] = {"name": "f", "arguments": "{}"}
    assert b"function_call" in b"".join(cut("chat", msgspec.json.encode(body), usage=False))
    assert b"usage" not in b"".join(cut("chat", msgspec.json.encode(body), usage=False))


@pytest.mark.parametrize(
    ("op", "change"),
    [
        ("chat", {"message": {"role": "assistant", "content": "x", "audio": {"id": "a"}}}),
        ("chat", {"logprobs": {"content": [1]}}),
        ("messages", {}),
    ],
)
def test_what_a_stream_cannot_say_is_not_cut(op, change):
    body = msgspec.json.decode(chat_body("x"))
    body["choices"][0] |= change
    assert cut(op, msgspec.json.encode(body), usage=False) is None


def test_usage_that_is_asked_for_must_be_there():
    body = msgspec.json.decode(chat_body("x"))
    del body["usage"]
    assert cut("chat", msgspec.json.encode(body), usage=True) is None
    assert cut("chat", msgspec.json.encode(body), usage=False)


@settings(max_examples=60, derandomize=True, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40), st.sampled_from(["chat", "complete"]))
def test_cache_14_there_and_back_keeps_text_and_usage(text, op):
    body = msgspec.json.decode(chat_body(text))
    if op == "complete":
        body["choices"][0]["text"] = body["choices"][0].pop("message")["content"]
    again = assemble(op, b"".join(cut(op, msgspec.json.encode(body), usage=True))).body
    assert text_of(again) == text
    assert usage_of(again) == usage_of(body)
    assert again["choices"][0]["finish_reason"] == "stop"


def test_usage_events_are_left_out_and_everything_else_stays_as_it_was():
    chunks = chat_chunks("a b")
    assert list(without_usage_event("chat", chunks)) == [chunk for chunk in chunks if b'"usage"' not in chunk]
    glued = [b"".join(chunks)]
    assert list(without_usage_event("chat", glued)) == [b"".join(chunk for chunk in chunks if b'"usage"' not in chunk)]
    odd = [b': "usage" "choices"\n\n', b'data: {"usage" "choices"\n\n', sse(chat({}) | {"usage": {"a": 1}}) + b"data: "]
    assert list(without_usage_event("chat", odd)) == odd
    assert list(without_usage_event("messages", chunks)) == chunks

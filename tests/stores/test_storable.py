"""What is no whole answer is never stored, in any provider's shape."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmmw.answer import problem_with
from llmmw.call import Call, Item, Reply
from llmmw.stores.record import Making, NotStorable, record_reply, record_stream
from llmmw.stores.storable import event_shape_of, shape_of, why_not_storable

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(
            ["choices", "message", "content", "text", "finish_reason", "output", "tool_calls", "function", "custom",
             "arguments", "error", "data", "stop_reason", "status", "type", "object", "input", "embedding", "refusal",
             "incomplete_details", "function_call", "n", "prompt"]
        ),
        inner,
        max_size=5,
    ),
    max_leaves=15,
)  # fmt: skip
ops = st.sampled_from(["chat", "complete", "embed", "messages", "responses", "other", ""])


def forced(op, body):
    """The body with the list that its operation expects, so that the judgement goes deeper."""
    lists = {"chat": "choices", "complete": "choices", "embed": "data", "messages": "content", "responses": "output"}
    if not isinstance(body, dict) or op not in lists:
        return body
    return {"status": "completed", "stop_reason": "end_turn"} | body | {lists[op]: [body, body.get("message")]}


@settings(max_examples=200, derandomize=True, deadline=None)
@given(anything, anything, ops)
def test_no_body_makes_the_judge_raise(body, asked, op):
    asked = asked if isinstance(asked, dict) else {}
    for found in (body, forced(op, body)):
        told = why_not_storable(op, found, asked)
        assert told is None or isinstance(told, str)
        if problem_with(op, found) is not None:
            assert told is not None
        assert isinstance(shape_of(found), str)
        assert isinstance(event_shape_of(found), str)


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


def message(*content, stop="end_turn", **more):
    return {"type": "message", "content": list(content), "stop_reason": stop, **more}


def response(*output, status="completed", **more):
    return {"object": "response", "output": list(output), "status": status, **more}


def said(*content, **more):
    return {"type": "message", "content": list(content), **more}


TEXT = {"type": "text", "text": "hi"}
OUTPUT = {"type": "output_text", "text": "hi"}


@pytest.mark.parametrize(
    ("op", "body"),
    [
        ("messages", message({"type": "text", "text": ""})),
        ("messages", message({"type": "thinking", "thinking": "hm"})),
        ("messages", message({"type": "tool_use", "name": "f", "input": '{"x": '}, stop="tool_use")),
        ("messages", message(TEXT, stop="refusal")),
        ("messages", message(TEXT, stop="pause_turn")),
        ("messages", message(TEXT, stop=None)),
        ("messages", message(TEXT, stop=["end_turn"])),
        ("messages", message(TEXT, error={})),
        ("responses", response(said({"type": "output_text", "text": ""}))),
        ("responses", response(said({"type": "refusal", "refusal": "no"}))),
        ("responses", response(said(OUTPUT, {"type": "refusal", "refusal": "no"}))),
        ("responses", response({"type": "reasoning", "summary": []})),
        ("responses", response({"type": "function_call", "name": "f", "arguments": '{"x": '})),
        ("responses", response({"type": "function_call", "name": "f", "arguments": ""})),
        ("responses", response(said(OUTPUT, status="incomplete"))),
        ("responses", response(said(OUTPUT), status="incomplete")),
        ("responses", response(said(OUTPUT), incomplete_details={"reason": "max_output_tokens"})),
        ("responses", response()),
        ("chat", chat(message={"content": [{"type": "refusal", "refusal": "no"}]})),
        ("chat", chat(message={"tool_calls": [{}]}, finish_reason="tool_calls")),
        ("chat", chat(message={"tool_calls": [{"function": {"name": "f", "arguments": ""}}]})),
        ("chat", chat(message={"function_call": {"name": "f", "arguments": "{"}}, finish_reason="function_call")),
        ("chat", chat() | {"error": {}}),
        ("chat", chat(finish_reason=[])),
        ("complete", {"choices": [{"text": "", "finish_reason": "stop"}]}),
        ("complete", {"choices": [{"text": "hi", "finish_reason": "length"}]}),
        ("embed", {"data": []}),
        ("embed", {"data": [{"embedding": []}]}),
        ("embed", {"data": [{"embedding": [1.0]}, {"embedding": None}]}),
    ],
    ids=str,
)
def test_cache_11_and_12_in_every_shape(op, body):
    assert why_not_storable(op, body) is not None


@pytest.mark.parametrize(
    ("op", "body"),
    [
        ("messages", message({"type": "thinking", "thinking": "hm"}, TEXT)),
        ("messages", message({"type": "tool_use", "name": "f", "input": {}}, stop="tool_use")),
        ("messages", message(TEXT, stop="stop_sequence")),
        ("responses", response({"type": "reasoning"}, said(OUTPUT, status="completed"), error=None)),
        ("responses", response({"type": "function_call", "name": "f", "arguments": "{}"}, incomplete_details=None)),
        ("responses", response({"type": "custom_tool_call", "input": "x"})),
        ("chat", chat(message={"tool_calls": [{"type": "custom", "custom": {"name": "f", "input": "x"}}]})),
        ("chat", chat(message={"tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]})),
        ("chat", chat(message={"function_call": {"name": "f", "arguments": "{}"}}, finish_reason="function_call")),
        ("chat", chat(message={"content": [{"type": "text", "text": "hi"}]}, error=None)),
        ("embed", {"data": [{"embedding": "AAAA"}]}),
    ],
    ids=str,
)
def test_whole_answers_with_calls_thoughts_and_parts_are_storable(op, body):
    assert why_not_storable(op, body) is None


def test_cache_11_fewer_answers_than_were_asked_for_are_a_part():
    one, two = chat(), {"choices": chat()["choices"] * 2}
    assert why_not_storable("chat", one, {"n": 2}) == "fewer answers than were asked for"
    assert why_not_storable("chat", two, {"n": 2}) is None
    texts = {"choices": [{"text": "hi", "finish_reason": "stop"}] * 4}
    assert why_not_storable("complete", texts, {"prompt": ["a", "b"], "n": 2}) is None
    assert why_not_storable("complete", texts, {"prompt": ["a", "b", "c"], "n": 2}) is not None
    assert why_not_storable("complete", texts, {"prompt": [1, 2, 3, 4, 5]}) is None
    vectors = {"data": [{"embedding": [1.0]}] * 2}
    assert why_not_storable("embed", vectors, {"input": ["a", "b"]}) is None
    assert why_not_storable("embed", vectors, {"input": ["a", "b", "c"]}) is not None
    assert why_not_storable("embed", vectors, {"input": [1, 2, 3]}) is None
    assert why_not_storable("chat", one, {"n": True}) is why_not_storable("chat", one, {"n": "x"}) is None


# ── a function's values ─────────────────────────────────────────────────────────────────────────────────────────────

FUNCTION = Call("function", "", {"prompt": "x"}, target="m.f")
MAKING = Making(b"b", 0.0, 10.0, 1.0)


def value(found, tag=b"j"):
    return record_reply(FUNCTION, Reply(data=tag + msgspec.json.encode(found)), MAKING)


@pytest.mark.parametrize(
    "found",
    [
        None,
        "",
        chat(finish_reason="length") | {"object": "chat.completion"},
        {"object": "text_completion", "choices": [{"text": "", "finish_reason": "stop"}]},
        message(TEXT, stop="max_tokens"),
        response(said(OUTPUT), status="incomplete"),
    ],
    ids=str,
)
def test_cache_11_a_functions_value_that_is_no_answer_is_not_stored(found):
    with pytest.raises(NotStorable):
        value(found)
    with pytest.raises(NotStorable):
        value(found, b"topenai.types:ChatCompletion\n")


@pytest.mark.parametrize(
    "found", ["x", 0, False, [], {}, {"choices": []}, {"type": "message"}, chat() | {"object": "chat.completion"}]
)
def test_other_values_of_functions_are_nobodys_business(found):
    assert value(found).data[1:] == msgspec.json.encode(found)


def items_of(*events):
    held = [Item(event, b"j" + msgspec.json.encode(event)) for event in events]
    return record_stream(FUNCTION, Reply(), held, Reply().usage, MAKING)


def chunk(text, finish=None):
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": finish}
    return {"object": "chat.completion.chunk", "choices": [choice]}


def test_cache_11_a_generators_items_are_judged_where_they_are_the_events_of_an_sdk():
    assert items_of("a", "b").header.items
    assert items_of(chunk("a"), chunk("", "stop"))
    for cut_off in ([chunk("a")], [chunk("a"), chunk("", "length")], []):
        with pytest.raises(NotStorable):
            items_of(*cut_off)
    start = {"type": "message_start", "message": {"content": []}}
    block = {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": "a"}}
    stop = {"type": "message_delta", "delta": {"stop_reason": "end_turn"}}
    assert items_of(start, block, stop, {"type": "message_stop"})
    with pytest.raises(NotStorable, match="message_stop"):
        items_of(start, block, stop)
    with pytest.raises(NotStorable):
        items_of({"type": "response.created"}, {"type": "response.output_text.delta", "delta": "a"})

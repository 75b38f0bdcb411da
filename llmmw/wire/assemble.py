"""A streamed answer put together into the body that a plain call would have got, and the reverse.

Pure: decoded events and bodies in, bodies and bytes out. What cannot be converted without loss (log
probabilities, audio, fields we do not know) is said so, never guessed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from llmmw.answer import items, mapping
from llmmw.wire.sse import SSEParser

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_TEXTS = ("content", "refusal", "reasoning_content", "reasoning")
_CHOICE_FIELDS = frozenset({"index", "delta", "message", "text", "finish_reason", "logprobs"})
_ENVELOPE = frozenset({"choices", "usage", "object"})
DONE = b"data: [DONE]\n\n"


class Assembled(msgspec.Struct):
    """A body put together from a stream."""

    body: dict[str, Any]
    exact: bool
    """Whether a plain call would have got the same content and usage."""


def assemble(op: str, data: bytes) -> Assembled | None:
    """The body that a whole recorded stream amounts to; None where the stream or the operation is not understood."""
    parser = SSEParser(max_line_bytes=max(len(data), 1))
    events = [event.data for event in (*parser.feed(data), *parser.end()) if event.data != b"[DONE]"]
    try:
        decoded = [mapping(msgspec.json.decode(event)) for event in events]
        if op in {"chat", "complete"}:
            return _from_choices(op, decoded)
        if op == "messages":
            return _from_blocks(decoded)
    except (msgspec.DecodeError, RecursionError, TypeError, UnicodeError):
        return None
    if op == "responses":
        for event in decoded:
            if event.get("type") == "response.completed":
                return Assembled(mapping(event.get("response")), exact=True)
    return None


def _from_choices(op: str, events: Iterable[dict[str, Any]]) -> Assembled:
    """OpenAI's chat and completions."""
    found = Assembled({}, exact=True)
    choices: dict[int, dict[str, Any]] = {}
    for event in events:
        for name, value in event.items():
            if name not in _ENVELOPE and value is not None:
                found.body[name] = value
        if event.get("usage"):
            found.body["usage"] = event["usage"]
        for raw in items(event.get("choices")):
            part = mapping(raw)
            index: int = part.get("index", 0)
            choice = choices.setdefault(index, _empty_choice(op, index))
            found.exact &= _add_choice(op, choice, part)
    found.body["object"] = "chat.completion" if op == "chat" else "text_completion"
    found.body["choices"] = [choices[index] for index in sorted(choices)]
    for choice in choices.values():
        for call in mapping(choice.get("message")).get("tool_calls", ()):
            del call["index"]  # which a plain answer does not have
    found.exact &= "usage" in found.body
    return found


def _empty_choice(op: str, index: int) -> dict[str, Any]:
    held: dict[str, Any] = {"message": {"role": "assistant", "content": None}} if op == "chat" else {"text": ""}
    return {"index": index, **held, "logprobs": None, "finish_reason": None}


def _add_choice(op: str, choice: dict[str, Any], part: dict[str, Any]) -> bool:
    """Add one event's part of a choice; False where something of it is lost."""
    exact = not part.get("logprobs")
    for name, value in part.items():
        if name == "finish_reason":
            choice[name] = value or choice[name]
        elif name not in _CHOICE_FIELDS and value is not None:
            choice[name] = value
    if op == "complete":
        choice["text"] += part.get("text") or ""
        return exact
    return _add_delta(choice["message"], mapping(part.get("delta"))) and exact


def _add_delta(message: dict[str, Any], delta: dict[str, Any]) -> bool:
    exact = True
    for name, value in delta.items():
        if not value:
            continue
        if name in _TEXTS:
            message[name] = (message.get(name) or "") + value
        elif name == "role":
            message[name] = value
        elif name == "tool_calls":
            for call in items(value):
                _add_tool_call(message.setdefault("tool_calls", []), mapping(call))
        elif name == "function_call":
            _add_function(message.setdefault("function_call", {}), mapping(value))
        else:
            exact = False
    return exact


def _add_tool_call(calls: list[dict[str, Any]], part: dict[str, Any]) -> None:
    position = part.get("index", len(calls) - 1 if calls and not part.get("id") else len(calls))
    known = [found for found in calls if found["index"] == position]
    blank: dict[str, Any] = {"index": position, "id": None, "type": "function", "function": {}}
    if not known:
        calls.append(blank)
    call = known[0] if known else blank
    for name in ("id", "type"):
        call[name] = part.get(name) or call[name]
    _add_function(call["function"], mapping(part.get("function")))


def _add_function(function: dict[str, Any], part: dict[str, Any]) -> None:
    if part.get("name"):
        function["name"] = part["name"]
    function["arguments"] = function.get("arguments", "") + (part.get("arguments") or "")


def _from_blocks(events: Iterable[dict[str, Any]]) -> Assembled | None:
    """Anthropic's messages."""
    body: dict[str, Any] | None = None
    blocks: dict[int, dict[str, Any]] = {}
    exact = True
    for event in events:
        kind, index = event.get("type"), event.get("index", 0)
        if kind == "message_start":
            body = mapping(event.get("message"))
        elif kind == "content_block_start":
            blocks[index] = mapping(event.get("content_block"))
        elif kind == "content_block_delta":
            exact &= _add_block(blocks.setdefault(index, {}), mapping(event.get("delta")))
        elif kind == "message_delta" and body is not None:
            body.update(mapping(event.get("delta")))
            usage = {name: count for name, count in mapping(event.get("usage")).items() if count is not None}
            body["usage"] = mapping(body.get("usage")) | usage
    if body is None:
        return None
    for block in blocks.values():
        if "partial_json" in block:
            block["input"] = msgspec.json.decode(block.pop("partial_json") or "{}")
    body["content"] = [blocks[index] for index in sorted(blocks)]
    return Assembled(body, exact)


_BLOCK_DELTAS = {
    "text_delta": ("text", "text"),
    "thinking_delta": ("thinking", "thinking"),
    "signature_delta": ("signature", "signature"),
    "input_json_delta": ("partial_json", "partial_json"),
}


def _add_block(block: dict[str, Any], delta: dict[str, Any]) -> bool:
    names = _BLOCK_DELTAS.get(str(delta.get("type")))
    if names is None:
        return False
    field, source = names
    block[field] = (block.get(field) or "") + (delta.get(source) or "")
    return True


def cut(op: str, data: bytes, *, usage: bool) -> list[bytes] | None:
    """A plain answer as the stream of it, or None where it cannot be one without loss.

    Args:
        op: "chat" or "complete"; other operations have no such form here.
        data: the body.
        usage: whether the caller asked for a usage event.
    """
    if op not in {"chat", "complete"}:
        return None
    body = mapping(msgspec.json.decode(data))
    shared = {name: value for name, value in body.items() if name not in _ENVELOPE and value is not None}
    shared["object"] = "chat.completion.chunk" if op == "chat" else "text_completion"
    events: list[dict[str, Any]] = []
    for raw in items(body.get("choices")):
        choice = mapping(raw)
        if choice.get("logprobs"):
            return None
        extra = {name: value for name, value in choice.items() if name not in _CHOICE_FIELDS and value is not None}
        if op == "complete":
            ending = {"index": choice.get("index", 0), "text": choice.get("text"), "logprobs": None, **extra}
            events.append({**shared, "choices": [{**ending, "finish_reason": choice.get("finish_reason")}]})
            continue
        deltas = _deltas(mapping(choice.get("message")))
        if deltas is None:
            return None
        blank = {"index": choice.get("index", 0), "logprobs": None, "finish_reason": None}
        events += [{**shared, "choices": [{**blank, "delta": delta}]} for delta in deltas]
        last: dict[str, Any] = {**blank, "delta": {}, "finish_reason": choice.get("finish_reason"), **extra}
        events.append({**shared, "choices": [last]})
    if usage:
        if not body.get("usage"):
            return None
        events.append({**shared, "choices": [], "usage": body["usage"]})
    return [*(_sse(event) for event in events), DONE]


def _sse(event: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(event) + b"\n\n"


def _deltas(message: dict[str, Any]) -> list[dict[str, Any]] | None:
    """A message as the deltas that build it, or None where one of its fields has no such form."""
    known = {"role", "tool_calls", "function_call", *_TEXTS}
    if any(value for name, value in message.items() if name not in known):
        return None
    deltas: list[dict[str, Any]] = [{"role": message.get("role") or "assistant", "content": ""}]
    deltas += [{name: message[name]} for name in _TEXTS if message.get(name)]
    calls = [{**mapping(call), "index": index} for index, call in enumerate(items(message.get("tool_calls")))]
    if calls:
        deltas.append({"tool_calls": calls})
    if message.get("function_call"):
        deltas.append({"function_call": message["function_call"]})
    return deltas


def without_usage_event(op: str, pieces: Iterable[bytes]) -> Iterator[bytes]:
    """A recorded stream for a caller who did not ask for a usage event (an event without choices would surprise it).

    Chunks that hold nothing else are left out; chunk boundaries stay where they were.
    """
    for piece in pieces:
        if op in {"chat", "complete"} and b'"usage"' in piece and b'"choices"' in piece:
            kept = [event for event in _raw_events(piece) if not _is_usage_event(event)]
            if kept:
                yield b"".join(kept)
        else:
            yield piece


def _raw_events(piece: bytes) -> list[bytes]:
    found = piece.split(b"\n\n")
    return [event + b"\n\n" for event in found[:-1]] + ([found[-1]] if found[-1] else [])


def _is_usage_event(event: bytes) -> bool:
    if not event.startswith(b"data:"):
        return False
    try:
        decoded = mapping(msgspec.json.decode(event[5:]))
    except msgspec.DecodeError:
        return False
    return bool(decoded.get("usage")) and not items(decoded.get("choices"))

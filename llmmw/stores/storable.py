"""Whether an answer is whole: with content, to its end, its tool arguments cut nowhere (SPEC 1, *Storing*).

Like `answer.py` it knows the shapes of OpenAI (chat, completions, responses, embeddings) and Anthropic (messages),
takes decoded JSON that may be anything, and never raises.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from llmmw.answer import COMPLETE_FINISHES, content_texts, items, mapping, problem_with

if TYPE_CHECKING:
    from collections.abc import Mapping

NOTHING_ASKED: Mapping[str, Any] = {}
_NOT_WHOLE = "an answer without content, with a refusal or with cut-off tool arguments"
_SILENT = frozenset({"text", "message", "output_text"})
"""Blocks and items that are no answer without text."""
_THOUGHTS = frozenset({"thinking", "redacted_thinking", "reasoning"})
_SHAPES = {"chat.completion": "chat", "text_completion": "complete", "response": "responses"}
_EVENTS = {"chat.completion.chunk": "chat", "text_completion": "complete"}


def _parses(arguments: object) -> bool:
    """Whether a call's arguments are whole; some servers send them decoded."""
    if isinstance(arguments, dict):
        return True
    try:
        msgspec.json.decode(arguments if isinstance(arguments, str) else "")
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return False
    return True


def _call_is_whole(call: dict[str, Any]) -> bool:
    custom = mapping(call.get("custom"))  # a tool that takes free text
    return bool(custom.get("input")) or _parses(mapping(call.get("function")).get("arguments"))


def _choice_is_whole(choice: object) -> bool:
    entry = mapping(choice)
    message = mapping(entry.get("message"))
    content = message.get("content") if message else entry.get("text")
    if message.get("refusal") or any(mapping(part).get("refusal") for part in items(content)):
        return False
    calls = [mapping(call) for call in items(message.get("tool_calls"))]
    if message.get("function_call"):
        calls.append({"function": message["function_call"]})
    return bool(calls or "".join(content_texts(content))) and all(map(_call_is_whole, calls))


def _block_is_whole(block: dict[str, Any]) -> bool:
    """Of Anthropic's messages."""
    return block.get("type") != "tool_use" or isinstance(block.get("input"), dict)


def _item_is_whole(item: dict[str, Any]) -> bool:
    """Of OpenAI's responses."""
    if str(item.get("status") or "completed") != "completed":
        return False
    if any(mapping(part).get("refusal") for part in items(item.get("content"))):
        return False
    return item.get("type") != "function_call" or _parses(item.get("arguments"))


def _is_said(part: dict[str, Any]) -> bool:
    """Whether a block or an item is a part of the answer: text or a call."""
    kind = str(part.get("type") or "text")
    if kind in _THOUGHTS:
        return False
    text = part.get("text")
    spoken = (text if isinstance(text, str) else "") + "".join(content_texts(part.get("content")))
    return bool(spoken) or kind not in _SILENT


def _vector_is_whole(entry: object) -> bool:
    return bool(mapping(entry).get("embedding"))


def _expected(op: str, asked: Mapping[str, Any]) -> int:
    """How many choices or vectors the request asked for; 1 where it cannot be told."""
    given = asked.get("input") if op == "embed" else asked.get("prompt") if op == "complete" else None
    several = items(given)
    count = len(several) if several and not isinstance(several[0], int) else 1  # numbers: one text as tokens
    n = asked.get("n")
    return count * n if op != "embed" and type(n) is int and n > 0 else count


def why_not_storable(op: str, body: object, asked: Mapping[str, Any] = NOTHING_ASKED) -> str | None:
    """Why a 2xx answer must not be cached (SPEC 1, *Storing*), or None when it may be.

    Args:
        op: as for `problem_with`.
        body: decoded JSON.
        asked: the request's body: an answer with fewer choices or vectors than it asks for is a part of one.
    """
    problem = problem_with(op, body)
    if problem is not None:
        return problem
    root = mapping(body)
    if root.get("error") is not None:
        return "an error in the body"
    if op in {"messages", "responses"}:
        return _why_not_spoken(op, root)
    return _why_not_listed(op, root, asked) if op in {"chat", "complete", "embed"} else None


def _why_not_listed(op: str, root: dict[str, Any], asked: Mapping[str, Any]) -> str | None:
    held = items(root.get("data" if op == "embed" else "choices"))
    if op == "embed":
        whole = all(map(_vector_is_whole, held))
    else:
        for choice in held:
            reason = mapping(choice).get("finish_reason")
            if not isinstance(reason, str) or reason not in COMPLETE_FINISHES:
                return f"finish_reason {reason!r}"
        whole = all(map(_choice_is_whole, held))
    if not whole:
        return _NOT_WHOLE
    return None if len(held) >= _expected(op, asked) else "fewer answers than were asked for"


def _why_not_spoken(op: str, root: dict[str, Any]) -> str | None:
    reason = root.get("stop_reason") if op == "messages" else root.get("status")
    if not isinstance(reason, str) or reason not in COMPLETE_FINISHES or root.get("incomplete_details") is not None:
        return f"stop reason {reason!r}"
    parts = [mapping(part) for part in items(root.get("content" if op == "messages" else "output"))]
    is_whole = _block_is_whole if op == "messages" else _item_is_whole
    if any(map(_is_said, parts)) and all(map(is_whole, parts)):
        return None
    return _NOT_WHOLE


def shape_of(body: object) -> str:
    """The operation that a body calls itself an answer to, or ""."""
    root = mapping(body)
    if root.get("type") == "message" and "stop_reason" in root:
        return "messages"
    kind = root.get("object")
    return _SHAPES.get(kind, "") if isinstance(kind, str) else ""


def event_shape_of(event: object) -> str:
    """The operation whose stream an event belongs to by its own account, or ""."""
    root = mapping(event)
    kind, name = root.get("object"), root.get("type")
    if name == "message_start":
        return "messages"
    if isinstance(name, str) and name.startswith("response."):
        return "responses"
    return _EVENTS.get(kind, "") if isinstance(kind, str) else ""

"""What an answer body says: its text, its usage, how it finished, and whether it is an answer at all.

Knows the JSON shapes of OpenAI (chat, completions, responses, embeddings) and Anthropic (messages). Every
function takes decoded JSON from a server, which may be anything, and never raises.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterator

COMPLETE_FINISHES = frozenset({
    "stop", "tool_calls", "function_call", "end_turn", "stop_sequence", "tool_use", "completed",
})  # fmt: skip
"""Finish reasons after which nothing is missing (SPEC 1); "length" and "content_filter" are not among them."""

MAX_TOKENS_REPORTED = 10_000_000
"""A usage figure above this is hostile or broken and is clamped (SPEC 10)."""


class Usage(msgspec.Struct, frozen=True):
    """Tokens of one answer, as the server reported them."""

    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    """Part of input_tokens that the server's prefix cache answered."""
    reported: bool = False
    """False where the server gave no usage."""

    @property
    def total_tokens(self) -> int:
        """Input and output together."""
        return self.input_tokens + self.output_tokens

    def __add__(self, other: Usage) -> Usage:
        """Sum of two usages; reported if either was."""
        return Usage(
            self.input_tokens + other.input_tokens,
            self.output_tokens + other.output_tokens,
            self.cached_tokens + other.cached_tokens,
            self.reported or other.reported,
        )


NO_USAGE = Usage()


def mapping(value: object) -> dict[str, Any]:
    """The value if it is a JSON object, else an empty one."""
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


def items(value: object) -> list[Any]:
    """The value if it is a JSON array, else an empty one."""
    return value if isinstance(value, list) else []  # pyright: ignore[reportUnknownVariableType]  # JSON


def _count(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return 0
    if value != value or value <= 0:  # noqa: PLR0124 — NaN is the value that differs from itself
        return 0
    return int(min(value, MAX_TOKENS_REPORTED))


def usage_of(body: object) -> Usage:
    """The usage in an answer or in a stream's event (OpenAI's and Anthropic's names), clamped to sane counts."""
    root = mapping(body)
    raw = root.get("usage")
    if raw is None:
        nested = root.get("message") if "message" in root else root.get("response")
        raw = mapping(nested).get("usage")
    if not isinstance(raw, dict):
        return NO_USAGE
    found = mapping(cast("object", raw))
    details = mapping(found.get("prompt_tokens_details")) or mapping(found.get("input_tokens_details"))
    cached = _count(details.get("cached_tokens")) or _count(found.get("cache_read_input_tokens"))
    return Usage(
        _count(found.get("prompt_tokens")) or _count(found.get("input_tokens")),
        _count(found.get("completion_tokens")) or _count(found.get("output_tokens")),
        cached,
        reported=True,
    )


def _texts(body: dict[str, Any]) -> Iterator[str]:
    for choice in items(body.get("choices"))[:1]:
        entry = mapping(choice)
        message = mapping(entry.get("message")) or mapping(entry.get("delta"))
        content = message.get("content") if message else entry.get("text")
        yield from content_texts(content)
    yield from content_texts(body.get("content"))
    for block in items(body.get("output")):
        yield from content_texts(mapping(block).get("content"))


def content_texts(content: object) -> Iterator[str]:
    """The texts in a message's content, which is one text or a list of parts."""
    if isinstance(content, str):
        yield content
    for part in items(content):
        text = mapping(part).get("text")
        if isinstance(text, str):
            yield text


def text_of(body: object) -> str:
    """The text of the first choice ("" where there is none, as for a pure tool call or an embedding)."""
    found: Any = body
    try:  # nearly every answer is one
        content = found["choices"][0]["message"]["content"]
        if type(content) is str and not ("content" in found or "output" in found):
            return content
    except (KeyError, IndexError, TypeError):
        pass
    return "".join(_texts(mapping(found)))


class _Message(msgspec.Struct):
    content: str


class _Choice(msgspec.Struct):
    message: _Message


class _Completion(msgspec.Struct):
    """The usual answer, of which the decoder skips everything but the text, in half the time."""

    choices: list[_Choice]
    content: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    output: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


_decode_completion = msgspec.json.Decoder(_Completion).decode


def text_in(data: bytes) -> str:
    """`text_of` a body as it came.

    Raises:
        msgspec.DecodeError: it is not JSON.
    """
    try:
        found = _decode_completion(data)
    except msgspec.ValidationError:
        pass  # another shape
    else:
        if found.choices and found.content is msgspec.UNSET is found.output:
            return found.choices[0].message.content
    return text_of(msgspec.json.decode(data))


def finish_reasons(body: object) -> list[str]:
    """Every finish reason in an answer, in order of the choices."""
    root = mapping(body)
    found = [mapping(choice).get("finish_reason") for choice in items(root.get("choices"))]
    found += [root.get("stop_reason"), root.get("status")]
    return [reason for reason in found if isinstance(reason, str)]


def problem_with(op: str, body: object) -> str | None:
    """Why a 2xx body is not an answer to this operation, or None when it is one.

    Args:
        op: "chat", "complete", "embed", "messages", "responses"; other operations are not judged.
        body: decoded JSON.
    """
    if op not in {"chat", "complete", "embed", "messages", "responses"}:
        return None
    if not isinstance(body, dict):
        return f"expected a JSON object, got {type(body).__name__}"
    root = mapping(cast("object", body))
    if root.get("error"):
        return "the body is an error although the status says success"
    expected = {"chat": "choices", "complete": "choices", "embed": "data", "messages": "content"}.get(op, "output")
    value = root.get(expected)
    if not isinstance(value, list):
        return f"no {expected!r} list in the body"
    if not value and op in {"chat", "complete", "embed"}:
        return f"{expected!r} is empty"
    return _cut_off(items(root.get("choices"))) if op in {"chat", "complete"} else None


def _cut_off(choices: list[Any]) -> str | None:
    """Why one of the choices is not finished, or None."""
    reasons = [mapping(choice).get("finish_reason") for choice in choices]
    if not all(reasons):
        return "a choice has no finish_reason"
    # OpenRouter: the provider behind it broke off.
    return "a choice ended in an error" if "error" in reasons else None

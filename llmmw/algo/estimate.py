"""How many tokens a call will cost, before anybody knows."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from typing import TYPE_CHECKING, Any, cast

from llmmw.answer import items

if TYPE_CHECKING:
    from collections.abc import Mapping

_CHARS_PER_TOKEN = 4
"""English prose under the usual BPE vocabularies; other scripts are counted in UTF-8 bytes, which comes close."""
_PER_MESSAGE = 4
"""Role and separators of a chat template."""
_PER_IMAGE = 1000
_IMAGES = frozenset({"image_url", "image", "input_image"})
_MAX_DEPTH = 6
_UNTOLD_OUTPUT = 512
"""Expected output before anything was learned and where the call sets no maximum."""
_PROMPT_FIELDS = ("messages", "prompt", "input", "system", "tools")
_OUTPUT_FIELDS = ("max_tokens", "max_completion_tokens", "max_output_tokens")


def prompt_tokens(payload: Mapping[str, Any]) -> int:
    """Tokens of the prompt: about a quarter of its characters, plus a few per message, 1000 per image.

    Reads messages (of one or several conversations), prompt, input, system and tools; of a payload with none of
    them (a function's arguments) every text.
    """
    found = -1
    for name in _PROMPT_FIELDS:
        value = payload.get(name)
        if value is not None:
            found = max(found, 0) + _measure(value, 0)
    return found if found >= 0 else _measure(dict(payload), 0)


def output_cap(payload: Mapping[str, Any]) -> int | None:
    """The most output tokens one choice may have, where the call says so."""
    for name in _OUTPUT_FIELDS:
        value = payload.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


def choices(payload: Mapping[str, Any]) -> int:
    """How many answers the call makes the server write: conversations or prompts, times `n` (or `best_of`)."""
    each = 1
    for name in ("n", "best_of"):
        asked = payload.get(name)
        if isinstance(asked, int) and not isinstance(asked, bool) and asked > each:
            each = asked
    listed = items(payload.get("messages"))
    if listed:
        return each * len(listed) if isinstance(listed[0], list) else each
    listed = items(payload.get("prompt"))
    return each * len(listed) if listed and isinstance(listed[0], str | list) else each


class LearnedOutput:
    """The 90th percentile of the last 64 output lengths."""

    __slots__ = ("_recent", "_sorted")

    def __init__(self) -> None:
        self._recent: deque[int] = deque()
        self._sorted: list[int] = []

    def learn(self, tokens: int) -> None:
        """An answer had this many tokens."""
        if len(self._recent) == 64:  # noqa: PLR2004 — see the class
            del self._sorted[bisect_left(self._sorted, self._recent.popleft())]
        self._recent.append(tokens)
        insort(self._sorted, tokens)

    def expect(self, cap: int | None) -> int:
        """Output tokens to reserve for one answer, at most `cap`."""
        if not self._sorted:
            return _UNTOLD_OUTPUT if cap is None else cap
        expected = self._sorted[len(self._sorted) * 9 // 10]
        return expected if cap is None else min(cap, expected)


def _measure(value: object, depth: int) -> int:
    if isinstance(value, str):
        size = len(value) if value.isascii() else len(value.encode("utf-8", "replace"))
        return (size + _CHARS_PER_TOKEN - 1) // _CHARS_PER_TOKEN
    total = 0
    if depth > _MAX_DEPTH:
        return total
    if isinstance(value, list | tuple):
        listed = cast("list[object]", value)
        if listed and isinstance(listed[0], int):
            return len(listed)  # token ids
        for entry in listed:
            total += _measure(entry, depth + 1)
    elif isinstance(value, dict):
        fields = cast("dict[str, object]", value)
        content = fields.get("content")
        if content is not None or "role" in fields:
            tools = fields.get("tool_calls")
            called = 0 if tools is None else _measure(tools, depth + 1)
            return _PER_MESSAGE + (0 if content is None else _measure(content, depth + 1)) + called
        if fields.get("type") in _IMAGES:
            return _PER_IMAGE
        for entry in fields.values():
            total += _measure(entry, depth + 1)
    return total

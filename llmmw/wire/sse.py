"""Server-sent events as LLM servers stream them: bytes to events, and what a passing stream has said so far.

`StreamWatch` reads along while the chunks go by untouched: usage, text, error, and whether anything is missing at
the end. It knows the streams of OpenAI (chat, completions, responses) and Anthropic (messages).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from llmmw.answer import NO_USAGE, Usage, items, mapping, usage_of
from llmmw.errors import ResponseTooLarge
from llmmw.wire.strict import worth

if TYPE_CHECKING:
    from collections.abc import Sequence

MAX_LINE_BYTES = 8 * 1024 * 1024
_MAX_DATA_LINES = 10_000
"""One is usual. A million short lines keep below the bound in bytes, and a processor busy for seconds."""
_LARGE = 64 * 1024
_MAX_WORTH = 16 * 1024 * 1024
"""What a large event may take when it is decoded: half a million numbers, 0.1 s. Two million lists would take 3 s."""


class ServerEvent(msgspec.Struct, frozen=True):
    """One server-sent event: its type ("" when not given) and its data lines joined by newlines."""

    event: str
    data: bytes


class SSEParser:
    """Turns bytes, cut anywhere, into events (WHATWG HTML, 9.2.6: CR, LF and CRLF lines, comments, multi-line data).

    Ids and retry times are read over: no LLM API resumes a stream.
    """

    def __init__(self, *, max_line_bytes: int = MAX_LINE_BYTES) -> None:
        self._max = max_line_bytes
        self._partial: list[bytes] = []
        self._partial_size = 0
        self._event = ""
        self._data: list[bytes] = []
        self._data_size = 0
        self._at_start = True

    def feed(self, chunk: bytes) -> list[ServerEvent]:
        """The events that this chunk completes.

        Raises:
            ResponseTooLarge: a line, or the data of one event, exceeds the bound.
        """
        after_cr = bool(self._partial) and self._partial[-1].endswith(b"\r")
        if not after_cr and b"\n" not in chunk and b"\r" not in chunk:
            self._keep(chunk)
            return []
        lines = b"".join([*self._partial, chunk]).splitlines(keepends=True)
        self._partial, self._partial_size = [], 0
        if lines and not lines[-1].endswith(b"\n"):
            # Open, or ended by a CR whose LF may be in the next chunk.
            self._keep(lines.pop())
        return self._take(lines)

    def end(self) -> list[ServerEvent]:
        """The event that the end of the stream completes: only one whose blank line ended in a lone CR.

        An event without its blank line is incomplete and dropped, as the standard says.
        """
        rest, self._partial, self._partial_size = b"".join(self._partial), [], 0
        return self._take([rest]) if rest.endswith(b"\r") else []

    def _keep(self, piece: bytes) -> None:
        self._partial.append(piece)
        self._partial_size += len(piece)
        self._check(self._partial_size)

    def _check(self, size: int) -> None:
        if size > self._max:
            raise ResponseTooLarge(f"an event of the stream is longer than {self._max} bytes")

    def _take(self, lines: Sequence[bytes]) -> list[ServerEvent]:
        found: list[ServerEvent] = []
        for raw in lines:
            self._check(len(raw))
            line = raw.rstrip(b"\r\n")
            if self._at_start:
                self._at_start = False
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line[:5] == b"data:":
                self._add(line[6:] if line[5:6] == b" " else line[5:])
            elif not line:
                if self._data:
                    found.append(ServerEvent(self._event, b"\n".join(self._data)))
                self._event, self._data, self._data_size = "", [], 0
            elif line[:6] == b"event:":
                self._event = line[6:].strip(b" ").decode("utf-8", "replace")
            elif line == b"data":
                self._add(b"")
        return found

    def _add(self, data: bytes) -> None:
        self._data.append(data)
        self._data_size += len(data) + 1
        self._check(self._data_size)
        if len(self._data) > _MAX_DATA_LINES:
            raise ResponseTooLarge(f"an event of the stream has more than {_MAX_DATA_LINES} lines of data")


def error_in(event: object) -> dict[str, Any] | None:
    """The error event, as {"error": ...}, where this event is one; else None.

    Known shapes: {"error": object or text}, {"object": "error", ...} (old vLLM), {"type": "error", ...}, and
    `response.failed` with the error inside "response".
    """
    root = mapping(event)
    if root.get("error"):
        return root
    if root.get("type") == "response.failed":
        return {"error": mapping(root.get("response")).get("error") or "the response failed"}
    if root.get("object") == "error" or root.get("type") == "error":
        return {"error": root}
    return None


_TOKENS = ("content", "tool_calls", "function_call", "reasoning_content", "reasoning", "refusal", "audio")
_RESPONSES_END = frozenset({"response.completed", "response.incomplete", "response.failed", "response.cancelled"})


class StreamWatch:
    """What a stream of one operation has said so far. Operations it does not know are read for usage only."""

    def __init__(self, op: str, *, max_line_bytes: int = MAX_LINE_BYTES) -> None:
        self._op = op
        self._parser = SSEParser(max_line_bytes=max_line_bytes)
        self._pieces: list[str] = []
        self._seen: set[object] = set()
        self._finished: set[object] = set()
        self._terminated = False
        self._broken = False
        self.usage: Usage = NO_USAGE
        self.error: dict[str, Any] | None = None
        """The first error event, as {"error": ...}."""
        self.has_token = False
        """Whether anything generated has gone by (text, reasoning or a tool call)."""

    @property
    def text(self) -> str:
        """The text of the first choice so far."""
        return "".join(self._pieces)

    def feed(self, chunk: bytes) -> None:
        """Read one chunk.

        Raises:
            ResponseTooLarge: a line is longer than the bound.
        """
        for event in self._parser.feed(chunk):
            self._read(event)

    def missing(self) -> str | None:
        """Why a stream that ended here is cut off, or None when it is whole."""
        for event in self._parser.end():
            self._read(event)
        if self._broken:
            return "an event is not JSON"
        if self._op in {"chat", "complete"}:
            if not self._seen or self._seen - self._finished:
                return "no finish_reason"
            return None if self._terminated else "no [DONE]"
        if self._op in {"messages", "responses"} and not self._terminated:
            return "no message_stop" if self._op == "messages" else "no response.completed"
        return None

    def _read(self, event: ServerEvent) -> None:
        if event.data == b"[DONE]":
            self._terminated = True
            return
        if len(event.data) > _LARGE and worth(event.data) > _MAX_WORTH:
            raise ResponseTooLarge("an event of the stream holds too many values")
        try:
            decoded = msgspec.json.decode(event.data)
        except (msgspec.DecodeError, RecursionError):
            self._broken = True
            return
        root = mapping(decoded) or mapping(next(iter(items(decoded)), None))  # Gemini: an error in a list of one
        if b'"usage"' in event.data:
            self._merge(usage_of(root))
        if b'error"' in event.data or root.get("type") == "response.failed":
            self.error = self.error or error_in(root)
        if self._op in {"chat", "complete"}:
            self._read_choices(root)
        elif self._op in {"messages", "responses"}:
            self._read_typed(root)

    def _merge(self, found: Usage) -> None:
        # Servers that report several times report running totals, and Anthropic splits input and output.
        if found.reported:
            mine = self.usage
            self.usage = Usage(
                max(mine.input_tokens, found.input_tokens),
                max(mine.output_tokens, found.output_tokens),
                max(mine.cached_tokens, found.cached_tokens),
                reported=True,
            )

    def _read_choices(self, root: dict[str, Any]) -> None:
        for choice in items(root.get("choices")):
            entry = mapping(choice)
            index = entry.get("index", 0)
            index = index if isinstance(index, int) else 0
            self._seen.add(index)
            if entry.get("finish_reason"):
                self._finished.add(index)
            delta = mapping(entry.get("delta"))
            text = delta.get("content") if delta else entry.get("text")
            if text or any(delta.get(name) for name in _TOKENS):
                self.has_token = True
                if index == 0 and isinstance(text, str):
                    self._pieces.append(text)

    def _read_typed(self, root: dict[str, Any]) -> None:
        kind = root.get("type")
        if kind == "message_stop" or kind in _RESPONSES_END:
            self._terminated = True
        delta = root.get("delta")
        text = delta if kind == "response.output_text.delta" else mapping(delta).get("text")
        if isinstance(text, str):
            self._pieces.append(text)
        self.has_token = self.has_token or kind == "content_block_delta" or (isinstance(delta, str) and bool(delta))

"""When a passing stream has its first token; roles, pings and empty deltas before it are none."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmmw.call import Item
from llmmw.errors import ResponseTooLarge
from llmmw.wire.sse import StreamWatch

if TYPE_CHECKING:
    from collections.abc import Callable

    from llmmw.call import Chunk

HAVE_TOKENS = frozenset({"chat", "complete", "messages", "responses"})
"""Operations whose streams begin with chunks that say nothing yet."""
MAX_SILENT = 16
"""A stream that says nothing for so many chunks is taken as it is."""


class FirstToken:
    """Calls `on_token` once, with the first chunk that holds something generated. For `at_end(on_chunk=)`."""

    __slots__ = ("_chunks", "_on_token", "_watch")

    def __init__(self, op: str, on_token: Callable[[], object]) -> None:
        self._watch = StreamWatch(op) if op in HAVE_TOKENS else None
        self._on_token: Callable[[], object] | None = on_token
        self._chunks = 0

    def read(self, chunk: Chunk) -> None:
        """A chunk goes by."""
        on_token = self._on_token
        if on_token is None:
            return
        self._chunks += 1
        if self._watch is not None and not isinstance(chunk, Item) and self._chunks < MAX_SILENT:
            try:
                self._watch.feed(chunk)
            except ResponseTooLarge:
                self._on_token = None
                return
            if not self._watch.has_token:
                return
        self._on_token = self._watch = None
        on_token()

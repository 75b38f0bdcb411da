"""Streamed bodies: seeing their end exactly once (`at_end`), replaying them (`Replay`).

Whatever must happen when an answer is over (permits back, tokens settled, breaker told, statistics) hangs on
`at_end`, which treats a whole reply and a stream alike.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Literal

import msgspec

from llmmw.answer import NO_USAGE, Usage

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from llmmw.call import Chunk, Chunks, Reply


Ending = Literal["finished", "failed", "closed", "cancelled"]
""""closed": the reader stopped early; "cancelled": the reading task was cancelled."""


class End(msgspec.Struct, frozen=True):
    """How a body ended."""

    how: Ending
    usage: Usage = NO_USAGE
    error: BaseException | None = None


class Tap:
    """A stream that passes every chunk through unchanged and calls `on_end` exactly once, however it ends."""

    def __init__(
        self,
        inner: Chunks,
        on_end: Callable[[End], object],
        on_chunk: Callable[[Chunk], object] | None = None,
    ) -> None:
        self._inner = inner
        self._on_end: Callable[[End], object] | None = on_end
        self._on_chunk = on_chunk
        self._left: Literal["closed", "cancelled"] | None = None

    @property
    def usage(self) -> Usage:
        """What the stream reported so far."""
        return self._inner.usage

    def __aiter__(self) -> Tap:
        return self

    async def __anext__(self) -> Chunk:
        try:
            chunk = await self._inner.__anext__()
        except StopAsyncIteration:
            self._end("finished")
            raise
        except asyncio.CancelledError as error:
            await self._abandon("cancelled", error)
            raise
        except BaseException as error:
            self._end("failed", error)
            raise
        if self._on_chunk is not None:
            self._on_chunk(chunk)
        return chunk

    async def aclose(self) -> None:
        """Stop reading; the end is told as "closed" unless it already came."""
        await self._abandon("closed", None)

    async def _abandon(self, how: Literal["closed", "cancelled"], error: BaseException | None) -> None:
        # A reader who waits while somebody else closes sees an end, but the stream has not finished.
        self._left = self._left or how
        try:
            await self._inner.aclose()
        finally:
            self._end(how, error)

    def _end(self, how: Ending, error: BaseException | None = None) -> None:
        on_end, self._on_end = self._on_end, None
        if on_end is not None:
            left = self._left
            on_end(End(how if left is None else left, self._inner.usage, None if left not in {None, how} else error))


def at_end(reply: Reply, on_end: Callable[[End], object], on_chunk: Callable[[Chunk], object] | None = None) -> Reply:
    """Call `on_end` once when the reply's body is over: now for a whole reply, after the last chunk of a stream.

    `on_chunk` sees each chunk of a stream before the reader does.
    """
    if reply.chunks is None:
        on_end(End("finished", reply.usage))
        return reply
    return reply.replace(chunks=Tap(reply.chunks, on_end, on_chunk))


class Replay:
    """A recorded stream: the same chunks, in order, without waiting; `usage` is final from the start.

    `aclose` ends it early; a replay holds nothing, so dropping it unread is harmless.
    """

    def __init__(self, chunks: Sequence[Chunk], usage: Usage = NO_USAGE) -> None:
        self._chunks = iter(chunks)
        self._usage = usage

    @property
    def usage(self) -> Usage:
        """What the recorded stream reported at its end."""
        return self._usage

    def __aiter__(self) -> Replay:
        return self

    async def __anext__(self) -> Chunk:
        for chunk in self._chunks:
            return chunk
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """Read no further."""
        self._chunks = iter(())

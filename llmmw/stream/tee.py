"""Sharing one live stream between several readers: `Tee`."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

from llmmw.answer import NO_USAGE, Usage
from llmmw.errors import StreamInterrupted
from llmmw.stream.copies import own_chunk, own_error

if TYPE_CHECKING:
    from collections.abc import Callable

    from llmmw.call import Chunk, Chunks

_READ_AHEAD = 64 * 1024
"""Bytes read before the fastest reader asks for them: enough to keep the source busy, small beside the buffer."""
_VALUE_SIZE = 1024
"""What a function's value without an encoded form counts for, in bytes."""


class _Cursor:
    """Where one reader stands; the tee knows this and not the reader, so that a dropped reader is collected."""

    __slots__ = ("index", "own", "wake")

    def __init__(self, *, own: bool) -> None:
        self.index = 0
        self.own = own
        self.wake: asyncio.Future[None] | None = None


def _nobody() -> bool:
    return False


class Tee:
    """One live stream for several readers, each of which gets it from the beginning, whenever it joined.

    Somebody must run `pump()` in a task of its own: it reads the source as fast as the fastest reader (and a little
    ahead), so slow readers delay nobody. Chunks are kept, up to `max_bytes`, for those who lag or join later; a
    reader that lags further loses its place and gets StreamInterrupted, the others go on.

    Args:
        source: the stream; read and closed by `pump` only.
        max_bytes: bound of the buffer.
        on_abandoned: called when the last reader left before the end; tells whether it cancelled the pump. If it did
            not, the tee reads on, for later readers and for whoever taps the source.
    """

    def __init__(self, source: Chunks, *, max_bytes: int, on_abandoned: Callable[[], bool]) -> None:
        self._source: Chunks | None = source
        self._usage = NO_USAGE
        self._chunks: list[Chunk] = []
        self._first = 0
        self._kept = self._ahead = 0
        self._front = 0
        self._max_bytes = max_bytes
        self._on_abandoned = on_abandoned
        self._cursors: set[_Cursor] = set()
        self._demand: asyncio.Future[None] | None = None
        self._ended = False
        self._error: BaseException | None = None
        self._released = asyncio.Event()

    @property
    def usage(self) -> Usage:
        """What the source reported so far."""
        return self._usage if self._source is None else self._source.usage

    @property
    def joinable(self) -> bool:
        """Whether a new reader would get the whole stream, and it still runs."""
        return not self._ended and self._first == 0

    @property
    def readers(self) -> int:
        """How many read now."""
        return len(self._cursors)

    def reader(self, *, own: bool) -> TeeReader:
        """One more reader, from the beginning; `own` for one that needs copies (everybody but the leader)."""
        cursor = _Cursor(own=own)
        self._cursors.add(cursor)
        return TeeReader(self, cursor)

    async def pump(self) -> None:
        """Read the source to its end. Readers get the source's error; it is raised here only if it is a cancellation.

        A cancelled pump ends its readers with StreamInterrupted, unless `fail` said otherwise.
        """
        source = self._source
        if source is None:
            return
        try:
            while True:
                if self._ahead >= _READ_AHEAD and self._cursors:
                    await self._wait_for_demand()
                self._push(await source.__anext__())
        except StopAsyncIteration:
            self._end(None)
        except GeneratorExit:  # the loop was dropped with us pending: there is nobody to wake and nothing to await
            raise
        except asyncio.CancelledError:
            self._end(StreamInterrupted("the shared stream was cancelled", usage=source.usage))
            await _close(source)
            raise
        except BaseException as error:  # noqa: BLE001 — every reader raises it
            self._end(error)
            await _close(source)
        finally:
            self._usage, self._source = source.usage, None
            self._on_abandoned = _nobody  # its closure holds the flight, which holds us
            self._released.set()

    def fail(self, error: BaseException) -> None:
        """End the stream for all readers with this error."""
        self._end(error)

    async def _wait_for_demand(self) -> None:
        self._demand = asyncio.get_running_loop().create_future()
        try:
            await self._demand
        finally:
            self._demand = None

    def _push(self, chunk: Chunk) -> None:
        size = _size(chunk)
        self._chunks.append(chunk)
        self._kept += size
        self._ahead += size
        while self._kept > self._max_bytes and self._first < self._front:
            self._kept -= _size(self._chunks.pop(0))
            self._first += 1
        self._wake_readers()

    def _end(self, error: BaseException | None) -> None:
        if not self._ended:
            self._ended, self._error = True, error
            self._wake_readers()

    def _wake_readers(self) -> None:
        for cursor in self._cursors:
            if cursor.wake is not None:
                _set(cursor.wake)

    async def next_for(self, cursor: _Cursor) -> Chunk:
        """The next chunk for one reader; waits for the source if it has read all there is."""
        while cursor in self._cursors and cursor.index >= self._first + len(self._chunks):
            if self._ended:
                self._cursors.discard(cursor)
                if self._error is not None:
                    raise own_error(self._error) if cursor.own else self._error
                break
            cursor.wake = asyncio.get_running_loop().create_future()
            try:
                await cursor.wake
            finally:
                cursor.wake = None
        if cursor not in self._cursors:
            raise StopAsyncIteration
        if cursor.index < self._first:
            self.leave(cursor)
            raise StreamInterrupted(
                f"this reader of a shared stream fell more than {self._max_bytes} bytes behind", usage=self.usage
            )
        return self._take(cursor)

    def _take(self, cursor: _Cursor) -> Chunk:
        chunk = self._chunks[cursor.index - self._first]
        cursor.index += 1
        if cursor.index > self._front:
            self._front = cursor.index
            self._ahead -= _size(chunk)
            if self._demand is not None and self._ahead < _READ_AHEAD:
                _set(self._demand)
        return own_chunk(chunk) if cursor.own else chunk

    def leave(self, cursor: _Cursor) -> bool:
        """A reader stops; tells whether it was the last of a running stream and the pump is being cancelled."""
        if cursor not in self._cursors:
            return False
        self._cursors.discard(cursor)
        if cursor.wake is not None:
            _set(cursor.wake)
        if self._cursors or self._ended:
            return False
        if self._demand is not None:
            _set(self._demand)
        return self._on_abandoned()

    def has(self, cursor: _Cursor) -> bool:
        """Whether this reader still reads."""
        return cursor in self._cursors

    async def wait_released(self) -> None:
        """Until the source is closed."""
        await self._released.wait()


class TeeReader:
    """One reader's view of a `Tee`. One that is dropped unread counts as gone when it is collected."""

    def __init__(self, tee: Tee, cursor: _Cursor) -> None:
        self._tee = tee
        self._cursor = cursor
        self._loop = asyncio.get_running_loop()

    @property
    def usage(self) -> Usage:
        """What the shared stream reported so far."""
        return self._tee.usage

    def __aiter__(self) -> TeeReader:
        return self

    async def __anext__(self) -> Chunk:
        return await self._tee.next_for(self._cursor)

    async def aclose(self) -> None:
        """Stop reading; others go on. The last reader waits until the source is closed."""
        if self._tee.leave(self._cursor):
            await self._tee.wait_released()

    def __del__(self) -> None:
        if self._tee.has(self._cursor):
            with contextlib.suppress(RuntimeError):  # the loop is closed: the pump went with it
                self._loop.call_soon_threadsafe(self._tee.leave, self._cursor)


def _size(chunk: Chunk) -> int:
    if isinstance(chunk, bytes):
        return len(chunk)
    return _VALUE_SIZE if chunk.data is None else len(chunk.data)


def _set(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


async def _close(source: Chunks) -> None:
    """Close a source whose end the readers know already, so that trouble while closing concerns nobody."""
    with contextlib.suppress(Exception):
        await source.aclose()

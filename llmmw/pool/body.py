"""The body of a response: decoded under caps, and the end of it told exactly once."""

from __future__ import annotations

import io
import types
import warnings
import zlib
from typing import TYPE_CHECKING, Any

from llmmw.errors import ProtocolError, ResponseTooLarge

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from llmmw.pool.engine import RawResponse
    from llmmw.pool.fleet import Fleet, Generation
    from llmmw.pool.limits import Patience

MAX_RATIO = 200
"""A body that grows more than this is a bomb: JSON text compresses 3 to 30 times."""
RATIO_FLOOR = 1024 * 1024
"""Small bodies are not judged by ratio; a few repeated kilobytes are harmless."""
_STEP = 256 * 1024
_IN_A_ROW = 64
"""Pieces that may be taken without a turn for others: a burst of tiny chunks is at hand without any waiting."""
ACCEPT_ENCODING = "gzip, deflate"


@types.coroutine
def _others() -> Generator[None]:
    """Let the event loop serve others, as `asyncio.sleep(0)` does."""
    yield


class Inflater:
    """Gzip or deflate, inflated in bounded steps, so a bomb is refused before it is inflated."""

    def __init__(self, coding: str, max_bytes: int) -> None:
        self._wbits = zlib.MAX_WBITS | 16 if coding in {"gzip", "x-gzip"} else zlib.MAX_WBITS
        self._deflate = coding == "deflate"
        self._z: Any = None
        self._max_bytes = max_bytes
        self._taken = 0
        self._given = 0

    def feed(self, data: bytes) -> bytes:
        """The decoded form of the next piece.

        Raises:
            ResponseTooLarge: too many bytes, or too many for what was sent.
            ProtocolError: not what the header says.
        """
        if self._z is None:
            # "deflate" means zlib's format, but some servers send the bare stream (RFC 9110, 8.4.1.2).
            bare = self._deflate and data[:1] and (data[0] & 0x0F) != 8  # noqa: PLR2004 — zlib's method number
            self._z = zlib.decompressobj(-zlib.MAX_WBITS if bare else self._wbits)
        self._taken += len(data)
        if self._taken > self._max_bytes:  # also of what comes after the end of the compressed data
            raise ResponseTooLarge(f"the body is larger than {self._max_bytes} bytes")
        pieces: list[bytes] = []
        try:
            while data and not self._z.eof:
                piece = self._z.decompress(data, _STEP)
                data = self._z.unconsumed_tail
                self._given += len(piece)
                self._check()
                pieces.append(piece)
        except zlib.error:
            raise ProtocolError("the body is not in the encoding that its header says") from None
        return b"".join(pieces)

    def end(self) -> None:
        """The body is over.

        Raises:
            ProtocolError: within the compressed data.
        """
        if self._z is not None and not self._z.eof:
            raise ProtocolError("the compressed body is cut off")

    def _check(self) -> None:
        if self._given > self._max_bytes:
            raise ResponseTooLarge(f"the decoded body is larger than {self._max_bytes} bytes")
        if self._given > RATIO_FLOOR and self._given > self._taken * MAX_RATIO:
            raise ResponseTooLarge(f"the body grows more than {MAX_RATIO} times when decoded")


class Body:
    """The body of one response: an async iterator over its bytes as they arrive, or `read()` for all of it.

    Raises ResponseTooLarge, AmbiguousOutcome (the connection broke), UpstreamTimeout (nothing came for too long).
    However it ends, the connection goes back (or is closed), and the slot once.
    """

    __slots__ = ("_fleet", "_generation", "_in_a_row", "_inflater", "_left", "_lost", "_patience", "_raw", "_was_cut")

    def __init__(
        self,
        raw: RawResponse,
        fleet: Fleet,
        generation: Generation,
        lost: Callable[[BaseException], BaseException],
        *,
        max_bytes: int,
        patience: Patience | None = None,
        inflater: Inflater | None = None,
    ) -> None:
        self._raw = raw
        self._fleet: Fleet | None = fleet
        self._generation = generation
        self._lost = lost
        self._patience = patience
        self._inflater = inflater
        self._left = max_bytes
        self._in_a_row = 0
        self._was_cut = False

    def __aiter__(self) -> Body:
        return self

    async def __anext__(self) -> bytes:
        piece = await self._next()
        if not piece:
            raise StopAsyncIteration
        return piece

    async def read(self, limit: int | None = None) -> bytes:
        """All of the body; with a limit at most that many bytes of it, and the rest is not fetched."""
        first = await self._next()
        whole: io.BytesIO | None = None
        size = len(first)
        while limit is None or size <= limit:
            piece = await self._next()
            if not piece:
                break
            if whole is None:
                # One buffer: as a list of its pieces a body sent byte by byte would take forty times its size.
                whole = io.BytesIO()
                whole.write(first)
            whole.write(piece)
            size += len(piece)
        else:
            await self.aclose()
        data = first if whole is None else whole.getvalue()
        return data if limit is None else data[:limit]

    @property
    def was_cut(self) -> bool:
        """Whether reading stopped before the end."""
        return self._was_cut

    async def aclose(self) -> None:
        """Stop reading. Idempotent."""
        if self._fleet is not None:
            self._was_cut = True
            try:
                await self._raw.aclose()
            finally:
                self._end()

    async def _next(self) -> bytes:
        if self._fleet is None:
            return b""
        raw, lost, patience, inflater = self._raw, self._lost, self._patience, self._inflater
        try:
            while not raw.ended:
                self._in_a_row += 1
                if self._in_a_row >= _IN_A_ROW:
                    self._in_a_row = 0
                    await _others()
                piece = await (raw.next() if patience is None else patience.piece(raw.next()))
                if not piece:
                    break
                piece = self._admit(piece, inflater)
                if piece:
                    return piece
            if inflater is not None and not self._was_cut:
                inflater.end()
        except BaseException as error:
            await self.aclose()
            mapped = lost(error)
            if mapped is error:
                raise
            raise mapped from None
        self._end()
        return b""

    def _admit(self, piece: bytes, inflater: Inflater | None) -> bytes:
        if inflater is not None:
            piece = inflater.feed(piece)
        self._left -= len(piece)
        if self._left < 0:
            raise ResponseTooLarge("the body is larger than max_response_bytes")
        return piece

    def _end(self) -> None:
        fleet, self._fleet = self._fleet, None
        if fleet is not None:
            generation = self._generation
            # An error may keep this body for hours: not the connection with it.
            del self._raw, self._generation, self._lost, self._patience, self._inflater
            fleet.finish(generation)

    def __del__(self) -> None:
        # A reader that simply went away: the slot must come back, or the pool would lose it for ever.
        fleet = self._fleet
        if fleet is not None and not fleet.dead and not fleet.loop.is_closed():
            warnings.warn("a response body was neither read to its end nor closed", ResourceWarning, stacklevel=2)
            fleet.loop.call_soon_threadsafe(_let_go, self._raw, fleet, self._generation)


def _let_go(raw: RawResponse, fleet: Fleet, generation: Generation) -> None:
    raw.abandon()
    fleet.finish(generation)

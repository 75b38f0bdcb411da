"""One exchange of a HTTP/2 connection: what has come of its answer so far."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING

from llmmw.errors import ProtocolError
from llmmw.pool.engine import Lost

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llmmw.pool.engines.h2connection import Connection


class Exchanged:
    """One exchange: a `RawResponse` as soon as its head is here."""

    __slots__ = ("_connection", "_error", "_over", "_pieces", "_wake", "headers", "mark", "number", "status")

    def __init__(self, connection: Connection, number: int, mark: int) -> None:
        self._connection = connection
        self.number = number
        self.mark = mark
        """How much the connection had received when the request went out."""
        self.status = 0
        self.headers: Sequence[tuple[bytes, bytes]] = ()
        self._pieces: deque[tuple[bytes, int]] = deque()
        self._over = False
        self._error: Exception | None = None
        self._wake: asyncio.Future[None] | None = None

    @property
    def ended(self) -> bool:
        """Whether the whole body has been taken."""
        return self._over and not self._pieces

    @property
    def is_decided(self) -> bool:
        """Whether nothing more comes, so that sending on is pointless."""
        return self._over or self._error is not None

    async def head(self) -> None:
        """Wait for status and headers."""
        while not self.status:
            await self._more()

    async def next(self) -> bytes:
        """The next piece of the body; b"" at its end."""
        while not self.ended:
            if self._pieces:
                data, size = self._pieces.popleft()
                self._connection.acknowledge(self, size)
                if data:
                    return data
            else:
                await self._more()
        return b""

    async def _more(self) -> None:
        if self._error is not None:
            raise self._error
        if self._over:
            raise Lost("the server ended the exchange without a response", any_byte=True)
        self._wake = asyncio.get_running_loop().create_future()
        try:
            await self._wake
        finally:
            self._wake = None

    async def aclose(self) -> None:
        """Take no more; the server is told to stop."""
        self.abandon()

    def abandon(self) -> None:
        """The same without awaiting."""
        left = sum(size for _, size in self._pieces)
        self._pieces.clear()
        self._connection.leave(self, left)

    def begins(self, headers: Sequence[tuple[bytes, bytes]]) -> None:
        """The head of the response."""
        status = dict(headers).get(b":status", b"")
        if not (status.isdigit() and len(status) == len("200") and status[:1] != b"0"):
            self.fail(ProtocolError("the response has no status that HTTP knows"))
            return
        self.status = int(status)
        self.headers = [pair for pair in headers if pair[0][:1] != b":"]
        self._woken()

    def add(self, data: bytes, size: int) -> None:
        """A piece of the body and what it takes of the window (padding included)."""
        self._pieces.append((data, size))
        self._woken()

    def finish(self) -> None:
        """The end of the body."""
        self._over = True
        if not self._pieces:
            self._connection.leave(self)
        self._woken()

    def fail(self, error: Exception) -> None:
        """The end of the exchange."""
        if not self.is_decided:
            self._error = error
            self._woken()

    def _woken(self) -> None:
        if self._wake is not None:
            resolve(self._wake)


def resolve(future: asyncio.Future[None]) -> None:
    """Wake whoever waits, if nobody has done so yet."""
    if not future.done():
        future.set_result(None)

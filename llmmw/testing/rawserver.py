"""An HTTP/1.1 server on 127.0.0.1 whose answers are written byte by byte: for what a well-behaved server never does."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Self

import msgspec

if TYPE_CHECKING:
    import ssl
    from collections.abc import Awaitable, Callable
    from types import TracebackType

    Answer = Callable[["RawRequest", asyncio.StreamWriter], Awaitable[None]]


class RawRequest(msgspec.Struct, frozen=True):
    """A request as it arrived."""

    method: str
    target: str
    headers: dict[str, str]
    """Lower-case names."""
    body: bytes
    connection: int
    """Number of the connection it came over, from 1."""
    number: int
    """Number of the request, from 1."""


def answer_bytes(status: int = 200, body: bytes = b"{}", **headers: str) -> bytes:
    """A whole response; header names are given with underscores."""
    fields = {"content-type": "application/json", **{name.replace("_", "-"): value for name, value in headers.items()}}
    if "transfer-encoding" not in fields:
        fields.setdefault("content-length", str(len(body)))
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return f"HTTP/1.1 {status} Word\r\n{head}\r\n".encode("latin-1") + body


def chunked(*pieces: bytes) -> bytes:
    """Pieces in chunked transfer coding, with the terminator."""
    return b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in (*pieces, b""))


def say(data: bytes) -> Answer:
    """An answer that writes these bytes."""

    async def answer(_: RawRequest, writer: asyncio.StreamWriter) -> None:
        writer.write(data)

    return answer


def hang_up(*, reset: bool = False) -> Answer:
    """An answer that closes the connection (with a TCP reset) instead of answering."""

    async def answer(_: RawRequest, writer: asyncio.StreamWriter) -> None:
        if reset:
            writer.transport.abort()
        writer.close()

    return answer


class RawServer:
    """Serves scripted answers, one per request, and then the last one for ever.

    Args:
        answers: called with the request and the connection's writer; a connection that an answer closed is over.
        tls: serve https.
    """

    def __init__(self, *answers: Answer, tls: ssl.SSLContext | None = None) -> None:
        self._answers = list(answers) or [say(answer_bytes())]
        self._tls = tls
        self._server: asyncio.Server | None = None
        self._handlers: set[asyncio.Task[None]] = set()
        self.requests: list[RawRequest] = []
        self.connections = 0
        self.gone = asyncio.Event()
        """Set when a client closed a connection."""

    @property
    def origin(self) -> str:
        """http(s)://127.0.0.1:PORT."""
        assert self._server is not None
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self._tls)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        for handler in self._handlers:
            handler.cancel()
        await asyncio.gather(*self._handlers, return_exceptions=True)
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._handlers.add(task)
        self.connections += 1
        connection = self.connections
        try:
            while not writer.is_closing():
                request = await self._read(reader, connection)
                if request is None:
                    self.gone.set()
                    break
                answer = self._answers[min(request.number, len(self._answers)) - 1]
                watch = asyncio.ensure_future(self._watch(reader))
                try:
                    await answer(request, writer)
                    await writer.drain()
                finally:
                    watch.cancel()
        except (OSError, asyncio.IncompleteReadError):
            self.gone.set()
        except asyncio.CancelledError:
            # The server is closing. An idle client would never answer a TLS farewell.
            writer.transport.abort()
        finally:
            self._handlers.discard(task)
            writer.close()
            with contextlib.suppress(OSError, asyncio.CancelledError):
                await writer.wait_closed()

    async def _watch(self, reader: asyncio.StreamReader) -> None:
        """Notice that the client went away while an answer is being written (nobody pipelines here)."""
        while not reader.at_eof():  # noqa: ASYNC110 — StreamReader has no event for its end
            await asyncio.sleep(0.005)
        self.gone.set()

    async def _read(self, reader: asyncio.StreamReader, connection: int) -> RawRequest | None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError:
            return None
        first, *lines = head.decode("latin-1").rstrip("\r\n").split("\r\n")
        method, target, _ = first.split(" ")
        pairs = [line.split(": ", 1) for line in lines]
        headers = {name.lower(): value for name, value in pairs}
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        request = RawRequest(method, target, headers, body, connection, len(self.requests) + 1)
        self.requests.append(request)
        return request

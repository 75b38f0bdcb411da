"""What a wire engine is: it sends one request and hands over the raw answer. Everything else is the pool's.

An engine follows no redirect, decodes nothing, keeps no cookie, repeats nothing and limits nothing. It raises

- `ConnectionFailed`: there was no connection, so nothing was sent;
- `Lost`: the connection broke after the request (or a part of it) had gone out;
- `UpstreamTimeout`: the server stopped taking the request (`Exchange.stalled`);
- `ResponseTooLarge`, `ProtocolError`: the head of the response is over the bound or is not HTTP.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import msgspec

from llmmw.errors import UpstreamTimeout

if TYPE_CHECKING:
    import ssl
    from collections.abc import Sequence

    from llmmw.pool.guard import Guard
    from llmmw.wire import HTTPRequest

MAX_HEADER_BYTES = 64 * 1024


class EngineOptions(msgspec.Struct, frozen=True):
    """The settings of a pool that its engine carries out."""

    guard: Guard
    keepalive_expiry: float
    verify: bool | ssl.SSLContext
    trust_env: bool
    http2: bool


class Exchange:
    """What the pool tells the engine about one request, and learns while it is under way."""

    __slots__ = ("any_byte", "connect_s", "handed_over", "opened", "write_s")

    def __init__(self, connect_s: float | None, write_s: float | None = None) -> None:
        self.connect_s = connect_s
        """Seconds for name resolution, TCP and TLS."""
        self.write_s = write_s
        """Seconds for which the server may take nothing of the request."""
        self.opened: bool | None = None
        """Whether a connection was opened for it (True) or reused (False); None while, or where, it is not known."""
        self.any_byte = False
        """For an engine's own use: something of the response has arrived."""
        self.handed_over = False
        """Set by an engine that cannot tell how far it is: from now on the request may be sent."""

    @property
    def is_sent(self) -> bool:
        """Whether the request may have reached the server."""
        return self.opened is not None or self.handed_over

    def stalled(self) -> UpstreamTimeout:
        """The error for a request of which the server has taken nothing more for `write_s`.

        The end of the request never left this process, so the server cannot have done the work.
        """
        return UpstreamTimeout(f"the server took nothing more of the request for {self.write_s:g} s", sent=False)


class Lost(Exception):
    """The connection broke after something had been sent; becomes StaleConnection or AmbiguousOutcome in the pool."""

    def __init__(self, message: str, *, any_byte: bool = False, unprocessed: bool = False) -> None:
        super().__init__(message)
        self.any_byte = any_byte
        """Whether a part of the response had arrived."""
        self.unprocessed = unprocessed
        """Whether the server says that it has not begun with the request (HTTP/2)."""


class RawResponse(Protocol):
    """An answer whose head has arrived."""

    @property
    def status(self) -> int:
        """HTTP status."""
        ...

    @property
    def headers(self) -> Sequence[tuple[bytes, bytes]]:
        """Names and values as sent."""
        ...

    @property
    def ended(self) -> bool:
        """Whether the whole body has been taken (False where only another `next` would show it)."""
        ...

    async def next(self) -> bytes:
        """The next piece of the undecoded body, as it arrived; b"" at the end, and then the connection is given back.

        Raises:
            Lost: the connection broke.
        """
        ...

    async def aclose(self) -> None:
        """Close the connection, unless the body was read to its end. Idempotent."""
        ...

    def abandon(self) -> None:
        """The same without awaiting, for a response that nobody holds any more."""
        ...


class Engine(Protocol):
    """Connections of one process and one event loop."""

    async def send(self, request: HTTPRequest, exchange: Exchange) -> RawResponse:
        """Send a request and wait for the head of the answer."""
        ...

    def held(self) -> int | None:
        """How many connections are in use (not idle), or None where the engine cannot tell."""
        ...

    def drop(self) -> None:
        """Forget every socket without writing, waiting or touching the event loop, which is dead or the parent's."""
        ...

    async def aclose(self) -> None:
        """Close every connection."""
        ...


def as_utf8(value: str) -> str:
    """A header value for a library that writes UTF-8: ours are Latin-1, one character per byte.

    Bytes that are UTF-8 go out as they were; others (rare) go out as the UTF-8 of their characters.
    """
    if value.isascii():
        return value
    try:
        return value.encode("latin-1").decode("utf-8")
    except UnicodeDecodeError:
        return value

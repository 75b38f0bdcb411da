"""How httpcore and httpcore2 make connections for us: addresses judged, streams known, exchanges told."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from llmmw.errors import ConnectionFailed
from llmmw.pool.engines.lookup import addresses_of
from llmmw.pool.sockets import abandon, detached

if TYPE_CHECKING:
    import ssl
    from collections.abc import Iterable

    from llmmw.pool.engine import Exchange
    from llmmw.pool.guard import Guard

current_exchange: ContextVar[Exchange | None] = ContextVar("llmmw_exchange", default=None)
"""The exchange of the running task, for which httpcore reads, writes and connects."""


class _Discreet(logging.Filter):
    """Keeps response headers (cookies, a key that the server echoes) out of httpcore's log, of our requests only."""

    def filter(self, record: logging.LogRecord) -> bool:
        if current_exchange.get() is not None and str(record.msg).startswith("receive_response_headers.complete"):
            record.msg, record.args = "receive_response_headers.complete return_value=***", ()
        return True


_discreet = _Discreet()


def be_discreet(package: str) -> None:
    """Let a package of the httpcore family log nothing secret. Idempotent."""
    logging.getLogger(f"{package}.http11").addFilter(_discreet)


class _Stream:
    """A connection's byte stream that tells the exchange under way what happens on it."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self._is_new = True

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ASYNC109 — httpcore's signature
        data: bytes = await self._inner.read(max_bytes, timeout)
        exchange = current_exchange.get()
        if data and exchange is not None:
            exchange.any_byte = True
        return data

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:  # noqa: ASYNC109 — likewise
        exchange = current_exchange.get()
        if exchange is not None and exchange.opened is None:
            exchange.opened, self._is_new = self._is_new, False
        await self._inner.write(buffer, timeout)

    async def aclose(self) -> None:
        await self._inner.aclose()

    async def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,  # noqa: ASYNC109 — likewise
    ) -> _Stream:
        try:
            self._inner = await self._inner.start_tls(ssl_context, server_hostname, timeout)
        except BaseException:  # httpcore closes the socket of a handshake that failed, not of one that was cancelled
            _abort(self._inner)
            raise
        return self

    def get_extra_info(self, info: str) -> Any:
        return self._inner.get_extra_info(info)

    def drop(self) -> None:
        """Close the socket without the event loop."""
        abandon(_transport_of(self._inner))


def _transport_of(stream: Any) -> Any:
    """The asyncio transport below httpcore's and anyio's wrappers."""
    inner = getattr(stream, "_stream", None)
    return getattr(getattr(inner, "transport_stream", inner), "_transport", None)


def _abort(stream: Any) -> None:
    transport = _transport_of(stream)
    if transport is not None:
        transport.abort()


class Backend:
    """Makes connections: resolves, has every address judged, and remembers the streams to be able to drop them."""

    def __init__(self, inner: Any, guard: Guard) -> None:
        self._inner = inner
        self._guard = guard
        self.streams: WeakSet[_Stream] = WeakSet()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109 — httpcore's signature
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> _Stream:
        """Connect to one of the host's addresses, in their order, within the time-out for all of them.

        Raises:
            ConnectionFailed: no address, or none in time.
            ConfigError: an address that the guard refuses.
        """
        try:
            async with asyncio.timeout(timeout):
                stream = _Stream(await detached(self._connect(host, port, local_address, socket_options), _abort))
        except TimeoutError:
            raise ConnectionFailed("no connection in time") from None
        self.streams.add(stream)
        return stream

    async def _connect(
        self, host: str, port: int, local_address: str | None, socket_options: Iterable[Any] | None
    ) -> Any:
        addresses = await addresses_of(host, port, self._guard)
        for address in addresses[:-1]:
            with contextlib.suppress(Exception):  # httpcore's ConnectError, of either package
                return await self._inner.connect_tcp(address, port, None, local_address, socket_options)
        return await self._inner.connect_tcp(addresses[-1], port, None, local_address, socket_options)

    async def connect_unix_socket(self, *_: Any, **__: Any) -> Any:
        """Never asked for: base URLs are http(s)."""
        raise NotImplementedError

    async def sleep(self, seconds: float) -> None:
        """Between httpcore's own attempts, of which it makes none here."""
        await self._inner.sleep(seconds)

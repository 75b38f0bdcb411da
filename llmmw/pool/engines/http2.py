"""HTTP/2 over any engine that speaks HTTP/1.1: where a server's TLS offers "h2", its requests share connections.

Plain http, servers without HTTP/2 and requests through a proxy are the inner engine's.
"""

from __future__ import annotations

import asyncio
import os
import ssl
from contextvars import Context
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import msgspec

from llmmw.errors import ConfigError, ConnectionFailed
from llmmw.pool.engines.h2connection import Connection
from llmmw.pool.engines.lookup import addresses_of, proxy_for, tls_context
from llmmw.pool.sockets import abandon

if TYPE_CHECKING:
    from llmmw.pool.engine import Engine, EngineOptions, Exchange, RawResponse
    from llmmw.wire import Headers, HTTPRequest

_REMEMBERED = 256
"""URLs and sets of headers whose reading is kept."""
_Dialled = Connection | Exception | None
"""A connection, why there is none, or None where the server speaks HTTP/1.1."""


class _Place(msgspec.Struct, frozen=True):
    """What a URL says."""

    host: str
    port: int
    authority: bytes
    path: bytes


class Http2Engine:
    """Connections of one process and one event loop; `inner` serves what is not HTTP/2."""

    def __init__(self, inner: Engine, options: EngineOptions) -> None:
        self._inner = inner
        self._options = options
        self._places: dict[str, _Place | None] = {}
        self._heads: dict[int, tuple[Headers, list[tuple[bytes, bytes]]]] = {}
        self._connections: dict[tuple[str, int], list[Connection]] = {}
        self._dialling: dict[tuple[str, int], asyncio.Task[_Dialled]] = {}
        self._only_http1: set[tuple[str, int]] = set()
        self._loop = asyncio.get_running_loop()
        self._pid = os.getpid()

    async def send(self, request: HTTPRequest, exchange: Exchange) -> RawResponse:
        """Send one request."""
        url = request.url
        place = self._places[url] if url in self._places else self._locate(url)
        connection = None if place is None else await self._connection(place, exchange)
        if place is None or connection is None:
            return await self._inner.send(request, exchange)
        if exchange.opened is None:
            exchange.opened = False
        return await connection.exchange(self._head(request, place), request.body, exchange)

    def _locate(self, url: str) -> _Place | None:
        parts = urlsplit(url)
        host = parts.hostname or ""
        place = None
        if parts.scheme == "https" and proxy_for(self._options, "https", host) is None:
            path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            place = _Place(host, parts.port or 443, parts.netloc.encode("ascii"), path.encode("ascii"))
        if len(self._places) >= _REMEMBERED:
            self._places.clear()
        self._places[url] = place
        return place

    async def _connection(self, place: _Place, exchange: Exchange) -> Connection | None:
        """A connection that takes one request more; None where the server does not speak HTTP/2."""
        spot = (place.host, place.port)
        while spot not in self._only_http1:
            for connection in self._connections.get(spot, ()):
                if connection.is_free:
                    return connection
            dialled = await self._dial(spot, exchange)
            if isinstance(dialled, Exception):
                raise type(dialled)(*dialled.args)
        return None

    async def _dial(self, spot: tuple[str, int], exchange: Exchange) -> _Dialled:
        """Make one connection more, or wait for the one that somebody else makes."""
        task = self._dialling.get(spot)
        mine = task is None
        if task is None:
            # In a context of its own: its handles would keep the caller's, and with it the call, while it lives.
            task = self._loop.create_task(self._connect(spot, exchange.connect_s), context=Context())
            self._dialling[spot] = task
            task.add_done_callback(lambda _: self._dialling.pop(spot, None))
        try:
            async with asyncio.timeout(exchange.connect_s):
                dialled = await asyncio.shield(task)
        except TimeoutError:
            raise ConnectionFailed("no connection in time") from None
        if mine and isinstance(dialled, Connection):
            exchange.opened = True
        return dialled

    async def _connect(self, spot: tuple[str, int], limit_s: float | None) -> _Dialled:
        try:
            async with asyncio.timeout(limit_s):
                connection = await self._open(*spot)
        except TimeoutError:
            return ConnectionFailed("no connection in time")
        except asyncio.CancelledError:  # by `aclose`; those who wait were not cancelled themselves
            return ConnectionFailed("no connection: the pool was closed")
        except (OSError, ssl.SSLError) as error:
            return ConnectionFailed(f"no connection: {error}")
        except (ConnectionFailed, ConfigError) as error:
            return error
        if connection is None:
            self._only_http1.add(spot)
            return None
        self._connections.setdefault(spot, []).append(connection)
        return connection

    async def _open(self, host: str, port: int) -> Connection | None:
        addresses = await addresses_of(host, port, self._options.guard)
        context = tls_context(self._options)
        context.set_alpn_protocols(["h2", "http/1.1"])  # each time: httpcore sets its own on a context of the user's

        def make() -> Connection:
            return Connection(self._options.keepalive_expiry, lambda gone: self._forget((host, port), gone))

        for address in addresses:
            try:
                made = await self._loop.create_connection(make, address, port, ssl=context, server_hostname=host)
            except (OSError, ssl.SSLError):
                if address == addresses[-1]:
                    raise
                continue
            connection = made[1]
            if not connection.speaks_http2:
                connection.transport.abort()
                return None
            # What it allows is known before a prompt is sent; sent too soon, it might be refused.
            await connection.ready
            return connection
        raise ConnectionFailed("no connection")

    def _forget(self, spot: tuple[str, int], connection: Connection) -> None:
        known = self._connections.get(spot, [])
        if connection in known:
            known.remove(connection)

    def _head(self, request: HTTPRequest, place: _Place) -> list[tuple[bytes, bytes]]:
        method, headers = request.method, request.headers
        known = self._heads.get(id(headers))
        if known is None or known[0] is not headers:
            if len(self._heads) >= _REMEMBERED:
                self._heads.clear()
            pairs = ((name.lower().encode(), value.encode("latin-1")) for name, value in headers)
            known = self._heads[id(headers)] = headers, [pair for pair in pairs if pair[0] != b"host"]
        head = [
            (b":method", method.encode("ascii")),
            (b":authority", place.authority),
            (b":scheme", b"https"),
            (b":path", place.path),
            *known[1],
        ]
        if request.body or method in {"POST", "PUT", "PATCH"}:
            head.append((b"content-length", b"%d" % len(request.body)))
        return head

    def _all(self) -> list[Connection]:
        return [connection for known in self._connections.values() for connection in known]

    def held(self) -> int | None:
        """Connections in use; of HTTP/2's never more than requests."""
        inner = self._inner.held()
        return None if inner is None else inner + sum(connection.active > 0 for connection in self._all())

    def drop(self) -> None:
        """Forget every socket."""
        orphaned = self._loop.is_closed() or self._pid != os.getpid()
        for connection in self._all():
            if orphaned:
                abandon(connection.transport)
            else:
                connection.transport.abort()
        self._connections.clear()
        self._inner.drop()

    async def aclose(self) -> None:
        """Close every connection."""
        for task in list(self._dialling.values()):
            task.cancel()
        closing = [connection.aclose() for connection in self._all()]
        await asyncio.gather(self._inner.aclose(), *closing, *self._dialling.values(), return_exceptions=True)

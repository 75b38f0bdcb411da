"""The aiohttp engine: the fastest of the pure installs (about 0.1 ms of CPU per call), and the default."""

from __future__ import annotations

import asyncio
import functools
import io
import os
import socket
from contextvars import Context, ContextVar
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import aiohttp
import msgspec
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.http_exceptions import LineTooLong
from multidict import CIMultiDict
from yarl import URL

from llmmw.errors import ConnectionFailed, ProtocolError, ResponseTooLarge
from llmmw.pool.engine import MAX_HEADER_BYTES, Lost, as_utf8
from llmmw.pool.engines.lookup import proxy_for, tls_context
from llmmw.pool.sockets import abandon, detached

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aiohttp.client_proto import ResponseHandler

    from llmmw.pool.engine import EngineOptions, Exchange
    from llmmw.pool.guard import Guard
    from llmmw.wire import Headers, HTTPRequest

_PIECE = 64 * 1024
_BIG_BODY = 1024 * 1024
"""aiohttp warns about bytes above 1 MiB; a BytesIO is sent in pieces."""
_REMEMBERED = 256
"""URLs and sets of headers that are kept in aiohttp's form; a transport edge may see many."""
_exchange: ContextVar[Exchange | None] = ContextVar("llmmw_exchange", default=None)


class _Resolver(AbstractResolver):
    """Name resolution that refuses addresses the guard refuses (so a name cannot be rebound to one)."""

    def __init__(self, guard: Guard) -> None:
        self._inner = aiohttp.ThreadedResolver()
        self._guard = guard

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        found = await self._inner.resolve(host, port, family)
        for result in found:
            self._guard.refuse_address(host, result["host"])
        return found

    async def close(self) -> None:
        await self._inner.close()


class _Connector(aiohttp.TCPConnector):
    """Tells each exchange whether its connection is new, and remembers the connections to be able to drop them.

    aiohttp's TraceConfig would tell the same for 15 µs per call; this costs 3.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)  # pyright: ignore[reportUnknownMemberType]  # aiohttp's own annotation
        self.known: WeakSet[ResponseHandler] = WeakSet()

    def held(self) -> int:
        """Connections that a request holds."""
        return len(self._acquired)

    def forget(self) -> None:
        """Let go of all connections, whose sockets are closed already."""
        self._conns.clear()
        self._acquired.clear()
        self._closed = True

    async def connect(  # aiohttp's own extension point
        self,
        req: Any,
        traces: Any,
        timeout: Any,  # noqa: ASYNC109 — its signature
    ) -> aiohttp.connector.Connection:
        connection = await super().connect(req, traces, timeout)
        exchange, protocol = _exchange.get(), connection.protocol
        if protocol is not None:
            opened = protocol not in self.known
            if opened:
                self.known.add(protocol)
            if exchange is not None:
                exchange.opened = opened
        return connection

    async def _create_connection(
        self,
        req: Any,
        traces: Any,
        timeout: Any,  # noqa: ASYNC109 — its signature
    ) -> ResponseHandler:
        return await detached(super()._create_connection(req, traces, timeout), _close)

    def _release(self, key: Any, protocol: ResponseHandler, *, should_close: bool = False) -> None:
        # It arms the timer that closes idle connections, which arms itself again: for ever in this call's context.
        Context().run(functools.partial(super()._release, key, protocol, should_close=should_close))


def _close(protocol: ResponseHandler) -> None:
    protocol.close()


class AiohttpEngine:
    """One aiohttp session that adds nothing of its own to a request."""

    def __init__(self, options: EngineOptions) -> None:
        self._connector = _Connector(
            limit=0,
            ttl_dns_cache=10,
            keepalive_timeout=options.keepalive_expiry,
            ssl=tls_context(msgspec.structs.replace(options, http2=False)),
            resolver=_Resolver(options.guard),
        )
        self._session = aiohttp.ClientSession(
            connector=self._connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
            auto_decompress=False,
            timeout=aiohttp.ClientTimeout(total=None),
            max_line_size=MAX_HEADER_BYTES,
            max_field_size=MAX_HEADER_BYTES,
        )
        self._options = options
        self._urls: dict[str, tuple[URL, URL | None]] = {}
        self._heads: dict[int, tuple[Headers, CIMultiDict[str]]] = {}
        self._loop = asyncio.get_running_loop()
        self._pid = os.getpid()

    async def send(self, request: HTTPRequest, exchange: Exchange) -> _Response:
        """Send one request."""
        url, proxy = self._urls.get(request.url) or self._locate(request.url)
        token = _exchange.set(exchange)
        try:
            response: aiohttp.ClientResponse | Exception = await self._session.request(
                request.method,
                url,
                headers=self._header_map(request.headers),
                data=_payload(request.body, exchange),
                allow_redirects=False,
                timeout=_timeout(exchange.connect_s),
                proxy=proxy,
            )
        except aiohttp.ClientError as error:
            response = _mapped(error, exchange)
        finally:
            _exchange.reset(token)
        if isinstance(response, Exception):
            # Raised out here without a cause: aiohttp's errors hold the request with its headers, hence the key.
            raise response
        return _Response(response)

    def _locate(self, text: str) -> tuple[URL, URL | None]:
        # Parsing costs as much as a tenth of the whole call, and an endpoint has a handful of URLs.
        if len(self._urls) >= _REMEMBERED:
            self._urls.clear()
        url = URL(text, encoded=True)
        # aiohttp's own `trust_env` would read netrc too: credentials that no cache key and no user knows of.
        proxy = proxy_for(self._options, url.scheme, url.host or "")
        way = None if proxy is None else URL(proxy.url)
        if way is not None and proxy is not None and proxy.user:
            way = way.with_user(proxy.user).with_password(proxy.password)
        found = self._urls[text] = url, way
        return found

    def _header_map(self, headers: Headers) -> CIMultiDict[str]:
        known = self._heads.get(id(headers))
        if known is None or known[0] is not headers:
            if len(self._heads) >= _REMEMBERED:
                self._heads.clear()
            found = CIMultiDict((name, as_utf8(value)) for name, value in headers)
            known = self._heads[id(headers)] = (headers, found)
        return known[1]

    def held(self) -> int | None:
        """Connections that a request holds."""
        return self._connector.held()

    def drop(self) -> None:
        """Close the sockets and make the session forget them."""
        orphaned = self._loop.is_closed() or self._pid != os.getpid()
        for protocol in list(self._connector.known):
            transport, protocol.transport = protocol.transport, None
            if orphaned:
                abandon(transport)
            elif transport is not None:
                transport.abort()
        self._session.detach()
        self._connector.forget()

    async def aclose(self) -> None:
        """Close the session and its connections."""
        await self._session.close()


class _Timed(aiohttp.BytesIOPayload):
    """A body of which the server must go on taking."""

    def __init__(self, body: bytes, exchange: Exchange) -> None:
        super().__init__(io.BytesIO(body))
        self._exchange = exchange

    async def write_with_length(self, writer: Any, content_length: int | None) -> None:
        del content_length  # ours is the length of the body
        while piece := self._value.read(_PIECE):
            try:
                async with asyncio.timeout(self._exchange.write_s):
                    await writer.write(piece)
            except TimeoutError:
                raise _Stalled from None


class _Stalled(Exception):
    """Travels through aiohttp's writer as the cause of its own error."""


def _payload(body: bytes, exchange: Exchange) -> aiohttp.Payload | None:
    # Made here, because finding out what kind of payload bytes are costs aiohttp 3 µs.
    if exchange.write_s is not None:
        return _Timed(body, exchange)
    if len(body) > _BIG_BODY:
        return aiohttp.BytesIOPayload(io.BytesIO(body))
    return aiohttp.BytesPayload(body) if body else None


@functools.lru_cache(maxsize=64)
def _timeout(connect_s: float | None) -> aiohttp.ClientTimeout:
    # `connect` and not `sock_connect`, which leaves name resolution out.
    return aiohttp.ClientTimeout(total=None, connect=connect_s)


class _Response:
    """aiohttp's response, undecoded."""

    __slots__ = ("_content", "_response", "headers", "status")

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response
        self._content = response.content
        self.status: int = response.status
        self.headers: Sequence[tuple[bytes, bytes]] = response.raw_headers

    @property
    def ended(self) -> bool:
        return self._content.at_eof()

    async def next(self) -> bytes:
        content = self._content
        try:
            # `readany` would join chunks that arrived together, and a stream is passed on as the server cut it.
            while True:
                piece, at_cut = await content.readchunk()
                if piece or not at_cut:
                    return piece
        except (aiohttp.ClientError, OSError) as error:
            broken = Lost(f"the body broke off ({type(error).__name__})", any_byte=True)
        raise broken

    async def aclose(self) -> None:
        self._response.close()

    def abandon(self) -> None:
        self._response.close()


def _mapped(error: aiohttp.ClientError, exchange: Exchange) -> Exception:
    kind = type(error).__name__
    if isinstance(error.__cause__, _Stalled):
        return exchange.stalled()
    if isinstance(error, aiohttp.ClientConnectorError | aiohttp.ClientConnectorCertificateError):
        return ConnectionFailed(f"no connection: {error}")
    if exchange.opened is None:  # also a proxy that refuses
        return ConnectionFailed(f"no connection ({kind})")
    if isinstance(error, aiohttp.ClientResponseError):
        return _not_http(error)
    if isinstance(error, aiohttp.ServerDisconnectedError):
        # The message is the head of the response where one had come.
        return Lost("the server closed the connection", any_byte=not isinstance(error.message, str))
    return Lost(f"the connection broke ({kind})")


def _not_http(error: aiohttp.ClientResponseError) -> Exception:
    cause = error.__cause__
    if isinstance(cause, LineTooLong) or (cause is not None and isinstance(cause.__cause__, LineTooLong)):
        return ResponseTooLarge(f"a header of the response is larger than {MAX_HEADER_BYTES} bytes")
    return ProtocolError("the response is not HTTP")

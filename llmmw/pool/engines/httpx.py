"""The httpx and httpx2 engines: their wire halves (httpcore, httpcore2), without the client's cost per call.

httpcore's cost per call grows with the number of connections in a pool (encode/httpx#3215): 1.0 ms at 16, 0.3 ms
at one. So every HTTP/1.1 connection has a httpcore pool of its own, and the one used last is used next.
"""

from __future__ import annotations

import asyncio
import importlib
import os
from collections import deque
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import msgspec

from llmmw.errors import ConfigError, ConnectionFailed, ProtocolError, ResponseTooLarge
from llmmw.pool.engine import MAX_HEADER_BYTES, Lost
from llmmw.pool.engines.backend import Backend, be_discreet, current_exchange
from llmmw.pool.engines.lookup import Proxy, proxy_for, tls_context

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llmmw.pool.engine import EngineOptions, Exchange
    from llmmw.wire import HTTPRequest

_MAX_URLS = 256


class _Shard:
    """One httpcore pool, for one request at a time."""

    def __init__(self, pool: Any, proxy: Proxy | None) -> None:
        self.pool = pool
        self.proxy = proxy
        self.idle_since = 0.0


class HttpcoreEngine:
    """Connections through httpcore or httpcore2.

    Args:
        name: "httpx" or "httpx2".
        options: from the pool.
    """

    def __init__(self, name: str, options: EngineOptions) -> None:
        package = "httpcore2" if name == "httpx2" else "httpcore"
        self._core: Any = importlib.import_module(package)
        be_discreet(package)
        self._options = options
        self._ssl = tls_context(msgspec.structs.replace(options, http2=False))
        self._backend = Backend(self._core.AnyIOBackend(), options.guard)
        self._shards: set[_Shard] = set()
        self._free: dict[Proxy | None, deque[_Shard]] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._urls: dict[str, tuple[Any, bytes, Proxy | None]] = {}
        self._loop = asyncio.get_running_loop()
        self._pid = os.getpid()

    async def send(self, request: HTTPRequest, exchange: Exchange) -> _Response:
        """Send one request."""
        url, host, proxy = self._urls.get(request.url) or self._locate(request.url)
        headers = [(name.encode(), value.encode("latin-1")) for name, value in request.headers]
        if not any(name.lower() == b"host" for name, _ in headers):
            headers.insert(0, (b"Host", host))
        if request.body or request.method in {"POST", "PUT", "PATCH"}:
            headers.append((b"Content-Length", b"%d" % len(request.body)))
        native = self._core.Request(
            request.method.encode(),
            url,
            headers=headers,
            content=request.body,
            extensions={"timeout": {"connect": exchange.connect_s, "write": exchange.write_s}},
        )
        shard = self._take(proxy)
        token = current_exchange.set(exchange)
        try:
            response = await shard.pool.handle_async_request(native)
        except BaseException as error:
            self.give(shard)
            found = self.mapped(error, exchange)
            if found is error:
                raise
            raise found from error
        finally:
            current_exchange.reset(token)
        return _Response(self, shard, response)

    def _locate(self, text: str) -> tuple[Any, bytes, Proxy | None]:
        parts = urlsplit(text)
        if len(self._urls) >= _MAX_URLS:
            self._urls.clear()
        proxy = proxy_for(self._options, parts.scheme, parts.hostname or "")
        found = self._urls[text] = (self._core.URL(text), parts.netloc.encode("ascii"), proxy)
        return found

    def _take(self, proxy: Proxy | None) -> _Shard:
        free = self._free.setdefault(proxy, deque())
        expired = self._loop.time() - self._options.keepalive_expiry
        while free and free[0].idle_since < expired:
            self._close(free.popleft())
        return free.pop() if free else self._open(proxy)

    def give(self, shard: _Shard) -> None:
        """A request is over."""
        shard.idle_since = self._loop.time()
        if shard not in self._shards:
            return
        if _has_more(shard.pool):
            self._close(shard)
        else:
            self._free[shard.proxy].append(shard)

    def _open(self, proxy: Proxy | None) -> _Shard:
        options = {
            "ssl_context": self._ssl,
            "max_connections": None,
            "keepalive_expiry": self._options.keepalive_expiry,
            "network_backend": self._backend,
        }
        if proxy is None:
            pool = self._core.AsyncConnectionPool(**options)
        else:
            who = (proxy.user, proxy.password) if proxy.user else None
            pool = self._core.AsyncHTTPProxy(proxy.url, proxy_auth=who, **options)
        shard = _Shard(pool, proxy)
        self._shards.add(shard)
        return shard

    def _close(self, shard: _Shard) -> None:
        self._shards.discard(shard)
        task = self._loop.create_task(shard.pool.aclose())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    def mapped(self, error: BaseException, exchange: Exchange | None) -> BaseException:
        """Our error for httpcore's; without an exchange the head of the response has arrived."""
        core = self._core
        if isinstance(error, core.ConnectError | core.ConnectTimeout | core.ProxyError | core.UnsupportedProtocol):
            return ConnectionFailed(f"no connection: {error}" if str(error) else "no connection in time")
        if isinstance(error, core.WriteTimeout) and exchange is not None:
            return exchange.stalled()
        any_byte = exchange is None or exchange.any_byte
        if isinstance(error, core.NetworkError | core.TimeoutException):
            return Lost(f"the connection broke ({type(error).__name__})", any_byte=any_byte)
        if isinstance(error, core.LocalProtocolError):
            return ConfigError("the request is not valid HTTP")
        if isinstance(error, core.RemoteProtocolError):
            return _bad_answer(str(error)[:200], exchange is None, any_byte=any_byte)
        return error

    def held(self) -> int | None:
        """Connections that are not idle; httpcore forgets to free some when requests are cancelled."""
        pools = [shard.pool for shard in self._shards]
        return sum(not (c.is_idle() or c.is_closed()) for pool in pools for c in pool.connections)

    def drop(self) -> None:
        """Close the sockets without the loop."""
        orphaned = self._loop.is_closed() or self._pid != os.getpid()
        for stream in list(self._backend.streams):
            if orphaned:
                stream.drop()
        if not orphaned:
            for shard in list(self._shards):
                self._close(shard)
        self._shards.clear()
        self._free.clear()

    async def aclose(self) -> None:
        """Close every pool."""
        for shard in list(self._shards):
            self._close(shard)
        self._free.clear()
        await asyncio.gather(*self._closing, return_exceptions=True)


class _Response:
    """httpcore's response."""

    def __init__(self, engine: HttpcoreEngine, shard: _Shard, response: Any) -> None:
        self._engine = engine
        self._shard: _Shard | None = shard
        self._response = response
        self._pieces = response.aiter_stream()
        self.status: int = response.status
        self.headers: Sequence[tuple[bytes, bytes]] = response.headers
        self.ended = False

    async def next(self) -> bytes:
        try:
            async for piece in self._pieces:
                if piece:
                    return bytes(piece)
        except Exception as error:
            raise self._engine.mapped(error, None) from error
        self.ended = True
        await self.aclose()
        return b""

    async def aclose(self) -> None:
        shard, self._shard = self._shard, None
        if shard is not None:
            try:
                await self._pieces.aclose()
                await self._response.aclose()
            finally:
                self._engine.give(shard)

    def abandon(self) -> None:
        task = asyncio.get_running_loop().create_task(self.aclose())
        _abandoned.add(task)
        task.add_done_callback(_abandoned.discard)


_abandoned: set[asyncio.Task[None]] = set()


def _has_more(pool: Any) -> bool:
    """Whether the server sent more than its answer: httpcore would take that for the answer to the next request."""
    for connection in pool.connections:
        inner = connection
        while inner is not None and not hasattr(inner, "_h11_state"):
            inner = getattr(inner, "_connection", None)
        if inner is not None and getattr(inner, "_h11_state").trailing_data[0]:  # noqa: B009 — httpcore's own
            return True
    return False


def _bad_answer(why: str, head_is_here: bool, *, any_byte: bool) -> Exception:  # noqa: FBT001 — read beside its call
    if "too long" in why:
        return ResponseTooLarge(f"the response's head is larger than {MAX_HEADER_BYTES} bytes")
    if head_is_here or "disconnected" in why:
        return Lost(why, any_byte=any_byte)
    return ProtocolError(f"the response is not HTTP: {why}")

"""The pyreqwest engine: reqwest and hyper in Rust, the least CPU per call of all.

What it gives up: it does not tell new connections from reused ones (so they are not counted, and a stale one shows
as AmbiguousOutcome unless hyper repeats the request by itself, which it does where nothing had been sent), it does
not stop a request that is given up before its head has come (pyreqwest drops the task's handle without aborting it: the
server goes on working, and the socket stays until it has answered), and it does not survive a fork.
"""

from __future__ import annotations

import asyncio
import os
from datetime import timedelta
from typing import TYPE_CHECKING, NamedTuple, TypeVar
from urllib.parse import urlsplit

import pyreqwest.exceptions as failures
from pyreqwest.client import Client, ClientBuilder

from llmmw.errors import ConfigError, ConnectionFailed, ProtocolError
from llmmw.pool.engine import Lost, as_utf8
from llmmw.pool.engines.lookup import addresses_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Sequence

    from pyreqwest.request import StreamRequest
    from pyreqwest.response import Response

    from llmmw.pool.engine import EngineOptions, Exchange
    from llmmw.wire import HTTPRequest

T = TypeVar("T")

_CANCELLATIONS = 100
"""The second is enough, as far as seen."""
_first_pid: list[int] = []
_JUDGED_FOR_S = 10.0
_REMEMBERED = 256


class _Way(NamedTuple):
    """What a client is made for; each has its own connections."""

    connect_s: float | None
    host: str
    address: str


class PyreqwestEngine:
    """Connections through reqwest."""

    def __init__(self, options: EngineOptions) -> None:
        if not _first_pid:
            _first_pid.append(os.getpid())
        if _first_pid[0] != os.getpid():
            raise ConfigError('engine="pyreqwest" does not survive a fork (its threads do not); use engine="aiohttp"')
        self._options = options
        self._clients: dict[_Way, Client] = {}
        self._judged: dict[str, tuple[float, list[str]]] = {}

    async def send(self, request: HTTPRequest, exchange: Exchange) -> _Response:
        """Send one request, to the first of the host's addresses that takes it."""
        host = urlsplit(request.url).hostname or ""
        try:
            async with asyncio.timeout(exchange.connect_s):
                addresses = await self._judge(host)
        except TimeoutError:
            raise ConnectionFailed("no connection in time") from None
        *others, last = addresses
        for address in others:
            try:
                return await self._send_to(_Way(exchange.connect_s, host, address), request, exchange)
            except ConnectionFailed:
                addresses.append(addresses.pop(addresses.index(address)))  # next time the others first
        return await self._send_to(_Way(exchange.connect_s, host, last), request, exchange)

    async def _send_to(self, way: _Way, request: HTTPRequest, exchange: Exchange) -> _Response:
        client = self._clients.get(way) or self._build(way)
        exchange.handed_over = True
        try:
            headers = [(name, as_utf8(value)) for name, value in request.headers]
            builder = client.request(request.method, request.url).headers(headers)
            if request.body:
                builder = builder.body_bytes(request.body)
            # Otherwise the head waits until that much of the body has come, and a token with it.
            sending = builder.streamed_read_buffer_limit(0).build_streamed()
            return _Response(sending, await _cancellable(sending.__aenter__()))
        except failures.PyreqwestError as error:
            failed = _mapped(error)
        # Raised out here without a cause: pyreqwest's errors show the whole URL, in which a key may be.
        raise failed

    async def _judge(self, host: str) -> list[str]:
        now = asyncio.get_running_loop().time()
        until, known = self._judged.get(host, (0.0, []))
        if now < until:
            return known
        found = await addresses_of(host, None, self._options.guard)
        if sorted(found) != sorted(known):
            known = found
            if len(self._judged) >= _REMEMBERED:
                self._judged.clear()
        self._judged[host] = now + _JUDGED_FOR_S, known
        return known

    def _build(self, way: _Way) -> Client:
        options = self._options
        builder = (
            ClientBuilder()
            .follow_redirects(enable=False)
            .default_cookie_store(enable=False)
            .referer(enable=False)
            .gzip(enable=False)
            .deflate(enable=False)
            .brotli(enable=False)
            .zstd(enable=False)
            .pool_idle_timeout(timedelta(seconds=options.keepalive_expiry))
            .http2(options.http2)
            .danger_accept_invalid_certs(not options.verify)
        )
        if not options.trust_env:
            builder = builder.no_proxy()
        if way.connect_s is not None:
            builder = builder.connect_timeout(timedelta(seconds=way.connect_s))
        if way.address != way.host:
            # The address that was judged: Rust's own resolution could be told another one (DNS rebinding).
            builder = builder.resolve(way.host, way.address.partition("%")[0], 0)
        if len(self._clients) >= _REMEMBERED:
            self._clients.clear()
        client = self._clients[way] = builder.build()
        return client

    def held(self) -> int | None:
        """Unknown."""
        return None

    def drop(self) -> None:
        """Forget the clients; their sockets belong to Rust's own threads, not to the event loop."""
        self._clients.clear()

    async def aclose(self) -> None:
        """Close the clients."""
        clients = list(self._clients.values())
        self._clients.clear()
        for client in clients:
            await client.close()


class _Response:
    """pyreqwest's streamed response."""

    def __init__(self, sending: StreamRequest, response: Response) -> None:
        self._sending: StreamRequest | None = sending
        self._reader = response.body_reader
        self.status: int = response.status
        self.headers: Sequence[tuple[bytes, bytes]] = [
            (name.encode("latin-1"), value.encode("latin-1")) for name, value in response.headers.items()
        ]
        self.ended = False

    async def next(self) -> bytes:
        try:
            piece = await _cancellable(self._reader.read_chunk())
        except failures.PyreqwestError as error:
            broken = Lost(f"the body broke off ({type(error).__name__})", any_byte=True)
        else:
            if piece is not None:
                return bytes(piece)
            self.ended = True
            await self.aclose()
            return b""
        raise broken

    async def aclose(self) -> None:
        sending, self._sending = self._sending, None
        if sending is not None:
            await sending.__aexit__(None, None, None)

    def abandon(self) -> None:
        self._sending = None


async def _cancellable(work: Awaitable[T]) -> T:
    """Await pyreqwest's own coroutine, which loses a cancellation that comes while Rust is waking it."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        for _ in range(_CANCELLATIONS):
            if task.done():
                break
            task.cancel()
            await asyncio.wait([task], timeout=0)
        if task.done() and not task.cancelled():
            task.exception()  # nobody else will ask for it
        raise


def _mapped(error: failures.PyreqwestError) -> Exception:
    kind = type(error).__name__
    text = str(error).lower()
    # ConnectError covers both a connection that was never made and one that broke; only hyper's own words tell.
    if isinstance(error, failures.ConnectError) and "client error (sendrequest)" in text:
        return Lost(f"the connection broke ({kind})")
    if isinstance(error, failures.ConnectError | failures.ConnectTimeoutError | failures.PoolTimeoutError):
        return ConnectionFailed(f"no connection ({kind})")
    if isinstance(error, failures.BuilderError):
        return ConfigError("the request is not valid HTTP")
    if "parse" in text or "invalid http" in text:
        return ProtocolError("the response is not HTTP")
    return Lost(f"the connection broke ({kind})")

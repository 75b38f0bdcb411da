"""`BoundPool`: one engine's connections on its home loop. `pool.py` has the settings."""

from __future__ import annotations

import asyncio
import contextlib
import warnings
from typing import TYPE_CHECKING

import msgspec

from llmmw.errors import (
    AmbiguousOutcome,
    Closed,
    ConnectionFailed,
    LLMMWError,
    ProtocolError,
    ResponseTooLarge,
    StaleConnection,
    UpstreamTimeout,
)
from llmmw.events import ConnectionOpened, ConnectionReused
from llmmw.pool.body import ACCEPT_ENCODING, Body, Inflater
from llmmw.pool.engine import MAX_HEADER_BYTES, EngineOptions, Exchange, Lost
from llmmw.pool.fleet import Fleet
from llmmw.pool.guard import check_headers, check_url, origin_of
from llmmw.settings import seconds
from llmmw.wire import HOP_BY_HOP, HTTPRequest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llmmw.env import Env
    from llmmw.pool.engine import RawResponse
    from llmmw.pool.fleet import Generation
    from llmmw.pool.guard import Guard
    from llmmw.pool.pool import ConnectionPool
    from llmmw.wire import Headers

_IDEMPOTENT = frozenset({"GET", "HEAD", "OPTIONS", "PUT", "DELETE", "TRACE"})
_REMEMBERED = 256
_WARM_BYTES = 64 * 1024
_NOT_FORWARDED = HOP_BY_HOP | {"content-length", "accept-encoding", "expect"}


class Response(msgspec.Struct, frozen=True):
    """A response whose head has arrived. Read or close its body; until then it holds a connection."""

    status: int
    headers: Headers
    """Lower-case names; hop-by-hop headers are removed, and content-encoding too, for the body is decoded."""
    body: Body
    reused: bool = False
    """Whether it came over a kept-alive connection."""

    def header(self, name: str) -> str:
        """The first header of that (lower-case) name, or ""."""
        for key, value in self.headers:
            if key == name:
                return value
        return ""


class BoundPool:
    """Sends requests over pooled connections; lives on one event loop at a time.

    Coming from another loop, or from a forked child, it forgets its sockets and starts afresh.
    """

    def __init__(self, settings: ConnectionPool, env: Env, guard: Guard) -> None:
        self.settings = settings
        self._env = env
        self._guard = guard
        self._age_s = _optional(settings.max_connection_age)
        self._connect_s = _optional(settings.connect_timeout)
        self._first_byte_s = _optional(settings.first_byte_timeout)
        self._gap_s = _optional(settings.chunk_timeout)
        self._drain_s = seconds("drain_timeout", settings.drain_timeout)
        self._options = EngineOptions(
            guard=guard,
            keepalive_expiry=seconds("keepalive_expiry", settings.keepalive_expiry),
            verify=settings.verify,
            trust_env=settings.trust_env,
            http2=settings.http2,
        )
        self._fleet: Fleet | None = None
        self._closed = False
        self._closing: asyncio.Task[None] | None = None
        self._origins: dict[str, str] = {}
        self._outgoing: dict[int, tuple[Headers, Headers]] = {}

    async def request(
        self, request: HTTPRequest, *, duplicate_ok: bool = False, connect_s: float | None = None
    ) -> Response:
        """Send a request and wait for the head of the response. Redirects are returned, not followed.

        Args:
            request: what to send; hop-by-hop headers and content-length in it are ours to set.
            duplicate_ok: it may safely arrive twice, so a dead kept-alive connection is replaced at once.
            connect_s: instead of the pool's `connect_timeout`.

        Raises:
            Closed: the pool is closed or closing.
            ConfigError: the URL or a header is refused.
            ConnectionFailed: nothing was sent.
            StaleConnection: a kept-alive connection was dead before a byte came back.
            AmbiguousOutcome: sent, then lost.
            UpstreamTimeout: nothing came for `first_byte_timeout`.
            ResponseTooLarge, ProtocolError: the head of the response.
        """
        if self._closed:
            raise Closed("the connection pool is closed")
        origin = self._origins.get(request.url) or self._judge(request.url)
        request = self._clean(request)
        fleet = self._here()
        if not fleet.try_enter():
            await fleet.enter()
        try:
            limit = self._connect_s if connect_s is None else connect_s
            generation, raw, exchange = await self._send(fleet, request, origin, limit, duplicate_ok=duplicate_ok)
        except BaseException:
            fleet.leave()
            raise
        try:
            return self._respond(fleet, generation, raw, exchange)
        except BaseException:
            raw.abandon()
            fleet.finish(generation)
            raise

    def warm_up(self, request: HTTPRequest) -> None:
        """Open `prewarm` connections in the background, with a harmless request over each; failures are no news."""
        for _ in range(self.settings.prewarm):
            self._here().background(self._warm(request))

    async def _warm(self, request: HTTPRequest) -> None:
        with contextlib.suppress(LLMMWError):
            await (await self.request(request)).body.read(_WARM_BYTES)

    def _judge(self, url: str) -> str:
        parts = check_url("url", url, self._guard)
        if len(self._origins) >= _REMEMBERED:
            self._origins.clear()
        origin = self._origins[url] = origin_of(parts)
        return origin

    def _clean(self, request: HTTPRequest) -> HTTPRequest:
        # An endpoint sends the same tuple of headers each time, so its check is remembered by identity.
        known = self._outgoing.get(id(request.headers))
        if known is None or known[0] is not request.headers:
            check_headers(request.headers)
            kept = tuple(pair for pair in request.headers if pair[0].lower() not in _NOT_FORWARDED)
            if len(self._outgoing) >= _REMEMBERED:
                self._outgoing.clear()
            # We decode, under caps; a coding that we cannot decode must not be asked for.
            known = (request.headers, (*kept, ("accept-encoding", ACCEPT_ENCODING)))
            self._outgoing[id(request.headers)] = known
        return HTTPRequest(request.method, request.url, known[1], request.body)

    def _here(self) -> Fleet:
        fleet = self._fleet
        if fleet is None or not fleet.is_here():
            if fleet is not None:
                fleet.drop()
            limit = self.settings.max_connections
            fleet = self._fleet = Fleet(self.settings.engine, self._options, self._env, limit, self._age_s)
        return fleet

    async def _send(
        self, fleet: Fleet, request: HTTPRequest, origin: str, connect_s: float | None, *, duplicate_ok: bool
    ) -> tuple[Generation, RawResponse, Exchange]:
        """Send over the current connections, once more over fresh ones where the first was stale and that is safe."""
        may_repeat = duplicate_ok or self.settings.retry_on_stale or request.method in _IDEMPOTENT
        began_again = False
        while True:
            generation, exchange = fleet.start(), Exchange(connect_s)
            try:
                if self._first_byte_s is None:
                    return generation, await generation.engine.send(request, exchange), exchange
                return generation, await self._send_in_time(generation, request, exchange, self._first_byte_s), exchange
            except BaseException as error:
                fleet.stop(generation)
                if not isinstance(error, Lost):
                    raise
                if error.unprocessed and not fleet.dead:
                    if began_again:
                        raise ConnectionFailed(f"not sent: {error}") from error
                    began_again = True
                    continue
                if fleet.dead or exchange.opened is not False or error.any_byte:
                    raise self._lost(error) from error
                # Its idle neighbours are as old, so none of them is used again.
                fleet.retire(generation)
                if not may_repeat:
                    raise StaleConnection(f"a kept-alive connection was dead: {error}", endpoint=origin) from error
                may_repeat = False
            finally:
                self._tell(exchange, origin)

    async def _send_in_time(
        self, generation: Generation, request: HTTPRequest, exchange: Exchange, limit_s: float
    ) -> RawResponse:
        try:
            async with asyncio.timeout(limit_s):
                return await generation.engine.send(request, exchange)
        except TimeoutError:
            sent = exchange.opened is not None
            raise UpstreamTimeout(f"no response within {limit_s:g} s", sent=sent) from None

    def _tell(self, exchange: Exchange, origin: str) -> None:
        if exchange.opened is not None:
            self._env.emit(ConnectionOpened(origin) if exchange.opened else ConnectionReused(origin))

    def _lost(self, error: BaseException) -> BaseException:
        if not isinstance(error, Lost):
            return error
        why = "the pool was closed during the call" if self._closed else str(error)
        return AmbiguousOutcome(f"{why}; the server may have done the work")

    def _respond(self, fleet: Fleet, generation: Generation, raw: RawResponse, exchange: Exchange) -> Response:
        headers, coding = _readable(raw.headers)
        body = Body(
            raw,
            fleet,
            generation,
            self._lost,
            max_bytes=self.settings.max_response_bytes,
            gap_s=self._gap_s,
            inflater=None if coding is None else Inflater(coding, self.settings.max_response_bytes),
        )
        return Response(raw.status, headers, body, exchange.opened is False)

    def rehome(self) -> None:
        """Drop every socket without waiting: the loop is dead, or this is a forked child."""
        fleet, self._fleet, self._closing = self._fleet, None, None
        if fleet is not None:
            fleet.drop()

    async def aclose(self) -> None:
        """Refuse new requests, wait `drain_timeout` for those in flight, then break them off. Idempotent.

        Closing goes on when the caller is cancelled, and every caller waits for the same closing.
        """
        self._closed = True
        fleet = self._fleet
        if fleet is None:
            return
        if not fleet.is_here():
            self.rehome()
            return
        if self._closing is None:
            self._closing = asyncio.create_task(fleet.close(self._drain_s))
        await asyncio.shield(self._closing)

    def gauges(self) -> dict[str, object]:
        """Readings of the moment, from any thread."""
        fleet = self._fleet
        waiting = 0 if fleet is None else fleet.waiting
        in_flight = 0 if fleet is None else fleet.active - waiting
        return {"engine": self.settings.engine, "in_flight": in_flight, "waiting": waiting}

    def __repr__(self) -> str:
        return f"BoundPool({self.settings.engine}, closed={self._closed})"

    def __del__(self) -> None:
        fleet = getattr(self, "_fleet", None)
        if fleet is not None and fleet.is_open and not self._closed:
            warnings.warn(f"{self!r} was not closed", ResourceWarning, stacklevel=2)
            fleet.drop_from_anywhere()


def _optional(value: float | str | None) -> float | None:
    return None if value is None else seconds("timeout", value)  # checked when the settings were made


_names: dict[bytes, str] = {}
"""Header names as seen before, in lower case: servers send the same few, and decoding each costs 0.1 µs."""


def _name(raw: bytes) -> str:
    if len(_names) >= _REMEMBERED:
        _names.clear()
    name = _names[raw] = raw.decode("latin-1").lower()
    return name


def _readable(raw: Sequence[tuple[bytes, bytes]]) -> tuple[Headers, str | None]:
    """The response's headers as text, without those of the connection; and the coding of the body, if it has one."""
    size = 0
    headers: list[tuple[str, str]] = []
    coding: str | None = None
    for raw_name, raw_value in raw:
        size += len(raw_name) + len(raw_value)
        name = _names.get(raw_name) or _name(raw_name)
        value = raw_value.decode("latin-1")
        if name == "content-encoding":
            coding = value.strip().lower() if coding is None else f"{coding},{value}"
        if name not in HOP_BY_HOP:
            headers.append((name, value))
    if size > MAX_HEADER_BYTES:
        raise ResponseTooLarge(f"the response's headers are larger than {MAX_HEADER_BYTES} bytes")
    if coding is None or coding in {"", "identity"}:
        return tuple(headers), None
    if "," in coding:
        raise ResponseTooLarge("the body is compressed more than once")
    if coding not in {"gzip", "x-gzip", "deflate"}:
        raise ProtocolError(f"the body is encoded as {coding[:40]!r}, which was not asked for")
    # The body is handed over decoded, so what describes its encoded form goes.
    return tuple(pair for pair in headers if pair[0] not in {"content-encoding", "content-length"}), coding

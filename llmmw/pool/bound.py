"""`BoundPool`: one engine's connections on its home loop. `pool.py` has the settings."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import warnings
from typing import TYPE_CHECKING

import msgspec

from llmmw.errors import (
    AmbiguousOutcome,
    Closed,
    ConnectionFailed,
    LLMMWError,
    PoolTimeout,
    StaleConnection,
    UpstreamTimeout,
)
from llmmw.events import ConnectionOpened, ConnectionReused
from llmmw.interrupt import mark_unsent
from llmmw.pool.body import ACCEPT_ENCODING, Body, Inflater
from llmmw.pool.engine import EngineOptions, Exchange, Lost
from llmmw.pool.engines import make_engine
from llmmw.pool.fleet import Fleet
from llmmw.pool.guard import check_headers, check_url, origin_of
from llmmw.pool.limits import Patience, limits_of
from llmmw.pool.response import Response, read_headers
from llmmw.settings import seconds
from llmmw.wire import HOP_BY_HOP, HTTPRequest

if TYPE_CHECKING:
    from collections.abc import Callable

    from llmmw.env import Env
    from llmmw.pool.engine import Engine, RawResponse
    from llmmw.pool.fleet import Generation
    from llmmw.pool.guard import Guard
    from llmmw.pool.pool import ConnectionPool
    from llmmw.wire import Headers

_IDEMPOTENT = frozenset({"GET", "HEAD", "OPTIONS", "PUT", "DELETE", "TRACE"})
_REMEMBERED = 256
_WARM_BYTES = 64 * 1024
_NOT_FORWARDED = HOP_BY_HOP | {"content-length", "accept-encoding", "expect"}


class _Way(msgspec.Struct, frozen=True):
    """How one request is to be sent."""

    origin: str
    connect_s: float | None
    patience: Patience | None
    duplicate_ok: bool


class BoundPool:
    """Sends requests over pooled connections; lives on one event loop at a time.

    Coming from another loop, or from a forked child, it forgets its sockets and starts afresh.

    Args:
        settings: how connections are made and kept.
        env: clock and event sinks.
        guard: where requests may go.
        make: makes the engine, where it is none of those that the settings name.
    """

    def __init__(
        self,
        settings: ConnectionPool,
        env: Env,
        guard: Guard,
        make: Callable[[EngineOptions], Engine] | None = None,
    ) -> None:
        self.settings = settings
        self._env = env
        self._guard = guard
        age = settings.max_connection_age
        self._age_s = None if age is None else seconds("max_connection_age", age)
        self._limits = limits_of(settings)
        self._waits = (self._limits.first_byte_s, self._limits.chunk_s, self._limits.total_s) != (None, None, None)
        self._drain_s = seconds("drain_timeout", settings.drain_timeout)
        self._options = EngineOptions(
            guard=guard,
            keepalive_expiry=seconds("keepalive_expiry", settings.keepalive_expiry),
            verify=settings.verify,
            trust_env=settings.trust_env,
            http2=settings.http2,
        )
        self._make = functools.partial(make_engine, settings.engine) if make is None else make
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
            ConnectionFailed: nothing was sent (PoolTimeout: because every connection of the pool was busy).
            StaleConnection: a kept-alive connection was dead before a byte came back.
            AmbiguousOutcome: sent, then lost.
            UpstreamTimeout: a time-out of the pool passed; `sent` says whether the work may be done.
            ResponseTooLarge, ProtocolError: the head of the response.
        """
        if self._closed:
            raise Closed("the connection pool is closed")
        origin = self._origins.get(request.url) or self._judge(request.url)
        request = self._clean(request)
        fleet = self._here()
        if not fleet.try_enter():
            try:
                await fleet.enter(self._limits.pool_s)
            except asyncio.CancelledError as error:
                mark_unsent(error)
                raise
        patience = Patience(self._limits) if self._waits else None
        try:
            limit = self._limits.connect_s if connect_s is None else connect_s
            twice_ok = (duplicate_ok or self.settings.retry_on_stale) and not request.once
            way = _Way(origin, limit, patience, twice_ok)
            generation, raw, exchange = await self._send(fleet, request, way)
        except BaseException:
            fleet.leave()
            raise
        try:
            max_bytes = request.max_bytes or self.settings.max_response_bytes
            return self._respond(fleet, generation, raw, exchange, patience, max_bytes)
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
        return HTTPRequest(request.method, request.url, known[1], request.body, request.once, request.max_bytes)

    def _here(self) -> Fleet:
        fleet = self._fleet
        if fleet is None or not fleet.is_here():
            if fleet is not None:
                fleet.drop()
            limit = self.settings.max_connections
            fleet = self._fleet = Fleet(self._make, self._options, self._env, limit, self._age_s)
        return fleet

    async def _send(self, fleet: Fleet, request: HTTPRequest, way: _Way) -> tuple[Generation, RawResponse, Exchange]:
        """Send over the current connections.

        Once more over fresh ones where the first was stale and that is safe; once more where the server says that it
        has not begun.
        """
        may_repeat = way.duplicate_ok or request.method in _IDEMPOTENT
        began_again = False
        while True:
            generation, exchange = fleet.start(), Exchange(way.connect_s, self._limits.write_s)
            began, heard = self._env.clock.monotonic(), generation.heard
            try:
                sending = generation.engine.send(request, exchange)
                raw = await (sending if way.patience is None else way.patience.head(sending))
            except BaseException as error:
                fleet.stop(generation)
                if not isinstance(error, Lost):
                    _say_what_was_sent(error, exchange)
                    if generation.heard != heard:
                        self._blame_ourselves(error, began, way.connect_s)
                    raise
                if error.unprocessed and not fleet.dead:
                    if began_again:
                        raise ConnectionFailed(f"not sent: {error}") from None
                    began_again = True
                    continue
                if fleet.dead or exchange.opened is not False or error.any_byte:
                    raise self._lost(error) from None
                # Its idle neighbours are as old, so none of them is used again.
                fleet.retire(generation)
                if not may_repeat:
                    raise StaleConnection(f"a kept-alive connection was dead: {error}", endpoint=way.origin) from None
                may_repeat = False
            else:
                generation.heard += 1
                return generation, raw, exchange
            finally:
                self._tell(exchange, way.origin)

    def _blame_ourselves(self, error: BaseException, began: float, connect_s: float | None) -> None:
        """A connection that took too long while the same server answered others: it is this process that is too slow.

        A thousand calls at once through an SDK keep the loop busy for seconds; no circuit may open for that.

        Raises:
            PoolTimeout: so it was.
        """
        took_s = self._env.clock.monotonic() - began
        if isinstance(error, ConnectionFailed) and connect_s is not None and took_s >= connect_s:
            raise PoolTimeout(
                f"no connection within {took_s:.3g} s, while others were answered: this process has too much to do"
            ) from None

    def _tell(self, exchange: Exchange, origin: str) -> None:
        if exchange.opened is not None:
            self._env.emit(ConnectionOpened(origin) if exchange.opened else ConnectionReused(origin))

    def _lost(self, error: BaseException) -> BaseException:
        if not isinstance(error, Lost):
            return error
        why = "the pool was closed during the call" if self._closed else str(error)
        return AmbiguousOutcome(f"{why}; the server may have done the work")

    def _respond(
        self,
        fleet: Fleet,
        generation: Generation,
        raw: RawResponse,
        exchange: Exchange,
        patience: Patience | None,
        max_bytes: int,
    ) -> Response:
        headers, coding = read_headers(raw.headers)
        body = Body(
            raw,
            fleet,
            generation,
            self._lost,
            max_bytes=max_bytes,
            patience=patience,
            inflater=None if coding is None else Inflater(coding, max_bytes),
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


def _say_what_was_sent(error: BaseException, exchange: Exchange) -> None:
    """Whether the server may have done the work, on the errors that can tell."""
    if isinstance(error, asyncio.CancelledError) and not exchange.is_sent:
        mark_unsent(error)
    if isinstance(error, UpstreamTimeout):
        error.sent = error.sent and exchange.is_sent

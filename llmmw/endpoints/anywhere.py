"""`Anywhere`: the endpoint of the transport edge, where each request brings its own URL, credentials and time-out."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from llmmw.endpoints.openai import POOL_EXAMPLE, HTTPEndpoint
from llmmw.env import SYSTEM_CLOCK, Env
from llmmw.errors import UpstreamTimeout
from llmmw.interrupt import TimedChunks, Until
from llmmw.pool import ConnectionPool
from llmmw.pool.guard import host_names, origin_of
from llmmw.settings import instance
from llmmw.wire import HTTPRequest

if TYPE_CHECKING:
    from collections.abc import Iterable

    from llmmw.answer import Usage
    from llmmw.call import Call, Chunk, Chunks, Reply
    from llmmw.endpoints.base import Endpoint
    from llmmw.env import Clock


class TimedRequest(HTTPRequest, frozen=True):
    """A request with the time-out that its sender put on it."""

    read_s: float | None = None


class Anywhere:
    """Sends each call's own request (`Call.native`) to wherever its URL says; one HTTPEndpoint, one pool, per origin.

    Args:
        pool: settings of the connections.
        allow_hosts: hosts exempt from the ban on link-local and metadata addresses.
    """

    def __init__(self, pool: ConnectionPool | None = None, allow_hosts: Iterable[str] = ()) -> None:
        self._settings = None if pool is None else instance("pool", pool, ConnectionPool, POOL_EXAMPLE)
        self._allow_hosts = host_names(allow_hosts)
        self._env = Env()
        self._endpoints: dict[str, HTTPEndpoint] = {}
        self._by_target: dict[str, HTTPEndpoint] = {}

    @property
    def name(self) -> str:
        """The origins seen so far."""
        return ", ".join(self._endpoints) or "any URL"

    def start(self, env: Env) -> None:
        """The engine's env."""
        self._env = env

    async def __call__(self, call: Call, /) -> Reply:
        """Make one attempt.

        Raises:
            ConfigError: a URL that must not be asked.
            UpstreamError: no answer could be obtained, or what came is none.
        """
        endpoint = self._by_target.get(call.target)
        if endpoint is None:
            endpoint = self._by_target[call.target] = self._open(origin_of(urlsplit(call.target)))
        return await endpoint(call)

    def _open(self, origin: str) -> HTTPEndpoint:
        endpoint = self._endpoints.get(origin)
        if endpoint is None:
            endpoint = HTTPEndpoint(origin, pool=self._settings, allow_hosts=self._allow_hosts)
            endpoint.start(self._env)
            self._endpoints[origin] = endpoint
        return endpoint

    def rehome(self) -> None:
        """Drop the sockets without waiting."""
        for endpoint in list(self._endpoints.values()):
            endpoint.rehome()

    async def aclose(self) -> None:
        """Close every connection. Idempotent."""
        for endpoint in list(self._endpoints.values()):
            await endpoint.aclose()

    def __repr__(self) -> str:
        return f"Anywhere({self.name})"


class Patient:
    """An endpoint that keeps the read time-out of each request, per attempt.

    It bounds the time until a whole answer is there; of a stream the time until its head is there and, as the HTTP
    libraries do, each wait for the next piece.

    Args:
        inner: the endpoint itself.
    """

    def __init__(self, inner: Endpoint) -> None:
        self._inner = inner
        self._clock = SYSTEM_CLOCK
        self.capabilities: frozenset[str] = frozenset(getattr(inner, "capabilities", ()))

    @property
    def name(self) -> str:
        """The inner endpoint's."""
        return self._inner.name

    def start(self, env: Env) -> None:
        """Start the inner endpoint."""
        self._clock = env.clock
        self._inner.start(env)

    async def __call__(self, call: Call, /) -> Reply:
        """One attempt within the request's own time-out.

        Raises:
            UpstreamTimeout: it is over.
        """
        native = call.native
        limit = native.read_s if isinstance(native, TimedRequest) else None
        if limit is None:
            return await self._inner(call)
        due = self._clock.monotonic() + limit
        reply = await Until(self._inner(call), self._clock, lambda: due, lambda: _late(limit))
        return reply if reply.chunks is None else reply.replace(chunks=_PatientChunks(reply.chunks, self._clock, limit))

    def rehome(self) -> None:
        """Tell the inner endpoint."""
        self._inner.rehome()

    async def aclose(self) -> None:
        """Close the inner endpoint."""
        await self._inner.aclose()

    def __repr__(self) -> str:
        return repr(self._inner)


class _PatientChunks:
    """A stream each of whose pieces comes in time."""

    def __init__(self, inner: Chunks, clock: Clock, limit: float) -> None:
        self._inner = TimedChunks(inner, clock, lambda: self._due, lambda: _late(limit))
        self._clock = clock
        self._limit = limit
        self._due = 0.0

    @property
    def usage(self) -> Usage:
        return self._inner.usage

    def __aiter__(self) -> _PatientChunks:
        return self

    async def __anext__(self) -> Chunk:
        self._due = self._clock.monotonic() + self._limit
        return await self._inner.__anext__()

    async def aclose(self) -> None:
        await self._inner.aclose()


def _late(limit: float) -> UpstreamTimeout:
    return UpstreamTimeout(f"nothing came within the request's own time-out of {limit:g} s")

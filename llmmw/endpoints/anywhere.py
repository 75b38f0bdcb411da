"""`Anywhere`: the endpoint of the transport edge, where each request brings its own URL, credentials and time-out."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from llmmw.endpoints.openai import HTTPEndpoint
from llmmw.env import Env
from llmmw.errors import UpstreamTimeout
from llmmw.pool.guard import origin_of
from llmmw.wire import HTTPRequest

if TYPE_CHECKING:
    from collections.abc import Iterable

    from llmmw.call import Call, Reply
    from llmmw.endpoints.base import Endpoint
    from llmmw.pool import ConnectionPool


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
        self._settings = pool
        self._allow_hosts = tuple(allow_hosts)
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

    For a whole answer it bounds the time until it is there, for a stream the time until its head is there.

    Args:
        inner: the endpoint itself.
    """

    def __init__(self, inner: Endpoint) -> None:
        self._inner = inner
        self.capabilities: frozenset[str] = frozenset(getattr(inner, "capabilities", ()))

    @property
    def name(self) -> str:
        """The inner endpoint's."""
        return self._inner.name

    def start(self, env: Env) -> None:
        """Start the inner endpoint."""
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
        timer = asyncio.timeout(limit)
        try:
            async with timer:
                return await self._inner(call)
        except TimeoutError:
            if not timer.expired():
                raise
            raise UpstreamTimeout(f"no answer within the request's own time-out of {limit:g} s") from None

    def rehome(self) -> None:
        """Tell the inner endpoint."""
        self._inner.rehome()

    async def aclose(self) -> None:
        """Close the inner endpoint."""
        await self._inner.aclose()

    def __repr__(self) -> str:
        return repr(self._inner)

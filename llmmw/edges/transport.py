"""The transport edge without its HTTP library: what `httpx.py` and `httpx2.py` have in common.

httpx and httpx2 have the same classes under the same names. Each binding derives from the classes here and from
its library's, and names the library in `lib`.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
from typing import TYPE_CHECKING, Any, ClassVar, Self

import msgspec

from llmmw.edges.http import HTTPEdge, Repeated
from llmmw.edges.outcome import Answer, stream_failure
from llmmw.endpoints.anywhere import Anywhere
from llmmw.endpoints.base import Endpoint
from llmmw.errors import ConfigError, LLMMWError, StatusError
from llmmw.settings import accepting
from llmmw.stack import Stack

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Generator, Iterable, Iterator, Mapping, Sequence
    from types import TracebackType

    from llmmw.call import Call, Chunk, Chunks, Reply
    from llmmw.engine import Engine
    from llmmw.engine.readers import BridgedChunks
    from llmmw.env import Env
    from llmmw.pool import ConnectionPool

_OURS = {
    "transport": "the stack is the transport",
    "mounts": "requests sent past the stack would not be counted or limited",
    "proxy": "connections are the pool's: pool=ConnectionPool(trust_env=True) uses HTTPS_PROXY",
    "proxies": "connections are the pool's: pool=ConnectionPool(trust_env=True) uses HTTPS_PROXY",
    "verify": "connections are the pool's: pool=ConnectionPool(verify=...)",
    "cert": "connections are the pool's: pool=ConnectionPool(verify=<ssl.SSLContext with the certificate>)",
    "http1": "connections are the pool's: pool=ConnectionPool(http2=...)",
    "http2": "connections are the pool's: pool=ConnectionPool(http2=...)",
    "limits": "connections are the pool's: pool=ConnectionPool(max_connections=...)",
    "follow_redirects": "a redirect would carry prompt and key to another server",
}
_NEUTRAL: dict[str, object] = {"verify": True, "http1": True, "http2": False, "follow_redirects": False}
"""What the library does by itself, so asking for it changes nothing."""
_TERMINATORS = (b"[DONE]", b"message_stop", b"response.completed")
_DRAIN_S = 1.0
"""After a terminator only the end of the body is left; it is waited for this long."""


class _Transport:
    """Requests of the library to calls, outcomes to its responses and exceptions."""

    lib: ClassVar[Any]
    body: ClassVar[Any]
    """The library's stream class around `reply.chunks`."""

    def __init__(self, edge: HTTPEdge) -> None:
        self.edge = edge

    def _call(self, request: Any, body: bytes) -> Call:
        timeout: dict[str, Any] = request.extensions.get("timeout") or {}
        try:
            return self.edge.call(request.method, str(request.url), request.headers.raw, body, timeout)
        except Repeated as again:
            raise getattr(self.lib, again.kind)(str(again), request=request) from None

    def _response(self, request: Any, reply: Reply) -> Any:
        answer = self.edge.answer(reply)
        if reply.chunks is None:
            return self.lib.Response(answer.status, headers=answer.headers, content=answer.body)
        stream = self.body(self.lib, request, self.edge.engine, reply.chunks)
        return self.lib.Response(answer.status, headers=answer.headers, stream=stream)

    def _failed(self, request: Any, body: bytes, error: LLMMWError) -> Any:
        """A response in place of the error; or the library's exception, raised."""
        if isinstance(error, ConfigError):
            raise error
        found = self.edge.failure(error, str(request.url), body)
        if isinstance(found, Answer):
            return self.lib.Response(found.status, headers=found.headers, content=found.body)
        raise getattr(self.lib, found)(error.message, request=request) from error


class AsyncTransport(_Transport):
    """For the library's `AsyncBaseTransport`."""

    async def handle_async_request(self, request: Any) -> Any:
        """Answer one request through the stack."""
        body: bytes = await request.aread()
        call = self._call(request, body)
        try:
            return self._response(request, await self.edge.engine.call(call))
        except LLMMWError as error:
            return self._failed(request, body, error)

    async def aclose(self) -> None:
        """Close the engine."""
        await self.edge.engine.aclose()

    async def __aenter__(self) -> Self:
        await self.edge.engine.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        traceback: TracebackType | None = None,
    ) -> None:
        """Close the engine; trouble with that does not hide the body's exception."""
        await self.edge.engine.__aexit__(kind, error, traceback)


class SyncTransport(_Transport):
    """For the library's `BaseTransport`."""

    def handle_request(self, request: Any) -> Any:
        """Answer one request through the stack, on the engine's own loop."""
        body: bytes = request.read()
        call = self._call(request, body)
        try:
            return self._response(request, self.edge.engine.call_sync(call))
        except LLMMWError as error:
            return self._failed(request, body, error)

    def close(self) -> None:
        """Close the engine."""
        self.edge.engine.close()

    def __enter__(self) -> Self:
        self.edge.engine.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        traceback: TracebackType | None = None,
    ) -> None:
        """Close the engine; trouble with that does not hide the body's exception."""
        self.edge.engine.__exit__(kind, error, traceback)


class _Body:
    """A streamed body for the library."""

    def __init__(self, lib: Any, request: Any, engine: Engine, chunks: Chunks) -> None:
        self._lib = lib
        self._request = request
        self._engine = engine
        self._chunks = chunks
        self._last: tuple[bytes, bytes] = (b"", b"")
        self._over = False

    def _seen(self, chunk: Chunk | None) -> bytes:
        if not isinstance(chunk, bytes):
            raise TypeError("an HTTP stream carries bytes")
        self._last = (self._last[1], chunk)
        return chunk

    def _should_drain(self) -> bool:
        # SDKs stop reading at the terminator. Seen by us as a reader who left early, the answer would not be stored.
        if self._over:
            return False
        tail = b"".join(self._last)
        return any(mark in tail for mark in _TERMINATORS)

    @contextlib.contextmanager
    def _told(self) -> Generator[list[bytes]]:
        """Errors of the stream as the library's; an error that the server put into the stream as that event again."""
        events: list[bytes] = []
        try:
            yield events
        except LLMMWError as error:
            refusal = error if isinstance(error, StatusError) else error.__cause__
            if isinstance(refusal, StatusError):
                events.append(_error_event(refusal))
                return
            kind = stream_failure(error) or "ReadError"
            raise getattr(self._lib, kind)(error.message, request=self._request) from error


class AsyncBody(_Body):
    """For the library's `AsyncByteStream`."""

    async def __aiter__(self) -> AsyncIterator[bytes]:
        with self._told() as events:
            async for chunk in self._chunks:
                yield self._seen(chunk)
        self._over = True
        for event in events:
            yield event

    async def aclose(self) -> None:
        """Stop reading; the server is told."""
        if self._should_drain():
            await drain(self._chunks)
        await self._chunks.aclose()


class SyncBody(_Body):
    """For the library's `SyncByteStream`."""

    _chunks: BridgedChunks

    def __iter__(self) -> Iterator[bytes]:
        with self._told() as events:
            while (chunk := self._chunks.next_sync()) is not None:
                yield self._seen(chunk)
        self._over = True
        yield from events

    def close(self) -> None:
        """Stop reading; the server is told."""
        if self._should_drain():
            with contextlib.suppress(LLMMWError):
                self._engine.run_sync(lambda: drain(self._chunks))
        self._chunks.close_sync()


async def drain(chunks: Chunks) -> None:
    """Read a stream whose terminator has come to its end."""
    with contextlib.suppress(TimeoutError, LLMMWError):
        async with asyncio.timeout(_DRAIN_S):
            async for _ in chunks:
                pass


def _error_event(error: StatusError) -> bytes:
    """As OpenAI's and Anthropic's SDKs both understand it."""
    told = {"type": error.code or "api_error", "message": error.message, "code": error.code or error.status}
    return b"event: error\ndata: " + msgspec.json.encode({"type": "error", "error": told}) + b"\n\n"


def _check_options(name: str, options: Mapping[str, Any], known: Iterable[str]) -> None:
    for option, value in options.items():
        if option not in _OURS:
            if option not in known:
                allowed = ", ".join(["stack", "pool", "allow_hosts", "endpoint", "env", *sorted({*known} - {*_OURS})])
                raise ConfigError(f"{name}: unexpected keyword argument {option!r} (options: {allowed})")
        elif value != _NEUTRAL[option] if option in _NEUTRAL else value:
            raise ConfigError(f"{name}({option}=): {_OURS[option]}")


class StackClient:
    """A client of the HTTP library whose requests go through a stack: `AsyncOpenAI(http_client=httpx_client(stack))`.

    It passes the SDKs' isinstance checks, and closing it closes the engine. Completions (chat, completions,
    embeddings, messages, responses) pass the layers; anything else goes straight over the pool. Responses say where
    they come from: `x-llmmw-source` (upstream, cache, coalesced, batch) and `x-llmmw-attempts`. Give the SDK
    `max_retries=0` where the stack has a Retry layer.

    Args:
        stack: the layers.
        pool: settings of the connections.
        allow_hosts: hosts that would otherwise be refused (link-local and cloud metadata addresses).
        endpoint: answers in place of the server that the SDK names (a model in process, a fake).
        env: clock, randomness and sinks, for tests.
        options: of the library's client (base_url, headers, timeout, event_hooks, ...).

    Raises:
        ConfigError: not a stack, or an option that is the stack's or the pool's (transport, proxy, limits, ...).
    """

    made_by: ClassVar[str]
    transport_class: ClassVar[type[Any]]

    @accepting
    def __init__(
        self,
        stack: Stack,
        *,
        pool: ConnectionPool | None = None,
        allow_hosts: Sequence[str] = (),
        endpoint: Endpoint | None = None,
        env: Env | None = None,
        **options: Any,
    ) -> None:
        name = self.made_by
        if not isinstance(stack, Stack):  # pyright: ignore[reportUnnecessaryIsInstance]  # users pass lists
            raise ConfigError(
                f"{name}(stack={stack!r}): expected a Stack, e.g. {name}(Stack(TTLCache(300), Coalescer()))"
            )
        parent: Any = super().__init__
        _check_options(name, options, inspect.signature(parent).parameters)
        if endpoint is not None and (pool is not None or allow_hosts):
            raise ConfigError(f"{name}(endpoint=): an endpoint of your own has its own pool and hosts")
        if endpoint is not None and not isinstance(endpoint, Endpoint):  # pyright: ignore[reportUnnecessaryIsInstance]  # a user's value
            raise ConfigError(f"{name}(endpoint={endpoint!r}): expected an Endpoint, e.g. HTTPEndpoint(base_url)")
        edge = HTTPEdge(stack, endpoint or Anywhere(pool, allow_hosts), env)
        parent(transport=self.transport_class(edge), **options)
        self.engine: Engine = edge.engine

    def get_performance_stats(self) -> dict[str, Any]:
        """What the stack did; every key is in the README."""
        return self.engine.get_performance_stats()

"""Somebody else's SDK as the endpoint: its own `create()` with the caller's own arguments does the work."""

from __future__ import annotations

import functools
import inspect
import os
import socket
from contextlib import suppress
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import urlsplit
from weakref import WeakSet

import msgspec

from llmmw.answer import usage_of
from llmmw.call import Reply
from llmmw.endpoints.answers import AnswerStream
from llmmw.endpoints.base import counted
from llmmw.endpoints.orphans import forget_orphans
from llmmw.env import Env
from llmmw.errors import AmbiguousOutcome, UpstreamTimeout
from llmmw.pool.guard import is_loopback
from llmmw.wire import HOP_BY_HOP, HTTPRequest, read_any_answer
from llmmw.wire.secrets import NO_SECRETS, secrets_of
from llmmw.wire.sse import StreamWatch

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from llmmw.call import Call
    from llmmw.wire.secrets import Secrets

_THREADS = 512
"""Upper bound on worker threads for a sync SDK; the stack's `concurrency` is the limit that is meant to bind."""
_NOT_KEPT = HOP_BY_HOP | {"content-encoding", "content-length"}
_MAX_ERROR_BYTES = 64 * 1024
_ERROR = 400


class Invocation(msgspec.Struct, frozen=True):
    """The native request of the SDK edge."""

    create: Callable[..., Any]
    """The SDK's own method that answers with the raw response (`with_raw_response.create`)."""
    kwargs: Mapping[str, Any]
    is_async: bool
    reparse: bool = False
    """Whether the SDK changes the body while it parses it (embeddings travel as base64)."""


class SDKEndpoint:
    """Runs the SDK's method: an async one on the home loop, a sync one on a worker thread.

    A refusal becomes a Reply whose `native` is the SDK's exception; what the SDK could not obtain comes through as
    its own exception.

    Args:
        name: the base URL without secrets.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        local = is_loopback(urlsplit(name).hostname or "")
        self.capabilities: frozenset[str] = frozenset({"idempotent"}) if local else frozenset()
        self._env = Env()
        self._threads: Any = None
        self._http_clients: WeakSet[Any] = WeakSet()
        self._pid = os.getpid()

    def sends_with(self, http_client: Any) -> None:
        """Remember an HTTP client of the SDK, whose connections must not outlive their loop."""
        self._http_clients.add(http_client)

    def start(self, env: Env) -> None:
        """The engine's env."""
        self._env = env

    async def __call__(self, call: Call, /) -> Reply:
        """Make one attempt.

        Raises:
            ProtocolError: a success status with a body that is no answer.
        """
        return await counted(self._env, call.target, call, self._work)

    async def _work(self, call: Call) -> Reply:
        invocation: Invocation = call.native
        run = _directly if invocation.is_async else self._in_thread
        try:
            raw = await run(functools.partial(invocation.create, **invocation.kwargs))
        except Exception as error:
            refusal = _refusal(error)
            if refusal is None:
                raise
            return refusal
        response = raw.http_response
        headers = _headers(response)
        if call.stream:
            body = _AsyncPieces(response) if invocation.is_async else _ThreadPieces(response, self._in_thread)
            stream = AnswerStream(cast("Any", body), StreamWatch(call.op), call.target, lambda: _secrets(response))
            return Reply(chunks=stream, status=response.status_code, headers=headers)
        data: bytes = response.content
        if invocation.reparse:
            parsed = raw.parse()
            parsed = await parsed if inspect.isawaitable(parsed) else parsed
            data = parsed.model_dump_json(by_alias=True, exclude_unset=True).encode()
        found = await read_any_answer(
            call.op, data, endpoint=call.target, content_type=response.headers.get("content-type", "")
        )
        return Reply(data=data, usage=usage_of(found), status=response.status_code, headers=headers)

    async def _in_thread(self, work: Callable[[], Any]) -> Any:
        from anyio import CapacityLimiter, to_thread  # noqa: PLC0415 — only sync SDKs pay for anyio

        if self._threads is None:
            self._threads = CapacityLimiter(_THREADS)
        return await to_thread.run_sync(work, limiter=self._threads, abandon_on_cancel=True)

    def rehome(self) -> None:
        """The capacity limiter and the SDK's connections belong to a loop."""
        self._threads = None
        forked, self._pid = os.getpid() != self._pid, os.getpid()
        for http_client in list(self._http_clients):
            forget_orphans(http_client, forked=forked)

    def closed(self) -> None:
        """The engine is closed: what was sent on a thread of its own cannot be closed by the SDK any more."""
        for http_client in list(self._http_clients):
            forget_orphans(http_client, forked=False, ending=False)

    async def aclose(self) -> None:
        """The SDK client is its owner's to close."""

    def __repr__(self) -> str:
        return f"SDKEndpoint({self.name!r})"


async def _directly(work: Callable[[], Awaitable[Any]]) -> Any:
    return await work()


def _headers(response: Any) -> tuple[tuple[str, str], ...]:
    pairs = response.headers.multi_items()
    return tuple((name.lower(), value) for name, value in pairs if name.lower() not in _NOT_KEPT)


def _refusal(error: Exception) -> Reply | None:
    status, response = getattr(error, "status_code", None), getattr(error, "response", None)
    if not isinstance(status, int) or status < _ERROR or response is None:
        return None
    try:
        data: bytes = response.content
    except Exception:  # noqa: BLE001 — a body that an event hook has closed unread
        data = b""
    hidden = _secrets(response)
    told = hidden.hide_bytes(data[:_MAX_ERROR_BYTES])
    return Reply(data=told, status=status, headers=hidden.hide_headers(_headers(response)), native=error)


def _secrets(response: Any) -> Secrets:
    """What the SDK's own request held; nothing where it does not tell its request."""
    try:
        request = response.request
        return secrets_of(HTTPRequest(request.method, str(request.url), tuple(request.headers.multi_items())))
    except (AttributeError, RuntimeError):  # httpx: "The request instance has not been set"
        return NO_SECRETS


def _broken(error: Exception) -> Exception:
    said = f"the stream broke ({type(error).__name__})"
    return UpstreamTimeout(said) if "Timeout" in type(error).__name__ else AmbiguousOutcome(said)


class _Pieces:
    """The body of a streamed response, as `AnswerStream` reads it; errors of the HTTP library become ours."""

    def __init__(self, response: Any) -> None:
        self._response = response
        self.was_cut = False

    async def __anext__(self) -> bytes:
        try:
            piece = await self._next()
        except Exception as error:
            raise _broken(error) from error
        if piece is None:
            raise StopAsyncIteration
        return piece

    async def aclose(self) -> None:
        """Stop reading. Idempotent."""
        self.was_cut = True
        if not self._response.is_closed:  # every layer closes what it holds, and for a sync SDK that is a thread's turn
            await self._close()

    async def _next(self) -> bytes | None:
        raise NotImplementedError  # abstract: one subclass each for sync and async SDKs

    async def _close(self) -> None:
        raise NotImplementedError  # abstract, as above


class _AsyncPieces(_Pieces):
    def __init__(self, response: Any) -> None:
        super().__init__(response)
        self._pieces = response.aiter_bytes()

    async def _next(self) -> bytes | None:
        return await anext(self._pieces, None)

    async def _close(self) -> None:
        await self._response.aclose()


class _ThreadPieces(_Pieces):
    """Of a sync response: a worker thread's turn per piece."""

    def __init__(self, response: Any, run: Callable[[Callable[[], Any]], Awaitable[Any]]) -> None:
        super().__init__(response)
        self._pieces = iter(response.iter_bytes())
        self._run = run
        self._is_reading = False

    async def _next(self) -> bytes | None:
        self._is_reading = True
        piece: bytes | None = await self._run(self._read)
        return piece

    def _read(self) -> bytes | None:
        try:
            return next(self._pieces, None)
        finally:
            self._is_reading = False

    async def _close(self) -> None:
        if self._is_reading:
            _wake(self._response)
        await self._run(self._response.close)


def _wake(response: Any) -> None:
    """End a read that another thread waits in; closing the socket alone would neither end it nor tell the server."""
    stream = response.extensions.get("network_stream")
    connection = None if stream is None else stream.get_extra_info("socket")
    if isinstance(connection, socket.socket):
        with suppress(OSError):
            socket.socket.shutdown(connection, socket.SHUT_RDWR)  # of a TLS socket too, past its own farewell

"""An application in this process as the server: each request is handed to it as ASGI, with no socket between.

The application lives on an event loop of its own choice, mostly on another thread than the caller's. Each side
touches only its own half of an answer; what crosses over is called on the other's loop.
"""

from __future__ import annotations

import asyncio
import functools
from collections import deque
from contextvars import Context
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import unquote, urlsplit
from weakref import WeakSet

from llmmw.errors import ConnectionFailed
from llmmw.pool.engine import Lost

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, MutableMapping, Sequence

    from llmmw.pool.engine import Exchange
    from llmmw.wire import HTTPRequest

    Message = MutableMapping[str, Any]
    App = Callable[[Message, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]], Awaitable[None]]
    """What ASGI calls an application: scope, receive, send."""

_AHEAD = 64
"""Pieces that an answer may be ahead of its reader before the application has to wait for it."""
_ERROR = 500


class Host(Protocol):
    """Where an application lives."""

    @property
    def app(self) -> App:
        """The application."""
        ...

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The event loop that it runs on."""
        ...

    def broken(self) -> str | None:
        """Why it will answer nothing (more), or None while it lives. From any thread."""
        ...

    def is_here(self) -> bool:
        """Whether it lives in this process, not in the one that this was forked from."""
        ...

    def add(self, task: asyncio.Task[None]) -> None:
        """Keep a task of its loop, and end it when the application ends."""
        ...


class AppEngine:
    """Hands requests to an application; lives on the caller's event loop.

    Raises ConnectionFailed where the application is gone, and Lost where it goes during a request. Leaving an answer
    unread is told to the application as a disconnected client.
    """

    def __init__(self, host: Host) -> None:
        self._host = host
        self._answers: WeakSet[_Answer] = WeakSet()

    async def send(self, request: HTTPRequest, exchange: Exchange) -> _Answer:
        """Hand over a request and wait for the head of the answer."""
        host = self._host
        broken = host.broken()
        if broken is not None:
            raise ConnectionFailed(broken)
        answer = _Answer(host, request)
        self._answers.add(answer)
        exchange.handed_over = True
        try:
            await answer.head()
        except BaseException:
            answer.abandon()
            raise
        if answer.status >= _ERROR and (broken := host.broken()) is not None:
            answer.abandon()
            raise Lost(broken)  # the application's own words about its end are no judgement on the request
        return answer

    def held(self) -> int | None:
        """There are no connections."""
        return None

    def drop(self) -> None:
        """Let go of every answer; a parent's application is left alone."""
        if self._host.is_here():
            for answer in list(self._answers):
                answer.abandon()

    async def aclose(self) -> None:
        """Let go of every answer; whoever waits for one hears of it."""
        if self._host.is_here():
            for answer in list(self._answers):
                await answer.aclose()


@functools.lru_cache(maxsize=256)
def _place(url: str) -> tuple[str, bytes, bytes, tuple[str, int | None]]:
    parts = urlsplit(url)
    return unquote(parts.path), parts.path.encode(), parts.query.encode(), (parts.hostname or "", parts.port)


def _scope(request: HTTPRequest) -> Message:
    path, raw_path, query, server = _place(request.url)
    headers = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in request.headers]
    headers.append((b"content-length", b"%d" % len(request.body)))
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": request.method,
        "scheme": "http",
        "path": path,
        "raw_path": raw_path,
        "query_string": query,
        "root_path": "",
        "headers": headers,
        "client": None,
        "server": server,
        "state": {},
    }


class _Answer:
    """One request and its answer: the reader's half, and the half on the application's loop."""

    def __init__(self, host: Host, request: HTTPRequest) -> None:
        self._host = host
        self._home = asyncio.get_running_loop()
        self._there = host.loop
        # The reader's half.
        self.status = 0
        self.headers: Sequence[tuple[bytes, bytes]] = ()
        self._headed: asyncio.Future[None] = self._home.create_future()
        self._pieces: deque[bytes] = deque()
        self._arrival: asyncio.Future[None] | None = None
        self._whole = False
        self._lost: str | None = None
        self._taken = 0
        # The application's half. It reads `_taken` and the reader `_room`: single values, written by one side.
        self._request: HTTPRequest | None = request
        self._gone = asyncio.Event()
        self._given = 0
        self._room: asyncio.Future[None] | None = None
        if not self._tell_app(self._begin):
            raise ConnectionFailed("the event loop of the application has ended")

    # ── the reader's half ───────────────────────────────────────────────────────────────────────────────────────

    @property
    def ended(self) -> bool:
        """Whether everything has been taken."""
        return self._whole and not self._pieces

    async def head(self) -> None:
        """Wait for status and headers."""
        await self._headed
        if self._lost is not None and not self.status:
            raise Lost(self._lost)

    async def next(self) -> bytes:
        """The next piece; b"" at the end."""
        while not self._pieces:
            if self._whole:
                return b""
            if self._lost is not None:
                raise Lost(self._lost, any_byte=True)
            self._arrival = self._home.create_future()
            try:
                await self._arrival
            finally:
                self._arrival = None
        self._taken += 1
        if self._room is not None and len(self._pieces) <= _AHEAD // 2:
            self._tell_app(self._make_room)
        return self._pieces.popleft()

    async def aclose(self) -> None:
        """Tell the application that nobody reads on, and whoever does, without waiting for its end. Idempotent."""
        self.abandon()
        _wake(self._headed)
        _wake(self._arrival)

    def abandon(self) -> None:
        """The same without awaiting."""
        if not self._whole and self._lost is None:
            self._lost = "the answer was closed"
            self._tell_app(self._leave)

    def _begins(self, status: int, headers: Sequence[tuple[bytes, bytes]]) -> None:
        self.status, self.headers = status, headers
        _wake(self._headed)

    def _arrives(self, piece: bytes, more: bool) -> None:  # noqa: FBT001 — called on another loop, by position
        if piece:
            self._pieces.append(piece)
        self._whole = self._whole or not more
        _wake(self._arrival)

    def _breaks(self, why: str) -> None:
        if not self._whole and self._lost is None:
            self._lost = why
        _wake(self._headed)
        _wake(self._arrival)

    def _tell_app(self, call: Callable[[], object]) -> bool:
        """Do something on the application's side; False where its loop has ended."""
        if self._home is self._there and not self._there.is_closed():
            call()
            return True
        try:
            self._there.call_soon_threadsafe(call, context=Context())
        except RuntimeError:
            return False
        return True

    # ── the application's half ──────────────────────────────────────────────────────────────────────────────────

    def _begin(self) -> None:
        # In a context without the caller's variables: what the application keeps must not hold them.
        self._host.add(self._there.create_task(self._serve(), context=Context()))

    async def _serve(self) -> None:
        request, why = self._request, "the application ended before its answer did"
        try:
            if request is not None:
                await self._host.app(_scope(request), self._receive, self._send)
        except asyncio.CancelledError:
            why = "the application was stopped"
            raise
        except Exception as error:  # noqa: BLE001 — whatever it raises, its caller gets an error of ours
            # Its words may hold the prompt. After a whole answer (Starlette raises behind its 500) it is no news.
            why = f"the application raised {type(error).__name__}"
        finally:
            self._tell_reader(self._breaks, why)

    async def _receive(self) -> Message:
        request, self._request = self._request, None
        if request is not None:
            return {"type": "http.request", "body": request.body, "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        if self._gone.is_set():
            return
        if message["type"] == "http.response.start":
            self._tell_reader(self._begins, message["status"], tuple(message.get("headers", ())))
        elif message["type"] == "http.response.body":
            more: bool = message.get("more_body", False)
            piece: bytes = message.get("body", b"")
            self._given += bool(piece)
            self._tell_reader(self._arrives, piece, more)
            if more and self._given - self._taken >= _AHEAD:
                await self._wait_for_reader()

    async def _wait_for_reader(self) -> None:
        self._room = room = self._there.create_future()
        if self._given - self._taken >= _AHEAD:  # it may have read on before it could see `_room`
            await room
        self._room = None

    def _make_room(self) -> None:
        _wake(self._room)

    def _leave(self) -> None:
        self._gone.set()
        _wake(self._room)

    def _tell_reader(self, call: Callable[..., object], *values: Any) -> None:
        if self._home is self._there:
            call(*values)
            return
        try:
            self._home.call_soon_threadsafe(call, *values, context=Context())
        except RuntimeError:  # its loop has ended
            self._leave()


def _wake(future: asyncio.Future[None] | None) -> None:
    if future is not None and not future.done():
        future.set_result(None)

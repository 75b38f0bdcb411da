"""One HTTP/2 connection (RFC 9113); `h2exchange.py` has the exchanges on it.

Written on the protocol library `h2` because httpcore's connection tells the server nothing of an exchange that was
given up (the server goes on generating, and what it sends eats the window of all others), and gives up exchanges
that the server finishes after its GOAWAY, which nginx sends every thousand requests.
"""

from __future__ import annotations

import asyncio
from contextvars import Context
from typing import TYPE_CHECKING, Any

from h2.config import H2Configuration
from h2.connection import ConnectionState, H2Connection
from h2.errors import ErrorCodes
from h2.events import (
    ConnectionTerminated,
    DataReceived,
    RemoteSettingsChanged,
    ResponseReceived,
    StreamEnded,
    StreamReset,
)
from h2.exceptions import DenialOfServiceError, FrameTooLargeError, ProtocolError
from h2.settings import SettingCodes, Settings

from llmmw.errors import ConfigError, ResponseTooLarge
from llmmw.pool.engine import MAX_HEADER_BYTES, Lost
from llmmw.pool.engines.h2exchange import Exchanged, resolve

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from h2.events import Event

    from llmmw.pool.engine import Exchange

MAX_STREAMS = 100
"""Exchanges on one connection; a server may allow fewer."""
_WINDOW = 256 * 1024
"""Bytes that one slow reader lets pile up. The connection has room for all of them, so none delays another."""
_MAX_FRAME = 16 * 1024
_FRAME_HEAD = 9
_MAX_UNSENT = 4 * 1024 * 1024
"""Far above what sending a body leaves in the buffer, for that waits."""
_CLOSE_S = 1.0
"""How long a peer may take over its farewell."""


class Connection(asyncio.Protocol):
    """Exchanges of one connection, on its event loop.

    Args:
        keepalive_expiry: seconds after which it closes when idle.
        on_gone: told once when it can take no more exchanges.
    """

    def __init__(self, keepalive_expiry: float, on_gone: Callable[[Connection], object]) -> None:
        self._expiry = keepalive_expiry
        self._on_gone: Callable[[Connection], object] | None = on_gone
        self._loop = asyncio.get_running_loop()
        self._h2 = H2Connection(H2Configuration(client_side=True, header_encoding=None))
        self._open: dict[int, Exchanged] = {}
        self._buffer = bytearray()
        self._received = 0
        self._paused = False
        self._room: asyncio.Future[None] = self._loop.create_future()
        self._idle: asyncio.TimerHandle | None = None
        self._closed: asyncio.Future[None] = self._loop.create_future()
        self.transport: Any = None
        self.speaks_http2 = False
        self.ready: asyncio.Future[None] = self._loop.create_future()
        """Done when the server has said what it allows, or is gone."""

    @property
    def active(self) -> int:
        """Exchanges under way."""
        return len(self._open)

    @property
    def is_free(self) -> bool:
        """Whether it takes one exchange more."""
        if self._on_gone is None:
            return False
        return len(self._open) < min(MAX_STREAMS, self._h2.remote_settings.max_concurrent_streams)

    # ── requests ────────────────────────────────────────────────────────────────────────────────────────────────

    async def exchange(self, headers: Sequence[tuple[bytes, bytes]], body: bytes, told: Exchange) -> Exchanged:
        """Send a request and wait for the head of its response.

        Raises:
            Lost: the connection or the exchange broke.
            ConfigError: what is to be sent is not valid HTTP.
            UpstreamTimeout: the server stopped taking the request.
        """
        if self._idle is not None:
            self._idle.cancel()
        number = self._h2.get_next_available_stream_id()
        one = self._open[number] = Exchanged(self, number, self._received)
        try:
            try:
                self._h2.send_headers(number, headers, end_stream=not body)
            except ProtocolError as error:
                self._break_off(error)
                raise ConfigError(f"the request is not valid HTTP/2 ({type(error).__name__})") from None
            self._flush()
            if body:
                await self._send(one, body, told)
            await one.head()
        except BaseException:
            one.abandon()
            raise
        return one

    async def _send(self, one: Exchanged, body: bytes, told: Exchange) -> None:
        sent, progress = 0, self._loop.time()
        while sent < len(body) and not one.is_decided:
            size = min(self._h2.local_flow_control_window(one.number), self._h2.max_outbound_frame_size)
            if size <= 0 or self._paused:
                await self._wait_for_room(told, progress)
                continue
            self._h2.send_data(one.number, body[sent : sent + size], end_stream=sent + size >= len(body))
            sent, progress = sent + size, self._loop.time()
            self._flush()

    async def _wait_for_room(self, told: Exchange, since: float) -> None:
        try:
            async with asyncio.timeout_at(None if told.write_s is None else since + told.write_s):
                await asyncio.shield(self._room)
        except TimeoutError:
            raise told.stalled() from None

    def acknowledge(self, one: Exchanged, size: int) -> None:
        """Some of the body was taken: the server may send as much again."""
        if size and one.number in self._open and not self.transport.is_closing():
            self._h2.acknowledge_received_data(size, one.number)
            self._flush()
        if one.ended:
            self.leave(one)

    def leave(self, one: Exchanged, left: int = 0) -> None:
        """An exchange is over; one that is not finished is reset, so that the server stops. Idempotent."""
        if self._open.pop(one.number, None) is None:
            return
        if not self.transport.is_closing():
            if left:
                self._h2.acknowledge_received_data(left, one.number)
            stream = self._h2.streams.get(one.number)
            if stream is not None and not stream.closed:
                self._h2.reset_stream(one.number, ErrorCodes.CANCEL)
            self._flush()
        self._rest()

    def _rest(self) -> None:
        """Without exchanges: wait for the next one, or close where none can come."""
        if self._open:
            return
        if self._on_gone is None:
            self.close()
        else:
            # A context of its own: the caller's would be kept, and with it the call.
            self._idle = self._loop.call_later(self._expiry, self.close, context=Context())

    def _flush(self) -> None:
        data = self._h2.data_to_send()
        if data and not self.transport.is_closing():
            self.transport.write(data)

    # ── the peer ────────────────────────────────────────────────────────────────────────────────────────────────

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Say what we allow, to a peer that speaks HTTP/2."""
        self.transport = transport
        self.speaks_http2 = transport.get_extra_info("ssl_object").selected_alpn_protocol() == "h2"
        if not self.speaks_http2:
            return
        self._h2.local_settings = Settings(
            client=True,
            initial_values={
                SettingCodes.ENABLE_PUSH: 0,
                SettingCodes.INITIAL_WINDOW_SIZE: _WINDOW,
                SettingCodes.MAX_CONCURRENT_STREAMS: MAX_STREAMS,
                SettingCodes.MAX_HEADER_LIST_SIZE: MAX_HEADER_BYTES,
            },
        )
        self._h2.initiate_connection()
        self._h2.increment_flow_control_window(MAX_STREAMS * _WINDOW)
        self._flush()

    def data_received(self, data: bytes) -> None:
        """Hand the frames to their exchanges."""
        self._received += len(data)
        buffer = self._buffer
        buffer += data
        taken = 0
        try:
            # Frame by frame, because h2 takes a GOAWAY for the end, and what follows it in the same data for an error.
            while len(buffer) - taken >= _FRAME_HEAD and not self.transport.is_closing():
                size = int.from_bytes(buffer[taken : taken + 3], "big")
                if size > _MAX_FRAME:
                    raise FrameTooLargeError
                if len(buffer) - taken < _FRAME_HEAD + size:
                    break
                for event in self._h2.receive_data(bytes(buffer[taken : taken + _FRAME_HEAD + size])):
                    self._take(event)
                taken += _FRAME_HEAD + size
        except ProtocolError as error:
            self._break_off(error)
            return
        del buffer[:taken]
        self._flush()
        if self.transport.get_write_buffer_size() > _MAX_UNSENT:
            # Pings and settings without end, each of which wants an answer, from a peer that takes none.
            self._break_off(FrameTooLargeError("more to answer than the peer takes"))
            return
        self._there_is_room()

    def _take(self, event: Event) -> None:
        if isinstance(event, ConnectionTerminated):
            last = event.last_stream_id or 0
            for number in [number for number in self._open if number > last]:
                self._open[number].fail(Lost("the server goes away and has not begun the request", unprocessed=True))
            # h2 holds the connection for closed, but what was begun will be finished (RFC 9113, 6.8).
            self._h2.state_machine.state = ConnectionState.CLIENT_OPEN
            self._gone()
            self._rest()
            return
        if isinstance(event, RemoteSettingsChanged):
            resolve(self.ready)
            return
        one = self._open.get(getattr(event, "stream_id", 0) or 0)
        if one is None:
            return
        if isinstance(event, ResponseReceived):
            one.begins(event.headers or ())
        elif isinstance(event, DataReceived):
            one.add(event.data or b"", event.flow_controlled_length or 0)
        elif isinstance(event, StreamEnded):
            one.finish()
        elif isinstance(event, StreamReset):
            refused = event.error_code == ErrorCodes.REFUSED_STREAM
            one.fail(Lost("the server reset the exchange", any_byte=not refused, unprocessed=refused))

    def _break_off(self, error: ProtocolError) -> None:
        for one in list(self._open.values()):
            if isinstance(error, DenialOfServiceError) and not one.status:
                one.fail(ResponseTooLarge(f"the response's head is larger than {MAX_HEADER_BYTES} bytes"))
            else:
                one.fail(Lost(f"the server broke the protocol ({type(error).__name__})", any_byte=True))
        self._gone()
        self.transport.abort()

    def pause_writing(self) -> None:
        """The socket is full."""
        self._paused = True

    def resume_writing(self) -> None:
        """The socket takes more."""
        self._paused = False
        self._there_is_room()

    def _there_is_room(self) -> None:
        resolve(self._room)
        self._room = self._loop.create_future()

    def connection_lost(self, exc: Exception | None) -> None:
        """Whatever was under way breaks off."""
        why = "the server closed the connection" if exc is None else f"the connection broke ({type(exc).__name__})"
        for one in list(self._open.values()):
            one.fail(Lost(why, any_byte=bool(one.status) or self._received > one.mark))
        self._gone()
        self._there_is_room()
        resolve(self.ready)
        resolve(self._closed)

    # ── the end ─────────────────────────────────────────────────────────────────────────────────────────────────

    def _gone(self) -> None:
        on_gone, self._on_gone = self._on_gone, None
        if on_gone is not None:
            on_gone(self)

    def close(self) -> None:
        """Say farewell and close. What is under way breaks off."""
        self._gone()
        if self._idle is not None:
            self._idle.cancel()
        if not self.transport.is_closing():
            self._h2.close_connection()
            self._flush()
            self.transport.close()

    async def aclose(self) -> None:
        """The same, and wait for it."""
        self.close()
        try:
            async with asyncio.timeout(_CLOSE_S):
                await asyncio.shield(self._closed)
        except TimeoutError:
            self.transport.abort()

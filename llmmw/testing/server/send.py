"""Answers onto the wire."""

import socket
import struct
from contextlib import aclosing

from aiohttp import web

from .exchange import Answer, Plain, Streamed

SERVER = "llmmw-embedded (not a model)"
_EVENT_STREAM = "text/event-stream; charset=utf-8"


def plain(answer: Plain) -> web.Response:
    """A complete response; aiohttp writes it when the handler returns."""
    headers = {"Content-Type": answer.content_type, "Server": SERVER, **answer.headers}
    return web.Response(body=answer.body, status=answer.status, headers=headers)


def opened(answer: Answer) -> web.StreamResponse:
    """A response whose body the caller writes."""
    kind = _EVENT_STREAM if isinstance(answer, Streamed) else answer.content_type
    status = 200 if isinstance(answer, Streamed) else answer.status
    headers = {"Content-Type": kind, "Server": SERVER, **answer.headers}
    return web.StreamResponse(status=status, headers=headers)


async def streamed(request: web.BaseRequest, answer: Streamed) -> web.StreamResponse:
    """Write events as they come; closing early (the client left) closes their source."""
    response = opened(answer)
    async with aclosing(answer.events) as events:
        await response.prepare(request)
        async for chunk in events:
            await response.write(chunk)
        await response.write_eof()
    return response


def hang_up(request: web.BaseRequest, *, reset: bool) -> None:
    """Close the TCP connection: a reset, or an orderly end after what was written."""
    transport = request.transport
    if transport is None:
        return
    if not reset:
        transport.close()
        return
    raw = transport.get_extra_info("socket")
    if raw is not None:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()

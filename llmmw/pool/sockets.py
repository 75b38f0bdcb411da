"""Letting go of sockets whose event loop is dead or belongs to the parent process.

Closing a transport needs its loop. On a dead loop that raises; in a forked child it would take the parent's socket
out of the parent's epoll set, which both share. So the file descriptor alone is closed: no FIN is sent while the
parent holds it, and no TLS farewell is written into the parent's session.
"""

from __future__ import annotations

import asyncio
import contextlib
from contextvars import Context
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

T = TypeVar("T")


async def detached(connect: Coroutine[Any, Any, T], close: Callable[[T], object]) -> T:
    """Run what makes a connection in a context of its own.

    A transport's handles keep the context that they are made in as long as the connection lives, and with the
    caller's its call, its prompt and whoever waits for it.

    Args:
        connect: makes the connection.
        close: called with it where the caller was cancelled in the moment it was ready.
    """
    task = asyncio.get_running_loop().create_task(connect, context=Context())
    try:
        return await task
    except asyncio.CancelledError:
        if task.done() and not task.cancelled() and task.exception() is None:
            close(task.result())
        raise


def abandon(transport: Any) -> None:
    """Close a transport's socket without its loop, and keep its finaliser from warning. Never raises.

    Works on asyncio's own transports. uvloop's close themselves with their loop, and in a forked child they stay
    open until it ends, because uvloop gives no access to the descriptor.
    """
    with contextlib.suppress(AttributeError, OSError):
        inner = getattr(transport, "_ssl_protocol", None)
        if inner is not None:
            transport._closed = True  # noqa: SLF001 — asyncio offers no way to drop a transport without its loop
            transport = inner._transport  # noqa: SLF001 — likewise
        sock, transport._sock = transport._sock, None  # noqa: SLF001 — likewise
        if sock is not None:
            sock.close()

"""Connections of somebody else's HTTP client whose event loop is gone.

An httpx or httpx2 client keeps its idle connections when `asyncio.run` ends, and the next one sends a request over
such a connection (the server gets it) before it notices that it cannot read the answer: "Event loop is closed". So
whoever moves from loop to loop must make the client forget them first (under uvloop, which closes its sockets with
the loop, the client notices in time). There is no public way, hence the names
with underscores; where a version of the library has others, nothing is done.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from llmmw.pool.sockets import abandon

if TYPE_CHECKING:
    from collections.abc import Iterator

_MAX_NESTING = 8


def forget_orphans(http_client: Any, *, forked: bool, ending: bool = True) -> int:
    """Drop connections of a dead loop, of the running loop (where that is `ending`), or all in a forked child.

    Returns:
        How many were dropped. A sync client has none: its sockets belong to no loop.
    """
    dropped = 0
    for pool in _pools(http_client):
        for connection in list(pool._connections):  # noqa: SLF001 — see above
            transport = _transport_of(connection)
            if transport is None:
                continue
            loop = getattr(transport, "_loop", None)
            if forked or (loop is not None and loop.is_closed()):
                abandon(transport)
            elif ending and loop is not None and loop is _running():
                transport.abort()
            else:
                continue
            pool._connections.remove(connection)  # noqa: SLF001 — httpcore offers no other way to drop one
            dropped += 1
    return dropped


def _pools(http_client: Any) -> Iterator[Any]:
    transports = [getattr(http_client, "_transport", None), *getattr(http_client, "_mounts", {}).values()]
    for transport in transports:
        pool = getattr(transport, "_pool", None)
        if isinstance(getattr(pool, "_connections", None), list):
            yield pool


def _transport_of(connection: Any) -> Any:
    """The asyncio transport below httpcore's and anyio's wrappers."""
    for _ in range(_MAX_NESTING):
        stream = getattr(connection, "_network_stream", None)
        if stream is not None:
            stream = getattr(stream, "_stream", None)
            stream = getattr(stream, "transport_stream", stream)
            return getattr(stream, "_transport", None)
        connection = getattr(connection, "_connection", None)
    return None


def _running() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None

"""The clients without anything: what every other row is compared with."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import client_cpu

from peers.protocol import Job, Peer, without_cache

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable
    from contextlib import AbstractAsyncContextManager

    from peers.protocol import Ask, Way


def _bare(client: Callable[[str], AbstractAsyncContextManager[Ask]]) -> Way:
    @asynccontextmanager
    async def way(job: Job) -> AsyncGenerator[Ask]:
        without_cache(job)
        async with client(job.url) as ask:
            yield ask

    way.__doc__ = client.__doc__
    return way


AIOHTTP = Peer("aiohttp", ("aiohttp",), "import aiohttp", {"aiohttp": _bare(client_cpu.aiohttp_client)})
HTTPX = Peer("httpx", ("httpx",), "import httpx", {"httpx": _bare(client_cpu.httpx_client)})
HTTPX2 = Peer("httpx2", ("httpx2",), "import httpx2", {"httpx2": _bare(client_cpu.httpx2_client)})

"""aiocache's decorator, around a function over bare aiohttp."""

from __future__ import annotations

from contextlib import asynccontextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any

from peers.adapters.function import asking
from peers.protocol import CannotError, Job, Peer

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from peers.protocol import Ask


@asynccontextmanager
async def decorator(job: Job) -> AsyncGenerator[Ask]:
    """@cached(ttl=300) in memory; against a stampede @cached_stampede(ttl=300, lease=10)."""
    if not job.caches:
        raise CannotError("only a cache")
    if job.purpose == "disk":
        raise CannotError("memory, Redis and memcached only")
    aiocache = import_module("aiocache")
    cached: Any = aiocache.cached(ttl=300)
    if job.purpose == "stampede":
        cached = aiocache.cached_stampede(ttl=300, lease=10)
    async with asking(job) as ask:
        yield cached(ask)


PEER = Peer("aiocache", ("aiocache",), "import aiocache", {"aiocache decorator": decorator}, beside="aiohttp")

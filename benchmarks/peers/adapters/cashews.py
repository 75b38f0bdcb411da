"""cashews' decorator, around a function over bare aiohttp."""

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
    """@cache(ttl="5m") with setup("mem://?size=100000") or "disk://"; its protection against stampedes is on, as it
    comes."""
    if not job.caches:
        raise CannotError("only a cache")
    cache: Any = import_module("cashews").Cache()
    if job.purpose == "disk":
        cache.setup(f"disk://?directory={job.directory}")
    else:
        cache.setup("mem://?size=100000")
    async with asking(job) as ask:
        yield cache(ttl="5m")(ask)
        await cache.close()


PEER = Peer("cashews", ("cashews",), "import cashews", {"cashews decorator": decorator}, beside="aiohttp")

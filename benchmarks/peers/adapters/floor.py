"""The least that a cache must do: canonical JSON, sha256, a dict; no expiry, no limit, nothing counted."""

from __future__ import annotations

import hashlib
import json
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from peers.adapters.function import asking
from peers.protocol import CannotError, Job, Peer

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from peers.protocol import Ask


@asynccontextmanager
async def by_hand(job: Job) -> AsyncGenerator[Ask]:
    """A dict keyed by the sha256 of the arguments as sorted JSON, around a function over bare aiohttp."""
    if job.purpose == "disk" or not job.caches:
        raise CannotError("only a dict")
    stored: dict[bytes, object] = {}
    async with asking(job) as ask:

        async def cached(prompt: str, **changes: object) -> object:
            key = hashlib.sha256(json.dumps([prompt, changes], sort_keys=True).encode()).digest()
            if key not in stored:
                stored[key] = await ask(prompt, **changes)
            return stored[key]

        yield cached


PEER = Peer("floor", (), "", {"a dict by hand": by_hand}, environment="aiohttp")

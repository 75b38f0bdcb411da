"""The function that decorators are put around: one call over bare aiohttp."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from client_cpu import aiohttp_client

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from peers.protocol import Ask, Job


@asynccontextmanager
async def asking(job: Job) -> AsyncGenerator[Ask]:
    """A function of the prompt alone; for probes one that takes every field (it closes over `post`)."""
    async with aiohttp_client(job.url) as post:

        async def ask(prompt: str) -> object:
            return await post(prompt)

        async def ask_with(prompt: str, **changes: Any) -> object:
            return await post(prompt, **(changes | changes.pop("extra_body", {})))

        yield ask_with if job.purpose == "probe" else ask

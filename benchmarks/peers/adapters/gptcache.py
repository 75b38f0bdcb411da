"""GPTCache's exact match, around a function over bare aiohttp (its own adapter needs an openai SDK before 1.0)."""

from __future__ import annotations

from contextlib import asynccontextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from peers.adapters.function import asking
from peers.protocol import CannotError, Job, Peer

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from peers.protocol import Ask


@asynccontextmanager
async def exact(job: Job) -> AsyncGenerator[Ask]:
    """get(prompt), else aiohttp and put(prompt, answer); init(pre_embedding_func=get_prompt), a map of 100,000."""
    if job.purpose in {"uncached", "storm", "defaults", "told"}:
        raise CannotError("only a cache")
    if job.purpose == "disk":
        raise CannotError("its map is written when the process ends; SQLite needs a vector store beside it")
    gptcache, api = import_module("gptcache"), import_module("gptcache.adapter.api")
    gptcache.cache.init(
        pre_embedding_func=import_module("gptcache.processor.pre").get_prompt,
        data_manager=import_module("gptcache.manager").get_data_manager(
            data_path=str(Path(job.directory) / "map"), max_size=100_000
        ),
    )
    async with asking(job) as ask:

        async def cached(prompt: str, **changes: object) -> object:
            found = api.get(prompt)
            if found is None:
                found = await ask(prompt, **changes)
                api.put(prompt, found)
            return found

        yield cached


PEER = Peer("gptcache", ("gptcache",), "import gptcache", {"GPTCache (exact)": exact}, beside="aiohttp")

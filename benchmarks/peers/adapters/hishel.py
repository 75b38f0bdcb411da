"""hishel's httpx client: an HTTP cache."""

from __future__ import annotations

from contextlib import asynccontextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from client_cpu import body

from peers.protocol import KEY, CannotError, Job, Peer

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from peers.protocol import Ask


@asynccontextmanager
async def client(job: Job) -> AsyncGenerator[Ask]:
    """hishel.httpx.AsyncCacheClient over SQLite; it keeps answers to GET and HEAD (to POST only with rfc= and a server
    that sends Cache-Control)."""
    if job.purpose not in {"miss", "stampede"}:
        raise CannotError("caches GET and HEAD only" if job.caches else "only a cache")
    hishel = import_module("hishel")
    storage = hishel.AsyncSqliteStorage(database_path=Path(job.directory) / "hishel.db")
    async with import_module("hishel.httpx").AsyncCacheClient(storage=storage, timeout=60) as http:

        async def ask(prompt: str, **changes: Any) -> object:
            response = await http.post(
                f"{job.url}/chat/completions",
                json=body(prompt) | changes,
                headers={"authorization": f"Bearer {KEY}"},
            )
            return response.json()["choices"][0]["message"]["content"]

        yield ask


PEER = Peer("hishel", ("hishel", "httpx"), "import hishel.httpx", {"hishel": client})

"""LangChain's ChatOpenAI."""

from __future__ import annotations

from contextlib import asynccontextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from client_cpu import body

from peers.protocol import KEY, Job, Peer

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from peers.protocol import Ask

_BOUND = ("tools", "response_format", "stop", "seed", "logit_bias", "max_tokens", "top_p", "temperature")
"""Given to a call, as `bind` does; the others are settings of the model object."""


@asynccontextmanager
async def chat(job: Job) -> AsyncGenerator[Ask]:
    """ChatOpenAI(...).ainvoke; cache=InMemoryCache() or langchain_community's SQLiteCache; max_retries=20 in storms
    (its default is the SDK's 2); told the rate, InMemoryRateLimiter."""
    chat_openai = import_module("langchain_openai").ChatOpenAI
    options: dict[str, Any] = {"cache": False}
    if job.purpose == "disk":
        caches = import_module("langchain_community.cache")
        options["cache"] = caches.SQLiteCache(database_path=str(Path(job.directory) / "langchain.db"))
    elif job.caches:
        options["cache"] = import_module("langchain_core.caches").InMemoryCache()
    if job.purpose != "defaults":
        options["max_retries"] = job.retries(2)
    if job.purpose == "told":
        limiters = import_module("langchain_core.rate_limiters")
        options["rate_limiter"] = limiters.InMemoryRateLimiter(
            requests_per_second=job.rate, check_every_n_seconds=0.01, max_bucket_size=job.burst
        )
    models: dict[str, Any] = {}

    def model_of(**settings: Any) -> Any:
        made = models.get(repr(settings))
        if made is None:
            made = models[repr(settings)] = chat_openai(**settings, **options)
        return made

    plain = body("")
    usual = model_of(base_url=job.url, api_key=KEY, model=plain["model"], temperature=plain["temperature"])

    async def ask(prompt: str, **changes: Any) -> object:
        messages = changes.pop("messages", None) or body(prompt)["messages"]
        if not changes:
            return (await usual.ainvoke(messages)).content
        bound = {name: changes.pop(name) for name in _BOUND if name in changes}
        settings = {"base_url": job.url, "api_key": KEY, "model": plain["model"], "temperature": plain["temperature"]}
        return (await model_of(**(settings | changes)).ainvoke(messages, **bound)).content

    yield ask


PEER = Peer(
    "langchain",
    ("langchain-openai", "langchain-core", "langchain-community"),
    "from langchain_openai import ChatOpenAI",
    {"LangChain": chat},
)

"""DSPy's language model object."""

from __future__ import annotations

import warnings
from contextlib import asynccontextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any

from client_cpu import body

from peers.protocol import KEY, CannotError, Job, Peer

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from peers.protocol import Ask


@asynccontextmanager
async def lm(job: Job) -> AsyncGenerator[Ask]:
    """dspy.LM("openai/m", api_base=...).acall(messages=...) with its own engine; configure_cache with one tier; history
    off; num_retries=20 in storms (its default is 3)."""
    if job.purpose == "told":
        raise CannotError("no rate limit to set")
    dspy = import_module("dspy")
    warnings.filterwarnings("ignore", module="dspy")
    on_disk = job.purpose == "disk"
    dspy.configure_cache(
        enable_disk_cache=on_disk,
        enable_memory_cache=job.caches and not on_disk,
        disk_cache_dir=job.directory if on_disk else None,
    )
    if not dspy.settings.disable_history:  # it may be set from one task only
        dspy.configure(disable_history=True)
    plain = body("")

    def model_of(**settings: Any) -> Any:
        return dspy.LM(f"openai/{settings.pop('model')}", cache=job.caches, num_retries=job.retries(3), **settings)

    usual = {"model": plain["model"], "api_base": job.url, "api_key": KEY, "temperature": plain["temperature"]}
    asker = model_of(**usual)

    async def ask(prompt: str, **changes: Any) -> object:
        messages = changes.pop("messages", None) or body(prompt)["messages"]
        model = asker
        settings = {
            "api_base" if name == "base_url" else name: changes.pop(name)
            for name in ("base_url", "api_key", "model")
            if name in changes
        }
        if settings:
            model = model_of(**(usual | settings))
        return (await model.acall(messages=messages, **changes))[0]

    yield ask


PEER = Peer("dspy", ("dspy",), "import dspy", {"DSPy": lm})

"""LiteLLM: `acompletion`, and its Router.

Its first cache hit needs packages that `pip install litellm` does not bring (fastapi, orjson, soundfile and more): its
extra "proxy" is installed beside it, after its size was taken.
"""

from __future__ import annotations

from contextlib import asynccontextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any

from client_cpu import MODEL, body

from peers.protocol import KEY, CannotError, Job, Peer

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from peers.protocol import Ask


def _package(job: Job) -> Any:
    litellm: Any = import_module("litellm")
    litellm.telemetry = False
    litellm.suppress_debug_info = True
    litellm.cache = None
    if job.purpose == "disk":
        litellm.cache = litellm.Cache(type="disk", disk_cache_dir=job.directory)
    elif job.caches:
        litellm.cache = litellm.Cache(type="local")
    return litellm


def _changed(changes: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    found = fields | changes
    found["model"] = f"openai/{found['model']}"
    return found


@asynccontextmanager
async def alone(job: Job) -> AsyncGenerator[Ask]:
    """litellm.acompletion("openai/m", api_base=...), a model that its price list does not know, as a local server's is;
    litellm.cache = Cache(type="local" or "disk"); num_retries=20 in storms (its default is the SDK's 2)."""
    if job.purpose == "told":
        raise CannotError("no rate limit that waits")
    litellm = _package(job)
    options: dict[str, Any] = {"caching": True} if job.caches else {}
    if job.purpose == "storm":
        options["num_retries"] = job.retries(2)
    elif job.purpose != "defaults":
        options["max_retries"] = 0

    async def ask(prompt: str, base_url: str = job.url, api_key: str = KEY, **changes: Any) -> object:
        made = await litellm.acompletion(
            **_changed(changes, body(prompt)), api_base=base_url, api_key=api_key, **options
        )
        return made.choices[0].message.content

    yield ask


@asynccontextmanager
async def router(job: Job) -> AsyncGenerator[Ask]:
    """litellm.Router over one deployment, cache_responses=True where it caches; num_retries=20 in storms (its default
    is 2), max_parallel_requests as many as calls; told the rate, rpm of the deployment and its limit check."""
    litellm = _package(job)
    deployment: dict[str, Any] = {"model": f"openai/{MODEL}", "api_base": job.url, "api_key": KEY}
    settings: dict[str, Any] = {"num_retries": job.retries(2), "cache_responses": job.caches}
    if job.purpose in {"defaults", "storm", "told"}:
        settings["retry_after"] = 1
    if job.purpose == "defaults":
        settings = {}
    if job.purpose == "told":
        deployment["rpm"] = int(job.rate * 60)
        settings["optional_pre_call_checks"] = ["enforce_model_rate_limits"]
    entry = {"model_name": MODEL, "litellm_params": deployment}
    asker = litellm.Router(model_list=[entry], **settings)

    async def ask(prompt: str, **changes: Any) -> object:
        if changes.keys() & {"base_url", "api_key", "model"}:
            raise CannotError("belongs to the deployment")
        made = await asker.acompletion(**(body(prompt) | changes))
        return made.choices[0].message.content

    yield ask


PEER = Peer("litellm", ("litellm",), "import litellm", {"litellm": alone, "litellm Router": router}, "litellm_cache")

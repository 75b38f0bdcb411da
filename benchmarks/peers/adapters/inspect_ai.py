"""inspect_ai's model object."""

from __future__ import annotations

import os
from contextlib import asynccontextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any

from client_cpu import body

from peers.protocol import KEY, CannotError, Job, Peer

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from peers.protocol import Ask

_NAMES = {"stop": "stop_seqs"}


@asynccontextmanager
async def model(job: Job) -> AsyncGenerator[Ask]:
    """get_model("openai-api/peer/m", base_url=...).generate(messages, cache=True); its cache is files of pickles, in
    INSPECT_CACHE_DIR; max_connections as many as calls, in storms its own adaptive connections; retries without end, as
    they come."""
    if job.purpose in {"memory", "miss"}:
        raise CannotError("no cache in memory")
    if job.purpose == "told":
        raise CannotError("no rate limit to set")
    if job.directory:
        os.environ["INSPECT_CACHE_DIR"] = job.directory
    found = import_module("inspect_ai.model")
    made: dict[str, Any] = {"system": found.ChatMessageSystem, "user": found.ChatMessageUser}
    made["assistant"] = found.ChatMessageAssistant
    plain = body("")
    config: dict[str, Any] = {"temperature": plain["temperature"]}
    if job.purpose not in {"storm", "defaults"}:
        config["max_connections"] = job.at_once

    def model_of(base_url: str = job.url, api_key: str = KEY, name: str = plain["model"]) -> Any:
        return found.get_model(
            f"openai-api/peer/{name}",
            base_url=base_url,
            api_key=api_key,
            config=found.GenerateConfig(**config),
        )

    usual = model_of()

    async def ask(prompt: str, **changes: Any) -> object:
        messages = [
            made[message["role"]](content=message["content"])
            for message in changes.pop("messages", None) or body(prompt)["messages"]
        ]
        options: dict[str, Any] = {}
        if "tools" in changes:
            options["tools"] = [
                import_module("inspect_ai.tool").ToolInfo(name=tool["function"]["name"], description="what it does")
                for tool in changes.pop("tools")
            ]
        if "response_format" in changes:
            raise CannotError("no field for it")
        asker = usual
        if "model" in changes:
            changes["name"] = changes.pop("model")
        settings = {name: changes.pop(name) for name in ("base_url", "api_key", "name") if name in changes}
        if settings:
            asker = model_of(**settings)
        if changes:
            options["config"] = found.GenerateConfig(**{_NAMES.get(name, name): of for name, of in changes.items()})
        answer = await asker.generate(messages, cache=job.caches, **options)
        return answer.completion

    yield ask


PEER = Peer("inspect_ai", ("inspect_ai",), "from inspect_ai.model import get_model", {"inspect_ai": model})

"""`VLLMEngine`: vLLM inside this process, asked as its server would be asked, without the network."""

from __future__ import annotations

import asyncio
import os
import warnings
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast

from llmmw.endpoints.hosting import Hosting
from llmmw.endpoints.openai import HTTPEndpoint
from llmmw.endpoints.salts import Salts
from llmmw.endpoints.vllm import dressed
from llmmw.errors import ConfigError, MissingExtra
from llmmw.pool import BoundPool, ConnectionPool
from llmmw.pool.engines.asgi import AppEngine
from llmmw.pool.guard import Guard
from llmmw.settings import text

if TYPE_CHECKING:
    from collections.abc import Mapping

    from llmmw.call import Call, Reply
    from llmmw.env import Env

_BASE = "http://vllm.invalid/v1"
"""Where the application's paths begin. The name is never resolved (RFC 6761)."""
_WHAT = "vLLM engine"
_OF_AN_ENGINE = ("generate", "abort", "errored", "vllm_config")


class VLLMEngine(HTTPEndpoint):
    """A vLLM engine (`AsyncLLM`) in this process.

        engine = VLLMEngine("meta-llama/Llama-3.1-8B-Instruct", max_model_len=8192, scheduling_policy="priority")
        async with Client(engine, model="meta-llama/Llama-3.1-8B-Instruct") as client:
            reply = await client.chat("Hello")

    Requests, answers, streams and refusals are those of vLLM's server, because its own application makes them. The
    engine starts with the first call (20 s and more; `ready` waits for it), on a thread and an event loop of its own,
    so it outlives the caller's loop. Whoever closes the client or stack closes it; a script that starts one needs
    `if __name__ == "__main__":`. A dead engine stays dead: make a new one. The call's priority counts where
    scheduling_policy is "priority".

    Args:
        model: name or directory of a model; or an `AsyncLLM` that is already made, which stays on the event loop on
            which it was made and is closed by who made it; or another VLLMEngine, whose engine is used (one vLLM for
            two clients) and which closes it.
        name: what it is called in statistics, in routers and in the keys of a cache; by default after the model.
        cache_salt: keeps tenants apart in vLLM's prefix cache, as for VLLMEndpoint.
        drain_timeout: seconds that closing waits for calls in flight.
        options: what `vllm serve` takes, with underscores, such as max_model_len=, gpu_memory_utilization=,
            served_model_name=, chat_template=, enable_auto_tool_choice=, tool_call_parser=. Whether vLLM knows them is
            seen when it starts. For an AsyncLLM those of the API only.

    Raises:
        MissingExtra: vLLM is not installed.
        ConfigError: `model` is neither.
    """

    recommended: ClassVar[Mapping[str, Any]] = {"concurrency": 256}
    """Options of `Stack.recommended` for a client that is given no stack: what vLLM runs at once by default."""

    def __init__(
        self,
        model: object,
        *,
        name: str | None = None,
        cache_salt: str | bool | None = None,
        drain_timeout: float | str = 10.0,
        **options: Any,
    ) -> None:
        self._salts = Salts(cache_salt)
        self._other = model if isinstance(model, VLLMEngine) else None
        if self._other is None:
            self._label, self._hosting = _given(model, options)
        elif options:
            raise ConfigError(f"{', '.join(options)}: belongs to {self._other!r}, whose engine is used")
        else:
            self._label, self._hosting = self._other._label, self._other._hosting  # noqa: SLF001 — its own kind
        # Who waits is vLLM's to say, by its priorities; in the pool they would wait in order of arrival.
        pool = ConnectionPool(max_connections=1_000_000, max_connection_age=None, drain_timeout=drain_timeout)
        super().__init__(_BASE, pool=pool, duplicate_ok=True)
        self._name = f"vllm:{self._label}" if name is None else text("VLLMEngine(name=)", name)

    @property
    def capabilities(self) -> frozenset[str]:
        """Batches of chats and of prompts too; and a lost call costs nothing but computing time."""
        return super().capabilities | {"batch:chat", "batch:complete"}

    def start(self, env: Env) -> None:
        """The engine's env.

        Raises:
            ConfigError: the endpoint already works for another stack.
        """
        if self._pool is not None and self._env is not env:
            raise ConfigError(f"{self!r} already belongs to another stack; VLLMEngine(it) is one more on the same vLLM")
        super().start(env)

    async def ready(self) -> Self:
        """Start the engine, where no call has, and wait until it runs.

        Raises:
            ConfigError: vLLM refuses its options.
            ConnectionFailed: it did not start.
            Closed: it was closed.
        """
        await self._hosting.ready()
        return self

    async def _attempt(self, call: Call) -> Reply:
        await self._hosting.ready()
        return await super()._attempt(dressed(call, self._salts, by_priority=self._hosting.hosted.by_priority))

    def _open(self) -> BoundPool:
        if self._pool is None:
            self._pool = BoundPool(self._settings, self._env, Guard(), lambda _: AppEngine(self._hosting))
        return self._pool

    async def aclose(self) -> None:
        """Wait for calls in flight (at most `drain_timeout`), then end the engine, its processes and thread."""
        try:
            await super().aclose()
        finally:
            if self._other is None:  # however often the caller is cancelled: what is half closed would keep the GPU
                await asyncio.shield(self._hosting.aclose())

    def gauges(self) -> dict[str, object]:
        """`state`, and how many calls vLLM works on or keeps waiting (`unfinished`), beside those of the pool."""
        readings = {"engine": "vllm", "state": self._hosting.state, "unfinished": self._hosting.unfinished()}
        return {**super().gauges(), **readings}

    def __repr__(self) -> str:
        return f"VLLMEngine({self._name!r})"

    def __del__(self) -> None:
        hosting = getattr(self, "_hosting", None)
        if hosting is not None and self._other is None and hosting.state in {"starting", "running"}:
            warnings.warn(f"{self!r} was not closed", ResourceWarning, stacklevel=2)
            hosting.end()


def _given(model: object, options: dict[str, Any]) -> tuple[str, Hosting]:
    """What an engine is called, and what runs it."""
    from llmmw.endpoints.vllm_app import joined, started  # noqa: PLC0415 — loads when it is used

    if isinstance(model, str | os.PathLike):
        if find_spec("vllm") is None:
            raise MissingExtra("VLLMEngine needs vLLM, which is not installed: pip install 'llmmw[vllm]'")
        path = text("VLLMEngine(model=)", os.fspath(cast("str", model)))
        return path, Hosting(lambda: started(path, options), label=_WHAT)
    engine: Any = model
    if not all(hasattr(engine, name) for name in _OF_AN_ENGINE):
        raise ConfigError(
            f"VLLMEngine(model={type(model).__name__}): expected the name or directory of a model, or vLLM's AsyncLLM"
        )
    # Its task that reads the outputs; where it has none yet, any loop will do.
    reading: asyncio.Task[None] | None = getattr(engine, "output_handler", None)
    loop = None if reading is None else reading.get_loop()
    return engine.vllm_config.model_config.model, Hosting(lambda: joined(engine, options), loop=loop, label=_WHAT)

"""`ModuleLLM`: Mesa-LLM's, with its questions going through a stack of llmmw."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import mesa_llm.module_llm as upstream
import tenacity

from llmmw_mesa.asking import OPTIONS, aask, ask, kwargs_of, shared_of, state_of
from llmmw_mesa.options import Options

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from llmmw import Stack
    from llmmw_mesa.options import Scope


@tenacity.retry(
    retry=tenacity.retry_if_exception_type(upstream.RETRYABLE_EXCEPTIONS),
    stop=tenacity.stop_after_attempt(4),
    reraise=True,
)
def _generate_once(
    self: Any,
    prompt: str | list[str] | None = None,
    tool_schema: list[dict[str, Any]] | None = None,
    tool_choice: str = "auto",
    response_format: dict[str, Any] | object | None = None,
    system_prompt: str | None = None,
    suppress_thinking: bool = False,  # noqa: FBT001, FBT002 — Mesa-LLM's, after 0.3
) -> Any:
    kwargs = kwargs_of(self, prompt, tool_schema, tool_choice, response_format, system_prompt, quiet=suppress_thinking)
    return ask(self, kwargs, once=True)


def generate(
    self: Any,
    prompt: str | list[str] | None = None,
    tool_schema: list[dict[str, Any]] | None = None,
    tool_choice: str = "auto",
    response_format: dict[str, Any] | object | None = None,
    system_prompt: str | None = None,
    suppress_thinking: bool = False,  # noqa: FBT001, FBT002 — Mesa-LLM's, after 0.3
) -> Any:
    """Ask the model.

    `generate.__wrapped__` is one attempt, as in Mesa-LLM; what `generate.retry_with(...)` makes tries 4 times at most.

    Args:
        self: a ModuleLLM, ours or Mesa-LLM's.
        prompt: one user message, several, or none.
        tool_schema: the tools it may call.
        tool_choice: which of them.
        response_format: a schema, or a pydantic class.
        system_prompt: for this call, in place of the module's.
        suppress_thinking: where Mesa-LLM knows it.

    Returns:
        A litellm ModelResponse; every hit is an object of its own.

    Raises:
        litellm.exceptions.APIError: and its kin, with a note that lists the attempts.
    """
    kwargs = kwargs_of(self, prompt, tool_schema, tool_choice, response_format, system_prompt, quiet=suppress_thinking)
    return ask(self, kwargs, once=False)


for _name in ("__wrapped__", "retry", "retry_with"):
    setattr(generate, _name, getattr(_generate_once, _name))


async def agenerate(
    self: Any,
    prompt: str | list[str] | None = None,
    tool_schema: list[dict[str, Any]] | None = None,
    tool_choice: str = "auto",
    response_format: dict[str, Any] | object | None = None,
    system_prompt: str | None = None,
    suppress_thinking: bool = False,  # noqa: FBT001, FBT002 — Mesa-LLM's, after 0.3
) -> Any:
    """`generate` for async code, on any loop."""
    kwargs = kwargs_of(self, prompt, tool_schema, tool_choice, response_format, system_prompt, quiet=suppress_thinking)
    return await aask(self, kwargs)


def get_performance_stats(self: Any) -> dict[str, Any]:
    """What was asked. Pull request #270's keys and those beside them count this object's own calls.

    request_count: calls, hits included; cache_hits, cache_hit_rate (0.0 before the first call), cache_misses,
    coalesced, errors. All else is the engine's, which all with the same server, credential and options share:
    batch_count, upstream_requests, tokens, latencies, layers, by_agent and so on; "shared" holds the engine's own
    figures of the first six.
    """
    state, found = state_of(self), dict(shared_of(self).stats())
    mine = state.figures.snapshot()
    own = {
        "request_count": mine["calls"],
        "cache_hits": mine["hits"],
        "cache_misses": mine["calls"] - mine["hits"],
        "cache_hit_rate": mine["hits"] / mine["calls"] if mine["calls"] else 0.0,
        "coalesced": mine["joined"],
        "errors": mine["failures"],
    }
    return found | {"shared": {name: found[name] for name in own}} | own


async def cleanup(self: Any) -> None:
    """Send what waits and give up this object's part of the engine; the last user closes it. Idempotent.

    The statistics stay, and a later call opens it again.
    """
    state = state_of(self)
    if state.shared is not None:
        await state.shared.aclose(state)


def close(self: Any) -> None:
    """`cleanup` for plain code."""
    state = state_of(self)
    if state.shared is not None:
        state.shared.close(state)


METHODS = {
    "generate": generate,
    "agenerate": agenerate,
    "get_performance_stats": get_performance_stats,
    "cleanup": cleanup,
    "close": close,
}
"""What `install()` gives to Mesa-LLM's own class."""


class ModuleLLM(upstream.ModuleLLM):
    """Mesa-LLM's ModuleLLM with caching, joining, rate limits, retries and one loop; see `Options` for the settings.

    All with the same model, api_base, credential and options share one engine. `async with` it, or `cleanup()`.

    Raises:
        ConfigError: a value that cannot work.
        ValueError: as Mesa-LLM's own.
    """

    def __init__(
        self,
        llm_model: str,
        api_base: str | None = None,
        system_prompt: str | None = None,
        enable_caching: bool = False,  # noqa: FBT001, FBT002 — pull request #270's constructor
        enable_batching: bool = False,  # noqa: FBT001, FBT002 — as above
        cache_size: int = 1000,
        cache_ttl: float | str = 300.0,
        batch_size: int = 10,
        *,
        stack: Stack | None = None,
        sampling: Literal["share", "lanes", "deterministic"] = "share",
        cache_scope: Scope = "agent",
        cache_dir: str | None = None,
        run_seed: int | str | None = None,
        flush_interval: float | str = 0.005,
        max_concurrency: int | str = 64,
        rpm: int | None = None,
        tpm: int | None = None,
        timeout: float | str = 60.0,
        max_attempts: int = 4,
        deadline: float | str = 180.0,
    ) -> None:
        given = locals()
        options = Options(**{name: given[name] for name in Options.__dataclass_fields__})  # all of them are arguments
        super().__init__(llm_model=llm_model, api_base=api_base, system_prompt=system_prompt)
        self.__dict__[OPTIONS] = options

    generate = generate
    agenerate = agenerate
    get_performance_stats = get_performance_stats
    cleanup = cleanup
    close = close

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

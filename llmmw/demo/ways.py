"""The three ways of running the workload: a bare SDK call by call, the same concurrently, and through llmmw."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from llmmw.call import using
from llmmw.edges.client import Client
from llmmw.env import SYSTEM_CLOCK
from llmmw.errors import LLMMWError, MissingExtra
from llmmw.stack import Stack

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from llmmw.demo.workload import Question, Workload

SDK_DEADLINE_S = 60.0


class Result(msgspec.Struct):
    """What one way cost, seen from the client."""

    way: str
    wall_s: float = 0.0
    upstream_calls: int = 0
    """HTTP requests sent, the SDK's own retries included."""
    tokens: int = 0
    """Prompt and completion tokens that the server reported for answers it was asked for."""
    failures: int = 0
    """Questions without an answer."""
    hit_rate: float = 0.0
    """Share of the questions answered from the cache."""
    coalesced: int = 0
    answers: int = 0
    stats: dict[str, Any] = {}
    """`get_performance_stats()` of llmmw."""


class Progress(Protocol):
    """Told after each question."""

    def __call__(self, answered: int, failed: int) -> None:
        """Counts so far."""
        ...


class World(Protocol):
    """Where the questions go; it may make trouble at the start of a tick."""

    @property
    def base_url(self) -> str:
        """The server to ask."""
        ...

    @property
    def fallbacks(self) -> Sequence[str]:
        """Other servers that llmmw may ask."""
        ...

    def start_way(self) -> None:
        """Forget the way before: counters, limits, caches."""
        ...

    def start_tick(self, tick: int) -> None:
        """Begin or end trouble."""
        ...


class Setting(msgspec.Struct, frozen=True):
    """What all ways share."""

    workload: Workload
    model: str
    api_key: str | None = None

    @property
    def limits(self) -> dict[str, Any]:
        """Fields that bound the answer."""
        fields = {"max_tokens": self.workload.max_tokens, "stop": list(self.workload.stop)}
        return {name: value for name, value in fields.items() if value}


async def bare(world: World, setting: Setting, progress: Progress, *, concurrently: bool) -> Result:
    """The openai SDK as it comes: its own connection pool and its default of two retries."""
    sdk, count = _bare_sdk(world.base_url, setting.api_key)
    result = Result("bare SDK, all at once" if concurrently else "bare SDK, one by one")

    async def ask(question: Question) -> None:
        answer = await sdk.chat.completions.create(
            model=setting.model,
            messages=list(question.messages),
            temperature=0,
            **setting.limits,
        )
        if answer.usage is not None:
            result.tokens += answer.usage.total_tokens

    try:
        await _run(world, setting.workload, result, ask, progress, concurrently=concurrently)
    finally:
        await sdk.close()
    result.upstream_calls = count()
    return result


async def through_llmmw(world: World, setting: Setting, progress: Progress) -> Result:
    """Llmmw's client with the recommended stack, a cache and a fallback endpoint."""
    stack = Stack.recommended(
        deadline=SDK_DEADLINE_S, cache_ttl="10m", concurrency=64, fallbacks=tuple(world.fallbacks), timeout=30
    )
    result = Result("llmmw")
    async with Client(world.base_url, setting.api_key, stack=stack, model=setting.model) as client:

        async def ask(question: Question) -> None:
            with using(agent=question.agent, step=question.tick):
                await client.chat(list(question.messages), temperature=0, **setting.limits)

        await _run(world, setting.workload, result, ask, progress, concurrently=True)
        result.stats = stats = client.get_performance_stats()
    result.upstream_calls = stats["upstream_requests"]
    result.tokens = stats["tokens_in"] + stats["tokens_out"]
    result.hit_rate = stats["cache_hits"] / max(1, stats["request_count"])
    result.coalesced = stats["coalesced"]
    return result


async def _run(
    world: World,
    workload: Workload,
    result: Result,
    ask: Callable[[Question], Any],
    progress: Progress,
    *,
    concurrently: bool,
) -> None:
    async def guarded(question: Question) -> None:
        try:
            await ask(question)
            result.answers += 1
        except Exception as error:
            if isinstance(error, LLMMWError | OSError) or hasattr(error, "request") or hasattr(error, "status_code"):
                result.failures += 1
            else:
                raise
        progress(result.answers, result.failures)

    world.start_way()
    began = SYSTEM_CLOCK.monotonic()
    for tick in range(workload.ticks):
        world.start_tick(tick)
        if concurrently:
            await asyncio.gather(*(guarded(question) for question in workload.tick(tick)))
        else:
            for question in workload.tick(tick):
                await guarded(question)
    result.wall_s = SYSTEM_CLOCK.monotonic() - began


def _bare_sdk(base_url: str, api_key: str | None) -> tuple[Any, Callable[[], int]]:
    try:
        import openai  # noqa: PLC0415 — only the demo's comparison needs the SDK
    except ImportError as error:
        raise MissingExtra("the demo compares with the openai SDK: pip install 'llmmw[demo]'") from error
    sent = 0

    async def count(_: object) -> None:
        nonlocal sent
        sent += 1

    http_client = openai.DefaultAsyncHttpxClient(event_hooks={"request": [count]})
    return openai.AsyncOpenAI(base_url=base_url, api_key=api_key or "none", http_client=http_client), lambda: sent

"""What a ModuleLLM can be told, checked once, and the stack that follows from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from llmmw import (
    Batcher,
    CircuitBreaker,
    Coalescer,
    ConfigError,
    Deadline,
    ErrorRouter,
    RateLimiter,
    Retry,
    Stack,
    Timeout,
    TTLCache,
)

if TYPE_CHECKING:
    from llmmw.layers.base import Layer

Scope = Literal["agent", "model"]


@dataclass(frozen=True)
class Options:
    """Settings of a ModuleLLM beyond Mesa-LLM's own. Equal options share their state.

    Args:
        enable_caching: answer repeated questions from memory, and ask once for those made at the same time.
        enable_batching: release calls of one moment together.
        cache_size: answers in memory.
        cache_ttl: seconds (or text such as "12h") an answer lives.
        batch_size: calls released together.
        stack: layers of your own in place of the ones that follow from the other options.
        sampling: "share": the same question has the same answer; "lanes": each agent draws its own, and a rerun with
            the same `run_seed` repeats them; "deterministic": only temperature 0 or seeded questions are cached.
        cache_scope: "agent": only an agent's own repeats are answered from the cache or joined; "model": all agents'.
        cache_dir: keeps answers on disk too.
        run_seed: names a run, so that the same run can be repeated without asking again.
        flush_interval: seconds a call waits for batch mates.
        max_concurrency: calls under way at once, of all agents together.
        rpm: requests per minute.
        tpm: tokens per minute.
        timeout: seconds one attempt may take.
        max_attempts: tries of one call, the first included.
        deadline: seconds a call may take in all, waiting included.

    Raises:
        ConfigError: a value that cannot work; the message names the option.
    """

    enable_caching: bool = False
    enable_batching: bool = False
    cache_size: int = 1000
    cache_ttl: float | str = 300.0
    batch_size: int = 10
    stack: Stack | None = None
    sampling: Literal["share", "lanes", "deterministic"] = "share"
    cache_scope: Scope = "agent"
    cache_dir: str | None = None
    run_seed: int | str | None = None
    flush_interval: float | str = 0.005
    max_concurrency: int | str = 64
    rpm: int | None = None
    tpm: int | None = None
    timeout: float | str = 60.0
    max_attempts: int = 4
    deadline: float | str = 180.0

    def __post_init__(self) -> None:
        if self.cache_scope not in {"agent", "model"}:
            raise ConfigError(f'cache_scope={self.cache_scope!r}: must be "agent" or "model"')
        if self.stack is not None and not isinstance(self.stack, Stack):
            raise ConfigError(f"stack={self.stack!r}: expected a llmmw.Stack, e.g. Stack(TTLCache(300), Coalescer())")
        self.layers()  # what cannot work is said now

    def layers(self) -> Stack:
        """The stack of these options."""
        if self.stack is not None:
            return self.stack
        found: list[Layer] = [Deadline(self.deadline)]
        if self.enable_caching:
            cache = TTLCache(
                self.cache_ttl, directory=self.cache_dir, sampling=self.sampling, max_entries=self.cache_size
            )
            found += [cache, Coalescer()]
        found += [ErrorRouter(), Retry(attempts=self.max_attempts), CircuitBreaker()]
        if self.enable_batching:
            found.append(Batcher(max_size=self.batch_size, flush_interval=self.flush_interval))
        found += [RateLimiter(rpm=self.rpm, tpm=self.tpm, concurrency=self.max_concurrency), Timeout(self.timeout)]
        return Stack(*found)

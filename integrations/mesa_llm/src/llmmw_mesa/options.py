"""What a ModuleLLM can be told, checked once, and the stack that follows from it."""

from __future__ import annotations

import dataclasses
import operator
from typing import TYPE_CHECKING, Any, Literal

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
from llmmw.settings import choice, named_as_given, positive_seconds, settings, text

if TYPE_CHECKING:
    import os

    from llmmw.layers.base import Layer

Scope = Literal["agent", "model"]

_GIVEN_AS = {
    "TTLCache(ttl=": "cache_ttl", "TTLCache(directory=": "cache_dir", "TTLCache(sampling=": "sampling",
    "TTLCache(max_entries=": "cache_size", "Retry(attempts=": "max_attempts", "Batcher(max_size=": "batch_size",
    "RateLimiter(rpm=": "rpm", "RateLimiter(tpm=": "tpm", "RateLimiter(concurrency=": "max_concurrency",
}  # fmt: skip
"""The option behind a layer's own."""
_DURATIONS = ("cache_ttl", "flush_interval", "timeout", "deadline")
_OF_THE_CACHE = ("sampling", "cache_scope", "cache_dir", "run_seed")
_BESIDE_A_STACK = frozenset({"stack", "cache_scope", "run_seed", "max_concurrency"})
"""What means something where the layers are the user's own; `install()` also bounds steps by the last."""


@settings
class Options:
    """Settings of a ModuleLLM beyond Mesa-LLM's own. Equal options share their state.

    A 429 that says when to come back is waited for, within `deadline`; one that does not is asked again for a minute
    at most, ever more rarely, as the limits of providers are per minute. Neither uses up `max_attempts`, unless that
    is 1. A rate-limit error that no server has sent (a `completion` of your own raised it) counts like any other.

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
        run_seed: names a run, so that the same run can be repeated without asking again: in this process, or with
            `cache_dir` in another.
        flush_interval: seconds a call waits for batch mates.
        max_concurrency: calls under way at once, of all agents together.
        rpm: requests per minute.
        tpm: tokens per minute.
        timeout: seconds one attempt may take.
        max_attempts: tries of one call, the first included.
        deadline: seconds a call may take in all, waiting included.

    Raises:
        ConfigError: a value that cannot work, or one that another option makes meaningless; the message names it.
    """

    enable_caching: bool = False
    enable_batching: bool = False
    cache_size: int = 1000
    cache_ttl: float | str = 300.0
    batch_size: int = 10
    _: dataclasses.KW_ONLY
    stack: Stack | None = None
    sampling: Literal["share", "lanes", "deterministic"] = "share"
    cache_scope: Scope = "agent"
    cache_dir: str | os.PathLike[str] | None = None
    run_seed: int | str | None = None
    flush_interval: float | str = 0.005
    max_concurrency: int | str = 64
    rpm: int | None = None
    tpm: int | None = None
    timeout: float | str = 60.0
    max_attempts: int = 4
    deadline: float | str = 180.0

    def __post_init__(self) -> None:
        for name in _DURATIONS:
            object.__setattr__(self, name, positive_seconds(f"ModuleLLM({name}=)", getattr(self, name)))
        choice("ModuleLLM(cache_scope=)", self.cache_scope, ("agent", "model"))
        object.__setattr__(self, "run_seed", _checked_seed(self.run_seed))
        with named_as_given("ModuleLLM", _GIVEN_AS):
            self._cache()
            self._batcher()
            self._inner()
        if self.stack is None:
            self._check_cache()
        else:
            self._check_stack(self.stack)

    def layers(self) -> Stack:
        """The stack of these options."""
        if self.stack is not None:
            return self.stack
        found: list[Layer] = [Deadline(self.deadline)]
        if self.enable_caching:
            found += [self._cache(), Coalescer()]
        found += [ErrorRouter(max_total_attempts=self.max_attempts), self._inner()[0], CircuitBreaker()]
        if self.enable_batching:
            found.append(self._batcher())
        return Stack(*found, *self._inner()[1:])

    def _cache(self) -> TTLCache:
        return TTLCache(self.cache_ttl, directory=self.cache_dir, sampling=self.sampling, max_entries=self.cache_size)

    def _batcher(self) -> Batcher:
        return Batcher(max_size=self.batch_size, flush_interval=self.flush_interval)

    def _inner(self) -> tuple[Layer, ...]:
        # A lost call is asked again, as Mesa-LLM and the SDK below it do: an answer has no effect but its price.
        patience: dict[str, Any] = {"rate_patience": 0.0} if self.max_attempts == 1 else {}
        return (
            Retry(attempts=self.max_attempts, duplicate_ok=True, **patience),
            RateLimiter(rpm=self.rpm, tpm=self.tpm, concurrency=self.max_concurrency),
            Timeout(self.timeout),
        )

    def _check_cache(self) -> None:
        for name in _OF_THE_CACHE:
            if not self.enable_caching and getattr(self, name) != _default(name):
                raise ConfigError(
                    f"ModuleLLM({name}={getattr(self, name)!r}): keeps nothing without enable_caching=True"
                )

    def _check_stack(self, stack: object) -> None:
        if not isinstance(stack, Stack):
            raise ConfigError(
                f"ModuleLLM(stack={stack!r}): expected a llmmw.Stack, e.g. Stack(TTLCache(300), Coalescer())"
            )
        for field in dataclasses.fields(self):
            if field.name not in _BESIDE_A_STACK and getattr(self, field.name) != field.default:
                raise ConfigError(
                    f"ModuleLLM({field.name}={getattr(self, field.name)!r}): a stack of your own has its own layers; "
                    "give one or the other"
                )
        try:
            hash(stack)
        except TypeError as error:
            raise ConfigError(f"ModuleLLM(stack=): its layers must be hashable to be shared ({error})") from None


def _default(name: str) -> Any:
    return Options.__dataclass_fields__[name].default


def _checked_seed(seed: Any) -> int | str | None:
    if seed is None:
        return None
    if isinstance(seed, str):
        return text("ModuleLLM(run_seed=)", seed)
    if isinstance(seed, bool) or not hasattr(seed, "__index__"):
        raise ConfigError(f"ModuleLLM(run_seed={seed!r}): must be a whole number or a text")
    return operator.index(seed)  # NumPy's integers too

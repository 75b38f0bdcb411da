"""The parts of one server and how they are replaced while it runs."""

import asyncio
import os
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import suppress
from hashlib import shake_128
from typing import Any, Final

from .batches import Book
from .config import ServerConfig, changed
from .engine import Engine, Group
from .faults import FaultBook
from .limits import Limits
from .plan import Planner
from .stats import Stats

_LIMITS: Final = ("rpm", "tpm", "limit_window_s", "limit_kind", "limit_style", "quota_requests")


class Core:
    """Config, planner, engine, limits, faults and statistics of one server."""

    def __init__(self, config: ServerConfig) -> None:
        self.config = config
        self.uid = os.urandom(4).hex()
        self.started_at = int(time.time())
        self.planner = Planner(config)
        self.engine = Engine(config)
        self.limits = Limits(config)
        self.faults = FaultBook(config.faults, config.seed)
        self.stats = Stats(config.log_requests)
        self.offline = Book()
        self._watchers: set[asyncio.Future[None]] = set()
        self.engine.on_change = self.notify

    def configure(self, patch: Mapping[str, Any]) -> ServerConfig:
        """Replace options; ValueError names what is wrong and leaves everything as it was."""
        old, new = self.config, changed(self.config, patch)
        self.config = new
        self.planner.config = new
        self.engine.configure(new)
        if any(getattr(old, name) != getattr(new, name) for name in _LIMITS):
            self.limits = Limits(new)
        if "faults" in patch or old.seed != new.seed:
            self.faults = FaultBook(new.faults, new.seed)
        if old.log_requests != new.log_requests:
            self.stats.clear(new.log_requests)
        return new

    def reset(self) -> None:
        """Counters, draws, limits, prefix cache, fault counts, batches start afresh; requests under way go on."""
        in_flight = self.stats.in_flight
        self.stats.clear(self.config.log_requests)
        self.stats.in_flight = self.stats.peak_in_flight = in_flight
        self.planner.reset()
        self.engine.reset()
        self.limits = Limits(self.config)
        self.faults = FaultBook(self.faults.rules(), self.config.seed)
        self.offline = Book()

    def pace(self, group: Group) -> AsyncGenerator[None, None]:
        """The latency model in force: yields as tokens appear."""
        latency = self.config.latency
        if latency == "engine":
            return self.engine.run(group)
        return _fixed(group, self.config) if latency == "fixed" else _at_once(group)

    def report(self, newest: int) -> dict[str, Any]:
        """The statistics of the control plane."""
        engine = self.engine
        return {
            **self.stats.report(newest),
            "engine": {
                "running": len(engine.running),
                "waiting": engine.waiting,
                "peak_running": engine.peak_running,
                "peak_waiting": engine.peak_waiting,
                "steps": engine.steps,
                "kv_usage": engine.kv_usage,
                "prefix_queries": engine.prefix.queries,
                "prefix_hits": engine.prefix.hits,
            },
            "faults": self.faults.report(),
        }

    def notify(self) -> None:
        """Something that ``wait`` may look at has changed."""
        for watcher in self._watchers:
            if not watcher.done():
                watcher.set_result(None)

    async def wait(self, condition: Callable[[dict[str, Any]], bool], timeout_s: float) -> bool:
        """Wait until the report satisfies the condition; False when it did not in time."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while not condition(self.report(0)):
                    watcher = asyncio.get_running_loop().create_future()
                    self._watchers.add(watcher)
                    try:
                        await watcher
                    finally:
                        self._watchers.discard(watcher)
                return True
        return False


def _complete(group: Group, share_done: int | None = None) -> None:
    for seq in group.sequences:
        seq.produced = seq.output_tokens if share_done is None else min(seq.output_tokens, share_done)


async def _at_once(group: Group) -> AsyncGenerator[None, None]:
    _complete(group)
    yield


def first_token_s(config: ServerConfig, units: str | list[int]) -> float:
    """Seconds before the first token of this prompt: whoever asks and whenever, the same ones."""
    if not config.latency_spread:
        return config.latency_s
    digest = shake_128(f"{config.seed}\0{units}".encode("utf-8", "surrogatepass")).digest(4)
    unit = int.from_bytes(digest, "big") / 2**32
    return config.latency_s * (1.0 + config.latency_spread * (2.0 * unit - 1.0))


async def _fixed(group: Group, config: ServerConfig) -> AsyncGenerator[None, None]:
    """``latency_s`` to the first token, ``token_s`` for each further one, whatever else is running."""
    wait_s = first_token_s(config, group.sequences[0].units)
    longest = max(seq.output_tokens for seq in group.sequences)
    if not group.streaming or not config.token_s:
        await asyncio.sleep(wait_s + config.token_s * (longest - 1))
        _complete(group)
        yield
        return
    due = time.monotonic() + wait_s
    for number in range(1, longest + 1):
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        due += config.token_s
        _complete(group, number)
        yield

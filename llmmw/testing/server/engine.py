"""Latency of continuous batching: slots, steps, priorities, chunked prefill, prefix hits. No model behind it.

Modelled: at most ``max_num_seqs`` sequences run; a step lasts ``step_s + prefill_s_per_token * prompt tokens
computed in it + seq_s * sequences in it`` and gives each prefilled sequence one token; a step holds at most
``max_batched_tokens``, so long prompts are prefilled over several steps; the queue is ordered by (priority,
arrival), smaller first; prompt blocks seen before cost nothing; a client that leaves frees its slot at once.
Not modelled: preemption, a KV cache that is full (its use is reported, never enforced), speculative decoding,
attention cost growing with length, tensor parallel ranks, CPU cost of scheduling.
"""

import asyncio
import heapq
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from contextlib import suppress
from itertools import count

from .config import ServerConfig
from .prefix import PrefixCache
from .stats import Histogram

Sleep = Callable[[float], Awaitable[None]]
Clock = Callable[[], float]


class Sequence:
    """One text under way: how many tokens it needs and has."""

    __slots__ = (
        "arrived_at",
        "cached",
        "dead",
        "group",
        "output_tokens",
        "prefill_left",
        "priority",
        "produced",
        "prompt_tokens",
        "salt",
        "units",
    )

    group: "Group"  # set when a group takes it in

    def __init__(
        self,
        prompt_tokens: int,
        output_tokens: int,
        *,
        priority: int = 0,
        units: str | list[int] = "",
        salt: str = "",
    ) -> None:
        self.prompt_tokens = prompt_tokens
        self.output_tokens = max(1, output_tokens)
        self.priority = priority
        self.units = units
        self.salt = salt
        self.produced = 0
        self.cached = 0
        self.prefill_left = prompt_tokens
        self.dead = False
        self.arrived_at = 0.0


class Group:
    """The sequences of one request, which wake it together."""

    __slots__ = ("_waiter", "left", "sequences", "streaming")

    def __init__(self, sequences: Iterable[Sequence], *, streaming: bool) -> None:
        self.sequences = list(sequences)
        self.left = len(self.sequences)
        self.streaming = streaming
        self._waiter: asyncio.Future[None] | None = None
        for sequence in self.sequences:
            sequence.group = self

    def wake(self) -> None:
        """Some sequence moved on; a plain request is woken by the last one only."""
        waiter = self._waiter
        if waiter is not None and not waiter.done() and (self.streaming or not self.left):
            waiter.set_result(None)

    async def moved(self) -> None:
        """Wait for the next ``wake``."""
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None


class Engine:
    """The scheduler. Its loop is a task that sleeps on an event whenever nothing runs or waits."""

    def __init__(self, config: ServerConfig, *, sleep: Sleep = asyncio.sleep, clock: Clock = time.monotonic) -> None:
        self.config = config
        self.running: dict[Sequence, None] = {}
        self.waiting = 0
        self.peak_running = 0
        self.peak_waiting = 0
        self.steps = 0
        self.first_token_s = Histogram()
        self.queue_s = Histogram()
        self.prefix = PrefixCache(config.block_tokens, config.kv_blocks)
        self.on_change: Callable[[], None] = _nothing
        self._queue: list[tuple[int, int, Sequence]] = []
        self._arrival = count()
        self._sleep = sleep
        self._clock = clock
        self._due = 0.0
        self._work = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def configure(self, config: ServerConfig) -> None:
        """Go on with other settings; running sequences stay."""
        if (config.block_tokens, config.kv_blocks) != (self.config.block_tokens, self.config.kv_blocks):
            self.prefix = PrefixCache(config.block_tokens, config.kv_blocks)
        self.config = config
        self._work.set()

    def reset(self) -> None:
        """Forget counts, peaks and cached prefixes."""
        self.peak_running, self.peak_waiting, self.steps = len(self.running), self.waiting, 0
        self.first_token_s, self.queue_s = Histogram(), Histogram()
        self.prefix.clear()

    @property
    def kv_usage(self) -> float:
        """Share of the KV blocks that running sequences hold, 0 to 1."""
        size = self.config.block_tokens
        blocks = sum(-(-(seq.prompt_tokens + seq.produced) // size) for seq in self.running)
        return min(1.0, blocks / self.config.kv_blocks)

    async def run(self, group: Group) -> AsyncGenerator[None, None]:
        """Yield whenever sequences of the group have new tokens, until all are complete.

        Closing the generator early (the client left) frees the slots.
        """
        self._submit(group)
        seen = 0
        try:
            while True:
                produced = sum(seq.produced for seq in group.sequences)
                if produced > seen and (group.streaming or not group.left):
                    seen = produced
                    yield
                if not group.left:
                    return
                if sum(seq.produced for seq in group.sequences) == seen or not group.streaming:
                    await group.moved()
        finally:
            self._abort(group)

    async def aclose(self) -> None:
        """Stop the loop."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    def _submit(self, group: Group) -> None:
        now = self._clock()
        for seq in group.sequences:
            seq.arrived_at = now
            heapq.heappush(self._queue, (seq.priority, next(self._arrival), seq))
        self.waiting += len(group.sequences)
        self.peak_waiting = max(self.peak_waiting, self.waiting)
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._loop())
        self._work.set()
        self.on_change()

    def _abort(self, group: Group) -> None:
        if not group.left:
            return
        for seq in group.sequences:
            if seq in self.running:
                del self.running[seq]
            elif seq.produced < seq.output_tokens:
                self.waiting -= 1  # its heap entry is skipped when it comes up
            seq.dead = True
        group.left = 0
        self._work.set()
        self.on_change()

    async def _loop(self) -> None:
        while True:
            while self.config.paused or not (self.running or self.waiting):
                self._work.clear()
                self._due = 0.0
                await self._work.wait()
            self._admit()
            duration, moved = self._plan()
            # Steps follow each other on a grid, so that timers that fire late do not add up.
            now = self._clock()
            self._due = max(now, self._due + duration) if self._due else now + duration
            await self._sleep(max(0.0, self._due - now))
            self._advance(moved)

    def _admit(self) -> None:
        admitted = False
        while self._queue and len(self.running) < self.config.max_num_seqs:
            seq = heapq.heappop(self._queue)[2]
            if seq.dead:
                continue
            admitted = True
            self.waiting -= 1
            if self.config.prefix_cache:
                seq.cached = self.prefix.visit(seq.units, seq.prompt_tokens, seq.salt)
            seq.prefill_left = seq.prompt_tokens - seq.cached
            self.queue_s.add(self._clock() - seq.arrived_at)
            self.running[seq] = None
        if admitted:
            self.peak_running = max(self.peak_running, len(self.running))
            self.on_change()

    def _plan(self) -> tuple[float, list[Sequence]]:
        """The next step: seconds it takes, and the sequences that get a token at its end."""
        config = self.config
        moved = [seq for seq in self.running if not seq.prefill_left]
        budget = max(1, config.max_batched_tokens - len(moved))
        busy, prefilled = len(moved), 0
        for seq in self.running:
            if seq.prefill_left and prefilled < budget:
                chunk = min(seq.prefill_left, budget - prefilled)
                seq.prefill_left -= chunk
                prefilled += chunk
                busy += 1
                if not seq.prefill_left:
                    moved.append(seq)
        return config.step_s + config.prefill_s_per_token * prefilled + config.seq_s * busy, moved

    def _advance(self, moved: list[Sequence]) -> None:
        self.steps += 1
        for seq in moved:
            if seq.dead:
                continue
            seq.produced += 1
            if seq.produced == 1:
                self.first_token_s.add(self._clock() - seq.arrived_at)
            group = seq.group
            if seq.produced >= seq.output_tokens:
                del self.running[seq]
                group.left -= 1
            group.wake()
        self.on_change()


def _nothing() -> None:
    """Nobody listens."""

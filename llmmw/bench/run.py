"""All shapes in turn, with every number of calls, as often as asked: slow minutes of a machine hit them alike."""

from __future__ import annotations

import asyncio
import gc
import secrets
from time import process_time  # noqa: TID251 — CPU time is what is measured; nothing is decided by it
from typing import TYPE_CHECKING

import msgspec

from llmmw.bench.figures import Row, Sample, extrapolated
from llmmw.bench.shapes import Tally, Target, client_of
from llmmw.call import Call
from llmmw.edges.client import Client
from llmmw.edges.requests import answer_of
from llmmw.endpoints.vllm import VLLMEndpoint
from llmmw.env import SYSTEM_CLOCK
from llmmw.errors import ConfigError, LLMMWError, UpstreamTimeout
from llmmw.stack import Stack

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from llmmw.bench.shapes import Shape

    Told = Callable[[int, str], object]
    """Told how many waves are done, and what runs next."""

LOOK_S = 30.0
_SHOWN = 8


class Plan(msgspec.Struct, frozen=True):
    """What to measure."""

    shapes: tuple[Shape, ...]
    counts: tuple[int, ...] = (1, 4, 16, 64)
    """Numbers of calls in a wave."""
    repeats: int = 3
    sequential_most: int = 16
    """More calls than that are not made one after the other; the row is extrapolated."""
    cold: bool = False
    """Whether waves are their client's first: connections are opened, and llmmw's limiter starts gently."""

    def rows(self) -> list[tuple[Shape, int]]:
        """What is measured, without what is extrapolated."""
        found = [
            (shape, min(count, self.sequential_most) if shape.sequential else count)
            for count in sorted(set(self.counts))
            for shape in self.shapes
        ]
        return list(dict.fromkeys(found))

    def waves(self) -> Iterator[tuple[Shape, int]]:
        """In alternating order, so that nothing always follows the same neighbour."""
        rows = self.rows()
        for repeat in range(self.repeats):
            yield from rows if repeat % 2 == 0 else rows[::-1]

    @property
    def calls(self) -> int:
        """Calls of all waves together, without the warm-up."""
        return self.repeats * sum(count for _, count in self.rows())


class Bench:
    """A plan being carried out; `rows()` may be read at any time."""

    def __init__(self, target: Target, plan: Plan) -> None:
        self.target = target
        self.plan = plan
        self.failures = 0
        self._rows = {(shape.name, count): Row(shape.name, count, []) for shape, count in plan.rows()}
        self._tag = secrets.token_hex(3)
        self._asked = 0

    async def run(self, told: Told) -> None:
        """Measure everything."""
        done = 0
        for done, (shape, count) in enumerate(self.plan.waves(), 1):
            told(done - 1, f"{count} calls: {shape.name}")
            row = self._rows[shape.name, count]
            if not row.skipped:
                await self._wave(shape, row)
        told(done, "")

    async def _wave(self, shape: Shape, row: Row) -> None:
        try:
            async with shape.open(self.target) as ask_all:
                if not self.plan.cold:
                    warm = Tally(self.target.api_key)
                    count = 1 if shape.sequential else row.calls
                    await ask_all(self._prompts(count), 1, warm)
                    if warm.failures == count:
                        row.skipped = warm.said
                        return
                prompts = self._prompts(row.calls)
                gc.collect()  # the rubbish of the wave before is not this one's
                tally, cpu = Tally(self.target.api_key), process_time()
                await ask_all(prompts, self.target.max_tokens, tally)
                cpu, wall_s = process_time() - cpu, SYSTEM_CLOCK.monotonic() - tally.began
        except LLMMWError as error:
            row.skipped = f"{type(error).__name__}: {error}"
            return
        self.failures += tally.failures
        row.said = row.said or tally.said
        row.samples.append(Sample(wall_s, cpu, tuple(tally.latencies_s), tally.tokens, tally.failures))

    def _prompts(self, count: int) -> list[str]:
        """New ones, different from the first word on, so that no prefix cache helps whoever comes later."""
        first, self._asked = self._asked, self._asked + count
        return [
            f"{self._tag}-{number}. You live in a small town. Say in one short paragraph what you do next, and why."
            for number in range(first, first + count)
        ]

    def rows(self) -> list[Row]:
        """By number of calls, then in the plan's order of shapes; with what is extrapolated."""
        found: list[Row] = []
        for count in sorted(set(self.plan.counts)):
            for shape in self.plan.shapes:
                row = self._rows.get((shape.name, count))
                if row is None:
                    row = extrapolated(self._rows[shape.name, self.plan.sequential_most], count)
                found.append(row)
        return found


async def look(target: Target) -> Target:
    """Ask the server about itself, and one short question, before hundreds of calls fail one by one.

    Returns:
        The target with a model (the first that the server lists, where none was named) and with what it takes to ask
        a vLLM server as one.

    Raises:
        ConfigError: it does not know the model, or the URL has a query.
        LLMMWError: it is not there, or refuses.
    """
    await client_of(target).aclose()  # its options are checked before anybody is asked
    if "?" in target.base_url:  # and it would be written into the report
        raise ConfigError("base_url: must be without a query, which bare clients cannot pass on; name a key apart")
    endpoint = VLLMEndpoint(target.base_url, target.api_key, load_interval=None)
    async with Client(endpoint, stack=Stack()) as client:
        try:
            async with asyncio.timeout(LOOK_S):
                about = await endpoint.discover()
                known = [model.id for model in about.models]
                if about.version is not None:
                    target = msgspec.structs.replace(target, vllm=True, base_url=endpoint.name)
                if not target.model and not known:
                    listing = Call("models", "", {}, native=endpoint.request("GET", "/models"), direct=True)
                    answer_of(await client.engine.call(listing))  # it refuses, perhaps
                    raise ConfigError(f"model: {target.base_url} lists none; name one")
                if target.model and known and target.model not in known:
                    shown = ", ".join(known[:_SHOWN]) + (", ..." if len(known) > _SHOWN else "")
                    raise ConfigError(f"model={target.model!r}: {target.base_url} does not list it; it has {shown}")
                target = msgspec.structs.replace(target, model=target.model or known[0])
                await client.chat("hi", model=target.model, max_tokens=1, temperature=0)
        except TimeoutError:
            raise UpstreamTimeout(f"{target.base_url} did not answer a first call within {LOOK_S:g} s") from None
    return target

"""Several unlike servers behind one client: who gets which call, and what that is worth.

    python benchmarks/replicas.py [--servers 3] [--repeats 3] [--only agents strangers] [--json FILE]

Real server processes (the embedded model server with its continuous-batching model and prefix cache: emulated, no
model), real sockets. Each server takes half as long again as the one before: steps of 6, 9, 13.5 ms and so on.

    agents     each has a memory of its own that is in every prompt and grows; all ask at once, each one call after
               another. No server's prefix cache holds the memories of all.
    strangers  short prompts that nobody asks twice, coming by chance at three quarters of what the servers can do
               together: a third of them is more than the slowest can do.

Ways to choose: round robin and at random (the same clients without a Balancer), llmmw's two choices
(`Balancer(affinity="none")`) and llmmw's default, the agent's own replica. "hits" is prompt tokens that a prefix cache
held, "slowest" the share of the calls that went to the slowest server. Repeats are interleaved; figures are medians,
and ratios are against round robin in the same run.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import itertools
import random
import statistics
import time
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from measure import Progress, in_turn, machine, write_json

from llmmw import Balancer, Client, Stack, using
from llmmw.testing.server import ServerConfig, server_process

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from llmmw.testing.server import ServerProcess

MODEL = "llmmw-embedded"
ROBIN, RANDOM, TWO, OWN = "round robin", "random", "two choices", "agent's own"
WAYS_OF = {"agents": (ROBIN, RANDOM, TWO, OWN), "strangers": (ROBIN, RANDOM, TWO)}
"""Who is no agent has no replica of its own."""
STEP_S, SLOWER = 0.006, 1.5
SLOTS = {"agents": 8, "strangers": 4}
"""Sequences that a server runs at once."""
TOKENS = 16
BUSY = 0.75
MEMORY_CHARS = 8000
"""Of an agent's memory: 2000 tokens, 125 blocks."""
TURN_CHARS = 400


@dataclasses.dataclass(frozen=True)
class Load:
    """Who asks what."""

    name: str
    callers: int
    turns: int

    def prompt(self, run: str, caller: int, turn: int) -> str:
        """What a caller asks in its turn."""
        if self.name == "strangers":
            return f"{run} {caller} {turn} " + "word " * 40
        chars = MEMORY_CHARS + TURN_CHARS * turn
        return (f"{run}, agent {caller} remembers. " * (chars // 20))[:chars]

    def rate(self, servers: int) -> float:
        """Calls per second that keep the servers busy, but not too busy."""
        slots = SLOTS[self.name]
        return BUSY * sum(slots / (TOKENS * STEP_S * SLOWER**place) for place in range(servers))


@dataclasses.dataclass
class Result:
    """One way in one run."""

    load: str
    way: str
    p50_ms: float
    p99_ms: float
    wall_s: float
    hits: float
    slowest: float


def config(place: int, callers: int, servers: int) -> ServerConfig:
    """The settings of one server; its cache holds the memories of its share of the agents and of half as many more."""
    per_agent = (MEMORY_CHARS + TURN_CHARS * 6) // 64
    return ServerConfig(
        latency="engine",
        step_s=STEP_S * SLOWER**place,
        prefill_s_per_token=20e-6 * SLOWER**place,
        seq_s=30e-6,
        max_num_seqs=SLOTS["agents"],
        kv_blocks=max(64, int(1.5 * callers / servers * per_agent)),
    )


def chooser(way: str, clients: Sequence[Client]) -> Callable[[], Client]:
    """Who gets the next call: of several clients by turns or by chance; one over all servers chooses by itself."""
    turns, rng = itertools.cycle(clients), random.Random(1)
    return (lambda: rng.choice(clients)) if way == RANDOM else lambda: next(turns)


async def play(load: Load, way: str, run: str, urls: Sequence[str]) -> tuple[list[float], float]:
    """Seconds that each call took, and all together."""
    took: list[float] = []
    async with AsyncExitStack() as stack:
        if way in {ROBIN, RANDOM}:
            made = [Client(url, stack=Stack(), model=MODEL) for url in urls]
        else:
            balancer = Balancer(affinity="agent" if way == OWN else "none")
            made = [Client(urls, stack=Stack(balancer), model=MODEL)]
        clients = [await stack.enter_async_context(client) for client in made]
        choose = chooser(way, clients)

        async def ask(caller: int, turn: int) -> None:
            with using(agent=f"agent {caller}" if load.name == "agents" else None):
                began = time.perf_counter()
                await choose().chat(load.prompt(run, caller, turn), max_tokens=TOKENS)
                took.append(time.perf_counter() - began)

        async def ask_in_turn(caller: int) -> None:
            for turn in range(load.turns):
                await ask(caller, turn)

        began = time.perf_counter()
        if load.name == "agents":
            await asyncio.gather(*(ask_in_turn(caller) for caller in range(load.callers)))
        else:
            await arrive(ask, load, load.rate(len(urls)))
        return took, time.perf_counter() - began


async def arrive(ask: Callable[[int, int], Awaitable[None]], load: Load, per_s: float) -> None:
    """Calls that come by chance, the same in every run, whether or not earlier ones are answered."""
    rng, due, asking = random.Random(2), time.perf_counter(), list[asyncio.Task[None]]()
    for number in range(load.callers * load.turns):
        due += rng.expovariate(per_s)
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        asking.append(asyncio.ensure_future(ask(number, 0)))
    await asyncio.gather(*asking)


def measure(load: Load, way: str, run: str, servers: Sequence[ServerProcess]) -> Result:
    """One way, from empty caches."""
    for server in servers:
        server.configure(max_num_seqs=SLOTS[load.name])
        server.reset()
    took, wall_s = asyncio.run(play(load, way, run, [server.base_url for server in servers]))
    stats = [server.stats(0) for server in servers]
    tokens, asked = [each["tokens"] for each in stats], [each["received"] for each in stats]
    cuts = statistics.quantiles(took, n=100, method="inclusive")
    prompts = sum(each["prompt"] for each in tokens)
    hits = sum(each["cached"] for each in tokens) / prompts if prompts else 0.0
    return Result(load.name, way, cuts[49] * 1000, cuts[98] * 1000, wall_s, hits, asked[-1] / sum(asked))


def summary(results: Sequence[Result], loads: Sequence[Load]) -> list[dict[str, Any]]:
    """Medians of the repeats, with ratios to round robin."""
    rows: list[dict[str, Any]] = []
    for load in loads:
        ways = WAYS_OF[load.name]
        found = {way: [each for each in results if (each.load, each.way) == (load.name, way)] for way in ways}
        floor: dict[str, float] = {}
        for way in ways:
            row: dict[str, Any] = {"load": load.name, "way": way, "repeats": len(found[way])}
            for figure in ("p50_ms", "p99_ms", "wall_s", "hits", "slowest"):
                row[figure] = statistics.median(getattr(each, figure) for each in found[way])
            floor = floor or row
            row |= {f"x_{figure}": row[figure] / floor[figure] for figure in ("p50_ms", "p99_ms", "wall_s")}
            rows.append(row)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as text."""
    lines: list[str] = []
    for load, group in itertools.groupby(rows, lambda row: row["load"]):
        lines += ["", f"── {load}", f"{'':12}  p50 ms  p99 ms  wall s   x p50  x p99  x wall   hits  slowest"]
        for row in group:
            lines.append(
                f"{row['way']:12}  {row['p50_ms']:6.0f}  {row['p99_ms']:6.0f}  {row['wall_s']:6.2f}"
                f"   {row['x_p50_ms']:5.2f}  {row['x_p99_ms']:5.2f}  {row['x_wall_s']:6.2f}"
                f"  {row['hits']:5.0%}  {row['slowest']:7.0%}"
            )
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--servers", type=int, default=3, choices=range(2, 5), help="how many (default 3)")
    parser.add_argument("--callers", type=int, default=24, help="agents, or strangers at a time (default 24)")
    parser.add_argument("--turns", type=int, default=6, help="calls of each (default 6)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=("agents", "strangers"), default=["agents", "strangers"])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    return parser.parse_args()


def main() -> None:
    """Measure and print."""
    options, progress = parse(), Progress()
    turns = {"agents": options.turns, "strangers": 2 * options.turns}
    loads = [Load(name, options.callers, turns[name]) for name in options.only]
    results: list[Result] = []
    with ExitStack() as stack:
        settings = [config(place, options.callers, options.servers) for place in range(options.servers)]
        servers = [stack.enter_context(server_process(each)) for each in settings]
        for repeat in range(options.repeats):
            for load in loads:
                progress(f"{load.name}: repeat {repeat + 1} of {options.repeats}")
                ways = in_turn(WAYS_OF[load.name], repeat)
                results += [measure(load, way, f"{repeat} {way}", servers) for way in ways]
    rows = summary(results, loads)
    print(table(rows))
    print(f"\n{options.servers} servers, {options.callers} callers; {progress.took_s:.1f} s")
    if options.json is not None:
        chosen = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
        write_json(options.json, {"machine": machine(), "settings": chosen, "rows": rows})


if __name__ == "__main__":
    main()

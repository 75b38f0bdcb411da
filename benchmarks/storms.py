"""Crowds at a server that refuses: what llmmw and a bare SDK cost there, in requests and in time.

    python benchmarks/storms.py [--only stampede small ...] [--json FILE] [--repeats 3]

Real server processes (the embedded model server), real sockets, real time. Each storm lets all calls start at once:

    stampede   1000 identical calls, answers take 50 ms
    small      30 different calls where 5 per 3 s are admitted, with Retry-After; the client is not told the limit
    small-told the same with `rpm` set
    large      1000 different calls where 200 per s are admitted (50 at once), with Retry-After; not told
    large-told the same with `rpm` set

"per call" is requests that reached the server per call; "x ideal" is wall time over that of a client that knows
everything. The exit status is 1 when a budget of llmmw's is broken. The SDK runs beside it, with 20 retries of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import statistics
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from client_cpu import crowd
from measure import Progress, concluded

from llmmw import Client, Coalescer, RateLimiter, Stack, TTLCache
from llmmw.testing.server import ServerConfig, server_process

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llmmw.testing.server import ServerProcess

MODEL = "llmmw-embedded"
LATENCY_S = 0.05
Ask = Callable[[int], Awaitable[object]]


@dataclasses.dataclass(frozen=True)
class Storm:
    """One crowd at one server."""

    name: str
    calls: int
    identical: bool = False
    limit: int | None = None
    """Requests that the server's bucket holds..."""
    window_s: float = 0.0
    """...and refills in so many seconds."""
    told: bool = False
    most_upstream: int = 0
    most_ideal: float = 0.0
    """Budgets: requests in all, and wall time over the ideal (0: none). Nothing may fail; told, nothing be refused."""

    @property
    def ideal_s(self) -> float:
        """Wall time of a client that knows everything."""
        waits = 0.0 if self.limit is None else (self.calls - self.limit) * self.window_s / self.limit
        return max(0.0, waits) + LATENCY_S

    def server(self) -> ServerConfig:
        """Its settings."""
        return ServerConfig(
            latency="fixed",
            latency_s=LATENCY_S,
            rpm=self.limit,
            limit_window_s=self.window_s or 60.0,
            limit_style="plain",
            error_style="openai",
        )

    def stack(self) -> Stack:
        """The stack under test."""
        if self.identical:
            return Stack(TTLCache(300), Coalescer())
        stack = Stack.recommended(timeout=60)
        if self.told and self.limit is not None:
            return stack.replacing("limit", RateLimiter(self.limit, window=self.window_s))
        return stack


STORMS = (
    Storm("stampede", 1000, identical=True, most_upstream=1),
    Storm("small", 30, limit=5, window_s=3.0, most_upstream=45, most_ideal=1.2),
    Storm("small-told", 30, limit=5, window_s=3.0, told=True, most_upstream=30, most_ideal=1.2),
    Storm("large", 1000, limit=50, window_s=0.25, most_upstream=1200, most_ideal=1.5),
    Storm("large-told", 1000, limit=50, window_s=0.25, told=True, most_upstream=1000, most_ideal=1.1),
)


@dataclasses.dataclass
class Result:
    """One client in one storm."""

    storm: Storm
    client: str
    upstream: int
    refused: int
    failed: int
    wall_s: float

    @property
    def per_call(self) -> float:
        """Requests that reached the server, per call."""
        return self.upstream / self.storm.calls

    @property
    def x_ideal(self) -> float:
        """Wall time over the ideal."""
        return self.wall_s / self.storm.ideal_s

    def broken(self) -> list[str]:
        """Budgets that were not kept (only llmmw has any)."""
        storm, found = self.storm, list[str]()
        if self.client != "llmmw":
            return found
        if self.failed:
            found.append(f"{self.failed} failed")
        if self.upstream > storm.most_upstream:
            found.append(f"{self.upstream} upstream > {storm.most_upstream}")
        if storm.told and self.refused:
            found.append(f"{self.refused} refused although the limit was told")
        if storm.most_ideal and self.x_ideal > storm.most_ideal:
            found.append(f"{self.x_ideal:.2f} x ideal > {storm.most_ideal:g}")
        return found

    def as_json(self) -> dict[str, object]:
        """Plain values."""
        return {
            "storm": self.storm.name,
            "client": self.client,
            "calls": self.storm.calls,
            "upstream": self.upstream,
            "per_call": round(self.per_call, 4),
            "refused": self.refused,
            "failed": self.failed,
            "wall_s": round(self.wall_s, 3),
            "ideal_s": round(self.storm.ideal_s, 3),
            "x_ideal": round(self.x_ideal, 3),
            "broken": self.broken(),
        }


async def with_llmmw(storm: Storm, base_url: str) -> tuple[int, float]:
    """Failures and seconds of our client."""
    async with Client(base_url, stack=storm.stack()) as client:

        async def ask(number: int) -> object:
            return await client.chat(_prompt(storm, number), model=MODEL, temperature=0, max_tokens=8)

        failed, wall_s = await crowd(ask, storm.calls)
        return len(failed), wall_s


async def with_openai(storm: Storm, base_url: str) -> tuple[int, float]:
    """Failures and seconds of the bare SDK."""
    import openai

    async with openai.AsyncOpenAI(base_url=base_url, api_key="x", max_retries=20) as client:

        async def ask(number: int) -> object:
            messages: Any = _prompt(storm, number)
            return await client.chat.completions.create(model=MODEL, messages=messages, temperature=0, max_tokens=8)

        failed, wall_s = await crowd(ask, storm.calls)
        return len(failed), wall_s


CLIENTS = {"llmmw": with_llmmw, "openai SDK": with_openai}


def _prompt(storm: Storm, number: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": "hello" if storm.identical else f"hello {number}"}]


def measure(storm: Storm, client: str, server: ServerProcess) -> Result:
    """One run against a server whose counters and limits start afresh."""
    server.reset()
    failed, wall_s = asyncio.run(CLIENTS[client](storm, server.base_url))
    stats = server.stats(0)
    upstream = sum(count for route, count in stats["by_route"].items() if "completions" in route)
    return Result(storm, client, upstream, stats["refused_by_limit"], failed, wall_s)


def middle(results: Sequence[Result]) -> Result:
    """The repeat with the median wall time, with the worst counts of all."""
    wall = statistics.median_low(result.wall_s for result in results)
    found = next(result for result in results if result.wall_s == wall)
    return dataclasses.replace(
        found,
        upstream=max(result.upstream for result in results),
        refused=max(result.refused for result in results),
        failed=max(result.failed for result in results),
    )


def table(results: Sequence[Result]) -> str:
    """The results as text."""
    head = f"{'storm':11} {'client':11} {'calls':>6} {'upstream':>9} {'per call':>9} {'refused':>8} {'failed':>7}"
    lines = [f"{head} {'wall s':>8} {'ideal s':>8} {'x ideal':>8}  budget"]
    for result in results:
        storm, kept = result.storm, ""
        if result.client == "llmmw":
            ideal = f", ≤ {storm.most_ideal:g} x ideal" if storm.most_ideal else ""
            broken = result.broken()
            kept = f"{'OVER' if broken else 'ok'}: ≤ {storm.most_upstream} upstream, 0 failed{ideal}"
            kept += f" ({'; '.join(broken)})" if broken else ""
        lines.append(
            f"{storm.name:11} {result.client:11} {storm.calls:6} {result.upstream:9} {result.per_call:9.3f}"
            f" {result.refused:8} {result.failed:7} {result.wall_s:8.2f} {storm.ideal_s:8.2f} {result.x_ideal:8.2f}"
            f"  {kept}"
        )
    return "\n".join(lines)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[storm.name for storm in STORMS], help="these storms only")
    parser.add_argument("--clients", nargs="+", choices=list(CLIENTS), default=list(CLIENTS))
    parser.add_argument("--repeats", type=int, default=1, help="runs of llmmw; the SDK runs once")
    parser.add_argument("--calls", type=int, help="another number of calls (no budget then holds)")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write; the exit status."""
    options = _options(arguments)
    progress = Progress()
    storms = [storm for storm in STORMS if not options.only or storm.name in options.only]
    if options.calls:
        storms = [
            dataclasses.replace(storm, calls=options.calls, most_upstream=21 * options.calls, most_ideal=0.0)
            for storm in storms
        ]
    results: list[Result] = []
    for storm in storms:
        with server_process(storm.server()) as server:
            for client in options.clients:
                if storm.told and client != "llmmw":
                    continue  # the SDK cannot be told
                repeats = options.repeats if client == "llmmw" else 1
                progress(f"{storm.name}: {client} (ideal {storm.ideal_s:.2f} s, {repeats} x)")
                results.append(middle([measure(storm, client, server) for _ in range(repeats)]))
    print(table(results))
    broken = [f"{result.storm.name}: {text}" for result in results for text in result.broken()]
    return concluded([result.as_json() for result in results], broken, progress, options.json)


if __name__ == "__main__":
    sys.exit(main())

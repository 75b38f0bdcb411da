"""Servers that fail: how much llmmw adds to their load, how soon it gives up and how much gets through.

    python benchmarks/outage.py [--only dead-500 fifth ...] [--calls 2000] [--json FILE]

Real server processes (the embedded model server), real sockets, real time. 64 workers make the calls one after the
other; the server answers in 5 ms:

    dead-500   every request is answered 500        dead-503   every request is answered 503
    refused    nobody listens                       half       every second request fails (a coin), 500
    fifth      one in five fails                    healthy    none does

Clients: `recommended` is `Stack.recommended()` (retries with a budget, breaker, limiter, time-out), with a deadline of
60 s for `fifth` and `healthy`, so that calls wait for an open circuit; `retries` is `Stack(Retry())` alone, and
`openai SDK` the bare SDK with its two retries. "load" is requests that were made per call; "gave up" are the median and
the 99th percentile of the time that failed calls took. Simulated, three naive attempts at 100 / 50 / 20 % failures mean
a load of 3.00 / 1.75 / 1.24 and a success of 0 / .876 / .992, a retry quota 1.00 / 1.20 / 1.24 and 0 / .601 / .992
(SPEC 7); ours also lets a tenth of the traffic pass and starts full. The exit status is 1 when a budget of llmmw's is
broken; a success is judged less two standard errors of the sample.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import math
import socket
import sys
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from measure import Progress, concluded

from llmmw import Client, Retry, Stack
from llmmw.testing.server import FaultRule, Match, ServerConfig, server_process

if TYPE_CHECKING:
    from collections.abc import Sequence

MODEL = "llmmw-embedded"
LATENCY_S = 0.005
WORKERS = 64
SDK_CALLS = 500
"""The SDK sleeps between its attempts whatever happens; more calls of it say nothing new."""


@dataclasses.dataclass(frozen=True)
class Outage:
    """One way to be down."""

    name: str
    share: float = 1.0
    """Of requests that fail."""
    status: int | None = 500
    """What is answered then; None: nobody listens."""
    most_load: float = 0.0
    least_success: float = 0.0
    """Budgets of both stacks of llmmw (`half`: of the retries alone, for there the breaker is meant to cut off)."""
    deadline: float | None = None

    @property
    def success_judged(self) -> float:
        """The budget less two standard errors, for calls that number in the thousands."""
        share = self.least_success
        return share - 2 * math.sqrt(share * (1 - share) / 2000)


OUTAGES = (
    Outage("dead-500", most_load=1.2),
    Outage("dead-503", status=503, most_load=1.2),
    Outage("refused", status=None, most_load=1.2),
    Outage("half", share=0.5, most_load=1.5, least_success=0.601),
    Outage("fifth", share=0.2, most_load=1.25, least_success=0.99, deadline=60),
    Outage("healthy", share=0.0, most_load=1.0, least_success=1.0, deadline=60),
)


@dataclasses.dataclass
class Result:
    """One client in one outage."""

    outage: Outage
    client: str
    calls: int
    requests: int
    answered: int
    gave_up_s: list[float]
    wall_s: float

    @property
    def load(self) -> float:
        """Requests per call."""
        return self.requests / self.calls

    @property
    def success(self) -> float:
        """Share of calls that were answered."""
        return self.answered / self.calls

    def gave_up(self, share: float) -> float:
        """The quantile of the time that failed calls took; 0 where none failed."""
        times = sorted(self.gave_up_s)
        return times[min(len(times) - 1, int(share * len(times)))] if times else 0.0

    @property
    def judged(self) -> bool:
        """Whether there is a budget."""
        return self.client == "retries" or (self.client == "recommended" and self.outage.name != "half")

    def broken(self) -> list[str]:
        """Budgets that were not kept."""
        outage, found = self.outage, list[str]()
        if self.judged and self.load > outage.most_load:
            found.append(f"load {self.load:.3f} > {outage.most_load:g}")
        if self.judged and self.success < outage.success_judged:
            found.append(f"success {self.success:.3f} < {outage.least_success:g}")
        return found

    def as_json(self) -> dict[str, object]:
        """Plain values."""
        return {
            "outage": self.outage.name,
            "client": self.client,
            "calls": self.calls,
            "requests": self.requests,
            "load": round(self.load, 4),
            "success": round(self.success, 4),
            "gave_up_p50_s": round(self.gave_up(0.5), 4),
            "gave_up_p99_s": round(self.gave_up(0.99), 4),
            "wall_s": round(self.wall_s, 3),
            "broken": self.broken(),
        }


Ask = Callable[[int], Awaitable[object]]
Requests = Callable[[], int]


@contextlib.asynccontextmanager
async def _llmmw(base_url: str, stack: Stack) -> AsyncGenerator[tuple[Ask, Requests]]:
    async with Client(base_url, stack=stack) as client:

        async def ask(number: int) -> object:
            return await client.chat(f"hello {number}", model=MODEL, max_tokens=4)

        yield ask, lambda: client.get_performance_stats()["upstream_requests"]


@contextlib.asynccontextmanager
async def _openai(base_url: str, _: float | None) -> AsyncGenerator[tuple[Ask, Requests]]:
    import openai

    made = 0

    async def count(_: object) -> None:
        nonlocal made
        made += 1

    async with openai.AsyncOpenAI(base_url=base_url, api_key="x") as client:
        http: Any = getattr(client, "_client")  # noqa: B009 — private, but the same whichever HTTP library the SDK is on
        http.event_hooks = {"request": [count]}

        async def ask(number: int) -> object:
            messages: Any = [{"role": "user", "content": f"hello {number}"}]
            return await client.chat.completions.create(model=MODEL, messages=messages, max_tokens=4)

        yield ask, lambda: made


CLIENTS: dict[str, Callable[[str, float | None], contextlib.AbstractAsyncContextManager[tuple[Ask, Requests]]]] = {
    "recommended": lambda url, deadline: _llmmw(url, Stack.recommended(deadline=deadline)),
    "retries": lambda url, _: _llmmw(url, Stack(Retry())),
    "openai SDK": _openai,
}


async def work(outage: Outage, client: str, base_url: str, calls: int) -> Result:
    """All calls, 64 at a time."""
    numbers, answered, gave_up = iter(range(calls)), 0, list[float]()
    async with CLIENTS[client](base_url, outage.deadline) as (ask, requests):

        async def worker() -> None:
            nonlocal answered
            for number in numbers:
                began = time.perf_counter()
                try:
                    await ask(number)
                except Exception:  # a failed call is what is counted here
                    gave_up.append(time.perf_counter() - began)
                else:
                    answered += 1

        began = time.perf_counter()
        await asyncio.gather(*(worker() for _ in range(WORKERS)))
        wall_s = time.perf_counter() - began
        return Result(outage, client, calls, requests(), answered, gave_up, wall_s)


@contextlib.contextmanager
def serving(outage: Outage) -> Generator[str]:
    """The base URL of a server that fails like this."""
    if outage.status is None:
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))  # bound and not listening: refused, and nobody else gets the port
            yield f"http://127.0.0.1:{unused.getsockname()[1]}/v1"
        return
    with server_process(ServerConfig(latency="fixed", latency_s=LATENCY_S, error_style="openai", seed=7)) as server:
        if outage.share:
            match = Match(probability=outage.share) if outage.share < 1 else Match()
            server.add_fault(FaultRule(kind="status", status=outage.status, match=match))
        yield server.base_url


def table(results: Sequence[Result]) -> str:
    """The results as text."""
    head = f"{'outage':10} {'client':12} {'calls':>6} {'requests':>9} {'load':>7} {'success':>8}"
    lines = [f"{head} {'gave up p50':>12} {'p99 s':>7} {'wall s':>7}  budget"]
    for result in results:
        outage, kept = result.outage, ""
        if result.judged:
            success = f", success ≥ {outage.least_success:g}" if outage.least_success else ""
            broken = result.broken()
            kept = f"{'OVER' if broken else 'ok'}: load ≤ {outage.most_load:g}{success}"
            kept += f" ({'; '.join(broken)})" if broken else ""
        figures = f"{result.gave_up(0.5):12.3f} {result.gave_up(0.99):7.2f} {result.wall_s:7.2f}"
        lines.append(
            f"{outage.name:10} {result.client:12} {result.calls:6} {result.requests:9} {result.load:7.3f}"
            f" {result.success:8.3f} {figures}  {kept}"
        )
    return "\n".join(lines)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[outage.name for outage in OUTAGES], help="these outages only")
    parser.add_argument("--clients", nargs="+", choices=list(CLIENTS), default=list(CLIENTS))
    parser.add_argument("--calls", type=int, default=2000, help="per outage (the SDK: at most 500)")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write; the exit status."""
    options = _options(arguments)
    progress = Progress()
    results: list[Result] = []
    for outage in OUTAGES:
        if options.only and outage.name not in options.only:
            continue
        for client in options.clients:
            calls = min(options.calls, SDK_CALLS) if client == "openai SDK" else options.calls
            progress(f"{outage.name}: {client}, {calls} calls")
            with serving(outage) as base_url:
                results.append(asyncio.run(work(outage, client, base_url, calls)))
    print(table(results))
    broken = [f"{result.outage.name}, {result.client}: {text}" for result in results for text in result.broken()]
    return concluded([result.as_json() for result in results], broken, progress, options.json)


if __name__ == "__main__":
    sys.exit(main())

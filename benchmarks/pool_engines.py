"""Which wire engine costs least: client CPU per call, bare and below our pool, against a fast server process.

Each client sends the same chat request; the server (fast_server.py) answers a fixed body, at once or after a delay.
Figures are process CPU time (client threads included) divided by calls, median over repeats. Every repeat runs all
clients once in turn, so drift of the machine hits all alike; compare within one run only.

    python benchmarks/pool_engines.py --delay 0.05 --repeats 5 --json pool.json
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.util
import json
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fast_server
import msgspec

from llmmw.call import Call
from llmmw.endpoints.openai import HTTPEndpoint
from llmmw.pool import ConnectionPool

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    Ask = Callable[[], Awaitable[Any]]

PAYLOAD = {"model": "m", "messages": [{"role": "user", "content": "hello there, " * 20}]}
HEADERS = {"content-type": "application/json", "authorization": "Bearer k", "accept": "application/json"}


@contextlib.asynccontextmanager
async def bare_aiohttp(base: str, _: int) -> AsyncIterator[Ask]:
    import aiohttp

    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None)) as session:

        async def ask() -> Any:
            data = msgspec.json.encode(PAYLOAD)
            async with session.post(base + "/chat/completions", data=data, headers=HEADERS) as response:
                return msgspec.json.decode(await response.read())

        yield ask


def bare_httpx(module: str) -> Any:
    @contextlib.asynccontextmanager
    async def client(base: str, concurrency: int) -> AsyncIterator[Ask]:
        library = importlib.import_module(module)
        limits = library.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
        async with library.AsyncClient(limits=limits, timeout=None, trust_env=False) as session:

            async def ask() -> Any:
                data = msgspec.json.encode(PAYLOAD)
                response = await session.post(base + "/chat/completions", content=data, headers=HEADERS)
                return msgspec.json.decode(response.content)

            yield ask

    return client


@contextlib.asynccontextmanager
async def bare_pyreqwest(base: str, _: int) -> AsyncIterator[Ask]:
    from pyreqwest.client import ClientBuilder

    async with ClientBuilder().no_proxy().build() as session:

        async def ask() -> Any:
            builder = session.post(base + "/chat/completions").headers(HEADERS)
            response = await builder.body_bytes(msgspec.json.encode(PAYLOAD)).build().send()
            return msgspec.json.decode(bytes(await response.bytes()))

        yield ask


def ours(engine: str) -> Any:
    @contextlib.asynccontextmanager
    async def client(base: str, concurrency: int) -> AsyncIterator[Ask]:
        endpoint = HTTPEndpoint(base, "k", pool=ConnectionPool(engine=engine, max_connections=concurrency))
        call = Call("chat", "m", PAYLOAD)
        try:
            yield lambda: endpoint(call)
        finally:
            await endpoint.aclose()

    return client


CLIENTS = {
    "aiohttp": bare_aiohttp,
    "HTTPEndpoint over aiohttp": ours("aiohttp"),
    "httpx": bare_httpx("httpx"),
    "HTTPEndpoint over httpx": ours("httpx"),
    "httpx2": bare_httpx("httpx2"),
    "HTTPEndpoint over httpx2": ours("httpx2"),
    "pyreqwest": bare_pyreqwest,
    "HTTPEndpoint over pyreqwest": ours("pyreqwest"),
}


async def measure(client: Any, base: str, concurrency: int, calls: int) -> tuple[float, float]:
    """CPU and wall time per call, in microseconds."""
    async with client(base, concurrency) as ask:

        async def worker(count: int) -> None:
            for _ in range(count):
                await ask()

        await asyncio.gather(*(worker(3) for _ in range(concurrency)))
        each = max(1, calls // concurrency)
        cpu, wall = time.process_time(), time.perf_counter()
        await asyncio.gather(*(worker(each) for _ in range(concurrency)))
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        return cpu / (each * concurrency) * 1e6, wall / (each * concurrency) * 1e6


def run(base: str, concurrencies: list[int], calls: int, repeats: int, names: list[str]) -> list[dict[str, Any]]:
    rows = []
    for concurrency in concurrencies:
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
        for _ in range(repeats):
            for name in names:
                found[name].append(asyncio.run(measure(CLIENTS[name], base, concurrency, calls)))
        floor = statistics.median(cpu for cpu, _ in found.get("aiohttp", found[names[0]]))
        for name, times in found.items():
            cpu = [cpu for cpu, _ in times]
            row = {
                "client": name,
                "concurrency": concurrency,
                "cpu_us": round(statistics.median(cpu), 1),
                "cpu_us_least": round(min(cpu), 1),
                "cpu_us_most": round(max(cpu), 1),
                "wall_us": round(statistics.median(wall for _, wall in times), 1),
                "ratio_to_aiohttp": round(statistics.median(cpu) / floor, 2),
            }
            rows.append(row)
            print(
                f"{concurrency:>5}  {name:<30} {row['cpu_us']:>8.1f} us CPU per call "
                f"({row['cpu_us_least']:.0f} to {row['cpu_us_most']:.0f})  x{row['ratio_to_aiohttp']:.2f}",
                flush=True,
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 64, 256])
    parser.add_argument("--calls", type=int, default=2000, help="calls per client, concurrency and repeat")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--delay", type=float, default=0.0, help="seconds the server takes for each answer")
    parser.add_argument("--clients", nargs="+", choices=list(CLIENTS), help="default: all that are installed")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args()
    names = options.clients or [
        name for name in CLIENTS if importlib.util.find_spec(name.rpartition(" ")[2]) is not None
    ]
    with fast_server.running(options.delay) as base:
        rows = run(base, options.concurrency, options.calls, options.repeats, names)
    if options.json:
        options.json.write_text(json.dumps({"delay_s": options.delay, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()

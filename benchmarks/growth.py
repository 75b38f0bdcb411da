"""Whether a call costs more where there is more: `python benchmarks/growth.py --help`.

Each row is one thing that can become many (cached entries, waiters, agents, endpoints, ...), and the CPU time of one
call through the layer that holds them, at each size: the least of several interleaved repeats. The last column is the
largest size's cost over the smallest's; above the budget the exit status is 1. The collector is off while it is
measured: how often it runs, and over how much, is the program's.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import random
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from measure import Progress, in_turn, machine, write_json

from llmmw import (
    Batcher,
    CircuitBreaker,
    Coalescer,
    Deadline,
    Env,
    ErrorRouter,
    RateLimiter,
    Reply,
    Retry,
    Stack,
    Timeout,
    TTLCache,
)
from llmmw.call import Context
from llmmw.testing.fake import chat_body, chat_call

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable

    from llmmw.call import Call

    Op = Callable[[], Awaitable[object]]
    Build = Callable[[int, Path], contextlib.AbstractAsyncContextManager[Op]]

SIZES = (1_000, 10_000, 100_000)
BUDGET = 1.3
_REPLY = Reply(data=chat_body("an answer"), headers=(("content-type", "application/json"),))
_rng = random.Random(1)


class Case(NamedTuple):
    """One thing that can become many."""

    name: str
    many: str
    build: Build
    sizes: tuple[int, ...] = SIZES
    ops: int = 2_000
    judged: bool = True


async def answer(_: Call) -> Reply:
    """An endpoint that costs nothing."""
    return _REPLY


class Held:
    """An endpoint whose calls wait until they are let go, the longest-waiting first."""

    def __init__(self) -> None:
        self.inside: list[asyncio.Future[None]] = []

    async def __call__(self, _: Call) -> Reply:
        future = asyncio.get_running_loop().create_future()
        self.inside.append(future)
        await future
        return _REPLY

    def let_go(self) -> None:
        """Answer one."""
        future = self.inside.pop()
        if not future.done():
            future.set_result(None)


def question(number: int, **fields: Any) -> Call:
    """One of many questions."""
    return chat_call(f"question {number}", temperature=0, **fields)


async def turns(count: int = 3) -> None:
    """Let tasks run."""
    for _ in range(count):
        await asyncio.sleep(0)


async def cancelled(tasks: list[asyncio.Task[Any]]) -> None:
    """Stop what still waits."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def memory_hits(*, asked: int | None) -> Build:
    """Hits on so many of the entries in memory, spread evenly over them, or on any."""

    @contextlib.asynccontextmanager
    async def build(size: int, _: Path) -> AsyncGenerator[Op]:
        bound = TTLCache(3600, max_entries=10 * size, max_bytes=1 << 34).bind(answer, Env(seed=1))
        for number in range(size):
            await bound(question(number))
        step = 1 if asked is None else size // asked

        async def op() -> None:
            await bound(question(_rng.randrange(0, size, step)))

        yield op
        await bound.aclose()

    return build


@contextlib.asynccontextmanager
async def memory_stores(size: int, _: Path) -> AsyncGenerator[Op]:
    """Misses that are stored in a full cache, so that each evicts another."""
    bound = TTLCache(3600, max_entries=size).bind(answer, Env(seed=1))
    numbers = iter(range(10**9))
    for _number in range(size):
        await bound(question(next(numbers)))

    async def op() -> None:
        await bound(question(next(numbers)))

    yield op
    await bound.aclose()


@contextlib.asynccontextmanager
async def lanes(size: int, _: Path) -> AsyncGenerator[Op]:
    """Draws of lanes by many agents."""
    bound = TTLCache(3600, sampling="lanes", max_entries=size).bind(answer, Env(seed=1))
    for number in range(size):
        await bound(chat_call("q", context=Context(agent=f"agent {number}")))

    async def op() -> None:
        await bound(chat_call("q", context=Context(agent=f"agent {_rng.randrange(size)}")))

    yield op
    await bound.aclose()


@contextlib.asynccontextmanager
async def disk_hits(size: int, directory: Path) -> AsyncGenerator[Op]:
    """Hits on any of the rows on disk, with almost nothing in memory."""
    folder = directory / f"rows-{size}"
    bound = TTLCache(3600, directory=folder, max_entries=1).bind(answer, Env(seed=1))
    for number in range(size):
        await bound(question(number))
        if number % 200 == 0:
            await asyncio.sleep(0.01)  # the queue to the I/O thread is bounded, and what does not fit is dropped
    await bound.aclose()
    bound = TTLCache(3600, directory=folder, max_entries=1).bind(answer, Env(seed=1))

    async def op() -> None:
        await bound(question(_rng.randrange(size)))

    yield op
    await bound.aclose()


def waiting_calls(**settings: Any) -> Build:
    """Calls that wait for a permit, of one agent or of many: one leaves, the next is let in, another joins."""
    many_agents = settings.pop("many_agents", False)

    @contextlib.asynccontextmanager
    async def build(size: int, _: Path) -> AsyncGenerator[Op]:
        held = Held()
        bound = RateLimiter(**settings).bind(held, Env(seed=1))
        numbers = iter(range(10**9))

        def join() -> asyncio.Task[Any]:
            number = next(numbers)
            agent = f"agent {number % size}" if many_agents else "agent"
            priority = number % 3
            return asyncio.ensure_future(bound(question(0, context=Context(agent=agent, priority=priority))))

        tasks = [join() for _ in range(size)]
        await turns()

        async def op() -> None:
            held.let_go()
            tasks.append(join())
            await turns(4)

        yield op
        await cancelled(tasks)
        await bound.aclose()

    return build


@contextlib.asynccontextmanager
async def leaving_waiters(size: int, _: Path) -> AsyncGenerator[Op]:
    """Callers with deadlines who join the queue of the limiter and are cancelled."""
    held = Held()
    bound = RateLimiter(concurrency=1).bind(held, Env(seed=1))
    tasks = [asyncio.ensure_future(bound(question(0))) for _ in range(size)]
    await turns()
    loop = asyncio.get_running_loop()

    async def op() -> None:
        context = Context(deadline=loop.time() + 1000)
        task = asyncio.ensure_future(bound(question(0, context=context)))
        await turns(1)
        task.cancel()
        await turns(2)

    yield op
    await cancelled(tasks)
    await bound.aclose()


@contextlib.asynccontextmanager
async def flights(size: int, _: Path) -> AsyncGenerator[Op]:
    """Other flights under way."""
    held = Held()

    async def some(call: Call) -> Reply:
        return await (held if call.payload["messages"][0]["content"] != "question -1" else answer)(call)

    bound = Coalescer().bind(some, Env(seed=1))
    tasks = [asyncio.ensure_future(bound(question(number))) for number in range(size)]
    await turns()

    async def op() -> None:
        await bound(question(-1))

    yield op
    await cancelled(tasks)
    await bound.aclose()


@contextlib.asynccontextmanager
async def followers(size: int, _: Path) -> AsyncGenerator[Op]:
    """Other callers who wait for the same flight: one joins and leaves."""
    bound = Coalescer().bind(Held(), Env(seed=1))
    tasks = [asyncio.ensure_future(bound(question(0))) for _ in range(size)]
    await turns()

    async def op() -> None:
        task = asyncio.ensure_future(bound(question(0)))
        await turns(1)
        task.cancel()
        await turns(2)

    yield op
    await cancelled(tasks)
    await bound.aclose()


@contextlib.asynccontextmanager
async def endpoints(size: int, _: Path) -> AsyncGenerator[Op]:
    """Endpoints of a router, of which the first answers."""

    def one(number: int) -> Any:
        async def endpoint(call: Call) -> Reply:
            return await answer(call)

        endpoint.__name__ = f"endpoint_{number}"
        return endpoint

    stack = Stack(ErrorRouter(fallbacks=[one(number) for number in range(1, size)]), Retry(), CircuitBreaker())
    engine = stack.bind(one(0), env=Env(seed=1))

    async def op() -> None:
        await engine.call(question(0))

    yield op
    await engine.aclose()


@contextlib.asynccontextmanager
async def models(size: int, _: Path) -> AsyncGenerator[Op]:
    """Models that a breaker and a limiter have seen."""
    env = Env(seed=1)
    bound = CircuitBreaker().bind(RateLimiter(concurrency=64).bind(answer, env), env)
    calls = [question(0).replace(model=f"model {number}") for number in range(size)]
    for call in calls:
        await bound(call)

    async def op() -> None:
        await bound(calls[_rng.randrange(200)])  # those in use: the tables keep about a thousand

    yield op
    await bound.aclose()


@contextlib.asynccontextmanager
async def pending_items(size: int, _: Path) -> AsyncGenerator[Op]:
    """Items in the batcher that wait for batch mates: one joins and leaves."""
    batcher = Batcher(max_size=10**9, max_queue=10**9, flush_interval=3000, barrier=10**9)
    bound = batcher.bind(answer, Env(seed=1))

    def join(number: int) -> asyncio.Task[Any]:
        context = Context(step=1, agent=f"agent {number}")
        return asyncio.ensure_future(bound(question(number, context=context)))

    tasks = [join(number) for number in range(size)]
    await turns()

    async def op() -> None:
        task = join(size + 1)
        await turns(1)
        task.cancel()
        await turns(2)

    yield op
    await cancelled(tasks)
    await bound.aclose()


@contextlib.asynccontextmanager
async def calls_in_flight(size: int, _: Path) -> AsyncGenerator[Op]:
    """Other calls under way in the same engine, through deadline, retry, breaker, limiter and time-out."""
    held = Held()

    async def some(call: Call) -> Reply:
        return await (held if call.stream is False and call.model == "held" else answer)(call)

    layers = (Deadline(3000), Retry(), CircuitBreaker(), RateLimiter(concurrency=10**6, rpm=10**8), Timeout(2000))
    engine = Stack(*layers).bind(some, env=Env(seed=1))
    tasks = [asyncio.ensure_future(engine.call(question(n).replace(model="held"))) for n in range(size)]
    await turns()

    async def op() -> None:
        await engine.call(question(0))

    yield op
    await cancelled(tasks)
    await engine.aclose()


@contextlib.asynccontextmanager
async def agents(size: int, _: Path) -> AsyncGenerator[Op]:
    """Agents that the statistics of an engine have seen."""
    engine = Stack(RateLimiter(concurrency=64)).bind(answer, env=Env(seed=1))
    for number in range(size):
        await engine.call(question(0, context=Context(agent=f"agent {number}")))

    async def op() -> None:
        await engine.call(question(0, context=Context(agent=f"agent {_rng.randrange(size)}")))

    yield op
    await engine.aclose()


CASES = (
    Case("memory hit", "entries in memory", memory_hits(asked=200)),
    # Beyond the processor's caches each touch of memory costs more; that is measured and not judged.
    Case("memory hit, on any", "entries in memory", memory_hits(asked=None), judged=False),
    Case("memory miss, stored", "entries in a full memory", memory_stores),
    Case("lane drawn", "agents with lanes", lanes),
    Case("disk hit", "rows on disk", disk_hits, ops=500),
    Case("permit granted", "waiters, one agent", waiting_calls(concurrency=1)),
    Case("permit granted, many agents", "waiters, an agent each", waiting_calls(concurrency=1, many_agents=True)),
    Case("permit granted, tokens", "waiters, tpm told", waiting_calls(concurrency=1, tpm=10**9)),
    Case("waiter left", "waiters", leaving_waiters),
    Case("flight", "other flights", flights),
    Case("follower", "other followers", followers),
    Case("batch item", "pending items", pending_items),
    Case("call", "calls in flight", calls_in_flight),
    Case("call of an agent", "agents in the statistics", agents),
    Case("breaker and limiter", "models seen", models),
    Case("router", "endpoints", endpoints, sizes=(1, 8, 64)),
)


async def cost_of(op: Op, ops: int) -> float:
    """CPU microseconds of this thread per operation."""
    gc.collect()
    gc.disable()
    try:
        began = time.thread_time()
        for _ in range(ops):
            await op()
        return (time.thread_time() - began) / ops * 1e6
    finally:
        gc.enable()


async def measure(case: Case, repeats: int, directory: Path) -> dict[str, Any]:
    """All sizes stand side by side, and are measured in turn."""
    costs: dict[int, list[float]] = {size: [] for size in case.sizes}
    async with contextlib.AsyncExitStack() as stack:
        made = [(size, await stack.enter_async_context(case.build(size, directory))) for size in case.sizes]
        gc.freeze()
        for _, op in made:
            await cost_of(op, case.ops // 4)  # warm
        for repeat in range(repeats):
            for size, op in in_turn(made, repeat):
                costs[size].append(await cost_of(op, case.ops))
        gc.unfreeze()
    best = {size: min(found) for size, found in costs.items()}
    ratio = best[case.sizes[-1]] / best[case.sizes[0]]
    return {"name": case.name, "many": case.many, "us": best, "ratio": ratio, "ok": ratio <= BUDGET or not case.judged}


async def memory_of(calls: int) -> list[float]:
    """Resident MB at ten points of so many different calls, one after the other, through every layer."""
    layers = (Deadline(30), TTLCache(60, max_entries=1000), Coalescer(), Retry(), CircuitBreaker())
    found: list[float] = []
    async with Stack(*layers, RateLimiter(concurrency=8, tpm=10**9), Timeout(30)).bind(answer) as engine:
        for tenth in range(10):
            for number in range(calls // 10):
                await engine.call(question(tenth * calls + number))
            found.append(int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6)
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as text."""
    lines = [f"{'µs of CPU per':28} {'beside':26} {'at each size':>42} {'growth':>8}"]
    for row in rows:
        costs = "  ".join(f"{size:>6,}: {cost:6.1f}" for size, cost in row["us"].items())
        verdict = "ok" if row["ok"] else f"OVER {BUDGET}"
        lines.append(f"{row['name']:28} {row['many']:26} {costs:>42} {row['ratio']:7.2f}x  {verdict}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Measure, print, and judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7, help="measurements of each size (default 7)")
    parser.add_argument("--only", nargs="+", help="rows whose name contains one of these texts")
    parser.add_argument("--largest", type=int, default=SIZES[-1], help="leave out sizes above (default 100000)")
    parser.add_argument("--calls", type=int, default=200_000, help="calls for the memory row; 0: none (default 200000)")
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args(argv)
    progress, rows = Progress(), list[dict[str, Any]]()
    for case in CASES:
        if options.only and not any(text in case.name for text in options.only):
            continue
        progress(case.name)
        sizes = tuple(size for size in case.sizes if size <= options.largest)
        with tempfile.TemporaryDirectory() as directory:
            rows.append(asyncio.run(measure(case._replace(sizes=sizes), options.repeats, Path(directory))))
    print(table(rows))
    memory: list[float] = []
    if options.calls:
        progress(f"memory over {options.calls:,} calls")
        memory = asyncio.run(memory_of(options.calls))
        told = " ".join(f"{mb:.0f}" for mb in memory)
        print(f"resident MB over {options.calls:,} different calls, one after the other: {told}")
    flat = not memory or memory[-1] - memory[1] <= 10
    if options.json is not None:
        content = {"machine": machine(), "budget": BUDGET, "rows": rows, "memory_mb": memory, "memory_flat": flat}
        write_json(options.json, content)
    return 0 if flat and all(row["ok"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())

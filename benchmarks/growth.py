"""Whether a call costs more where there is more: `python benchmarks/growth.py --help`.

Each row is one thing that can become many (cached entries, waiters, agents, endpoints, ...), and the CPU time of one
call through the layer that holds them, at each size: the least of several interleaved repeats. "growth" is the cost at
100,000 over that at 1,000 (of endpoints: at 64 over that at 2; a lone one is not chosen); above the budget the
exit status is 1. "in all" is the largest size over the smallest. The collector is off while it is measured: how often
it runs, and over how much, is the program's.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import itertools
import random
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from measure import Progress, concluded, in_turn

from llmmw import (
    Balancer,
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
from llmmw.stores.place import prepare
from llmmw.stores.rows import Rows, _digest
from llmmw.testing.fake import chat_body, chat_call

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence

    from llmmw.call import Call
    from llmmw.stores.entry import Entry

    Op = Callable[[], Awaitable[object]]
    Ops = tuple[Op, ...]
    Build = Callable[[int, Path], contextlib.AbstractAsyncContextManager[Ops]]

ENTRIES = (1_000, 100_000, 1_000_000)
WAITERS = (1, 1_000, 4_096, 100_000)
SEEN = (1_000, 100_000)
ENDPOINTS = (1, 2, 8, 64)
BUDGET = 1.3
FLAT_MB = 10.0
ROOM = 1 << 34
_REPLY = Reply(data=chat_body("an answer"), headers=(("content-type", "application/json"),))
_rng = random.Random(1)


class Case(NamedTuple):
    """One thing that can become many."""

    names: tuple[str, ...]
    """One for each operation that `build` gives."""
    many: str
    build: Build
    sizes: tuple[int, ...] = SEEN
    ops: int = 2_000
    judged: tuple[int, int] = SEEN
    """The two sizes whose costs may not be far apart."""


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


@contextlib.asynccontextmanager
async def inside(ask: Any, calls: Iterable[Call], owner: Any = None) -> AsyncGenerator[list[asyncio.Task[Any]]]:
    """These calls are under way; whose they are (what is asked, by default) is closed at the end."""
    tasks = [asyncio.ensure_future(ask(call)) for call in calls]
    await turns()
    yield tasks
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await (owner or ask).aclose()


def come_and_go(bound: Any, call: Callable[[], Call]) -> Op:
    """One more call joins those that wait, and is cancelled."""

    async def op() -> None:
        task = asyncio.ensure_future(bound(call()))
        await turns(1)
        task.cancel()
        await turns(2)

    return op


@contextlib.asynccontextmanager
async def memory(size: int, _: Path) -> AsyncGenerator[Ops]:
    """A full memory: hits on 200 of its entries, spread evenly; hits on any; misses that each evict another entry."""
    bound = TTLCache(3600, max_entries=size, max_bytes=ROOM).bind(answer, Env(seed=1))
    for number in range(size):
        await bound(question(number))

    async def hit() -> None:
        await bound(question(_rng.randrange(0, size, size // 200)))

    async def any_hit() -> None:
        await bound(question(_rng.randrange(size)))

    numbers = itertools.count(size)

    async def miss() -> None:
        await bound(question(next(numbers)))

    yield hit, any_hit, miss
    await bound.aclose()


@contextlib.asynccontextmanager
async def lanes(size: int, _: Path) -> AsyncGenerator[Ops]:
    """Draws of lanes by many agents."""
    bound = TTLCache(3600, sampling="lanes", max_entries=size).bind(answer, Env(seed=1))
    for number in range(size):
        await bound(chat_call("q", context=Context(agent=f"agent {number}")))

    async def op() -> None:
        await bound(chat_call("q", context=Context(agent=f"agent {_rng.randrange(size)}")))

    yield (op,)
    await bound.aclose()


class Sink:
    """In place of a disk tier while a cache is filled: keeps the rows that it would write."""

    max_item_bytes = ROOM

    def __init__(self) -> None:
        self.rows: list[tuple[bytes, Entry]] = []

    def put(self, key: bytes, entry: Entry, *_: object) -> None:
        self.rows.append((key, entry))

    async def get(self, _: bytes) -> None:
        """Nothing is there."""


def write(folder: Path, entries: list[tuple[bytes, Entry]]) -> None:
    """Entries into a database: the first as the tier writes it, the others like it, in one transaction."""
    prepare(folder)
    rows = Rows(folder, ROOM)
    database: Any = rows._table  # noqa: SLF001 — a million rows one by one take minutes
    assert rows.set(*entries[0], 3600) is None
    found = database._sql("SELECT * FROM Cache")  # noqa: SLF001 — as above
    row = dict(zip([column[0] for column in found.description], found.fetchone(), strict=True))
    del row["rowid"]
    insert = f"INSERT INTO Cache ({', '.join(row)}) VALUES ({', '.join(f':{name}' for name in row)})"
    with database._transact() as (sql, _):  # noqa: SLF001 — as above
        for key, entry in entries[1:]:
            sealed = rows._seal(entry)  # noqa: SLF001 — as above
            sql(insert, row | {"key": key, "value": _digest(key, sealed) + sealed})
    rows.close()


@contextlib.asynccontextmanager
async def disk_hits(size: int, directory: Path) -> AsyncGenerator[Ops]:
    """Hits on any of the rows on disk, with almost nothing in memory."""
    settings = TTLCache(3600, directory=directory / f"rows-{size}", max_entries=1, disk_bytes=ROOM)
    bound, sink = settings.bind(answer, Env(seed=1)), Sink()
    bound._store.backing, disk = sink, bound._store.backing  # noqa: SLF001 — its queue is bounded: see `write`
    for number in range(size):
        await bound(question(number))
    bound._store.backing = disk  # noqa: SLF001 — as above
    await bound.aclose()
    write(directory / f"rows-{size}", sink.rows)
    bound = settings.bind(answer, Env(seed=1))

    async def op() -> None:
        await bound(question(_rng.randrange(size)))

    yield (op,)
    await bound.aclose()


def waiting_calls(*, many_agents: bool = False, **settings: Any) -> Build:
    """Calls that wait for a permit, of one agent or of many: one leaves, the next is let in, another joins."""

    @contextlib.asynccontextmanager
    async def build(size: int, _: Path) -> AsyncGenerator[Ops]:
        held = Held()
        bound = RateLimiter(**settings).bind(held, Env(seed=1))

        def of(number: int) -> Call:
            agent = f"agent {number % size}" if many_agents else "agent"
            return question(0, context=Context(agent=agent, priority=number % 3))

        numbers = itertools.count(size)
        async with inside(bound, map(of, range(size))) as tasks:

            async def op() -> None:
                held.let_go()
                tasks.append(asyncio.ensure_future(bound(of(next(numbers)))))
                await turns(4)

            yield (op,)

    return build


@contextlib.asynccontextmanager
async def leaving_waiters(size: int, _: Path) -> AsyncGenerator[Ops]:
    """Callers with deadlines who join the queue of the limiter and are cancelled."""
    bound = RateLimiter(concurrency=1).bind(Held(), Env(seed=1))
    loop = asyncio.get_running_loop()
    async with inside(bound, (question(0) for _ in range(size))):
        yield (come_and_go(bound, lambda: question(0, context=Context(deadline=loop.time() + 1000))),)


@contextlib.asynccontextmanager
async def flights(size: int, _: Path) -> AsyncGenerator[Ops]:
    """Other flights under way."""
    held = Held()

    async def some(call: Call) -> Reply:
        return await (held if call.payload["messages"][0]["content"] != "question -1" else answer)(call)

    bound = Coalescer().bind(some, Env(seed=1))
    async with inside(bound, map(question, range(size))):

        async def op() -> None:
            await bound(question(-1))

        yield (op,)


@contextlib.asynccontextmanager
async def followers(size: int, _: Path) -> AsyncGenerator[Ops]:
    """Other callers who wait for the same flight: one joins and leaves."""
    bound = Coalescer().bind(Held(), Env(seed=1))
    async with inside(bound, (question(0) for _ in range(size))):
        yield (come_and_go(bound, lambda: question(0)),)


def endpoint(number: int) -> Any:
    """One of several that answer at once."""

    async def found(call: Call) -> Reply:
        return await answer(call)

    found.__qualname__ = f"endpoint_{number}"
    return found


@contextlib.asynccontextmanager
async def replicas(size: int, _: Path) -> AsyncGenerator[Ops]:
    """Like servers of a balancer: for nobody's calls, and for those of agents."""
    engine = Stack(Balancer(), Retry(), CircuitBreaker()).bind([endpoint(number) for number in range(size)])

    async def op() -> None:
        await engine.call(question(0))

    async def by_agent() -> None:
        await engine.call(question(0).within(agent=f"agent {_rng.randrange(100)}"))

    yield (op, by_agent)
    await engine.aclose()


@contextlib.asynccontextmanager
async def fallbacks(size: int, _: Path) -> AsyncGenerator[Ops]:
    """Endpoints of a router, of which the first answers."""
    others = [endpoint(number) for number in range(1, size)]
    engine = Stack(ErrorRouter(fallbacks=others), Retry(), CircuitBreaker()).bind(endpoint(0), env=Env(seed=1))

    async def op() -> None:
        await engine.call(question(0))

    yield (op,)
    await engine.aclose()


@contextlib.asynccontextmanager
async def models(size: int, _: Path) -> AsyncGenerator[Ops]:
    """Models that a breaker and a limiter have seen."""
    env = Env(seed=1)
    bound = CircuitBreaker().bind(RateLimiter(concurrency=64).bind(answer, env), env)
    calls = [question(0).replace(model=f"model {number}") for number in range(size)]
    for call in calls:
        await bound(call)

    async def op() -> None:
        await bound(calls[_rng.randrange(200)])  # those in use: the tables keep about a thousand

    yield (op,)
    await bound.aclose()


@contextlib.asynccontextmanager
async def pending_items(size: int, _: Path) -> AsyncGenerator[Ops]:
    """Items in the batcher that wait for batch mates: one joins and leaves."""
    batcher = Batcher(max_size=10**9, max_queue=10**9, flush_interval=3000, barrier=10**9)
    bound = batcher.bind(answer, Env(seed=1))

    def of(number: int) -> Call:
        return question(number, context=Context(step=1, agent=f"agent {number}"))

    async with inside(bound, map(of, range(size))):
        yield (come_and_go(bound, lambda: of(size + 1)),)


@contextlib.asynccontextmanager
async def calls_in_flight(size: int, _: Path) -> AsyncGenerator[Ops]:
    """Other calls under way in the same engine, through deadline, retry, breaker, limiter and time-out."""
    held = Held()

    async def some(call: Call) -> Reply:
        return await (held if call.model == "held" else answer)(call)

    layers = (Deadline(3000), Retry(), CircuitBreaker(), RateLimiter(concurrency=10**6, rpm=10**8), Timeout(2000))
    engine = Stack(*layers).bind(some, env=Env(seed=1))
    async with inside(engine.call, (question(n).replace(model="held") for n in range(size)), engine):

        async def op() -> None:
            await engine.call(question(0))

        yield (op,)


@contextlib.asynccontextmanager
async def agents(size: int, _: Path) -> AsyncGenerator[Ops]:
    """Agents that the statistics of an engine have seen."""
    engine = Stack(RateLimiter(concurrency=64)).bind(answer, env=Env(seed=1))
    for number in range(size):
        await engine.call(question(0, context=Context(agent=f"agent {number}")))

    async def op() -> None:
        await engine.call(question(0, context=Context(agent=f"agent {_rng.randrange(size)}")))

    yield (op,)
    await engine.aclose()


def waiters(name: str, many: str, build: Build) -> Case:
    """What may be one and may be thousands."""
    return Case((name,), many, build, sizes=WAITERS)


MEMORY = ("memory hit", "memory hit, on any", "memory miss, stored")
UNJUDGED = frozenset({"memory hit, on any"})
"""Beyond the processor's caches each touch of memory costs more; that is measured and not judged."""
CASES = (
    Case(MEMORY, "entries in memory", memory, sizes=ENTRIES),
    Case(("disk hit",), "rows on disk", disk_hits, sizes=ENTRIES, ops=500),
    Case(("lane drawn",), "agents with lanes", lanes),
    Case(("call of an agent",), "agents in the statistics", agents),
    Case(("breaker and limiter",), "models seen", models),
    waiters("permit granted", "waiters, one agent", waiting_calls(concurrency=1)),
    waiters("permit granted, many agents", "waiters, an agent each", waiting_calls(concurrency=1, many_agents=True)),
    waiters("permit granted, tokens", "waiters, tpm told", waiting_calls(concurrency=1, tpm=10**9)),
    waiters("waiter left", "waiters", leaving_waiters),
    waiters("flight", "other flights", flights),
    waiters("follower", "other followers", followers),
    waiters("batch item", "pending items", pending_items),
    waiters("call", "calls in flight", calls_in_flight),
    Case(("router",), "fallbacks", fallbacks, sizes=ENDPOINTS, judged=(2, 64)),
    Case(("balancer", "balancer, agents"), "replicas", replicas, sizes=ENDPOINTS, judged=(2, 64)),
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


async def measure(case: Case, names: Sequence[str], repeats: int, directory: Path) -> list[dict[str, Any]]:
    """Those of a case's operations that are named, one after the other; of each, all sizes in turn."""
    rows: list[dict[str, Any]] = []
    async with contextlib.AsyncExitStack() as stack:
        gc.disable()  # it would look through a million entries again and again as they are made
        made = [(size, await stack.enter_async_context(case.build(size, directory))) for size in case.sizes]
        gc.freeze()
        for at, name in enumerate(case.names):
            if name not in names:
                continue
            costs: dict[int, list[float]] = {size: [] for size in case.sizes}
            for _, ops in made:
                await cost_of(ops[at], case.ops // 4)  # warm
            for repeat in range(repeats):
                for size, ops in in_turn(made, repeat):
                    costs[size].append(await cost_of(ops[at], case.ops))
            rows.append(judged(case, name, {size: min(found) for size, found in costs.items()}))
        gc.unfreeze()
    return rows


def judged(case: Case, name: str, best: dict[int, float]) -> dict[str, Any]:
    """A row: costs by size, how they grow, and whether they may. Growth is None where a size was not measured."""
    few, many = case.judged
    growth = best[many] / best[few] if few in best and many in best else None
    ok = name in UNJUDGED or growth is None or growth <= BUDGET
    sizes = sorted(best)
    in_all = best[sizes[-1]] / best[sizes[0]]
    return {"name": name, "many": case.many, "us": best, "growth": growth, "in_all": in_all, "ok": ok}


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
    lines = [f"{'µs of CPU per':28} {'beside':26} {'at each size':>61} {'growth':>8} {'in all':>8}"]
    for row in rows:
        costs = "  ".join(f"{size:>6,}: {cost:5.1f}" for size, cost in row["us"].items())
        growth = "" if row["growth"] is None else f"{row['growth']:.2f}x"
        verdict = "ok" if row["ok"] else f"OVER {BUDGET}"
        lines.append(f"{row['name']:28} {row['many']:26} {costs:>61} {growth:>8} {row['in_all']:7.2f}x  {verdict}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Measure, print, and judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7, help="measurements of each size (default 7)")
    parser.add_argument("--only", nargs="+", help="rows whose name contains one of these texts")
    parser.add_argument("--largest", type=int, default=ENTRIES[-1], help="leave out sizes above (default 1000000)")
    parser.add_argument("--calls", type=int, default=10**6, help="calls for the memory row; 0: none (default 1000000)")
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args(argv)
    progress, rows = Progress(), list[dict[str, Any]]()
    for case in CASES:
        names = [name for name in case.names if not options.only or any(text in name for text in options.only)]
        if not names:
            continue
        progress(", ".join(names))
        sizes = tuple(size for size in case.sizes if size <= options.largest)
        with tempfile.TemporaryDirectory() as directory:
            rows += asyncio.run(measure(case._replace(sizes=sizes), names, options.repeats, Path(directory)))
    print(table(rows))
    resident: list[float] = []
    if options.calls:
        progress(f"memory over {options.calls:,} calls")
        resident = asyncio.run(memory_of(options.calls))
        told = " ".join(f"{mb:.0f}" for mb in resident)
        print(f"resident MB over {options.calls:,} different calls, one after the other: {told}")
    broken = [f"{row['name']}: x {row['growth']:.2f}" for row in rows if not row["ok"]]
    if resident and resident[-1] - resident[1] > FLAT_MB:
        broken.append(f"resident memory grew from {resident[1]:.0f} to {resident[-1]:.0f} MB")
    return concluded(rows, broken, progress, options.json, memory_mb=resident)


if __name__ == "__main__":
    sys.exit(main())

"""The disk tier under a foreign lock, beside its floors, and as it fills: `python benchmarks/disk_faults.py --help`.

Three sections. "foreign lock": another process holds BEGIN IMMEDIATE while calls go on; the longest time between two
turns of the loop, beside the same without a lock and diskcache called on the loop. "one read": CPU of a disk read
beside the thread handoff that it cannot do without. "growth": the same operation with few and many entries.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import queue
import random
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from measure import Budget, Progress, Row, as_json, in_turn, table, write_json

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence

    from llmmw.stores.disk import DiskStore

    Work = Callable[[int], Awaitable[object]]

HOLD = """
import sqlite3, sys, time
c = sqlite3.connect(sys.argv[1], isolation_level=None)
c.execute("BEGIN IMMEDIATE")
print("held", flush=True)
time.sleep(float(sys.argv[2]))
"""
LOCK, READ, GROWTH = "foreign lock, longest gap of the loop", "one read, CPU", "growth, CPU"
GAP_MS = 50.0
GROWS = 1.3
VALUE = b"word " * 200
MISSING = 10**9
TOGETHER = 64


def key_of(number: int) -> bytes:
    return sha256(b"%d" % number).digest()


# ── a lock held elsewhere ────────────────────────────────────────────────────────────────────────────────────────────


@contextlib.asynccontextmanager
async def held(database: Path, hold_s: float) -> AsyncGenerator[None]:
    """Another process holds the write lock of a database for so long."""
    command = (sys.executable, "-c", HOLD, str(database), str(hold_s))
    holder = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
    assert holder.stdout is not None
    await holder.stdout.readline()
    yield
    await holder.wait()


async def longest_gap(work: Work, for_s: float) -> tuple[float, int]:
    """Milliseconds between two turns of the loop at most, and how many calls were served, in so many seconds."""
    gap, latest = 0.0, time.perf_counter()
    end = latest + for_s

    async def watch() -> None:
        nonlocal gap, latest
        while True:
            await asyncio.sleep(0.001)
            now = time.perf_counter()
            gap, latest = max(gap, now - latest), now

    watching = asyncio.create_task(watch())
    await asyncio.sleep(0)
    served = 0
    while time.perf_counter() < end:
        await work(served)
        served += 1
        await asyncio.sleep(0.002)
    watching.cancel()
    return gap * 1000, served


async def ours(hold_s: float, *, locked: bool) -> tuple[float, str]:
    """The gap while calls are made, every second one a disk hit's or miss's read; and what became of the calls."""
    import llmmw

    with tempfile.TemporaryDirectory() as base:
        place = Path(base) / "cache"

        @llmmw.middleware(cache_ttl=300, cache_directory=str(place))
        async def ask(prompt: str) -> str:
            await asyncio.sleep(0)
            return prompt * 10

        await ask("first")
        while ask.get_performance_stats()["layers"]["cache"]["waiting writes"]:
            await asyncio.sleep(0.001)
        async with held(place / "cache.db", hold_s) if locked else contextlib.nullcontext():
            gap_ms, served = await longest_gap(lambda number: ask(f"{number // 2}"), hold_s * 0.9)
            cache = ask.get_performance_stats()["layers"]["cache"]
        await ask.aclose()
        troubles = {name: count for name, count in cache.items() if name.startswith("trouble")}
        return gap_ms, f"{served} calls served, {cache['waiting writes']} writes waiting, {troubles or 'no trouble'}"


async def plain_diskcache(hold_s: float) -> float:
    """The same with diskcache called on the loop, as many libraries do."""
    import diskcache

    with tempfile.TemporaryDirectory() as base:
        stored = diskcache.Cache(base)

        async def work(number: int) -> None:
            stored.set(number, VALUE, retry=True)

        await work(0)
        async with held(Path(base) / "cache.db", hold_s):
            gap_ms, _ = await longest_gap(work, hold_s * 0.9)
        stored.close()
        return gap_ms


def measure_lock(hold_s: float, tell: Progress) -> tuple[list[Row], str]:
    tell(f"a lock held for {hold_s} s")
    free, _ = asyncio.run(ours(hold_s, locked=False))
    locked, became = asyncio.run(ours(hold_s, locked=True))
    peer = asyncio.run(plain_diskcache(hold_s))
    budget = Budget(GAP_MS, "SPEC disk-2")
    return [
        Row(LOCK, "llmmw, no lock", "ms", [free]),
        Row(LOCK, "llmmw, lock held", "ms", [locked], floor="llmmw, no lock", budget=budget, ours=True),
        Row(LOCK, "diskcache on the loop, lock held", "ms", [peer], floor="llmmw, no lock"),
    ], became


# ── one read ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class Handoff:
    """The least a read on another thread needs: a queue there, a wake-up back."""

    def __init__(self, database: Path) -> None:
        self._jobs: queue.SimpleQueue[tuple[asyncio.Future[Any], bytes | None] | None] = queue.SimpleQueue()
        self._database = database
        self._thread = threading.Thread(target=self._main)
        self._thread.start()

    def _main(self) -> None:
        connection = sqlite3.connect(self._database, isolation_level=None)
        while (job := self._jobs.get()) is not None:
            future, key = job
            row = (
                None if key is None else connection.execute("SELECT value FROM Cache WHERE key = ?", (key,)).fetchone()
            )
            future.get_loop().call_soon_threadsafe(future.set_result, row)
        connection.close()

    async def ask(self, key: bytes | None) -> object:
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._jobs.put((future, key))
        return await future

    def close(self) -> None:
        self._jobs.put(None)
        self._thread.join()


async def cpu_us(work: Work, calls: int, *, at_once: int = 1) -> float:
    """CPU per call, the median of ten parts, which a busy neighbour disturbs less than a mean."""
    parts: list[float] = []
    for part in range(10):
        numbers = range(part * calls // 10, (part + 1) * calls // 10)
        began = time.process_time_ns()
        for first in range(0, len(numbers), at_once):
            if at_once == 1:
                await work(numbers[first])
            else:
                await asyncio.gather(*map(work, numbers[first : first + at_once]))
        parts.append((time.process_time_ns() - began) / len(numbers) / 1000)
    return statistics.median(parts)


@contextlib.asynccontextmanager
async def filled(entries: int) -> AsyncGenerator[tuple[DiskStore, Path]]:
    """A store with so many entries of 1 KB."""
    from llmmw.env import Env
    from llmmw.stores import disk
    from llmmw.stores.entry import Entry, Header

    disk.READ_BUDGET_S = disk.OPEN_BUDGET_S = 30.0
    base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=base) as directory:
        place = Path(directory) / "cache"
        store = disk.DiskStore(place, Env(), max_bytes=2**32)
        for number in range(entries):
            store.put(key_of(number), Entry(Header(time.time(), 3600.0), VALUE), 3600.0)
            if number % 500 == 0:
                await written(store)
        await written(store)
        yield store, place
        await store.aclose()


async def written(store: DiskStore) -> None:
    while store.gauges()["waiting writes"]:
        await asyncio.sleep(0.0005)


async def measure_read(rows: dict[str, Row], calls: int, repeat: int) -> None:
    any_order = random.Random(repeat).sample(range(calls), calls)
    async with filled(calls) as (store, place):
        handoff = Handoff(place / "cache.db")
        works: list[tuple[str, Work, int]] = [
            ("handoff to a thread and back", lambda _: handoff.ask(None), 1),
            ("handoff and SELECT", lambda number: handoff.ask(key_of(number)), 1),
            ("asyncio.to_thread of nothing", lambda _: asyncio.to_thread(int), 1),
            ("DiskStore.get, in any order", lambda number: store.get(key_of(any_order[number])), 1),
            ("DiskStore.get, in the order of storing", lambda number: store.get(key_of(number)), 1),
            (f"DiskStore.get, {TOGETHER} at once", lambda number: store.get(key_of(number)), TOGETHER),
        ]
        for name, work, at_once in in_turn(works, repeat):
            row = rows.setdefault(name, Row(READ, name, "µs", floor="handoff and SELECT", ours="Disk" in name))
            row.values.append(await cpu_us(work, calls, at_once=at_once))
        handoff.close()


# ── growth ───────────────────────────────────────────────────────────────────────────────────────────────────────────


async def measure_growth(rows: dict[str, Row], entries: int, few: int, calls: int) -> None:
    from llmmw.env import Env
    from llmmw.stores.disk import DiskStore
    from llmmw.stores.entry import Entry, Header

    rng = random.Random(entries)
    numbers = [rng.randrange(entries) for _ in range(calls)]
    async with filled(entries) as (store, place):
        full = DiskStore(place, Env(), max_bytes=(place / "cache.db").stat().st_size)

        async def put(number: int, into: DiskStore = store) -> None:
            into.put(key_of(MISSING + number), Entry(Header(time.time(), 3600.0), VALUE), 3600.0)
            if number % 100 == 99:
                await written(into)

        async def delete(number: int) -> None:
            store.delete(key_of(MISSING + number))
            if number % 100 == 99:
                await written(store)

        works: list[tuple[str, Work]] = [
            ("get", lambda number: store.get(key_of(numbers[number]))),
            ("get, not there", lambda number: store.get(key_of(2 * MISSING + number))),
            ("put", put),
            ("delete", delete),
            ("put into a full one", lambda number: put(number + MISSING, full)),
        ]
        for name, work in works:
            floor = f"{name}, {few:,} entries"
            row = rows.setdefault(
                f"{name}, {entries:,} entries",
                Row(GROWTH, f"{name}, {entries:,} entries", "µs", floor="" if entries == few else floor, ours=True),
            )
            row.values.append(await cpu_us(work, calls))
        await full.aclose()


def grown(rows: Sequence[Row]) -> list[str]:
    """What grew by more than it may, by the best repeats, which busy neighbours disturbed least."""
    best = {row.name: min(row.values) for row in rows}
    grew = {row.name: best[row.name] / best[row.floor] for row in rows if row.section == GROWTH and row.floor}
    return [f"{name}: x {ratio:.2f}" for name, ratio in grew.items() if ratio > GROWS]


def main(argv: Sequence[str] | None = None) -> int:
    """Run it; with `--check` the exit status tells whether the budgets hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hold", type=float, default=3.0, help="seconds for which the lock is held")
    parser.add_argument("--entries", type=int, nargs="+", default=[1_000, 10_000, 100_000], help="how full, for growth")
    parser.add_argument("--calls", type=int, default=2_000, help="per figure")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument("--check", action="store_true", help="fail where a budget is exceeded")
    options = parser.parse_args(argv)
    tell = Progress()
    rows, became = measure_lock(options.hold, tell)
    reads: dict[str, Row] = {}
    growth: dict[str, Row] = {}
    for repeat in range(options.repeats):
        tell(f"reads, repeat {repeat + 1}")
        asyncio.run(measure_read(reads, options.calls, repeat))
        for entries in in_turn(sorted(options.entries), repeat):
            tell(f"{entries:,} entries")
            asyncio.run(measure_growth(growth, entries, min(options.entries), options.calls))
    rows += [*reads.values(), *growth.values()]
    print(table(rows))
    print(f"\nunder the lock: {became}")
    problems = [f"{row.name}: {row.median:.0f} {row.unit}" for row in rows if row.status == "over"] + grown(rows)
    print(f"loop gap under {GAP_MS:.0f} ms, growth under x {GROWS}: {'; '.join(problems) or 'both hold'}")
    if options.json is not None:
        settings = {"hold_s": options.hold, "entries": options.entries, "calls": options.calls}
        write_json(options.json, as_json(rows, settings, tell.took_s) | {"under the lock": became})
    return 1 if options.check and problems else 0


if __name__ == "__main__":
    sys.exit(main())

"""What a call costs the batcher when few and when many wait: `python benchmarks/batch_growth.py --help`.

Nothing is answered: an endpoint stands still, so that what is submitted waits. Then some calls more are submitted and
withdrawn again, and the CPU time of that is taken: at one group, at a group per call (a seed each), under limits of
bytes and tokens; beside plain dicts, whose growth is the memory's own.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from measure import Progress, Row, as_json, in_turn, table, write_json

from llmmw.algo.batchmates import grouping
from llmmw.call import Call, Reply
from llmmw.env import Env
from llmmw.layers.batch import Batcher

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llmmw.layers.gather import Gathering

GROWS = 1.3
"""Goal: at most that much more for a call among 100,000 than among 1,000 (issue 3)."""
ROOM = 10_000_000
FLOOR = "floor: plain dicts, one each"
WAYS: dict[str, dict[str, Any]] = {
    "one group": {},
    "a group each": {},
    "max_bytes, max_tokens": {"max_bytes": ROOM * 1000, "max_tokens": ROOM * 1000},
}


def call_of(number: int, way: str) -> Call:
    body: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": f"question {number}"}]}
    if way == "a group each":
        body["seed"] = number
    return Call("chat", "m", body, target="http://x/v1")


async def stands_still(_: Call) -> Reply:
    """An endpoint that never answers."""
    await asyncio.get_running_loop().create_future()
    raise AssertionError


def submit(gathering: Gathering, calls: Sequence[Call]) -> list[tuple[Any, asyncio.Future[Any]]]:
    """What `BoundBatcher` does with a call that has to wait."""
    loop = asyncio.get_running_loop()
    found: list[tuple[Any, asyncio.Future[Any]]] = []
    for call in calls:
        group = grouping(call)
        assert group is not None
        waiter: asyncio.Future[Any] = loop.create_future()
        found.append((gathering.submit(call, group, waiter), waiter))
    return found


def measure_floor(waiting: int, calls: int) -> float:
    """CPU seconds of the least that such calls can cost: a key and a dict of its own for each, in a dict."""
    held = {key_of(number): {number: object()} for number in range(waiting)}
    more = [key_of(waiting + number) for number in range(calls)]
    gc.collect()
    gc.disable()
    began = time.process_time()
    for key in more:
        held[key] = {0: object()}
    for key in more:
        del held[key]
    took = time.process_time() - began
    gc.enable()
    return took


def key_of(number: int) -> tuple[object, ...]:
    return ("chat", "m", "http://x/v1", "", None, (), 0, (), b'[["model","m"],["seed",%d]]' % number)


async def measure_batcher(way: str, waiting: int, calls: int) -> float:
    """CPU seconds of submitting and withdrawing, with so many waiting."""
    options = Batcher(joint="on", min_size=1, max_size=ROOM, max_queue=ROOM, flush_interval=3600, **WAYS[way])
    batcher = options.bind(stands_still, Env())
    busy = asyncio.ensure_future(batcher(call_of(-1, way)))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    gathering = batcher._gathering  # noqa: SLF001 — what is measured is inside  # pyright: ignore[reportPrivateUsage]
    submit(gathering, [call_of(number, way) for number in range(waiting)])
    more = [call_of(waiting + number, way) for number in range(calls)]
    gc.collect()
    gc.disable()
    began = time.process_time()
    for item, waiter in submit(gathering, more):
        item.leave(waiter)
        gathering.withdraw(item)
    took = time.process_time() - began
    gc.enable()
    await batcher.aclose()
    busy.cancel()
    await asyncio.gather(busy, return_exceptions=True)
    return took


def measure(rows: dict[str, Row], way: str, waiting: int, calls: int) -> None:
    """One more figure of a row."""
    name = f"{way}, {waiting:,} waiting"
    took = measure_floor(waiting, calls) if way == FLOOR else asyncio.run(measure_batcher(way, waiting, calls))
    row = rows.setdefault(name, Row("a call in and out, CPU", name, "µs", ours=way != FLOOR))
    row.values.append(took / calls * 1e6)


def main(argv: Sequence[str] | None = None) -> int:
    """Run it; with `--check` the exit status tells whether the goal is met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--waiting", type=int, nargs="+", default=[1_000, 10_000, 100_000], help="calls that wait")
    parser.add_argument("--calls", type=int, default=2_000, help="per figure")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument("--check", action="store_true", help="fail where a cost grows too much")
    options = parser.parse_args(argv)
    tell = Progress()
    rows: dict[str, Row] = {}
    counts = sorted(options.waiting)
    for repeat in range(options.repeats):
        for way in (*WAYS, FLOOR):
            tell(f"repeat {repeat + 1}, {way}")
            for waiting in in_turn(counts, repeat):
                measure(rows, way, waiting, options.calls)
    ordered = sorted(rows.values(), key=lambda row: list(rows).index(row.name))
    few = f"{counts[0]:,} waiting"
    for row in ordered:
        floor = f"{row.name.rpartition(', ')[0]}, {few}"
        row.floor = floor if floor != row.name else ""
    print(table(ordered))
    best = {row.name: min(row.values) for row in ordered}
    problems = [
        f"{row.name}: x {best[row.name] / best[row.floor]:.2f}"
        for row in ordered
        if row.floor and row.ours and best[row.name] > GROWS * best[row.floor]
    ]
    print(f"\ngrowth under x {GROWS} (best against best): {'; '.join(problems) or 'holds'}")
    if options.json is not None:
        settings: dict[str, object] = {"waiting": counts, "calls": options.calls}
        write_json(options.json, as_json(ordered, settings, tell.took_s))
    return 1 if options.check and problems else 0


if __name__ == "__main__":
    sys.exit(main())

"""The process of one way of one peer: reads commands as lines of JSON, answers each with one.

    python -m peers.worker NAME-OF-PEER NAME-OF-WAY

An answer is an object: what was found, or {"cannot": why} where the peer has nothing for it, or {"error": what}.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import json
import os
import sys
import time
from collections import Counter
from contextlib import asynccontextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from client_cpu import crowd, measure
from hit_cost import Case, cost_of, prompt

from peers.guard import OUTSIDE, stay_inside
from peers.protocol import CannotError, Job
from peers.roster import peer_named

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from peers.protocol import Ask, Peer, Way


class Worker:
    """Opens the way for a job, and uses it."""

    def __init__(self, runner: asyncio.Runner, peer: Peer, way: Way) -> None:
        self._runner = runner
        self._peer = peer
        self._way = way
        self._open: contextlib.AbstractAsyncContextManager[Ask] | None = None
        self._ask: Ask = _not_open
        self._numbers = itertools.count()

    def open(self, **job: Any) -> dict[str, Any]:
        """Open the way; what follows uses it."""
        self.close()
        entered = self._way(Job(**job))
        self._ask = self._runner.run(entered.__aenter__())
        self._open = entered
        return {}

    def close(self) -> dict[str, Any]:
        """Close the way."""
        entered, self._open = self._open, None
        if entered is not None:
            self._runner.run(entered.__aexit__(None, None, None))
        return {}

    def load(self, concurrency: int, calls: int) -> dict[str, Any]:
        """CPU and wall time of different calls by so many workers at once; the first wave opens the connections."""
        prompts = (f"question {number}" for number in self._numbers)
        self._runner.run(measure(self._ask, prompts, concurrency, concurrency))
        gc.collect()
        return {**self._runner.run(measure(self._ask, prompts, concurrency, calls))}

    def hits(self, calls: int, **job: Any) -> dict[str, Any]:
        """CPU µs and median wall µs of a call that is answered from the cache."""
        of = self._from_disk if job["purpose"] == "disk" else self._from_memory
        case = Case(self._peer.name, lambda count: of(Job(**job), count))
        cpu_us, walls = self._runner.run(cost_of(case, calls))
        return {"cpu_us": cpu_us, "p50_us": sorted(walls)[len(walls) // 2]}

    @asynccontextmanager
    async def _from_memory(self, job: Job, _: int) -> AsyncGenerator[Callable[[int], Any]]:
        text = prompt(0)
        async with self._way(job) as ask:
            await ask(text)
            yield lambda _number: ask(text)

    @asynccontextmanager
    async def _from_disk(self, job: Job, calls: int) -> AsyncGenerator[Callable[[int], Any]]:
        """Stored by one opening, read by another, each answer once."""
        async with self._way(job) as ask:
            for number in range(calls):
                await ask(prompt(number))
        async with self._way(job) as ask:
            yield lambda number: ask(prompt(number))

    def crowd(self, calls: int, *, identical: bool) -> dict[str, Any]:
        """Calls made all at once."""
        failed, wall_s = self._runner.run(
            crowd(lambda number: self._ask("the same" if identical else f"question {number}"), calls)
        )
        kinds = Counter(f"{type(error).__name__}: {error}"[:100] for error in failed)
        why = "; ".join(f"{count} x {kind}" for kind, count in kinds.most_common(2))
        return {"failed": len(failed), "wall_s": wall_s, "why": why}

    def ask(self, prompt: str, changes: dict[str, Any]) -> dict[str, Any]:
        """One call."""
        return {"text": str(self._runner.run(_one(self._ask, prompt, changes)))}

    @staticmethod
    def usage() -> dict[str, Any]:
        """What this process has used, and whom it tried to reach."""
        with Path("/proc/self/status").open(encoding="ascii") as status:
            rss_kb = next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))
        return {"cpu_s": time.process_time(), "rss_mb": rss_kb / 1024, "outside": sorted(OUTSIDE)}

    def versions(self) -> dict[str, Any]:
        """Of the peer's packages."""
        found = dict[str, Any]()
        for name in self._peer.packages:
            with contextlib.suppress(PackageNotFoundError):
                found[name] = version(name)
        return found


async def _not_open(*_: object, **__: object) -> object:
    raise RuntimeError("open the way first")


async def _one(ask: Ask, prompt: str, changes: dict[str, Any]) -> object:
    return await ask(prompt, **changes)


def answer(worker: Worker, line: str) -> dict[str, Any]:
    """Do what a line says."""
    command: dict[str, Any] = json.loads(line)
    try:
        found: dict[str, Any] = getattr(worker, command.pop("do"))(**command)
    except CannotError as error:
        return {"cannot": str(error)}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return found


def main() -> None:
    """Serve until standard input closes."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a peer prints must not look like an answer
    stay_inside()
    peer = peer_named(sys.argv[1])
    with asyncio.Runner() as runner:
        worker = Worker(runner, peer, peer.ways[sys.argv[2]])
        for line in sys.stdin:
            print(json.dumps(answer(worker, line)), file=answers, flush=True)
        with contextlib.suppress(Exception):
            worker.close()


if __name__ == "__main__":
    main()

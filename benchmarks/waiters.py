"""What a waiter costs the rate limiter, with 1,000 and with 100,000 others in its queue.

    python benchmarks/waiters.py [--json FILE] [--repeats 5]

CPU per operation on one bucket, each kind once with few flows and priorities and once with an agent per waiter, a
deadline each and 1000 priorities: "serve" (an answer comes in, its slot goes to the next waiter), "join and leave",
"foretell" (is a deadline hopeless), "refused" (a 429 comes in). The exit status is 1 where 100 times as many waiters
cost more than 1.3 times as much.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from measure import Progress, machine, write_json

from llmmw import RateLimiter
from llmmw.answer import NO_USAGE
from llmmw.call import Call, Context
from llmmw.env import Env
from llmmw.layers.gate import Gate, Waiting

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from llmmw.algo.queue import Entry

FEW, MANY = 1_000, 100_000
MOST = 1.3
OPERATIONS = 1_000


class Crowd:
    """A bucket with one slot, and so many waiters."""

    def __init__(self, waiters: int, *, varied: bool) -> None:
        self.varied = varied
        self.env = Env(seed=1)
        self.gate = Gate(RateLimiter(rpm=10**7, tpm=10**12, concurrency=1, adaptive=False).limits(), self.env)
        self.number = 0
        permit = self.gate.admit((10,))
        assert permit is not None
        self.permit = permit
        for _ in range(waiters):
            self.join()

    def join(self) -> Entry[Waiting]:
        """One more waiter."""
        self.number += 1
        deadline = self.env.clock.monotonic() + 3600 + self.number if self.varied else None
        context = Context(agent=self.flow, priority=self.priority, deadline=deadline)
        waiting = Waiting(Call("chat", "m", {}, context=context), (10,), asyncio.get_running_loop().create_future())
        return self.gate.enqueue(waiting, priority=self.priority, flow=self.flow)

    @property
    def flow(self) -> str:
        return f"agent {self.number}" if self.varied else "agent"

    @property
    def priority(self) -> int:
        return self.number * 7919 % 1000 if self.varied else 0

    def serve(self) -> None:
        """An answer comes in, and its slot goes to the next waiter; another takes his place."""
        self.join()
        head = self.gate.queue.head(self.env.clock.monotonic())
        assert head is not None
        self.gate.finish(self.permit, NO_USAGE, well=True)
        self.permit = head.item.future.result()

    def come_and_go(self) -> None:
        """A waiter joins and gives up."""
        entry = self.join()
        entry.item.future.cancel()
        self.gate.leave(entry)

    def foretell(self) -> None:
        """When a call that joins now could get its permit."""
        self.number += 1
        self.gate.predict((10,), self.priority, self.flow)

    def refused(self) -> None:
        """A 429 comes in, with a pause that most deadlines outlive."""
        allowance = self.gate.allowance
        self.gate.refused(CALL, allowance.grant((10,), self.env.clock.monotonic()), 0.001)


CALL = Call("chat", "m", {})
KINDS: dict[str, Callable[[Crowd], None]] = {
    "serve": Crowd.serve,
    "join and leave": Crowd.come_and_go,
    "foretell": Crowd.foretell,
    "refused": Crowd.refused,
}


async def cost_of(kind: str, waiters: int, *, varied: bool) -> float:
    """Microseconds of CPU per operation."""
    crowd, operation = Crowd(waiters, varied=varied), KINDS[kind]
    gc.collect()
    gc.disable()
    try:
        began = time.process_time()
        for _ in range(OPERATIONS):
            operation(crowd)
        return (time.process_time() - began) / OPERATIONS * 1e6
    finally:
        gc.enable()
        crowd.gate.rehome()  # who waits is a future that nobody awaits


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--many", type=int, default=MANY, help="waiters of the large crowd")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args(arguments)
    progress, rows, broken = Progress(), list[dict[str, object]](), 0
    print(f"{'operation':16} {'crowd':8} {f'{FEW} µs':>10} {f'{options.many} µs':>10} {'ratio':>7}  budget ≤ {MOST}")
    for kind in KINDS:
        for varied in (False, True):
            costs: dict[int, list[float]] = {FEW: [], options.many: []}
            for _ in range(options.repeats):
                for waiters, found in costs.items():
                    found.append(asyncio.run(cost_of(kind, waiters, varied=varied)))
            few, many = (min(found) for found in costs.values())
            ratio, crowd = many / few, "varied" if varied else "plain"
            broken += ratio > MOST
            verdict = "OVER" if ratio > MOST else "ok"
            print(f"{kind:16} {crowd:8} {few:10.2f} {many:10.2f} {ratio:7.2f}  {verdict}", flush=True)
            rows.append({"operation": kind, "crowd": crowd, "few_us": few, "many_us": many, "ratio": ratio})
    print(f"\n{broken} budgets broken, {progress.took_s:.0f} s")
    if options.json is not None:
        write_json(options.json, {"machine": machine(), "few": FEW, "many": options.many, "rows": rows})
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())

"""(f) What stepping itself costs: CPU time for each agent and step, where a step does nothing."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

from sections import show

if TYPE_CHECKING:
    from lab import Lab

AGENTS = 1000
WAYS = ("sequential", "overlap", "snapshot")


def measure(lab: Lab) -> None:
    """Microseconds of CPU time; medians of steps that take turns."""
    rounds = 5 if lab.quick else 21
    rows: list[dict[str, Any]] = []
    for pair in lab.pairs:
        with lab.server() as server, lab.workers(pair, {way: {} for way in WAYS}, server.base_url) as workers:
            for kind in ("plain", "awaiting"):
                took: dict[str, list[float]] = {way: [] for way in workers}
                for worker in workers.values():
                    worker("make", kind=kind, agents=AGENTS)
                    worker("step")  # threads and loops that stay begin here
                for _ in range(rounds):
                    for way, worker in workers.items():
                        found = worker("step")
                        lab.must(not found["error"], f"trivial: {way}: {found['error']}")
                        took[way].append(found["cpu_s"] / AGENTS * 1e6)
                medians = {way: statistics.median(values) for way, values in took.items()}
                rows.append(lab.note("trivial", version=pair.mesa_llm, kind=kind, agents=AGENTS, **medians))
    show(f"microseconds of CPU for each of {AGENTS} agents, whose steps do nothing", rows, ("version", "kind", *WAYS))

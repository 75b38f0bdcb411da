"""(a) A step of 3 to 100 ReAct agents, each way; (f) the same against a real vLLM."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from measure import in_turn

if TYPE_CHECKING:
    from lab import Lab, Worker
    from run_tests import Pair

    from llmmw.testing.server import ServerProcess

SIZES = (3, 5, 10, 20, 50, 100)
PARALLEL = ("asyncio", "threading", "overlap", "snapshot")
WIDE = "overlap: 128"
"""By default 64 calls are under way at most, of all agents together; stock knows no bound."""
_DEFAULT_MOST = 64
TOLERANCE = 1.05
"""Medians of a few steps differ by so much between two runs of the same."""
TIMES = 15.0
"""At 20 agents and 200-800 ms, `overlap` is to be so many times as fast as one by one."""


@dataclass(frozen=True)
class Profile:
    """How long calls take, and which sizes are measured how often."""

    name: str
    server: dict[str, Any]
    least_s: float
    """A call takes at least so long."""

    def steps(self, way: str, agents: int) -> int:
        """How often; 0: not at all."""
        if way == WIDE and agents <= _DEFAULT_MOST:
            return 0  # the same as with 64
        if self.least_s >= 0.1:  # one step of 20 agents one by one takes 20 s here, of 100 agents on 6 threads as long
            few = {"sequential": 1 if agents <= 20 else 0, "as shipped": 1 if agents <= 10 else 0, "threading": 2}
            return 1 if way == "threading" and agents >= 50 else few.get(way, 3)
        return {"sequential": 2 if agents <= 20 else 1, "as shipped": 1 if agents <= 20 else 0}.get(way, 5)


UNIFORM = Profile("200-800 ms", {"latency": "fixed", "latency_s": 0.5, "latency_spread": 0.6}, 0.2)
SHORT = Profile("50 ms", {"latency": "fixed", "latency_s": 0.05, "latency_spread": 0.0}, 0.05)


@dataclass
class Cell:
    """One way at one size."""

    way: str
    agents: int
    walls: list[float] = field(default_factory=list)
    cpus: list[float] = field(default_factory=list)
    in_flight: list[int] = field(default_factory=list)
    longest: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    computed: float = 0.0
    """Where it was not measured: what follows from a smaller size."""

    @property
    def wall_s(self) -> float:
        """Median seconds per step."""
        return statistics.median(self.walls) if self.walls else self.computed

    def add(self, took: dict[str, Any], in_flight: int) -> None:
        """One step."""
        self.walls.append(took["wall_s"])
        self.cpus.append(took["cpu_s"])
        self.longest.append(took["longest_s"])
        self.in_flight.append(in_flight)
        if took["error"]:
            self.errors.append(took["error"])


def measure(lab: Lab) -> None:
    """Every version, profile and size; ways take turns, so a slow minute hits all of them."""
    ways: dict[str, dict[str, Any]] = {way: {} for way in ("sequential", "as shipped", *PARALLEL)}
    if not lab.quick:
        ways[WIDE] = {"install": {"max_concurrency": 128}}
    for number, pair in enumerate(lab.pairs):
        sizes = SIZES if number == 0 else (5, 20)  # the older Mesa-LLM: enough to see that nothing differs
        if lab.quick:
            sizes = (3, 10)
        with lab.server(**SHORT.server) as server, lab.workers(pair, ways, server.base_url) as workers:
            for worker in workers.values():
                worker("make", kind="react", agents=3)
                worker("step")  # imports
            for profile in (SHORT,) if lab.quick else (UNIFORM, SHORT):
                server.configure(**profile.server)
                rows = [row for agents in sizes for row in _size(lab, pair, profile, agents, workers, server)]
                print(
                    f"\n── mesa-llm {pair.mesa_llm}, calls of {profile.name}: seconds per step\n{table(rows)}",
                    flush=True,
                )


def _size(
    lab: Lab, pair: Pair, profile: Profile, agents: int, workers: dict[str, Worker], server: ServerProcess
) -> list[dict[str, Any]]:
    cells = {way: Cell(way, agents) for way in workers}
    wanted = {way: profile.steps(way, agents) for way in workers}
    for way, worker in workers.items():
        if wanted[way]:
            worker("make", kind="react", agents=agents)
    for number in range(max(wanted.values())):
        for way in in_turn(list(workers), number):
            if number < wanted[way]:
                lab.progress(f"mesa-llm {pair.mesa_llm}, {profile.name}, {agents} agents, {way} {number + 1}")
                server.reset()
                took = workers[way]("step")
                cells[way].add(took, server.stats(0)["peak_in_flight"])
    _compute(lab, pair, profile, cells["sequential"])
    rows = [_row(lab, pair, profile, cell, cells) for cell in cells.values() if cell.wall_s]
    _judge(lab, pair, profile, cells)
    return rows


def _compute(lab: Lab, pair: Pair, profile: Profile, cell: Cell) -> None:
    """One by one, a step takes as long as its agents take: from the largest size that was measured."""
    if cell.walls:
        return
    measured = [
        row
        for row in lab.results
        if (row["version"], row["profile"], row["way"]) == (pair.mesa_llm, profile.name, "sequential")
        and not row["computed"]
    ]
    if measured:
        cell.computed = measured[-1]["wall_s"] / measured[-1]["agents"] * cell.agents


def _row(lab: Lab, pair: Pair, profile: Profile, cell: Cell, cells: dict[str, Cell]) -> dict[str, Any]:
    sequential, stock = cells["sequential"].wall_s, cells["asyncio"].wall_s
    return lab.note(
        "steps",
        version=pair.mesa_llm,
        profile=profile.name,
        agents=cell.agents,
        way=cell.way,
        wall_s=cell.wall_s,
        steps=len(cell.walls),
        computed=bool(cell.computed),
        times_sequential=sequential / cell.wall_s if sequential else None,
        times_asyncio=stock / cell.wall_s if stock and cell.way in {"overlap", "snapshot", WIDE} else None,
        in_flight=max(cell.in_flight, default=None),
        cpu_s=statistics.median(cell.cpus) if cell.cpus else None,
        longest_s=statistics.median(cell.longest) if cell.way == "sequential" and cell.longest else None,
        errors=cell.errors,
    )


def _judge(lab: Lab, pair: Pair, profile: Profile, cells: dict[str, Cell]) -> None:
    where = f"mesa-llm {pair.mesa_llm}, {profile.name}, {cells['overlap'].agents} agents"
    for way, cell in cells.items():
        lab.must(not cell.errors, f"{where}: {way} raised {cell.errors[:1]}")
    unbound = WIDE if WIDE in cells and cells[WIDE].walls else "overlap"
    overlap, stock, alone = (cells[way].wall_s for way in (unbound, "asyncio", "sequential"))
    lab.must(overlap <= stock * TOLERANCE, f"{where}: {unbound} takes {overlap:.2f} s, stock asyncio {stock:.2f} s")
    if profile is UNIFORM and cells["overlap"].agents == 20:
        bound = alone / max(cells["sequential"].longest, default=1.0)
        lab.must(
            alone >= TIMES * overlap,
            f"{where}: overlap is {alone / overlap:.1f} x sequential, not {TIMES:g} "
            f"(its slowest agent alone allows {bound:.1f})",
        )


def table(rows: list[dict[str, Any]]) -> str:
    """As text; the last column is what the slowest agent's own calls allow at best."""
    head = (
        f"{'agents':>6} {'way':12} {'s/step':>8} {'x seq.':>7} {'x asyncio':>10} {'in flight':>10} {'CPU s':>7}  notes"
    )
    lines = [head]
    for row in rows:
        figures = [
            f"{row['agents']:6}",
            f"{row['way']:12}",
            f"{row['wall_s']:8.2f}",
            f"{row['times_sequential']:7.1f}" if row["times_sequential"] else f"{'':7}",
            f"{row['times_asyncio']:10.2f}" if row["times_asyncio"] else f"{'':10}",
            f"{row['in_flight']:10}" if row["in_flight"] is not None else f"{'':10}",
            f"{row['cpu_s']:7.2f}" if row["cpu_s"] is not None else f"{'':7}",
        ]
        notes = [f"median of {row['steps']}" if row["steps"] > 1 else "one step" if row["steps"] else "computed"]
        if row["longest_s"]:
            notes.append(
                f"slowest agent alone {row['longest_s']:.2f} s: at best {row['wall_s'] / row['longest_s']:.1f} x"
            )
        notes += [f"raised {error[:60]}" for error in row["errors"][:1]]
        lines.append(" ".join(figures) + "  " + "; ".join(notes))
    return "\n".join(lines)


def against_vllm(lab: Lab, url: str, model: str) -> None:
    """(f) Mesa-LLM 0.3's ReAct without tool calls (the tiny model makes none), answers kept short by the schema."""
    pair = next(pair for pair in lab.pairs if pair.mesa_llm.startswith("0.3"))
    options = {"model": f"openai/{model}", "short": True, "planning": {"tool_calls": "none"}}
    ways: dict[str, dict[str, Any]] = {way: dict(options) for way in ("sequential", *PARALLEL)}
    profile, rows = Profile("vLLM", {}, 0.0), list[dict[str, Any]]()
    with lab.workers(pair, ways, url) as workers:
        for agents in (3, 10) if lab.quick else (5, 20, 50):
            cells = {way: Cell(way, agents) for way in workers}
            for worker in workers.values():
                worker("make", kind="react", agents=agents)
            for number in range(2 if lab.quick else 4):
                for way in in_turn(list(workers), number):
                    lab.progress(f"vLLM, {agents} agents, {way} {number + 1}")
                    began = time.perf_counter()
                    took = workers[way]("step")
                    if number or took["error"]:  # the first warms up
                        cells[way].add(took, 0)
                    lab.must(time.perf_counter() - began < 240, f"vLLM: {way} took too long")
            rows += [_row(lab, pair, profile, cell, cells) | {"in_flight": None} for cell in cells.values()]
            _judge(lab, pair, profile, cells)
    print(f"\n── mesa-llm {pair.mesa_llm} against vLLM: seconds per step\n{table(rows)}", flush=True)

"""(b) a rate limit, (c) open sockets, (d) pull request #264's sleeps, (e) Mesa-LLM's own examples."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

from lab import Worker, folder_of_examples

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lab import Lab
    from run_tests import Pair

    from llmmw.testing.server import ServerProcess

AGENTS = 20
RPM = 30
CALLS = 2 * AGENTS
"""Of one step: ReAct thinks in one call and acts by another."""
STUCK_S = 40.0
CLAIMED = {3: "1.8x", 20: "7.3x"}
"""What pull request #264 says of its smallest and its largest size."""


def show(title: str, rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> None:
    """A table of these columns."""
    cells = [[_text(row.get(name)) for name in columns] for row in rows]
    widths = [max(len(name), *(len(line[at]) for line in cells)) for at, name in enumerate(columns)]
    print(f"\n── {title}")
    for line in [list(columns), *cells]:
        print("  ".join(text.rjust(width) if at else text.ljust(width) for at, (text, width) in _wide(line, widths)))
    print(end="", flush=True)


def _wide(line: Sequence[str], widths: Sequence[int]) -> Any:
    return enumerate(zip(line, widths, strict=True))


def _text(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.2f}" if isinstance(value, float) else str(value)


# ── (b) ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def rate(lab: Lab) -> None:
    """One step of 20 agents where 30 requests a minute are admitted: 40 are needed.

    A scaled minute is kind to stock: what waits for the limit waits less, and asks less often in vain.
    """
    window = 60.0 if lab.full else 6.0
    told = {"rpm": RPM, "window": window, "concurrency": 64}
    ways: dict[str, dict[str, Any]] = {
        "asyncio": {},
        "overlap: told": {"limiter": told},
        "overlap: not told": {},
    }
    rows: list[dict[str, Any]] = []
    limits = {"rpm": RPM, "limit_window_s": window, "latency": "fixed", "latency_s": 0.05}
    for pair in lab.pairs[:1]:
        for way, options in ways.items():
            lab.progress(f"20 agents at {RPM} requests per {window:g} s: {way}")
            with lab.server(**limits) as server:
                rows.append(_limited(lab, pair, way, options, server, window))
    columns = ("way", "requests", "refused", "agents failed", "wall_s")
    show(f"20 ReAct agents, one step, {RPM} requests per {window:g} s ({CALLS} calls needed)", rows, columns)


def _limited(
    lab: Lab, pair: Pair, way: str, options: dict[str, Any], server: ServerProcess, window: float
) -> dict[str, Any]:
    with Worker(pair, way.partition(":")[0], server.base_url, limit_s=300.0, **options) as worker:
        worker("ready")
        server.configure(rpm=None)
        worker("make", kind="react", agents=1)
        worker("step")  # imports
        worker("make", kind="react", agents=AGENTS)
        server.configure(rpm=RPM)
        server.reset()
        took = step_or_stuck(worker)
    stats = server.stats(0)
    row = lab.note(
        "rate", way=way, window_s=window, requests=stats["received"], refused=stats["refused_by_limit"],
        wall_s=took["wall_s"], error=took["error"], version=pair.mesa_llm,
    ) | {"agents failed": 1 if took["error"] else 0}  # fmt: skip
    if way == "overlap: told":
        kept = (row["requests"], row["refused"], row["error"]) == (CALLS, 0, "")
        lab.must(kept, f"{way}: {row['requests']} requests, {row['refused']} refused, {row['error']!r}")
    return row


def step_or_stuck(worker: Worker) -> dict[str, Any]:
    """One step; a way that takes for ever is one that failed."""
    try:
        return worker("step")
    except RuntimeError as error:
        return {"wall_s": None, "cpu_s": None, "error": str(error), "descriptors": None}


# ── (c) ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def sockets(lab: Lab) -> None:
    """Open descriptors over 100 steps of 20 agents, and what becomes of a process that may have 256."""
    steps = 20 if lab.quick else 100
    shown = sorted({1, 10, steps // 4, steps // 2, steps})
    rows: list[dict[str, Any]] = []
    pair = lab.pairs[0]
    with lab.server(keepalive_s=5.0) as server:
        for way, limit in (("asyncio", 8192), ("overlap", 8192), ("asyncio", 256), ("overlap", 256)):
            options = {"descriptors": limit, "limit_s": STUCK_S if limit == 256 and way == "asyncio" else 600.0}
            rows.append(_descriptors(lab, pair, way, server.base_url, steps, options))
    for row in rows:
        row |= {f"step {number}": row["open"].get(number) for number in shown}
    columns = ("way", "limit", *(f"step {number}" for number in shown), "ended")
    show(f"descriptors open after a step of {AGENTS} agents", rows, columns)


def _descriptors(lab: Lab, pair: Pair, way: str, base_url: str, steps: int, options: dict[str, Any]) -> dict[str, Any]:
    limit_s = options.pop("limit_s")
    found: dict[int, int] = {}
    ended = "well"
    with Worker(pair, way, base_url, **options) as starting:
        starting("ready")
        starting("make", kind="react", agents=AGENTS)
        starting("step")  # imports; not counted below, and so may take its time
        starting.limit(limit_s)
        for number in range(1, steps + 1):
            if number % 10 == 1:
                lab.progress(f"descriptors: {way}, limit {options['descriptors']}, step {number} of {steps}")
            took = step_or_stuck(starting)
            if took["error"]:
                ended = f"step {number}: {took['error'][:60]}"
                break
            found[number] = took["descriptors"]
    if way == "overlap":
        later = [count for number, count in found.items() if number >= 10]
        flat = ended == "well" and bool(later) and max(later) <= found[1] + AGENTS
        counts = f"{found.get(1)} after the first step, up to {max(later, default=0)} later, ended {ended}"
        lab.must(flat, f"descriptors of {way} with a limit of {options['descriptors']}: {counts}")
    lab.note("sockets", way=way, limit=options["descriptors"], open=found, ended=ended, version=pair.mesa_llm)
    return lab.results[-1]


# ── (d) ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def sleeps(lab: Lab) -> None:
    """Agents that sleep 200 to 800 ms in place of asking: what pull request #264's table times."""
    ways: dict[str, dict[str, Any]] = {"sequential": {}, "asyncio": {}, "threading": {}, "overlap": {}}
    rows: list[dict[str, Any]] = []
    with lab.server() as server, lab.workers(lab.pairs[0], ways, server.base_url) as workers:
        for agents in (3, 5) if lab.quick else (3, 5, 10, 20):
            took: dict[str, list[float]] = {way: [] for way in workers}
            for worker in workers.values():
                worker("make", kind="sleeps", agents=agents)
            for number in range(3):
                for way, worker in workers.items():
                    if way == "sequential" and number and agents > 5:
                        continue  # 10 s of sleeping; the sum hardly varies
                    lab.progress(f"sleeps: {agents} agents, {way} {number + 1}")
                    took[way].append(worker("step")["wall_s"])
            middle = {way: statistics.median(walls) for way, walls in took.items()}
            ratios = {way: middle["sequential"] / wall for way, wall in middle.items() if way != "sequential"}
            lab.note("sleeps", agents=agents, **{f"{way}_s": wall for way, wall in middle.items()})
            rows.append(
                {"agents": agents, "sequential s": middle["sequential"], "claimed by #264": CLAIMED.get(agents, "")}
                | {f"{way}, x": ratio for way, ratio in ratios.items()}
            )
    show("sleeps of 200 to 800 ms, times as fast as one by one", rows, list(rows[0]))


# ── (e) ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

_CACHED = {"enable_caching": True}


def examples(lab: Lab) -> None:
    """Mesa-LLM's own models as they are: bare, and with one line before."""
    pair, rows = lab.pairs[0], list[dict[str, Any]]()
    folder = folder_of_examples(pair)
    if folder is None:
        print("SKIPPED Mesa-LLM's example models: no source distribution can be had")
        return
    common = {"sources": str(folder)}
    ways: dict[str, dict[str, Any]] = {
        "as shipped": common,
        "installed": common,
        "overlap": common,
        "overlap: cached": {**common, "install": _CACHED},
        "overlap: cached for all": {**common, "install": {**_CACHED, "cache_scope": "model"}},
    }
    agents, steps = (6, 2) if lab.quick else (8, 3)
    with lab.server(latency="fixed", latency_s=0.1) as server, lab.workers(pair, ways, server.base_url) as workers:
        for worker in workers.values():
            worker("make", kind="react", agents=2)
            worker("step")  # imports
        for kind in ("negotiation", "epstein", "sugarscrap"):
            rows += [_example(lab, pair, kind, agents, steps, worker, way, server) for way, worker in workers.items()]
    columns = ("model", "way", "s per step", "requests", "tokens in", "tokens out", "error")
    show(f"Mesa-LLM {pair.mesa_llm}'s examples, {agents} LLM agents, {steps} steps, calls of 100 ms", rows, columns)


def _example(
    lab: Lab, pair: Pair, kind: str, agents: int, steps: int, worker: Worker, way: str, server: ServerProcess
) -> dict[str, Any]:
    lab.progress(f"{kind}: {way}")
    worker("make", kind=kind, agents=agents)
    server.reset()
    took = [worker("step") for _ in range(steps)]
    stats = server.stats(0)
    error = next((step["error"] for step in took if step["error"]), "")
    wall_s = statistics.median(step["wall_s"] for step in took)
    figures = {"requests": stats["received"], "error": error[:60], "way": way, "model": kind}
    tokens = {"tokens in": stats["tokens"]["prompt"], "tokens out": stats["tokens"]["output"]}
    lab.must(not error, f"{kind}, {way}: {error}")
    lab.note("examples", version=pair.mesa_llm, wall_s=wall_s, **figures, **tokens)
    return {**figures, **tokens, "s per step": wall_s}

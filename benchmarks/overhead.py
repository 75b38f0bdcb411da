"""What llmmw costs, with the floors beside it, measured in one run: `python benchmarks/overhead.py --help`.

Three sections. "in process": hits and misses of wrapped functions, clients and SDKs. "HTTP client": CPU of the client's
process per call, beside bare clients, against a server of its own with a fixed latency. "import": fresh interpreters.
`--profile` shows instead where the time of a hit goes.
Figures are medians over interleaved repeats; rows with a budget are marked ok or over (`--check` makes that the exit
status). Ratios against httpx are at its default limits.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from client_cpu import CLIENTS, ClientProcess
from fast_server import running
from hit_cost import CASES, cost_of
from hit_profile import TURNS, as_rows, profiles, show
from import_cost import BARE, IMPORTS, import_cost
from measure import Budget, Progress, Row, as_json, in_turn, machine, table, write_json

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from hit_cost import Case

SECTIONS = ("memory", "http", "import")
IN_PROCESS = "in process, CPU per call"
_IMPORT_BUDGETS = dict.fromkeys(("import llmmw", "from llmmw import Client"), (0.15, 35.0))
_CLIENT, _AIOHTTP, _FLOOR = "llmmw Client", "aiohttp", "bare asyncio protocol"
_SDK, _SDK_OVER_LLMMW = "openai SDK", "openai SDK over llmmw"
_MOST_AIOHTTP, _MOST_SDK = 1.5, 0.2
_WIDE = 300
"""Figures that lie further apart than this are drawn on a logarithmic scale."""
_LONE = 1
"""At this concurrency mostly the loop's own wake-ups are measured."""


def measure_memory(cases: Sequence[Case], repeats: int, calls: int, progress: Progress) -> list[Row]:
    """Hits and misses inside one process."""
    rows = {
        case.name: Row(
            IN_PROCESS,
            case.name,
            "µs",
            floor="" if case.less_floor else case.floor,
            budget=None if case.budget_us is None else Budget(case.budget_us, f"≤ {case.budget_us:g} µs"),
            ours=bool(case.floor),
        )
        for case in cases
    }
    walls: dict[str, list[float]] = {case.name: [] for case in cases}
    for repeat in range(repeats):
        progress(f"in process: repeat {repeat + 1} of {repeats}")
        for case in in_turn(cases, repeat):
            row = rows[case.name]
            try:
                cpu, clocked = asyncio.run(cost_of(case, calls))
            except Exception as error:
                row.skipped = _why(error)  # unless another repeat works: a busy machine is too slow for some reads
            else:
                row.values.append(cpu)
                walls[case.name] += clocked
    for case in cases:
        row = rows[case.name]
        if walls[case.name]:
            row.p50 = statistics.median(walls[case.name])
        bare = rows.get(case.floor)
        if case.less_floor and row.measured and bare is not None and bare.measured:
            row.values = [value - floor for value, floor in zip(row.values, bare.values, strict=False)]
            row.p50 = (row.p50 or 0.0) - (bare.p50 or 0.0)
    return list(rows.values())


def measure_http(
    names: Sequence[str],
    repeats: int,
    levels: Sequence[int],
    calls_per_level: int,
    delay_s: float,
    progress: Progress,
) -> list[Row]:
    """CPU of each client's process per call, at each number of concurrent calls."""
    rows = {
        (level, name): Row(_section(level), name, "ms", floor="" if name == _FLOOR else _AIOHTTP, ours="llmmw" in name)
        for level in levels
        for name in names
    }
    walls: dict[tuple[int, str], list[float]] = {key: [] for key in rows}
    with running(delay_s) as url:
        clients = [ClientProcess(name, url) for name in names]
        try:
            for repeat in range(repeats):
                for level in levels:
                    progress(f"HTTP clients: repeat {repeat + 1} of {repeats}, {level} concurrent")
                    for client in in_turn(clients, repeat):
                        row = rows[level, client.name]
                        try:
                            found = client.measure(level, _calls_at(level, calls_per_level))
                        except RuntimeError as error:
                            row.skipped = _why(error)
                        else:
                            row.values.append(found["cpu_s"] * 1000)
                            walls[level, client.name].append(found["p50_s"] * 1000)
        finally:
            for client in clients:
                client.close()
    for key, row in rows.items():
        if row.measured:
            row.p50 = statistics.median(walls[key])
    _set_http_budgets(rows, levels)
    return list(rows.values())


def _set_http_budgets(rows: dict[tuple[int, str], Row], levels: Sequence[int]) -> None:
    for level in levels:
        aiohttp, sdk = (
            row if row and row.measured else None for row in map(rows.get, ((level, _AIOHTTP), (level, _SDK)))
        )
        client, over = rows.get((level, _CLIENT)), rows.get((level, _SDK_OVER_LLMMW))
        if client is not None and aiohttp is not None:
            found = [(_MOST_AIOHTTP * aiohttp.median, f"≤ {_MOST_AIOHTTP} x aiohttp")]
            # Alone, the loop's own wake-ups are most of a call, and the SDK's share of them is as large.
            if sdk is not None and level != _LONE:
                found.append((_MOST_SDK * sdk.median, f"≤ {_MOST_SDK} x openai SDK"))
            client.budget = Budget(min(found)[0], ", ".join(why for _, why in found))
        if over is not None and sdk is not None:
            over.budget = Budget(sdk.median, "≤ openai SDK")


def _section(level: int) -> str:
    return f"HTTP client, {level} concurrent, CPU per call"


def _calls_at(level: int, calls: int) -> int:
    """Enough calls to measure, without waiting for the latency too often."""
    return max(2 * level, min(calls, 12 * level))


def measure_imports(names: Sequence[str], repeats: int, progress: Progress) -> list[Row]:
    """CPU and memory of imports, over the bare interpreter."""
    cpu, memory = {}, {}
    for name in names:
        limits = _IMPORT_BUDGETS.get(name)
        cpu[name] = Row("import, CPU over the bare interpreter", name, "s", ours="llmmw" in name)
        memory[name] = Row("import, memory over the bare interpreter", name, "MB", ours="llmmw" in name)
        if limits is not None:
            cpu[name].budget = Budget(limits[0], f"≤ {limits[0]:g} s")
            memory[name].budget = Budget(limits[1], f"≤ {limits[1]:g} MB")
    for repeat in range(-1, repeats):  # the first time writes bytecode and fills the page cache
        progress("imports: warming up" if repeat < 0 else f"imports: repeat {repeat + 1} of {repeats}")
        bare_s, bare_mb = import_cost()
        for name in names:
            if cpu[name].skipped:
                continue
            try:
                took_s, megabytes = import_cost(IMPORTS[name])
            except RuntimeError as error:
                cpu[name].skipped = memory[name].skipped = _why(error)
                continue
            if repeat >= 0:
                cpu[name].values.append(took_s - bare_s)
                memory[name].values.append(megabytes - bare_mb)
    return [*cpu.values(), *memory.values()]


def _why(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:100] if not isinstance(error, RuntimeError) else text[:100]


def draw(rows: Sequence[Row], path: Path) -> None:
    """The HTTP clients and the in-process rows as bars, with a mark at each budget."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    shown = [row for row in rows if row.measured]
    sections = list(dict.fromkeys(row.section for row in shown))
    heights = [sum(row.section == section for row in shown) for section in sections]
    figure, axes = plt.subplots(
        len(sections), 1, figsize=(9, 0.32 * sum(heights) + 1.1 * len(sections)), height_ratios=heights, squeeze=False
    )
    for axis, section in zip(axes[:, 0], sections, strict=True):
        here = [row for row in shown if row.section == section][::-1]
        colours = ["tab:blue" if row.ours else "0.7" for row in here]
        bars = axis.barh([row.name for row in here], [row.median for row in here], color=colours)
        axis.bar_label(bars, fmt="%.3g", padding=3, fontsize=8)
        found = [row.median for row in here if row.median > 0]
        if found and max(found) > _WIDE * min(found):
            axis.set_xscale("log")
        axis.margins(x=0.1)
        for at, row in enumerate(here):
            if row.budget is not None:
                axis.plot([row.budget.limit] * 2, [at - 0.45, at + 0.45], color="tab:red", linewidth=2)
        axis.set_title(f"{section} [{here[0].unit}]; red: budget", fontsize=9, loc="left")
        axis.tick_params(labelsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer repeats and calls: about 15 seconds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure")
    parser.add_argument("--chart", type=Path, metavar="FILE", help="draw the figures (needs matplotlib)")
    parser.add_argument("--check", action="store_true", help="exit with 1 where a budget is exceeded or not measured")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS, help="what to measure")
    parser.add_argument("--only", nargs="+", metavar="WORDS", help="only rows whose name contains one of these")
    parser.add_argument("--repeats", type=int, help="repeats of everything (in process 5, else 3)")
    parser.add_argument("--calls", type=int, help="calls per repeat in process (600) and per HTTP client (512)")
    parser.add_argument("--levels", type=int, nargs="+", help="concurrent calls of the HTTP clients (1 64 512)")
    parser.add_argument("--profile", action="store_true", help="the steps of a hit in memory, which add up to it")
    parser.add_argument("--delay", type=float, default=0.05, help="seconds before the server answers (0.05)")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace, progress: Progress) -> tuple[list[Row], dict[str, object]]:
    """Measure what the options ask for; the settings that were used come with the rows."""
    quick = options.quick
    repeats = options.repeats or (1 if quick else 5)
    other_repeats = options.repeats or (1 if quick else 3)
    calls = options.calls or (300 if quick else 600)
    http_calls = options.calls or (192 if quick else 512)
    levels = options.levels or ([64] if quick else [1, 64, 512])

    def wanted(names: Iterable[str]) -> list[str]:
        return [name for name in names if options.only is None or any(words in name for words in options.only)]

    rows: list[Row] = []
    if "memory" in options.sections:
        names = wanted(case.name for case in CASES)
        rows += measure_memory([case for case in CASES if case.name in names], repeats, calls, progress)
    if "http" in options.sections:
        rows += measure_http(wanted(CLIENTS), other_repeats, levels, http_calls, options.delay, progress)
    if "import" in options.sections:
        rows += measure_imports(wanted(IMPORTS), other_repeats, progress)
    settings: dict[str, object] = {
        "quick": quick, "repeats": repeats, "other_repeats": other_repeats, "calls": calls, "http_calls": http_calls,
        "levels": levels, "delay_s": options.delay, "sections": list(options.sections), "import_base": BARE,
    }  # fmt: skip
    return rows, settings


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write; the exit status."""
    options = _options(arguments)
    warnings.simplefilter("ignore", ResourceWarning)
    progress = Progress()
    if options.profile:
        found = asyncio.run(profiles(options.repeats or (TURNS // 10 if options.quick else TURNS), progress))
        print(*map(show, found), sep="\n\n")
        if options.json is not None:
            write_json(options.json, {"machine": machine(), "profiles": [*map(as_rows, found)]})
        return 0
    rows, settings = run(options, progress)
    told: dict[str, Any] = as_json(rows, settings, progress.took_s)
    print(table(rows))
    budgeted = [row for row in rows if row.budget is not None]
    failed = [row for row in budgeted if row.status != "ok"]
    print(f"\n{len(budgeted) - len(failed)} of {len(budgeted)} budgets kept, {told['took_s']} s")
    for row in failed:
        print(f"  {row.status}: {row.section}: {row.name}")
    if options.json is not None:
        write_json(options.json, told)
    if options.chart is not None:
        draw(rows, options.chart)
    return 1 if options.check and failed else 0


if __name__ == "__main__":
    sys.exit(main())

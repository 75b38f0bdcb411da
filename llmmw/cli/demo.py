"""`llmmw demo`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
from rich.console import Console

from llmmw import __version__
from llmmw.demo import report
from llmmw.demo.run import run
from llmmw.demo.ways import Setting
from llmmw.demo.workload import Trouble, Workload
from llmmw.demo.worlds import EMBEDDED_MODEL, EmbeddedWorld, RealWorld
from llmmw.edges.sync import SyncClient
from llmmw.layers.timeout import Timeout
from llmmw.stack import Stack

if TYPE_CHECKING:
    from pathlib import Path


def run_demo(
    base_url: str | None,
    model: str | None,
    api_key: str | None,
    workload: Workload,
    json: Path | None,
    chart: Path | None,
) -> None:
    """Run it and say what came out; arguments as `llmmw demo` documents them."""
    console = Console()
    report.check_writable(json, chart)
    if base_url is not None:
        _ask_once(base_url, model, api_key or None)
    world = EmbeddedWorld(Trouble()) if base_url is None else RealWorld(base_url)
    where = "the embedded server" if base_url is None else base_url
    title = f"{workload.agents} agents, {workload.ticks} ticks, {workload.total} questions to {where}"
    console.print(title)
    if base_url is None:
        trouble = Trouble()
        console.print(
            "emulated timing, not a model; "
            f"tick {trouble.limited_tick}: the server admits {trouble.limit_requests} requests per "
            f"{trouble.limit_window_s:g} s (429 beyond); tick {trouble.broken_tick}: 503 for "
            f"{trouble.broken_district}; llmmw may fall back to a second server"
        )
    with world:
        results = run(world, Setting(workload, model or EMBEDDED_MODEL, api_key), console)
    console.print(report.table(results, title=title))
    about = {"workload": msgspec.to_builtins(workload), "server": where, "llmmw": __version__}
    if json is not None:
        report.write_json(json, {"about": about, "ways": list(results)})
        console.print(f"figures: {json}")
    if chart is not None:
        report.write_chart(chart, results, title=title)
        console.print(f"chart: {chart}")


def _ask_once(base_url: str, model: str | None, api_key: str | None) -> None:
    """See that the server answers, before hundreds of questions fail one by one."""
    with SyncClient(base_url, api_key, model=model, stack=Stack(Timeout(60))) as client:
        client.chat("hi", max_tokens=1)

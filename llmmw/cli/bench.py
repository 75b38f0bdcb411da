"""`llmmw bench`."""

from __future__ import annotations

import asyncio
import contextlib
import os
import platform
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import msgspec
import typer
from rich.console import Console

from llmmw import __version__
from llmmw.bench import report
from llmmw.bench.figures import claims
from llmmw.bench.run import Bench, look
from llmmw.bench.shapes import SHAPES
from llmmw.demo.report import check_writable, write_json
from llmmw.demo.run import progress_bars
from llmmw.demo.worlds import EMBEDDED_MODEL
from llmmw.env import SYSTEM_CLOCK
from llmmw.testing.server import ServerConfig, server_process

if TYPE_CHECKING:
    from collections.abc import Generator
    from pathlib import Path

    from llmmw.bench.run import Plan
    from llmmw.bench.shapes import Shape, Target

MOST_CALLS = 4096
_INTERRUPTED = 130
EMULATED = "the embedded server (emulated timing, not a model)"


def numbers_of(text: str) -> tuple[int, ...]:
    """Numbers of calls from text such as "1,4,16".

    Raises:
        BadParameter: they are none, or too large.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and 0 < int(part) <= MOST_CALLS for part in parts):
        raise typer.BadParameter(f"{text!r}: expected numbers from 1 to {MOST_CALLS}, as in 1,4,16", param_hint="--n")
    return tuple(int(part) for part in parts)


def shapes_of(text: str) -> tuple[Shape, ...]:
    """Shapes from text such as "client,batch", or "all".

    Raises:
        BadParameter: there is no such shape.
    """
    names = list(SHAPES) if text == "all" else [part.strip() for part in text.split(",")]
    unknown = [name for name in names if name not in SHAPES]
    if unknown:
        raise typer.BadParameter(f"{unknown[0]!r}: there are {', '.join(SHAPES)}", param_hint="--shapes")
    return tuple(SHAPES[name] for name in dict.fromkeys(names))


def key_from(name: str | None) -> str | None:
    """The credential in an environment variable, which nobody else sees.

    Raises:
        BadParameter: there is none in it.
    """
    if name is None:
        return None
    value = os.environ.get(name, "").strip()
    if not value:
        raise typer.BadParameter(f"the environment variable {name} is not set", param_hint="--api-key-env")
    return value


@contextlib.contextmanager
def asked(target: Target) -> Generator[Target]:
    """The target; where it has no base URL, an embedded server for the length of the block."""
    if target.base_url:
        yield target
        return
    # Answers longer than the bound, so that each has as many tokens as a wave asks for.
    config = ServerConfig(latency="engine", reply_tokens=2 * target.max_tokens, reply_spread=0.0)
    with server_process(config) as server:
        yield msgspec.structs.replace(target, base_url=server.base_url, model=EMBEDDED_MODEL)


def run_bench(
    target: Target, plan: Plan, *, json: Path | None = None, chart: Path | None = None, label: str = ""
) -> bool:
    """Measure and say what came out; arguments as `llmmw bench` documents them, no base URL: the embedded server.

    Returns:
        Whether the promises hold, as far as they were measured.
    """
    console = Console()
    check_writable(json, chart)
    with asked(target) as there:
        found = asyncio.run(look(there))
        label = label or (f"{found.model} at {found.base_url}" if target.base_url else EMULATED)
        console.print(f"{label}: {plan.calls} calls of at most {found.max_tokens} tokens, and as many to warm up")
        bench = Bench(found, plan)
        whole = _carry_out(bench, console)
    rows = bench.rows()
    console.print(report.table(rows, title=label))
    for line in report.notes(rows):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if json is not None:
        write_json(json, report.as_values(rows, {**_about(bench), "label": label, "whole": whole}))
        console.print(f"figures: {json}")
    if chart is not None:
        report.draw(chart, rows, title=label)
        console.print(f"chart: {chart}")
    if not whole:
        raise typer.Exit(_INTERRUPTED)
    return all(claim.ok for claim in claims(rows))


def _carry_out(bench: Bench, console: Console) -> bool:
    """Run it with progress: a bar on a terminal, else lines on standard error. False when Ctrl-C cut it short."""
    total = sum(1 for _ in bench.plan.waves())
    with contextlib.ExitStack() as stack:
        if console.is_terminal:
            bars = stack.enter_context(progress_bars(console))
            task = bars.add_task("", total=total, failed=0)

            def told(done: int, text: str) -> None:
                bars.update(task, completed=done, description=text, failed=bench.failures)

        else:

            def told(done: int, text: str) -> None:
                typer.echo(f"[{done + 1}/{total}] {text}" if done < total else "done", err=True)

        try:
            asyncio.run(bench.run(told))
        except KeyboardInterrupt:
            typer.echo("interrupted: what was measured so far", err=True)
            return False
    return True


def _about(bench: Bench) -> dict[str, Any]:
    target, plan = bench.target, bench.plan
    return {
        "server": target.base_url,
        "model": target.model,
        "max_tokens": target.max_tokens,
        "vllm": target.vllm,
        "concurrency": target.concurrency,
        "repeats": plan.repeats,
        "cold": plan.cold,
        "date": datetime.fromtimestamp(SYSTEM_CLOCK.wall(), UTC).isoformat(timespec="seconds"),
        "llmmw": __version__,
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
    }

"""What the benchmarks share: rows with their floor and budget, the table, JSON, progress and the machine's description.

A row is the median of several repeats. Repeats of everything in one run are interleaved, so a slow minute of the
machine hits all rows alike and the ratios stay true. Costs are CPU time of the process, not wall time.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import statistics
import sys
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, Literal, TypeVar

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

T = TypeVar("T")

_LIBRARIES = ("llmmw", "aiohttp", "httpx", "httpx2", "openai", "diskcache", "msgspec")


@dataclass(frozen=True)
class Budget:
    """The most a row may cost, in the row's unit, and where that figure comes from."""

    limit: float
    why: str


@dataclass
class Row:
    """One measured thing."""

    section: str
    name: str
    unit: Literal["µs", "ms", "s", "MB", ""]
    values: list[float] = dataclasses.field(default_factory=list[float])
    """One per repeat."""
    p50: float | None = None
    """Median wall time of a single call, in the row's unit, where calls were clocked one by one."""
    floor: str = ""
    """The row of the same section that it is compared with."""
    budget: Budget | None = None
    skipped: str = ""
    """Why it could not be measured here."""
    ours: bool = False
    """Whether llmmw is what is measured, and not what it is compared with."""

    @property
    def measured(self) -> bool:
        """Whether there is a figure."""
        return bool(self.values)

    @property
    def median(self) -> float:
        """The row's figure."""
        return statistics.median(self.values) if self.values else 0.0

    @property
    def status(self) -> str:
        """ "ok" or "over" beside a budget, "skipped" without a figure, else ""."""
        if not self.measured:
            return "skipped"
        if self.budget is None:
            return ""
        return "ok" if self.median <= self.budget.limit else "over"


def floors_of(rows: Sequence[Row]) -> dict[tuple[str, str], float]:
    """Every measured figure by section and name."""
    return {(row.section, row.name): row.median for row in rows if row.measured}


def as_json(rows: Sequence[Row], settings: dict[str, object], took_s: float) -> dict[str, Any]:
    """The whole run as plain values."""
    floors = floors_of(rows)
    return {
        "settings": settings,
        "machine": machine(),
        "took_s": round(took_s, 1),
        "rows": [_row_as_json(row, floors.get((row.section, row.floor))) for row in rows],
    }


def _row_as_json(row: Row, floor: float | None) -> dict[str, object]:
    return {
        "section": row.section,
        "name": row.name,
        "unit": row.unit,
        "median": row.median if row.measured else None,
        "best": min(row.values, default=None),
        "repeats": row.values,
        "p50": row.p50,
        "floor": row.floor or None,
        "ratio": row.median / floor if row.measured and floor else None,
        "budget": row.budget.limit if row.budget is not None else None,
        "budget_why": row.budget.why if row.budget is not None else None,
        "status": row.status,
        "skipped": None if row.measured else row.skipped,
    }


def write_json(path: Path, found: dict[str, Any]) -> None:
    """Write the run, making the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n")


def concluded(
    results: Sequence[object], broken: Sequence[str], progress: Progress, path: Path | None, **more: object
) -> int:
    """Tell how many budgets are broken, and write the figures (and *more*) if asked to; the exit status."""
    print(f"\n{len(broken)} budgets broken, {progress.took_s:.1f} s, load {os.getloadavg()[0]:.1f}")
    if path is not None:
        write_json(path, {"machine": machine(), "results": results, "broken": broken, **more})
    return 1 if broken else 0


def table(rows: Sequence[Row]) -> str:
    """The rows as text, section by section."""
    floors = floors_of(rows)
    width = max((len(row.name) for row in rows), default=0)
    lines: list[str] = []
    section = ""
    for row in rows:
        if row.section != section:
            section = row.section
            head = f"{'':{width}}  {'median':>9}  {'best':>9}  {'p50 wall':>9}  {'x floor':>8}  {'budget':>9}"
            lines += ["", f"── {section} [{row.unit}]", head]
        lines.append(_line(row, width, floors.get((row.section, row.floor))))
    return "\n".join(lines)


def _line(row: Row, width: int, floor: float | None) -> str:
    if not row.measured:
        return f"{row.name:{width}}  skipped: {row.skipped}"
    figures = [_figure(row.median), _figure(min(row.values)), "" if row.p50 is None else _figure(row.p50)]
    ratio = f"{row.median / floor:.2f}" if floor else ""
    limit = "" if row.budget is None else _figure(row.budget.limit)
    line = f"{row.name:{width}}  " + "  ".join(f"{figure:>9}" for figure in figures) + f"  {ratio:>8}  {limit:>9}"
    if row.budget is not None:
        line += f"  {row.status.upper() if row.status == 'over' else row.status:<4}  {row.budget.why}"
    elif row.floor:
        line += f"        against {row.floor}"
    return line.rstrip()


def _figure(value: float) -> str:
    return f"{value:.1f}" if value >= 10 else f"{value:.3f}" if value < 1 else f"{value:.2f}"


def machine() -> dict[str, object]:
    """What the figures depend on."""
    found: dict[str, object] = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count(),
    }
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def in_turn(things: Sequence[T], repeat: int) -> Sequence[T]:
    """All things, in alternating direction so that nothing always follows the same neighbour."""
    return things if repeat % 2 == 0 else things[::-1]


class Progress:
    """Lines on standard error that say what is being measured."""

    def __init__(self) -> None:
        self.began = time.perf_counter()

    @property
    def took_s(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.began

    def __call__(self, text: str) -> None:
        """Tell."""
        print(f"[{self.took_s:5.1f} s] {text}", file=sys.stderr, flush=True)

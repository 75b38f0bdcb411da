"""The rows as a table, as plain values and as a chart."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from llmmw.bench.figures import claims
from llmmw.demo.report import drawing, save

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from llmmw.bench.figures import Claim, Row

_PANELS = (("wall_s", "wall time (s)"), ("tokens_per_s", "tokens per second"), ("cpu_ms", "client CPU per call (ms)"))
_OURS = ("client", "generate-batch", "engine")


def table(rows: Sequence[Row], *, title: str) -> Any:
    """A rich Table, a section for each number of calls.

    "x best" compares wall times with the least of the section that lost no answer; "~" marks what is extrapolated.
    """
    from rich.table import Table  # noqa: PLC0415 — belongs to the extra

    found = Table(title=title, padding=(0, 0))
    found.add_column("calls", justify="right", no_wrap=True)
    found.add_column("shape", no_wrap=True)
    for name in ("wall s", "x best", "tokens/s", "p50 s", "p99 s", "CPU ms/call", "failed"):
        found.add_column(name, justify="right", no_wrap=True)
    for at, row in enumerate(rows):
        whole = [other for other in rows if other.calls == row.calls and other.samples and not other.lossy]
        last = at + 1 == len(rows) or rows[at + 1].calls != row.calls
        found.add_row(*_cells(row, min((other.wall_s for other in whole), default=0.0)), end_section=last)
    return found


def _cells(row: Row, best_s: float) -> list[str]:
    name, figures = f"{row.shape}{'~' if row.measured_at else ''}", row.figures()
    if not row.samples:
        return [str(row.calls), name, "skipped" if row.skipped else "-"]
    ratio = f"{row.wall_s / best_s:.2f}" if best_s else ""
    cells = [_figure(figures[key]) for key in ("tokens_per_s", "p50_s", "p99_s", "cpu_ms")]
    return [str(row.calls), name, _figure(row.wall_s), ratio, *cells, str(figures["failures"] or "")]


def _figure(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.3f}"  # noqa: PLR2004 — digits


def notes(rows: Sequence[Row]) -> list[str]:
    """Lines below the table: what the ratios are, what was extrapolated, skipped or failed, and why."""
    found = [verdict(claim) for claim in claims(rows)]
    found += sorted({f"{row.shape}~: from {row.measured_at} calls, in proportion" for row in rows if row.measured_at})
    for kind, key in (("skipped", "skipped"), ("failed", "said")):
        reasons: dict[tuple[str, str], list[int]] = {}
        for row in rows:
            if getattr(row, key) and not row.measured_at:
                reasons.setdefault((row.shape, getattr(row, key)), []).append(row.calls)
        found += [f"{shape} {kind} at {', '.join(map(str, at))}: {why}" for (shape, why), at in reasons.items()]
    return found


def verdict(claim: Claim) -> str:
    """One line."""
    text = f"{claim.text}: x {claim.ratio:.2f}, least over least x {claim.least:.2f}"
    return text if claim.most is None else f"{text} (at most {claim.most:.2f}: {'ok' if claim.ok else 'OVER'})"


def as_values(rows: Sequence[Row], about: dict[str, Any]) -> dict[str, Any]:
    """Everything measured, for JSON."""
    return {
        "about": about,
        "rows": [msgspec.to_builtins(row) | {"figures": row.figures()} for row in rows],
        "claims": [msgspec.to_builtins(claim) | {"ok": claim.ok} for claim in claims(rows)],
    }


def draw(path: Path, rows: Sequence[Row], *, title: str) -> None:
    """Wall time, tokens per second and client CPU by number of calls, a line per shape; ours are thick.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    figure = drawing(title, width=14, height=4.2)
    panels = figure.subplots(1, len(_PANELS))
    for axes, (key, label) in zip(panels, _PANELS, strict=True):
        for shape in dict.fromkeys(row.shape for row in rows):
            points = [(row.calls, row.figures()[key]) for row in rows if row.shape == shape and row.samples]
            if points:
                width, style = (2.8, "o-") if shape in _OURS else (1.2, "o--")
                axes.plot(*zip(*points, strict=True), style, label=shape, linewidth=width, markersize=4)
        axes.set(xscale="log", yscale="log", xlabel="calls")
        counts = sorted({row.calls for row in rows})
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.minorticks_off()
        axes.set_title(label, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].legend(fontsize=8)
    save(figure, path)

"""The table, the goals and the verdict."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from measure import Budget, Row

from peers import rows as at

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

DECORATOR, CLIENT = "llmmw decorator", "llmmw Client"
TRANSPORT, WRAPPING = "llmmw transport under openai", "llmmw wrap_client above openai"
SDK = "openai SDK"
FLOORS = (at.BARE, "httpx", "httpx2", at.DICT)
"""What does nothing but send, or nothing but remember."""
STORM, SMALL = "1000 calls at 200/s", "30 calls at 5 per 3 s"
TOLD, DEFAULTS = f"{STORM}, told", f"{STORM}, retries as they come"
_STORM_GOALS = {STORM: (0.0, 1.2, 1.5), SMALL: (0.0, 1.5, 1.2), TOLD: (0.0, 1.0, 1.1)}
_LEVEL = re.compile(r"(uncached|miss), (\d+) at once, CPU")


def set_goals(rows: Sequence[Row]) -> None:
    """What llmmw set out to reach, from the issue: a figure, or a ratio to what was measured beside it."""
    found = {(row.section, row.name): row for row in rows}
    for (section, name), row in found.items():
        if not row.ours:
            continue
        goal = _fixed(section, name) or _relative(section, name, found)
        if goal is not None:
            row.budget = goal


def _fixed(section: str, name: str) -> Budget | None:
    limits = {
        (at.MEMORY, DECORATOR): (6.0, "≤ 6 µs"),
        (at.MEMORY, WRAPPING): (15.0, "≤ 15 µs"),
        (at.DISK, DECORATOR): (25.0, "≤ 25 µs"),
        (at.IMPORT_S, CLIENT): (0.15, "≤ 0.15 s"),
        (at.IMPORT_S, DECORATOR): (0.15, "≤ 0.15 s"),
        (at.IMPORT_MB, DECORATOR): (35.0, "≤ 35 MB"),
    }
    if section in {at.STAMPEDE, at.WRONG}:
        return Budget(1.0, "1") if section == at.STAMPEDE else Budget(0.0, "none")
    title, _, what = section.rpartition(": ")
    if title in _STORM_GOALS:
        limit = _STORM_GOALS[title][("failed", "upstream per success", "x ideal").index(what)]
        return Budget(limit, f"≤ {limit:g}")
    limit_why = limits.get((section, name))
    return None if limit_why is None else Budget(*limit_why)


def _relative(section: str, name: str, found: dict[tuple[str, str], Row]) -> Budget | None:
    level = _LEVEL.fullmatch(section)
    bare, sdk = found.get((section, at.BARE)), found.get((section, SDK))
    if level is None or bare is None or not bare.measured:
        return None
    if level[1] == "miss":
        return Budget(bare.median + 30, "≤ aiohttp + 30 µs") if name == DECORATOR else None
    if sdk is None or not sdk.measured:
        return None
    if name == CLIENT:
        return Budget(min(1.5 * bare.median, 0.2 * sdk.median), "≤ 1.5 x aiohttp, ≤ 0.2 x the SDK")
    return Budget(sdk.median, "≤ the SDK") if name == TRANSPORT else None


def row_from(written: dict[str, Any]) -> Row:
    """A row that `as_json` wrote."""
    return Row(
        written["section"],
        written["name"],
        written["unit"],
        written["repeats"],
        p50=written["p50"],
        floor=written["floor"] or "",
        skipped=written["skipped"] or "",
        ours=written["name"].startswith("llmmw"),
    )


def is_drawn(row: Row) -> bool:
    """Whether the chart shows it: one panel for each kind of figure."""
    return row.section in {
        at.MEMORY, at.DISK, "uncached, 64 at once, CPU", "uncached, 256 at once, CPU", at.STAMPEDE,
        f"{STORM}: x ideal", f"{STORM}: upstream per success", at.WRONG, at.IMPORT_S, at.READY_MB, at.SIZE,
    }  # fmt: skip


# ── the table ───────────────────────────────────────────────────────────────────────────────────────────────────────


def tables(rows: Sequence[Row]) -> str:
    """Markdown that reads as plain text too: what calls cost, how they behave, and why cells are empty."""
    sections = list(
        dict.fromkeys(row.section for row in rows if any(r.measured for r in rows if r.section == row.section))
    )
    costs = [section for section in sections if section.endswith(", CPU") and "import" not in section]
    others = [section for section in sections if section not in costs]
    parts = [_table("CPU per call, µs (x the floor)", [s for s in costs if "first" not in s], rows)]
    parts.append(_table("behaviour", [s for s in others if not _weighs(s)], rows))
    parts.append(_table("weight", [s for s in sections if _weighs(s)], rows))
    return "\n\n".join(part for part in [*parts, _reasons(rows)] if part)


def _weighs(section: str) -> bool:
    return section.startswith(("import", "first", at.SIZE, at.PACKAGES))


def _table(title: str, sections: Sequence[str], rows: Sequence[Row]) -> str:
    found = {(row.section, row.name): row for row in rows}
    names = list(dict.fromkeys(row.name for row in rows))
    if not sections:
        return ""
    lines = [[title, *(_head(section) for section in sections)]]
    for name in names:
        cells = [_cell(found.get((section, name)), found) for section in sections]
        if any(cells):
            lines.append([name, *cells])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    lines.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    return "\n".join("| " + " | ".join(map(_padded, line, widths, range(len(line)))) + " |" for line in lines)


def _padded(cell: str, width: int, column: int) -> str:
    return cell.ljust(width) if column == 0 else cell.rjust(width)


def _head(section: str) -> str:
    return section.removesuffix(", CPU").replace(" at once", "")


def _cell(row: Row | None, found: dict[tuple[str, str], Row]) -> str:
    if row is None or not row.measured:
        return ""
    text = _figure(row.median)
    floor = found.get((row.section, row.floor))
    if floor is not None and floor.measured and floor.median:
        text += f" ({row.median / floor.median:.2f}x)"
    if row.unit in {"s", "MB"}:
        text += f" {row.unit}"
    return text + {"ok": " ✓", "over": " ✗"}.get(row.status, "")


def _figure(value: float) -> str:
    return f"{value:.0f}" if value >= 100 or value == int(value) else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _reasons(rows: Sequence[Row]) -> str:
    """Why cells are empty: each reason with the lines and columns it is true of."""
    why: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if not row.measured and row.skipped not in {"", "as above"}:
            why.setdefault((row.name, row.skipped), []).append(_head(row.section))
    lines = list[str]()
    for (name, reason), sections in why.items():
        shown = list(dict.fromkeys(section.partition(":")[0] for section in sections))
        lines.append(f"- {name}: {', '.join(shown)}: {reason}")
    return "Not measured:\n\n" + "\n".join(lines) if lines else ""


# ── the verdict ─────────────────────────────────────────────────────────────────────────────────────────────────────


def missed(rows: Iterable[Row]) -> list[str]:
    """Goals that were not reached."""
    return [
        f"{row.section}: {row.name}: {_figure(row.median)} (goal {row.budget.why}, here {_figure(row.budget.limit)})"
        for row in rows
        if row.budget is not None and row.status == "over"
    ]


def behind(rows: Sequence[Row]) -> list[str]:
    """Sections in which some peer is ahead of the best of llmmw's ways; less is better in all of them."""
    found = list[str]()
    for section in dict.fromkeys(row.section for row in rows):
        here = [row for row in rows if row.section == section and row.measured]
        own = min((row for row in here if row.ours), key=lambda row: row.median, default=None)
        if own is None:
            continue
        ahead = sorted((row for row in here if not row.ours and row.median < own.median), key=lambda row: row.median)
        if ahead:
            named = [f"{row.name}{' (a floor)' if row.name in FLOORS else ''} {_figure(row.median)}" for row in ahead]
            found.append(f"{section}: {', '.join(named)}; {own.name} {_figure(own.median)}")
    return found

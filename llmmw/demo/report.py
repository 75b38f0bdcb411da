"""The demo's figures as a table, as JSON and as a chart."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from llmmw.errors import ConfigError, MissingExtra

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from llmmw.demo.ways import Result

_PANELS = (
    ("wall_s", "wall time (s)"),
    ("upstream_calls", "HTTP requests sent"),
    ("tokens", "tokens paid"),
    ("failures", "questions unanswered"),
)


def table(results: Sequence[Result], *, title: str) -> Any:
    """A rich Table, one row per way.

    "sent" are HTTP requests (the SDK's own retries included), "hits" the share answered from the cache, "joined" the
    calls that shared another one's answer while it was in flight.
    """
    from rich.table import Table  # noqa: PLC0415 — belongs to the extra

    found = Table(title=title, padding=(0, 0))
    found.add_column("way", no_wrap=True)
    for name in ("wall s", "faster", "sent", "tokens", "failed", "hits", "joined"):
        found.add_column(name, justify="right", no_wrap=True)
    slowest = results[0].wall_s
    for result in results:
        found.add_row(
            result.way,
            f"{result.wall_s:.2f}",
            f"{slowest / result.wall_s:.1f}x" if result.wall_s else "-",
            str(result.upstream_calls),
            str(result.tokens),
            str(result.failures),
            f"{result.hit_rate:.0%}",
            str(result.coalesced),
        )
    return found


def write_json(path: Path, found: dict[str, Any]) -> None:
    """Write figures, making the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=2) + b"\n")


def check_writable(figures: Path | None, chart: Path | None) -> None:
    """See that both can be written, before minutes are spent on what goes into them.

    Raises:
        ConfigError: one cannot, or no chart has that ending.
        MissingExtra: matplotlib is not installed.
    """
    if chart is not None:
        endings = drawing("").canvas.get_supported_filetypes()
        if chart.suffix[1:].lower() not in endings:
            raise ConfigError(
                f"{chart}: a chart ends in one of {', '.join('.' + ending for ending in sorted(endings))}"
            )
    for path in (figures, chart):
        if path is not None:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.open("ab").close()
            except OSError as error:
                raise ConfigError(f"{path}: {error.strerror}") from None


def drawing(title: str, *, width: float = 12, height: float = 3.6) -> Any:
    """An empty matplotlib Figure of that many inches.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 — belongs to the extra
    except ImportError as error:
        raise MissingExtra("a chart needs matplotlib: pip install 'llmmw[demo]'") from error
    figure: Any = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(title)
    return figure


def save(figure: Any, path: Path) -> None:
    """Write a chart, making the folder; the file's ending chooses the format (png, svg, pdf)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def write_chart(path: Path, results: Sequence[Result], *, title: str) -> None:
    """Four small bar charts, one bar per way."""
    figure = drawing(title)
    colours = ("#9aa5b1", "#5b8db8", "#2a9d4e")
    for axes, (name, label) in zip(figure.subplots(1, len(_PANELS)), _PANELS, strict=True):
        values = [getattr(result, name) for result in results]
        bars = axes.bar([result.way.replace(", ", "\n") for result in results], values, color=colours)
        axes.bar_label(
            bars, labels=[f"{value:,}" if isinstance(value, int) else f"{value:.1f}" for value in values], padding=2
        )
        axes.set_title(label, fontsize=10)
        axes.tick_params(axis="x", labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_ylim(0, max([*values, 1]) * 1.15)
    save(figure, path)

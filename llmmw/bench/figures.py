"""What the waves of calls add up to: medians, quantiles, ratios, and the two promises about them. Nothing runs here."""

from __future__ import annotations

import math
import statistics
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

AGENTS = 4
MOST_AGENTS = 1.15
"""Four agents at once take at most that many times as long as one (the seed's claim was 1.5)."""
MOST_BATCH = 1.10
"""`generate_batch` takes at most that many times as long as the best of the three bare shapes."""
BATCH_FROM = 32
"""Calls from which on shapes differ by what HTTP costs (VLLM.md 3)."""
BARE_SHAPES = ("aiohttp", "list", "batch")


class Sample(msgspec.Struct, frozen=True):
    """One wave of calls."""

    wall_s: float
    """From before the first call until the last answer is read."""
    cpu_s: float
    """CPU time of this process meanwhile."""
    latencies_s: tuple[float, ...] = ()
    """One per answer, from when its call was made."""
    tokens: int = 0
    """Completion tokens, as the server reports them."""
    failures: int = 0


class Row(msgspec.Struct):
    """A shape with a number of calls, over all repeats."""

    shape: str
    calls: int
    samples: list[Sample] = []
    skipped: str = ""
    """Why there is no figure."""
    said: str = ""
    """The first failure's text."""
    measured_at: int = 0
    """Extrapolated in proportion from a row with that many calls; 0: measured."""

    @property
    def wall_s(self) -> float:
        """Median of the repeats; NaN without one."""
        return statistics.median(sample.wall_s for sample in self.samples) if self.samples else math.nan

    @property
    def lossy(self) -> bool:
        """Whether a wave lost answers, and so took less time than its work."""
        return any(sample.failures for sample in self.samples)

    def figures(self) -> dict[str, float | int | None]:
        """The row's numbers; None where there is none.

        `wall_s`, `tokens_per_s` and `cpu_ms` (client CPU per call) are medians of the repeats, `best_s` the least;
        `p50_s` and `p99_s` are over the answers of all repeats; `failures` is their sum.
        """
        if not self.samples:
            return dict.fromkeys(("wall_s", "best_s", "tokens_per_s", "p50_s", "p99_s", "cpu_ms", "failures"))
        latencies = [latency for sample in self.samples for latency in sample.latencies_s]
        return {
            "wall_s": self.wall_s,
            "best_s": min(sample.wall_s for sample in self.samples),
            "tokens_per_s": statistics.median(sample.tokens / max(1e-9, sample.wall_s) for sample in self.samples),
            "p50_s": quantile(latencies, 0.5),
            "p99_s": quantile(latencies, 0.99),
            "cpu_ms": statistics.median(sample.cpu_s for sample in self.samples) / self.calls * 1e3,
            "failures": sum(sample.failures for sample in self.samples),
        }


class Claim(msgspec.Struct, frozen=True):
    """A ratio, and the most it may be (None: for information)."""

    text: str
    ratio: float
    """Median over the repeats."""
    least: float
    """The least wall time over the other's least: what is left where other programs disturb."""
    most: float | None = None

    @property
    def ok(self) -> bool:
        """Whether it holds."""
        return self.most is None or self.ratio <= self.most


def quantile(values: Sequence[float], share: float) -> float | None:
    """The smallest value that `share` of all do not exceed; None of nothing."""
    if not values:
        return None
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def extrapolated(row: Row, calls: int) -> Row:
    """What that many calls one after the other take, if each takes what it took there."""
    times = calls / row.calls
    samples = [
        msgspec.structs.replace(
            sample, wall_s=sample.wall_s * times, cpu_s=sample.cpu_s * times, tokens=round(sample.tokens * times)
        )
        for sample in row.samples
    ]
    return Row(row.shape, calls, samples, row.skipped, row.said, row.calls)


def paired_ratio(one: Row, other: Row) -> float:
    """Median over the repeats of how many times as long `one` took; neighbours in time are compared.

    NaN where either has no figure.
    """
    if not one.samples or not other.samples:
        return math.nan
    pairs = zip(one.samples, other.samples, strict=False)
    return statistics.median(first.wall_s / max(1e-9, second.wall_s) for first, second in pairs)


def claims(rows: Iterable[Row]) -> list[Claim]:
    """What these rows say about the promises; nothing about what was not measured, or lost answers."""
    by = {(row.shape, row.calls): row for row in rows if row.samples and not row.lossy}
    found: list[Claim] = []
    for shape, most in (("one-by-one", None), ("client", MOST_AGENTS)):
        if (shape, 1) in by and (shape, AGENTS) in by:
            found.append(_claim(f"{shape}: {AGENTS} agents over one", by[shape, AGENTS], by[shape, 1], most))
    counts = sorted({calls for _, calls in by}, reverse=True)
    for calls in counts:
        ours = by.get(("generate-batch", calls))
        bare = [by[shape, calls] for shape in BARE_SHAPES if (shape, calls) in by]
        if calls >= BATCH_FROM and ours is not None and bare:
            best = min(bare, key=lambda row: row.wall_s)
            text = f"generate-batch: {calls} at once over the best bare shape ({best.shape})"
            found.append(_claim(text, ours, best, MOST_BATCH))
            break
    return found


def _claim(text: str, one: Row, other: Row, most: float | None) -> Claim:
    least = [min(sample.wall_s for sample in row.samples) for row in (one, other)]
    return Claim(text, paired_ratio(one, other), least[0] / max(1e-9, least[1]), most)

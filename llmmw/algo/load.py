"""How busy a vLLM server says it is: in a header of its answers, or on its /metrics page. Nothing here raises.

The header is ORCA's `endpoint-load-metrics`, which vLLM adds to whole answers that asked for it; the page is
Prometheus text. Both spellings of each figure are read: vLLM renamed `gpu_cache_usage_perc` and
`gpu_prefix_cache_*` to `kv_cache_usage_perc` and `prefix_cache_*`, and routers in front of it still use the old ones.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

import msgspec

from llmmw.answer import mapping

if TYPE_CHECKING:
    from collections.abc import Iterable

LOAD_HEADER = "endpoint-load-metrics"
ASKING_HEADER = "endpoint-load-metrics-format"

_MAX_HEADER = 4096
_MOST = 1e15
_RUNNING, _WAITING, _USAGE, _QUERIES, _HITS = "running", "waiting", "usage", "queries", "hits"
_NAMES = {
    "num_requests_running": _RUNNING,
    "num_requests_waiting": _WAITING,
    "kv_cache_usage_perc": _USAGE,
    "gpu_cache_usage_perc": _USAGE,
    "prefix_cache_queries": _QUERIES,
    "gpu_prefix_cache_queries": _QUERIES,
    "prefix_cache_hits": _HITS,
    "gpu_prefix_cache_hits": _HITS,
}
_SAMPLE = re.compile(r"^vllm:(\w+?)(?:_total)?(?:\{[^\n]*\})? ([0-9.eE+-]+)(?: [0-9]+)?\r?$", re.MULTILINE | re.ASCII)
_PAIR = re.compile(r"(?:named_metrics\.)?([\w.]+)\s*=\s*([0-9.eE+-]+)", re.ASCII)


class Load(msgspec.Struct, frozen=True):
    """How busy a server was when it answered; None where it does not say."""

    running: int | None = None
    """Sequences in its batch."""
    waiting: int | None = None
    """Sequences in its queue."""
    kv_cache_usage: float | None = None
    """Share of the KV cache in use, from 0 to 1; of several engines the fullest."""
    prefix_queries: int | None = None
    """Prompt tokens looked up in the prefix cache since the server began."""
    prefix_hits: int | None = None
    """How many of them it had."""

    @property
    def prefix_hit_rate(self) -> float | None:
        """Share of the prompt tokens that the prefix cache had, from 0 to 1; None before the first."""
        return self.prefix_hits / self.prefix_queries if self.prefix_queries and self.prefix_hits is not None else None


NO_LOAD = Load()


def load_of_header(value: str) -> Load:
    """The load in an `endpoint-load-metrics` header: 'JSON {"named_metrics": {...}}' or 'TEXT name=1, name=2'."""
    kind, _, rest = value[:_MAX_HEADER].strip().partition(" ")
    if kind.upper() == "TEXT":
        return _load((name.removeprefix("named_metrics."), _number(text)) for name, text in _PAIR.findall(rest))
    if kind.upper() != "JSON":
        return NO_LOAD
    try:
        told = mapping(msgspec.json.decode(rest))
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return NO_LOAD
    return _load(mapping(told.get("named_metrics")).items())


def load_of_metrics(page: str) -> Load:
    """The load on a /metrics page; of several engines the sum (of the cache's use the largest)."""
    return _load((name, _number(text)) for name, text in _SAMPLE.findall(page))


def _load(figures: Iterable[tuple[str, object]]) -> Load:
    found: dict[str, float] = {}
    by_name: dict[str, str] = {}
    for name, value in figures:
        field = _NAMES.get(name)
        if field is None or not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < _MOST:
            continue
        if by_name.setdefault(field, name) != name:
            continue  # a server that tells one figure under both names
        before = found.get(field, 0.0)
        found[field] = max(before, value) if field == _USAGE else before + value
    whole = {field: int(value) for field, value in found.items()}
    usage = found.get(_USAGE)
    return Load(
        running=whole.get(_RUNNING),
        waiting=whole.get(_WAITING),
        kv_cache_usage=None if usage is None else min(1.0, usage),
        prefix_queries=whole.get(_QUERIES),
        prefix_hits=whole.get(_HITS),
    )


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None

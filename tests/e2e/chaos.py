"""What the chaos tests share: who watches the engines, and what must hold when everything is over."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
from collections import Counter, defaultdict
from contextlib import suppress
from pathlib import Path

import llmmw
from llmmw import events as ev
from llmmw.layers.allowance import Allowance
from llmmw.layers.breaker import BoundBreaker
from llmmw.layers.limiter import BoundLimiter


def seeds(usual):
    """The usual seeds, or those that CHAOS_SEEDS names: "5,7" or "100-199"."""
    wanted = os.environ.get("CHAOS_SEEDS", "")
    found = []
    for part in filter(None, wanted.split(",")):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found or list(usual)


HOME = Path(llmmw.__file__).parent
ENDED = ("cache_hits", "coalesced", "answered_upstream", "errors", "cancelled")


class Watch:
    """An event sink: every call that begins must end, once; and so must every attempt."""

    def __init__(self):
        self.calls = Counter()
        self.attempts = Counter()
        self.ends = Counter()
        self.by_agent = defaultdict(list)

    def __call__(self, event):
        kind = type(event)
        if kind is ev.CallStarted:
            self.calls["begun"] += 1
            self.by_agent[event.agent].append("begun")
        elif kind is ev.CallEnded:
            self.calls["ended"] += 1
            self.ends[event.result] += 1
            self.by_agent[event.agent].append(event.result)
        elif kind is ev.UpstreamStarted:
            self.attempts["begun"] += 1
        elif kind is ev.UpstreamEnded:
            self.attempts["ended"] += 1
            self.attempts["ok"] += event.ok


class Permits:
    """Every permit that any limiter granted, and whether it came back once."""

    def __init__(self, monkeypatch):
        self.counts = Counter()
        for name in ("grant", "_release"):
            self._count(monkeypatch, name)

    def _count(self, monkeypatch, name):
        original = getattr(Allowance, name)

        def counted(*args, **kwargs):
            self.counts[name] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(Allowance, name, counted)


def own_tasks():
    """Tasks of the library itself on this loop."""
    found = []
    for task in asyncio.all_tasks():
        code = getattr(task.get_coro(), "cr_code", None)
        path = Path(code.co_filename) if code is not None else None
        if path is not None and path.is_relative_to(HOME) and not path.is_relative_to(HOME / "testing"):
            found.append(f"{path.name}:{code.co_qualname}")
    return found


def own_threads():
    return sorted(thread.name for thread in threading.enumerate() if thread.name.startswith("llmmw"))


def handles() -> Counter[str]:
    """Open file descriptors by kind: sockets, pipes, and files by path."""
    found = Counter()
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # the listing's own
            target = str(entry.readlink())
            found[target.partition(":[")[0] if ":[" in target else target] += 1
    return found


def own_objects() -> Counter[str]:
    """Objects of the library's classes that are still alive, by name; values that anybody may keep left out."""
    gc.collect()
    found = Counter()
    for thing in gc.get_objects():
        kind = type(thing)
        module = str(kind.__module__)  # of some types of other libraries a descriptor
        if module.startswith("llmmw.") and not module.startswith("llmmw.testing"):
            found[f"{module}.{kind.__qualname__}"] += 1
    return found


def parts(engine, kind):
    return [bound for _, bound in engine._bounds if isinstance(bound, kind)]


def unbalanced(engine, watch=None):
    """What does not add up in an engine that nobody asks anything; empty where all is well."""
    found = []
    stats = engine.get_performance_stats()
    layers = stats["layers"]
    if stats["in_flight"] or stats["request_count"] != sum(stats[name] for name in ENDED):
        found.append({name: stats[name] for name in ("request_count", "in_flight", *ENDED)})
    for layer, gauges in (
        ("limit", ("in_use", "waiting")),
        ("coalesce", ("flights", "waiting")),
        ("batch", ("waiting", "active")),
        ("pool", ("in_flight", "waiting")),
    ):
        left = {name: layers.get(layer, {}).get(name) for name in gauges if layers.get(layer, {}).get(name)}
        if left:
            found.append((layer, left))
    found += [what for limiter in parts(engine, BoundLimiter) for what in _unpaid(limiter)]
    found += [what for breaker in parts(engine, BoundBreaker) for what in _leased(breaker)]
    if watch is not None:
        if watch.calls["begun"] != watch.calls["ended"] or watch.calls["ended"] != stats["request_count"]:
            found.append((dict(watch.calls), stats["request_count"]))
        if watch.attempts["begun"] != watch.attempts["ended"] or watch.attempts["begun"] != stats["upstream_requests"]:
            found.append((dict(watch.attempts), stats["upstream_requests"]))
        if watch.attempts["ended"] - watch.attempts["ok"] != stats["upstream_failures"]:
            found.append((dict(watch.attempts), "failures", stats["upstream_failures"]))
        ends = {"hit": "cache_hits", "coalesced": "coalesced", "upstream": "answered_upstream", "failed": "errors"}
        for result, name in {**ends, "cancelled": "cancelled"}.items():
            if watch.ends[result] != stats[name]:
                found.append((result, watch.ends[result], stats[name]))
    return found


def _unpaid(limiter):
    for gate in limiter._gates.values():
        allowance = gate.allowance
        if allowance.in_use or len(gate.queue):
            yield "permits", allowance.in_use, len(gate.queue)
        for name, ledger in allowance.ledgers():
            used = ledger.used(limiter.env.clock.monotonic())
            if used < 0:
                yield "ledger", name, used


def _leased(breaker):
    for lines in (breaker._endpoints, breaker._credentials):
        for key, line in lines.items():
            if line.circuit._lease_until is not None:
                yield "probe leased", key, line.circuit.state


def unpaid_later(engine, now):
    """What the ledgers still hold at a time when every window has passed."""
    return [
        (name, used)
        for limiter in parts(engine, BoundLimiter)
        for gate in limiter._gates.values()
        for name, ledger in gate.allowance.ledgers()
        if (used := ledger.used(now))
    ]

"""Importing this takes the library's own patience out of the way, in a test run and in the processes it starts.

On a loaded machine anything may take seconds: a read of the disk tier is then a miss, a close gives up writes, a
join goes on without its thread, all as promised, and none of it what a test is about that does not say so. Tests of
these budgets set their own.
"""

from __future__ import annotations

from pathlib import Path

from llmmw.endpoints import inquiry
from llmmw.engine import bridge, home, inflight
from llmmw.stores import disk, iothread, leasetable, upkeep

FOR_A_CHILD = f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\nimport patience\n"
"""The first lines of a program that a test runs in a process of its own."""

PATIENCE_S = 120.0

for module, names in {
    disk: ("READ_BUDGET_S", "OPEN_BUDGET_S"),
    iothread: ("FLUSH_S", "_FORK_S"),
    leasetable: ("_OPEN_S",),
    upkeep: ("_PATIENCE_S",),
    inquiry: ("_LIMIT_S",),
    bridge: ("_JOIN_S",),
    home: ("_LAST_WORDS_S",),
    inflight: ("_BREAK_S",),
}.items():
    for name in names:
        if not hasattr(module, name):
            raise AttributeError(f"{module.__name__} has no {name} any more")
        setattr(module, name, PATIENCE_S)

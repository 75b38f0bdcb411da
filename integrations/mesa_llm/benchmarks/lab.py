"""What the sections share: the servers, the processes that step, and how a step is measured.

This runs in the repository's own environment; each way of stepping runs in the environment of one Mesa-LLM, in a
process of its own, against a server in yet another.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
sys.path += [str(ROOT / "benchmarks"), str(HERE.parent)]

from line_process import LineProcess  # noqa: E402 — found by the line above
from measure import Progress  # noqa: E402 — as above
from run_tests import PAIRS, interpreter_of, prepare, sources  # noqa: E402 — as above

from llmmw.testing.server import ServerConfig, server_process  # noqa: E402 — as above

if TYPE_CHECKING:
    from collections.abc import Iterator

    from run_tests import Pair

    from llmmw.testing.server import ServerProcess

KEEPALIVE_S = 60.0
"""Workers wait for each other; the embedded server's 5 s would end their connections meanwhile."""
ANSWERS = {"any_model": True, "tool_marker": " ", "keepalive_s": KEEPALIVE_S}
"""An executor's prompt has a space in it, so a tool is called whenever that is allowed."""


class Worker:
    """One way of stepping; see worker.py for what it is told."""

    def __init__(self, pair: Pair, way: str, base_url: str, *, limit_s: float = 600.0, **options: Any) -> None:
        self.way = way
        environment = {**os.environ, "OPENAI_API_BASE": base_url, "OPENAI_BASE_URL": base_url}
        environment.setdefault("OPENAI_API_KEY", "sk-bench")
        command = [str(pair.interpreter), str(HERE / "worker.py"), way, json.dumps(options)]
        self._process = LineProcess(command, environment, limit_s=limit_s)

    def __call__(self, do: str, **more: Any) -> dict[str, Any]:
        """Its answer; RuntimeError when it ended or took too long."""
        found: dict[str, Any] = json.loads(self._process.ask(json.dumps({"do": do, **more})))
        return found

    def limit(self, limit_s: float) -> None:
        """From now on one answer may take so long."""
        self._process.limit_s = limit_s

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.close()


@dataclass
class Lab:
    """Where it is measured: progress, versions, and the results so far."""

    pairs: list[Pair]
    quick: bool = False
    full: bool = False
    progress: Progress = field(default_factory=Progress)
    results: list[dict[str, Any]] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    """What must hold and does not."""

    @contextlib.contextmanager
    def server(self, **settings: Any) -> Iterator[ServerProcess]:
        """The embedded server in a process of its own."""
        with server_process(ServerConfig(**{**ANSWERS, **settings})) as running:
            yield running

    @contextlib.contextmanager
    def workers(self, pair: Pair, ways: dict[str, dict[str, Any]], base_url: str) -> Iterator[dict[str, Worker]]:
        """A process for each way, ready; a name "asyncio: more" is the way before the colon."""
        with contextlib.ExitStack() as stack:
            found = {
                name: stack.enter_context(Worker(pair, name.partition(":")[0], base_url, **options))
                for name, options in ways.items()
            }
            self.progress(f"mesa-llm {pair.mesa_llm}: {len(found)} processes start")
            for worker in found.values():
                worker("ready")
            yield found

    def must(self, holds: bool, what: str) -> None:  # noqa: FBT001 — reads as a sentence
        """Note what does not hold."""
        if not holds:
            self.broken.append(what)

    def note(self, section: str, **figures: Any) -> dict[str, Any]:
        """One line of the results."""
        row = {"section": section, **{k: round(v, 4) if isinstance(v, float) else v for k, v in figures.items()}}
        self.results.append(row)
        return row


def environments(only: str | None) -> list[Pair]:
    """The versions of Mesa-LLM that can be had here, newest first."""
    found: list[Pair] = []
    for pair in reversed(PAIRS):
        if only not in {None, pair.mesa_llm}:
            continue
        python = interpreter_of(pair.python)
        if python is None:
            print(f"SKIPPED mesa-llm {pair.mesa_llm}: no Python {pair.python} here")
            continue
        prepare(pair, python)
        found.append(pair)
    return found


def folder_of_examples(pair: Pair) -> Path | None:
    """Mesa-LLM's source distribution, whose folder `examples` is a package."""
    return sources(pair)

"""One way of stepping agents, in a process of its own: answers each line of JSON with one line of JSON.

worker.py WAY OPTIONS      (WAYS below; OPTIONS: JSON, see `Worker`)

{"do": "ready"}                                 when everything is imported
{"do": "ready"}                                 when everything is imported
{"do": "make", "kind": "react", "agents": 20}   a new simulation
{"do": "step"}                                  wall and CPU seconds, open descriptors, what it raised
{"do": "stats"}                                 what llmmw counted
"""

from __future__ import annotations

import json
import logging
import os
import resource
import shutil
import sys
import tempfile
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # LiteLLM fetches it from the internet otherwise

import litellm
import llmmw_mesa
import mesa_llm.parallel_stepping as stock
import population
from llmmw_mesa.parallel import agent_set_classes

from llmmw import RateLimiter

WAYS = ("sequential", "as shipped", "asyncio", "threading", "overlap", "snapshot", "installed")
"""One by one; `parallel_stepping=True` and stock; stock's two modes, put on every kind of agent set so that they do
overlap; llmmw_mesa's two modes; and llmmw_mesa installed with nothing changed about stepping."""
_OURS = ("overlap", "snapshot", "installed")


class Worker:
    """What the process can do.

    Args:
        way: one of WAYS.
        options: model: what to ask for; install: options of llmmw_mesa.install(); limiter: options of a RateLimiter
            to install it with instead; planning: further arguments of plan(); short: ReAct's answers are short;
            descriptors: the limit of this process; sources: where Mesa-LLM's `examples` are.
    """

    def __init__(self, way: str, options: dict[str, Any]) -> None:
        self._way, self._options = way, options
        self._model: Any = None
        if options.get("descriptors"):
            hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(options["descriptors"], hard), hard))
        if options.get("sources"):
            sys.path.insert(0, options["sources"])
        if options.get("short"):
            population.shorter_answers()
        if way in _OURS:
            self._install()
        else:
            self._step_as_stock()

    def _step_as_stock(self) -> None:
        if self._way == "sequential":
            stock.disable_automatic_parallel_stepping()
        else:
            stock.enable_automatic_parallel_stepping("threading" if self._way == "threading" else "asyncio")
        if self._way in {"asyncio", "threading"}:  # stock replaces that of one class only, which Mesa 3.5 does not use
            for kind in agent_set_classes():
                kind.shuffle_do = stock._enhanced_shuffle_do  # noqa: SLF001 — that is what is measured

    def _install(self) -> None:
        stock.disable_automatic_parallel_stepping()
        options = dict(self._options.get("install", {}))
        if self._options.get("limiter"):
            layers = llmmw_mesa.Options(**options).layers()
            options = {"stack": layers.replacing("limit", RateLimiter(**self._options["limiter"]))}
        llmmw_mesa.install(parallel="off" if self._way == "installed" else self._way, **options)

    def ready(self) -> dict[str, Any]:
        """What is measured here."""
        return {"way": self._way, **{name: version(name) for name in ("mesa-llm", "mesa", "litellm", "openai")}}

    def make(self, kind: str, agents: int) -> dict[str, Any]:
        """A new simulation in place of the one before."""
        parallel = self._way not in {"sequential", "installed"}
        model = self._options.get("model", "openai/llmmw-embedded")
        if kind in population.EXAMPLES:
            self._model = population.example(kind, agents, parallel=parallel, llm_model=model)
        else:
            beings = {
                "react": population.Forager,
                "sleeps": population.Sleeper,
                "plain": population.Plain,
                "awaiting": population.Awaiting,
            }[kind]
            planning = self._options.get("planning", {})
            self._model = population.World(agents, beings, parallel=parallel, llm_model=model, planning=planning)
        return {"agents": len(self._model.agents)}

    def step(self) -> dict[str, Any]:
        """One step of all agents."""
        error, before = "", [(agent, agent.acted) for agent in self._model.agents if hasattr(agent, "acted")]
        began, cpu = time.perf_counter(), time.process_time()
        try:
            self._model.step()
        except Exception as caught:  # noqa: BLE001 — told to who measures
            first = caught
            while isinstance(first, ExceptionGroup):
                first = first.exceptions[0]
            error = f"{type(first).__name__}: {first}"[:300]
        took: dict[str, Any] = {"wall_s": time.perf_counter() - began, "cpu_s": time.process_time() - cpu}
        idle = sum(agent.acted != acted + 1 for agent, acted in before)
        # On Mesa 3.5 a model's step() does nothing any more, without a word, once it has raised.
        took["error"] = error or (f"{idle} of {len(before)} agents did not step once" if idle else "")
        took["longest_s"] = max((getattr(agent, "took_s", 0.0) for agent in self._model.agents), default=0.0)
        return took | {"descriptors": sum(1 for _ in Path("/proc/self/fd").iterdir())}

    def stats(self) -> dict[str, Any]:
        """Sums over llmmw_mesa's engines; empty where it is not installed."""
        wanted = ("request_count", "cache_hits", "coalesced", "upstream_requests", "errors", "tokens_in", "tokens_out")
        every = llmmw_mesa.global_stats().values()
        return {name: sum(stats.get(name, 0) for stats in every) for name in wanted} if every else {}


def main() -> None:
    """Serve until standard input closes."""
    answers = os.fdopen(os.dup(1), "w")
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)  # Mesa-LLM prints each agent's thoughts
    os.close(silence)
    logging.disable()
    warnings.simplefilter("ignore")
    litellm.suppress_debug_info = True
    worker = Worker(sys.argv[1], json.loads(sys.argv[2]))
    folder = Path(tempfile.mkdtemp())  # two examples keep recordings where they run
    os.chdir(folder)
    for line in sys.stdin:
        order = json.loads(line)
        print(json.dumps(getattr(worker, order.pop("do"))(**order)), file=answers, flush=True)
    llmmw_mesa.uninstall()
    llmmw_mesa.close_all()
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(0)  # no recordings, no waiting for stock's threads


if __name__ == "__main__":
    main()

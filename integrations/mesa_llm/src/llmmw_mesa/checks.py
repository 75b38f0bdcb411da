"""`check()`: what would go wrong in this process, found before the first step, each with its cure."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from typing import Any, Literal

import mesa

from llmmw_mesa.parallel import _stepping as stepping
from llmmw_mesa.parallel import agent_set_classes

_DESCRIPTORS_WANTED = 1024


@dataclass(frozen=True)
class Finding:
    """Something to see to."""

    id: str
    severity: Literal["error", "warning"]
    message: str
    """What is wrong, and what to do."""

    def __str__(self) -> str:
        return f"{self.severity}: {self.message} [{self.id}]"


def check(model: Any = None) -> tuple[Finding, ...]:
    """Look for what breaks or slows simulations with LLM agents here; empty when all is well.

    Args:
        model: a Mesa model, to look at its `parallel_stepping` too.
    """
    found = [_tools(), _parallel(model), _threads(), _descriptors()]
    return tuple(finding for finding in found if finding is not None)


def _tools() -> Finding | None:
    if importlib.util.find_spec("mcp") is not None:
        return None
    return Finding(
        "mcp",
        "error",
        "the package `mcp` is missing: LiteLLM imports it for every call with tools, and all of Mesa-LLM's "
        "reasonings make such. Cure: pip install mcp (or llmmw-mesa[tools])",
    )


def _parallel(model: Any) -> Finding | None:
    if not getattr(model, "parallel_stepping", False) or stepping.depth:
        return None
    kind = type(getattr(model, "agents", None))
    method = getattr(kind, "shuffle_do", None)
    if getattr(method, "__name__", "") == "_enhanced_shuffle_do":
        return None
    others = ", ".join(cls.__name__ for cls in agent_set_classes())
    return Finding(
        "parallel",
        "warning",
        f"parallel_stepping is set, but Mesa {mesa.__version__} keeps agents in a {kind.__name__} (of {others}), which "
        "Mesa-LLM does not patch: steps run one after another. Cure: llmmw_mesa.enable_automatic_parallel_stepping(), "
        "or llmmw_mesa.step_agents(model.agents)",
    )


def _threads() -> Finding | None:
    usual = min(32, (os.cpu_count() or 1) + 4)
    from mesa_llm import parallel_stepping  # noqa: PLC0415 — Mesa-LLM patches classes when it is imported

    if getattr(parallel_stepping, "_PARALLEL_STEPPING_MODE", "") != "threading" or stepping.depth:
        return None
    return Finding(
        "threads",
        "warning",
        f"Mesa-LLM's threading mode steps at most {usual} agents at once here (processors + 4). "
        'Cure: llmmw_mesa.enable_automatic_parallel_stepping("threading", max_concurrent=64)',
    )


def _descriptors() -> Finding | None:
    try:
        import resource  # noqa: PLC0415 — not on Windows
    except ImportError:
        return None
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft >= _DESCRIPTORS_WANTED or soft == resource.RLIM_INFINITY:
        return None
    return Finding(
        "descriptors",
        "warning",
        f"this process may open {soft} files and sockets; without llmmw_mesa.install() Mesa-LLM opens one per agent "
        f"and step and closes none. Cure: ulimit -n {_DESCRIPTORS_WANTED}, and install()",
    )

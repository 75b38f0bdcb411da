"""Figures for Mesa's DataCollector: calls, tokens, hits and failures, of a model and of each agent, step by step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmmw_mesa.shared import global_stats

if TYPE_CHECKING:
    from collections.abc import Callable

_MODEL = {
    "llm_calls": "request_count",
    "llm_hits": "cache_hits",
    "llm_joined": "coalesced",
    "llm_upstream": "upstream_requests",
    "llm_failures": "errors",
    "llm_tokens_in": "tokens_in",
    "llm_tokens_out": "tokens_out",
    "llm_tokens_saved": "tokens_saved",
}
_AGENT = ("calls", "hits", "errors", "tokens_in", "tokens_out")


def model_reporters(*, per_step: bool = True) -> dict[str, Callable[[Any], float]]:
    """For `DataCollector(model_reporters={..., **model_reporters()})`: sums over all engines.

    Args:
        per_step: what was added since the last collection; False: since the beginning.
    """

    def reporter(key: str) -> Callable[[Any], float]:
        last = [0.0]

        def report(model: Any) -> float:
            del model
            now = sum(float(stats.get(key, 0)) for stats in global_stats().values())
            found, last[0] = now - last[0] * per_step, now
            return found

        return report

    return {name: reporter(key) for name, key in _MODEL.items()}


def agent_reporters(*, per_step: bool = True) -> dict[str, Callable[[Any], float]]:
    """For `DataCollector(agent_reporters={..., **agent_reporters()})`, by the agent's id."""

    def reporter(key: str) -> Callable[[Any], float]:
        last: dict[str, float] = {}

        def report(agent: Any) -> float:
            name = str(agent.unique_id)
            rows = (stats.get("by_agent", {}).get(name, {}) for stats in global_stats().values())
            now = sum(float(row.get(key, 0)) for row in rows)
            found, last[name] = now - last.get(name, 0.0) * per_step, now
            return found

        return report

    return {f"llm_{key}": reporter(key) for key in _AGENT}

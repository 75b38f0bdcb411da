"""What a Mesa model's agents are and use, as far as can be seen without running it."""

from __future__ import annotations

import inspect
from functools import cached_property
from typing import Any, cast

import mesa_llm.module_llm as upstream
from mesa_llm.llm_agent import LLMAgent
from mesa_llm.memory.episodic_memory import EpisodicMemory

from llmmw_mesa.activation import has_async_step
from llmmw_mesa.module import ModuleLLM


class Survey:
    """Facts for `check()`.

    Args:
        model: a Mesa model; None: only what holds for the process.
        llm_model: a language model that is going to be used.
        api_base: where.
    """

    def __init__(self, model: Any, llm_model: str | None, api_base: str | None) -> None:
        self._model = model
        self._llm_model = llm_model
        self._api_base = api_base

    @cached_property
    def _agents(self) -> list[Any]:
        return list(getattr(self._model, "agents", None) or ())

    @cached_property
    def _modules(self) -> list[Any]:
        """The ModuleLLMs that the model, its agents and their memories hold."""
        holders = [self._model, *self._agents, *(getattr(agent, "memory", None) for agent in self._agents)]
        values = [value for holder in holders for value in getattr(holder, "__dict__", {}).values()]
        return list({id(value): value for value in values if isinstance(value, upstream.ModuleLLM)}.values())

    @cached_property
    def llm_models(self) -> list[str]:
        """Their language models, each once."""
        found = [module.llm_model for module in self._modules]
        return list(dict.fromkeys([*filter(None, [self._llm_model]), *found]))

    @cached_property
    def api_bases(self) -> list[str]:
        """Where they are asked, each once."""
        return _bases([self._api_base, *(module.api_base for module in self._modules)])

    @cached_property
    def stock_modules(self) -> int:
        """How many are Mesa-LLM's own."""
        return len(self._stock)

    @cached_property
    def stock_bases(self) -> list[str]:
        """Where those are asked."""
        return _bases([module.api_base for module in self._stock])

    @cached_property
    def _stock(self) -> list[Any]:
        return [module for module in self._modules if not isinstance(module, ModuleLLM)]

    @property
    def async_base(self) -> bool:
        """Whether Mesa-LLM's own `agenerate` asks there too; 0.2's asks the provider's own servers."""
        return "api_base" in inspect.getsource(upstream.ModuleLLM.agenerate)

    @property
    def count(self) -> int:
        """Agents."""
        return len(self._agents)

    @property
    def llm_agents(self) -> int:
        """Those that are LLMAgents."""
        return sum(isinstance(agent, LLMAgent) for agent in self._agents)

    @property
    def all_seeing(self) -> int:
        """Those that observe all others."""
        return sum(getattr(agent, "vision", None) == -1 for agent in self._agents)

    @property
    def episodic(self) -> int:
        """Those whose memory grades every event."""
        return sum(isinstance(getattr(agent, "memory", None), EpisodicMemory) for agent in self._agents)

    @property
    def sync_only(self) -> list[Any]:
        """Those that step only in plain code."""
        return [agent for agent in self._agents if hasattr(agent, "step") and not has_async_step(agent)]

    @property
    def wants_parallel(self) -> bool:
        """Whether the model asks for parallel stepping."""
        return bool(getattr(self._model, "parallel_stepping", False))

    @property
    def _agent_set(self) -> Any:
        return cast("Any", type(getattr(self._model, "agents", None)))

    @property
    def agent_set(self) -> str:
        """The class that holds the agents."""
        return str(self._agent_set.__name__)

    @property
    def stock_parallel(self) -> bool:
        """Whether Mesa-LLM's own parallel stepping reaches that class."""
        method = getattr(self._agent_set, "shuffle_do", None)
        return getattr(method, "__name__", "") == "_enhanced_shuffle_do"

    @property
    def stopped(self) -> bool:
        """Whether Mesa (since 3.5) has given up stepping the model: its next step lies in the past."""
        due = getattr(getattr(self._model, "_default_schedule", None), "next_scheduled_time", None)
        return due is not None and due < self._model.time


def _bases(found: list[str | None]) -> list[str]:
    return list(dict.fromkeys(base for base in found if base))

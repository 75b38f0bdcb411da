"""Figures for Mesa's DataCollector: calls, tokens, hits and failures, of a model and of each agent, step by step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import mesa_llm.module_llm as upstream

from llmmw_mesa.asking import state_of
from llmmw_mesa.figures import NAMES, of_agent, of_model, of_nobody

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Self

    from llmmw_mesa.asking import State


def model_reporters(*, per_step: bool = True) -> dict[str, Callable[[Any], int]]:
    """For `DataCollector(model_reporters={..., **model_reporters()})`.

    Counted are the calls in the steps of the model's agents, those that are gone included, and calls outside of any
    step (in the whole process, since this was called).

    Args:
        per_step: what was added since the step that was collected before; False: since the beginning.

    Returns:
        llm_calls, llm_hits, llm_joined, llm_failures, llm_upstream (requests sent, repetitions included),
        llm_tokens_in, llm_tokens_out, llm_tokens_saved.
    """
    return {f"llm_{name}": partial(_OfModel(name, per_step=per_step)) for name in NAMES}  # Mesa knows a partial


def agent_reporters(*, per_step: bool = True) -> dict[str, Callable[[Any], int]]:
    """For `DataCollector(agent_reporters={..., **agent_reporters()})`: the same names for each agent.

    Counted are the calls in the agent's steps, and calls outside of any step through a ModuleLLM that is the agent's
    alone (an attribute of it or of its memory).

    Args:
        per_step: what was added since the step that was collected before; False: since the agent was made.
    """
    return {f"llm_{name}": _OfAgent(name, per_step=per_step) for name in NAMES}


class _Reporter(ABC):
    """One figure of whoever is reported on. Copies and pickles of it start anew, as the figures do."""

    def __init__(self, name: str, *, per_step: bool) -> None:
        self._name = name
        self._per_step = per_step
        self._marks: WeakKeyDictionary[Any, tuple[object, int, int]] = WeakKeyDictionary()
        """The step, the figure when it began, and the latest."""

    def __reduce__(self) -> tuple[Callable[..., Self], tuple[type[Self], str, bool]]:
        return _again, (type(self), self._name, self._per_step)

    def __call__(self, one: Any) -> int:
        now = self._now(one)
        if not self._per_step:
            return now
        # By the step, not by the call: Mesa asks a model's reporters twice before the first row, to validate them.
        step = getattr(getattr(one, "model", one), "steps", None)
        unseen: tuple[object, int, int] = (step, 0, 0)
        of, began, latest = self._marks.get(one, unseen)
        if of != step:
            began = latest
        self._marks[one] = (step, began, now)
        return now - began

    @abstractmethod
    def _now(self, one: Any) -> int:
        """The figure since the beginning."""


def _again(kind: Any, name: str, per_step: bool) -> Any:  # noqa: FBT001 — as pickle passes it
    return kind(name, per_step=per_step)


class _OfModel(_Reporter):
    def __init__(self, name: str, *, per_step: bool) -> None:
        super().__init__(name, per_step=per_step)
        self._before = of_nobody().snapshot()[name]

    def _now(self, one: Any) -> int:
        return of_model(one).snapshot()[self._name] + of_nobody().snapshot()[self._name] - self._before


class _OfAgent(_Reporter):
    def _now(self, one: Any) -> int:
        alone = sum(state.alone.snapshot()[self._name] for state in _its_own(one))
        return of_agent(one).snapshot()[self._name] + alone


def _its_own(agent: Any) -> list[State]:
    """The state of each ModuleLLM that this agent has and no other."""
    found = _has(agent)
    if any(agent not in state.owners for state in found):  # new here: so may be others, who share it
        for other in (agent, *getattr(getattr(agent, "model", None), "agents", ())):
            for state in _has(other):
                state.owners.add(other)
    return [state for state in found if len(state.owners) == 1]


def _has(agent: Any) -> list[State]:
    values: list[Any] = [*getattr(agent, "__dict__", {}).values(), getattr(getattr(agent, "memory", None), "llm", None)]
    modules = {id(value): value for value in values if isinstance(value, upstream.ModuleLLM)}
    return [state_of(module) for module in modules.values()]

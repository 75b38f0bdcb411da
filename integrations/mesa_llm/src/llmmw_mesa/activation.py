"""Who steps, in which order, and how: on the loop or on a thread."""

from __future__ import annotations

import inspect
import random
from typing import TYPE_CHECKING, Any, cast

from mesa.experimental.meta_agents.meta_agent import MetaAgent
from mesa_llm.llm_agent import LLMAgent

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence


def activation(agents: Iterable[Any], order: str) -> list[Any]:
    """The agents to step, in order. Those that a MetaAgent among them steps itself are not among them."""
    found = list(agents)
    members = {id(part) for agent in found if _steps_members(agent) for part in _members(agent) if part is not agent}
    if members:
        found = [agent for agent in found if id(agent) not in members]
    if order == "shuffle" and len(found) > 1:
        dice = getattr(agents, "random", None) or getattr(getattr(found[0], "model", None), "random", None)
        (dice or random.Random()).shuffle(found)  # noqa: S311 — no secret depends on it
    return found


def _members(agent: Any) -> Iterable[Any]:
    return getattr(agent, "_constituting_set", None) or ()


def _steps_members(agent: Any) -> bool:
    """Whether it has a step of its own, which steps its members; Mesa's does nothing."""
    if not getattr(agent, "_constituting_set", None):
        return False
    kind = cast("Any", type(agent))
    return "step" in vars(agent) or getattr(kind, "step", None) is not MetaAgent.step or hasattr(agent, "astep")


def is_registered(agent: Any) -> bool:
    """Whether it belongs to its model."""
    try:
        return agent in agent.model.agents
    except (AttributeError, TypeError):  # something that steps, but no agent of a model
        return False


class Ways:
    """How agents step; looked up once for each class.

    Args:
        agents: that step together.
        snapshot: each acts on its turn, for which plain code must be able to wait.
    """

    def __init__(self, agents: Sequence[Any], *, snapshot: bool) -> None:
        self._known: dict[type, tuple[str | None, bool]] = {}
        # Whoever speaks to an agent with such a memory asks for a grade, in plain code.
        self._plain = snapshot or any(_asks_in_plain_code(getattr(agent, "memory", None)) for agent in agents)
        self._snapshot = snapshot

    def of(self, agent: Any) -> tuple[Callable[[], Any] | None, bool]:
        """Its step, and whether it runs on the loop."""
        own = getattr(agent, "__dict__", {})
        if "step" in own or "astep" in own:
            name, on_loop = self._find(agent)
        else:
            kind = cast("Any", type(agent))
            found = self._known.get(kind)
            if found is None:
                found = self._known[kind] = self._find(agent)
            name, on_loop = found
        if name is None:
            return None, False
        if on_loop and not hasattr(LLMAgent, "apre_step") and hasattr(getattr(agent, "memory", None), "llm"):
            return self._on_thread(agent, name), False  # Mesa-LLM 0.2 has only plain code around an async step
        return getattr(agent, name), on_loop

    def _on_thread(self, agent: Any, name: str) -> Callable[[], Any]:
        both = name == "astep" and _depth(agent, "step") == _depth(agent, "astep")
        return getattr(agent, "step" if both else name)  # type: ignore[no-any-return]  # — the agent's own

    def _find(self, agent: Any) -> tuple[str | None, bool]:
        """The method that its most special class defines: LLMAgent has an `astep` that merely calls `step`."""
        plain, awaited = _depth(agent, "step"), _depth(agent, "astep")
        if plain is None and awaited is None:
            return None, False
        if awaited is None or (plain is not None and (plain < awaited or (plain == awaited and self._plain))):
            return "step", inspect.iscoroutinefunction(agent.step) and not self._plain
        return "astep", not self._plain


def has_async_step(agent: Any) -> bool:
    """Whether its class has an `astep` of its own; LLMAgent's merely calls `step` and would block everybody."""
    plain, awaited = _depth(agent, "step"), _depth(agent, "astep")
    return awaited is not None and (plain is None or awaited <= plain)


def _depth(agent: Any, name: str) -> int | None:
    """How far up its classes the method is defined."""
    if name in getattr(agent, "__dict__", {}):
        return -1
    for depth, cls in enumerate(type(agent).__mro__):
        if name in cls.__dict__:
            return None if cls.__dict__[name] is None else depth
    return None


def _asks_in_plain_code(memory: Any) -> bool:
    """Whether adding to it asks a question: Mesa-LLM's tools and messages do that in plain code, in async steps too."""
    return hasattr(memory, "grade_event_importance")


def waits(agent: Any) -> bool:
    """Whether a step of its kind is worth overlapping: it has a language model, or is async."""
    return isinstance(agent, LLMAgent) or hasattr(agent, "astep") or hasattr(agent, "llm")

"""What a step that was cut short leaves in an agent's memory."""

from __future__ import annotations

from collections import deque
from typing import Any, cast

from mesa_llm.memory.memory import Memory


def undo_half_steps(agent: Any) -> None:
    """After a step that was cut short: no memory entry without a step stays behind, its content waits for the next.

    Mesa-LLM puts what was heard before a step into such an entry and completes it at the end of the step. Which
    attribute holds it differs from memory to memory; all are looked at, and the memories of a MetaAgent's members.
    """
    for member in getattr(agent, "_constituting_set", None) or ():
        undo_half_steps(member)
    memory = getattr(agent, "memory", None)
    if memory is not None:
        _undo(memory)


def _undo(memory: Any) -> None:
    staged: list[dict[str, Any]] = []
    for name, value in list(getattr(memory, "__dict__", {}).items()):
        if isinstance(value, Memory):
            _undo(value)
        elif _is_half(value):
            staged.append(value.content)
            setattr(memory, name, None)
        elif isinstance(value, (list, deque)):
            entries = cast("list[Any]", value)
            halves = [entry for entry in entries if _is_half(entry)]  # several, where steps call each other
            if halves:
                whole = [entry for entry in entries if not _is_half(entry)]
                entries.clear()
                entries.extend(whole)
                staged += [entry.content for entry in halves]
    content: object = getattr(memory, "step_content", None)
    if not staged or not isinstance(content, dict):
        return
    current = cast("dict[str, Any]", content)
    # What others said is kept for the next step; what the agent saw and planned in this one is not.
    heard: list[Any] = [found["message"] for found in (*staged, current) if found.get("message")]
    current.clear()
    if heard:
        parts: list[Any] = []
        for found in heard:
            parts.extend(found if isinstance(found, list) else [found])  # pyright: ignore[reportUnknownArgumentType]  # — Mesa-LLM's
        current["message"] = parts
    if isinstance(getattr(memory, "last_observation", None), dict):
        memory.last_observation = {}  # Mesa-LLM 0.2 records what has changed since: that one is not recorded


def _is_half(value: Any) -> bool:
    return getattr(value, "step", 0) is None and isinstance(getattr(value, "content", None), dict)

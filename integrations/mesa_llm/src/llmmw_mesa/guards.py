"""What agents do to the world, noticed while they step: it waits for its turn, and a step that was given up does none.

The methods are put on the agent itself, for as long as one of its steps runs, one that was given up included.
"""

from __future__ import annotations

import functools
import inspect
import threading
from types import MethodType
from typing import Any, cast

from llmmw_mesa.acting import current_part

_ACTS = ("apply_plan", "aapply_plan", "send_message", "asend_message", "execute_action", "aexecute_action", "remove")
_REMEMBERS = ("process_step", "aprocess_step", "add_to_memory", "aadd_to_memory")

_lock = threading.Lock()
_guarded: dict[int, tuple[int, list[Any]]] = {}
"""By the agent's id: its steps that run now, and what was put where."""


def _acts(agent: Any) -> None:
    del agent
    part = current_part()
    if part is not None:
        part.commit()


def _remembers(memory: Any) -> None:
    part = current_part()
    if part is None:
        return
    own = getattr(part.agent, "memory", None) is memory or any(
        getattr(member, "memory", None) is memory for member in getattr(part.agent, "_constituting_set", None) or ()
    )
    part.check() if own else part.commit()  # what others are told is done to the world


def _hook(name: str, before: Any, *, awaited: bool) -> Any:
    """A method that does something before it does what its class says. Copies of the agent have their own."""

    def hook(self: Any, *args: Any, **kwargs: Any) -> Any:
        before(self)
        kind = cast("Any", type(self))
        return getattr(kind, name)(self, *args, **kwargs)

    async def ahook(self: Any, *args: Any, **kwargs: Any) -> Any:
        before(self)
        kind = cast("Any", type(self))
        return await getattr(kind, name)(self, *args, **kwargs)

    made = ahook if awaited else hook
    made.__name__ = made.__qualname__ = name  # bound methods are pickled by name
    return made


@functools.cache
def _made(name: str, before: Any, awaited: bool) -> Any:  # noqa: FBT001 — the cache wants positions
    return _hook(name, before, awaited=awaited)


def needs_guard(agent: Any) -> bool:
    """Whether it has anything that is guarded, beyond what every Mesa agent has."""
    return getattr(agent, "memory", None) is not None or hasattr(agent, "apply_plan")


def guard(agent: Any) -> None:
    """A step of this agent begins."""
    with _lock:
        count, put = _guarded.get(id(agent), (0, []))
        if not count:
            parts = [agent, *(getattr(agent, "_constituting_set", None) or ())]
            for part in parts:
                _put(part, _ACTS, _acts, put)
                _put(getattr(part, "memory", None), _REMEMBERS, _remembers, put)
        _guarded[id(agent)] = (count + 1, put)


def release(agent: Any) -> None:
    """One has ended."""
    with _lock:
        count, put = _guarded.pop(id(agent))
        if count > 1:
            _guarded[id(agent)] = (count - 1, put)
            return
        for where, name, hook in put:
            own = cast("dict[str, Any]", vars(where))
            if own.get(name) is hook:
                del own[name]


def _put(where: Any, names: tuple[str, ...], before: Any, put: list[Any]) -> None:
    own = getattr(where, "__dict__", None)
    if own is None:
        return
    kind = cast("Any", type(where))
    for name in names:
        method = getattr(kind, name, None)
        if method is not None and name not in own:
            hook = MethodType(_made(name, before, inspect.iscoroutinefunction(method)), where)
            own[name] = hook
            put.append((where, name, hook))

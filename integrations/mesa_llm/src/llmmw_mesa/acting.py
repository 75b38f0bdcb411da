"""Which agent's step the running code belongs to: for statistics, and for answers that only it may share."""

from __future__ import annotations

import contextlib
import itertools
import secrets
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from llmmw.context import current_context

if TYPE_CHECKING:
    from collections.abc import Generator

    from llmmw import Context


class Part:
    """An agent's step, as what runs for it sees it."""

    __slots__ = ("agent", "model", "over")

    def __init__(self, agent: Any) -> None:
        self.agent = agent
        self.model = getattr(agent, "model", None)  # an agent that is removed in its step has none any more
        self.over = False
        """It was given up; a thread that goes on with it must not ask anything any more."""


class StepAbandoned(RuntimeError):
    """A call from a step that was given up after its time-out."""


_acting: ContextVar[Part | None] = ContextVar("llmmw_mesa_part", default=None)
_process = secrets.token_hex(8)
_numbers = itertools.count(1)
_tokens: WeakKeyDictionary[Any, str] = WeakKeyDictionary()


def begin(agent: Any) -> None:
    """From here on, in this task or thread, calls are this agent's."""
    part = _acting.get()
    if part is None or part.agent is not agent:
        _acting.set(Part(agent))


def end() -> None:
    """They are nobody's."""
    _acting.set(None)


@contextlib.contextmanager
def acting(agent: Any) -> Generator[Part]:
    """Calls inside are this agent's."""
    part = Part(agent)
    token = _acting.set(part)
    try:
        yield part
    finally:
        _acting.reset(token)


def current_part() -> Part | None:
    """The step that the running code belongs to."""
    return _acting.get()


def _agent() -> Any:
    part = _acting.get()
    if part is None:
        return None
    if part.over:
        raise StepAbandoned("this step was given up after its time-out; what it would do now comes too late")
    return part.agent


def fresh_token() -> str:
    """A name that nothing else has, in no other process either."""
    return f"{_process}-{next(_numbers)}"


def scope(run_seed: object, otherwise: str) -> str:
    """Who shares answers where only an agent's own repeats may: the agent itself, not its id.

    Another simulation's agent of the same id is somebody else, unless `run_seed` says that it is the same run again.

    Args:
        run_seed: names a run; None: there is no other like it.
        otherwise: where no agent is known to act.
    """
    agent = _agent()
    if agent is None:
        return otherwise
    if run_seed is not None:
        return f"{run_seed}:{agent.unique_id}"
    token = _tokens.get(agent)
    if token is None:
        token = _tokens[agent] = fresh_token()
    return token


def context_of_call(llm: object) -> Context:
    """What `using()` says, completed by the agent that acts: its id, the model's step, and what the call is for."""
    context, agent = current_context(), _agent()
    if agent is None:
        return context
    purpose = "memory" if getattr(getattr(agent, "memory", None), "llm", None) is llm else "reasoning"
    step = getattr(getattr(agent, "model", None), "steps", None)
    changes: dict[str, Any] = {}
    if context.agent is None:
        changes["agent"] = str(getattr(agent, "unique_id", agent))
    if context.step is None and isinstance(step, int) and step >= 0:
        changes["step"] = step
    if purpose not in context.tags:
        changes["tags"] = (*context.tags, purpose)
    return type(context)(**{name: getattr(context, name) for name in context.__struct_fields__} | changes)

"""Which agent's step the running code belongs to: for statistics, and for answers that only it may share."""

from __future__ import annotations

import contextlib
import itertools
import secrets
import threading
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from llmmw.context import current_context

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from llmmw import Context
    from llmmw_mesa.dice import Streams


class Part:
    """An agent's step, as what runs for it sees it.

    Args:
        agent: whose step it is.
        outer: the step inside which this one runs: it ends with it, and waits for its turn to act.
    """

    __slots__ = ("_over", "agent", "begun", "committed", "model", "outer", "streams", "tally", "turn")

    def __init__(self, agent: Any, outer: Part | None = None) -> None:
        self.agent = agent
        self.model = getattr(agent, "model", None)  # an agent that is removed in its step has none any more
        self.outer = outer
        self.begun = False
        """By the step's own hook, not by a scheduler."""
        self.committed = False
        """It has done something to the world."""
        self.turn: Callable[[], object] | None = None
        """Waits until it may."""
        self.streams: Streams | None = None if outer is None else outer.streams
        self.tally: Tally | None = None if outer is None else outer.tally
        self._over = False

    @property
    def over(self) -> bool:
        """It was given up; a thread that goes on with it must not do anything any more."""
        return self._over or (self.outer is not None and self.outer.over)

    def give_up(self) -> None:
        """What it does from now on is refused."""
        self._over = True

    def check(self) -> None:
        """May it go on?

        Raises:
            StepAbandoned: no.
        """
        if self.over:
            raise StepAbandoned("this step was given up after its time-out; what it would do now comes too late")

    def commit(self) -> None:
        """Before anything is done to the world: wait for the turn.

        Raises:
            StepAbandoned: the step was given up.
        """
        self.check()
        if self.outer is not None:
            self.outer.commit()
        if self.turn is not None:
            self.turn()
            self.check()
        self.committed = True


class Tally:
    """Calls under way at once."""

    __slots__ = ("_lock", "_now", "calls", "most")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._now = self.calls = self.most = 0

    def __enter__(self) -> None:
        with self._lock:
            self.calls += 1
            self._now += 1
            self.most = max(self.most, self._now)

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._now -= 1


class StepAbandoned(RuntimeError):
    """A call from a step that was given up after its time-out."""


_acting: ContextVar[Part | None] = ContextVar("llmmw_mesa_part", default=None)
_uncounted = contextlib.nullcontext()
_process = secrets.token_hex(8)
_numbers = itertools.count(1)
_tokens: WeakKeyDictionary[Any, str] = WeakKeyDictionary()


def begin(agent: Any) -> None:
    """From here on, in this task or thread, calls are this agent's."""
    part = _acting.get()
    if part is None or part.agent is not agent:
        # A step that failed has not ended what it began: such are not piled up.
        made = Part(agent, part.outer if part is not None and part.begun else part)
        made.begun = True
        _acting.set(made)


def end() -> None:
    """They are nobody's again, or the scheduler's who runs the step."""
    part = _acting.get()
    if part is not None and part.begun:
        _acting.set(part.outer)


def enter(part: Part) -> None:
    """Calls of this context are this part's; the context ends with it."""
    _acting.set(part)


@contextlib.contextmanager
def acting(agent: Any) -> Generator[Part]:
    """Calls inside are this agent's."""
    part = Part(agent, _acting.get())
    token = _acting.set(part)
    try:
        yield part
    finally:
        _acting.reset(token)


def counted() -> Any:
    """A context manager to put around a call, for the run's tally."""
    part = _acting.get()
    return _uncounted if part is None or part.tally is None else part.tally


def current_part() -> Part | None:
    """The step that the running code belongs to."""
    return _acting.get()


def _agent() -> Any:
    part = _acting.get()
    if part is None:
        return None
    part.check()
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

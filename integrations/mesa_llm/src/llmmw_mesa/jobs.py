"""One agent's step in an activation: how it is started, what is known of it while it runs, how it is told to end."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
from typing import TYPE_CHECKING, Any

from llmmw_mesa import acting
from llmmw_mesa.activation import is_registered
from llmmw_mesa.report import Result

if TYPE_CHECKING:
    from collections.abc import Callable

    from llmmw_mesa.workers import Worker


class StepTimeoutError(TimeoutError):
    """An agent's step took too long."""


class Job:
    """One agent's step.

    Args:
        number: its place in the order of activation.
        agent: whose step it is.
        step: what to call; None: nothing.
        on_loop: whether it runs on the loop; else on a thread.
    """

    __slots__ = (
        "agent",
        "away",
        "began",
        "cancel",
        "expired",
        "guarded",
        "number",
        "on_loop",
        "over",
        "part",
        "placed",
        "registered",
        "removed",
        "result",
        "step",
        "waiting",
        "worker",
    )

    def __init__(self, number: int, agent: Any, step: Callable[[], Any] | None, *, on_loop: bool) -> None:
        self.number = number
        self.agent = agent
        self.step = step
        self.on_loop = on_loop
        self.registered = is_registered(agent)
        self.result = Result(agent, attempts=0)
        self.part = acting.Part(agent, acting.current_part())
        self.began = 0.0
        self.away: float | None = None
        """Since when it waits for its turn, which is not its own time."""
        self.waiting = 0
        self.placed = True
        self.guarded = False
        self.removed = False
        self.cancel: Callable[[], object] | None = None
        self.expired: float | None = None
        """When its time was over."""
        self.over = False
        """It has ended, or nobody waits for it any more."""
        self.worker: Worker | None = None

    def start(self) -> Any:
        """What the step returns: None, or what is to be awaited.

        Raises:
            TypeError: a generator, of which nothing has run.
        """
        self.result.attempts += 1
        answer = None if self.step is None else self.step()
        if answer is None or inspect.isawaitable(answer):
            return answer
        if inspect.isgenerator(answer) or inspect.isasyncgen(answer):
            raise TypeError("the step is a generator function: nothing of it has run. Cure: no `yield` in it")
        return None

    def has_left(self) -> bool:
        """Whether it was removed, by somebody else's step, since it was to step."""
        return self.registered and not is_registered(self.agent)

    def is_told_to_end(self) -> bool:
        """Whether it could be told; plain code cannot."""
        cancel = self.cancel
        if cancel is None:
            return False
        with contextlib.suppress(RuntimeError):  # its loop has just closed
            cancel()
        return True

    async def awaited(self, answer: Any) -> None:
        """An async step on a thread's own loop."""
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        self.cancel = lambda: loop.call_soon_threadsafe(task.cancel) if task is not None else None
        try:
            await answer
        finally:
            self.cancel = None

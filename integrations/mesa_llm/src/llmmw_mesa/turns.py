"""When agents may change the world, whether one has, and what a step that was cut short leaves behind."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from llmmw_mesa.acting import StepAbandoned

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import Self

_COMMITS = ("apply_plan", "send_message")
_ASYNC_COMMITS = ("aapply_plan", "asend_message")


class Turns:
    """Agents think side by side and act one after another.

    The first may act when everybody has thought (stands here, or has ended); each further one when the one before has
    ended its step. Every agent runs on a thread of its own, so waiting here holds up nobody else.

    Args:
        count: of agents; their numbers are their order.
        thought: called for each agent that has thought.
    """

    def __init__(self, count: int, thought: Callable[[], object]) -> None:
        self._thought = thought
        self._thinking = count
        self._here: set[int] = set()
        self._ended: set[int] = set()
        self._next = 0
        self._news = threading.Condition()

    def wait(self, number: int) -> None:
        """Wait for the turn.

        Raises:
            StepAbandoned: the step was given up meanwhile.
        """
        with self._news:
            self._arrive(number)
            self._news.wait_for(lambda: number in self._ended or (not self._thinking and self._first() == number))
            if number in self._ended:
                raise StepAbandoned("this step was given up; what it would do now comes too late")

    def done(self, number: int) -> None:
        """This one's step has ended, however. Idempotent."""
        with self._news:
            self._arrive(number)
            self._ended.add(number)
            self._news.notify_all()

    def _arrive(self, number: int) -> None:
        if number not in self._here:
            self._here.add(number)
            self._thinking -= 1
            self._thought()
            self._news.notify_all()

    def _first(self) -> int:
        """Whose turn it is."""
        while self._next in self._ended:
            self._next += 1
        return self._next


class watch_commits:  # noqa: N801 — used as a function: `with watch_commits(...)`
    """During a step: notes whether the agent does anything to the world, and makes it wait for its turn first."""

    def __init__(self, agent: Any, turns: Turns | None, number: int) -> None:
        self._agent = agent
        self._turns = turns
        self._number = number
        self._put: list[str] = []
        self.committed = False

    def __enter__(self) -> Self:
        for name in _COMMITS + _ASYNC_COMMITS:
            found = getattr(self._agent, name, None)
            if found is not None and name not in vars(self._agent):
                make = self._awaited if name in _ASYNC_COMMITS else self._plain
                vars(self._agent)[name] = make(found)
                self._put.append(name)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for name in self._put:
            vars(self._agent).pop(name, None)

    def _commit(self) -> None:
        if self._turns is not None:
            self._turns.wait(self._number)
        self.committed = True

    def _plain(self, act: Any) -> Any:
        def waits(*args: Any, **kwargs: Any) -> Any:
            self._commit()
            return act(*args, **kwargs)

        return waits

    def _awaited(self, act: Any) -> Any:
        async def waits(*args: Any, **kwargs: Any) -> Any:
            self._commit()
            return await act(*args, **kwargs)

        return waits


def undo_half_steps(agent: Any) -> None:
    """After a step that was cut short: no memory entry without a step stays behind, its content waits for the next.

    Mesa-LLM puts what was heard before a step into such an entry and completes it at the end of the step.
    """
    memory = getattr(agent, "memory", None)
    if memory is None:
        return
    entries = getattr(memory, "short_term_memory", None) or ()
    halves = [entry for entry in entries if getattr(entry, "step", 0) is None]  # several, where steps call each other
    for entry in halves:
        entries.remove(entry)
    staged: list[dict[str, Any]] = [entry.content for entry in halves]
    current_entry = getattr(memory, "_current_step_entry", None)
    if current_entry is not None:
        staged.append(current_entry.content)
        memory._current_step_entry = None  # noqa: SLF001 — Mesa-LLM has no public name for it
    current = getattr(memory, "step_content", None)
    if not staged or not isinstance(current, dict):
        return
    # What others said is kept for the next step; what the agent saw and planned in this one is not.
    heard = [found["message"] for found in (*staged, current) if found.get("message")]
    current.clear()
    if heard:
        current["message"] = [part for found in heard for part in (found if isinstance(found, list) else [found])]

"""Which work the running code is part of: who closes an engine or asks it again must not wait for itself."""

from __future__ import annotations

from contextvars import Context, ContextVar, Token
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

T = TypeVar("T")


class Run:
    """One execution of a user's function for an endpoint, or of a call below a layer: within it, what runs is its."""

    __slots__ = ("_at_end", "_token", "over", "owner")

    def __init__(self, owner: object) -> None:
        self.owner = owner
        self.over = False
        self._at_end: tuple[Callable[[], object], ...] = ()
        self._token: Token[tuple[Run, ...]] | None = None

    def __enter__(self) -> None:
        self.begin()

    def __exit__(self, *_: object) -> None:
        self.pause()
        self.end()

    def begin(self) -> None:
        """From here on what runs is part of it; also after a pause."""
        self._token = _runs.set((*_runs.get(), self))

    def pause(self) -> None:
        """What runs now is somebody else's."""
        if self._token is not None:
            _runs.reset(self._token)
            self._token = None  # it holds the context, and the context this

    def end(self) -> None:
        """It is over. Idempotent."""
        self.over = True
        acts, self._at_end = self._at_end, ()
        for act in acts:
            act()

    def at_end(self, act: Callable[[], object]) -> None:
        """Do this when it is over."""
        self._at_end = (*self._at_end, act)


_runs: ContextVar[tuple[Run, ...]] = ContextVar("llmmw_runs", default=())


async def as_part_of(owner: object, work: Awaitable[T]) -> T:
    """Await the work; what runs for it, and whatever that starts, is part of it as long as it lasts."""
    with Run(owner):
        return await work


def run_inside(owner: object) -> Run | None:
    """The innermost work of this one's that the running code is part of."""
    for run in reversed(_runs.get()):
        if run.owner is owner and not run.over:
            return run
    return None


def runs_inside(owners: Iterable[object]) -> bool:
    """Whether the running code is part of what one of these runs."""
    return any(run.owner is owner for run in _runs.get() if not run.over for owner in owners)


def bare_context() -> Context:
    """A context without any variables but what the running code is part of."""
    context = Context()
    context.run(_runs.set, _runs.get())
    return context

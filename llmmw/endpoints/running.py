"""Which work the running code is part of: who closes an engine or asks it again must not wait for itself."""

from __future__ import annotations

from contextvars import Context, ContextVar, Token
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Awaitable, Iterable

T = TypeVar("T")


class Run:
    """One execution of a user's function for an endpoint, or of a call below a layer: within it, what runs is its."""

    __slots__ = ("_token", "over", "owner")

    def __init__(self, owner: object) -> None:
        self.owner = owner
        self.over = False
        self._token: Token[tuple[Run, ...]] | None = None

    def __enter__(self) -> None:
        self._token = _runs.set((*_runs.get(), self))

    def __exit__(self, *_: object) -> None:
        self.over = True
        if self._token is not None:
            _runs.reset(self._token)
            self._token = None  # it holds the context, and the context this


_runs: ContextVar[tuple[Run, ...]] = ContextVar("llmmw_runs", default=())


async def as_part_of(owner: object, work: Awaitable[T]) -> T:
    """Await the work; what runs for it, and whatever that starts, is part of it as long as it lasts."""
    with Run(owner):
        return await work


def runs_inside(owners: Iterable[object]) -> bool:
    """Whether the running code is part of what one of these runs."""
    return any(run.owner is owner for run in _runs.get() if not run.over for owner in owners)


def bare_context() -> Context:
    """A context without any variables but what the running code is part of."""
    context = Context()
    context.run(_runs.set, _runs.get())
    return context

"""Which functions the running code is part of: one that closes its own engine must not wait for itself."""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Awaitable, Iterable

T = TypeVar("T")


class Run:
    """One execution of a user's function for an endpoint."""

    __slots__ = ("endpoint", "over")

    def __init__(self, endpoint: object) -> None:
        self.endpoint = endpoint
        self.over = False


_runs: ContextVar[tuple[Run, ...]] = ContextVar("llmmw_runs", default=())


async def as_part_of(endpoint: object, work: Awaitable[T]) -> T:
    """Await the work; what runs for it, and whatever that starts, is part of it as long as it lasts."""
    run = Run(endpoint)
    token = _runs.set((*_runs.get(), run))
    try:
        return await work
    finally:
        run.over = True
        _runs.reset(token)


def runs_inside(endpoints: Iterable[object]) -> bool:
    """Whether the running code is part of a function that one of these endpoints runs."""
    return any(run.endpoint is endpoint for run in _runs.get() if not run.over for endpoint in endpoints)

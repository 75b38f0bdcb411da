"""Which calls the running code is part of: a user's function that closes its own engine must not wait for itself."""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Generator

    from llmmw.engine.inflight import InFlight

_inside: ContextVar[tuple[tuple[InFlight, int], ...]] = ContextVar("llmmw_inside", default=())


@contextmanager
def inside(calls: InFlight, number: int) -> Generator[None]:
    """What runs in this block, and whatever it starts, is part of that call as long as the call lasts."""
    token = _inside.set((*_inside.get(), (calls, number)))
    try:
        yield
    finally:
        _inside.reset(token)


def is_inside(calls: InFlight) -> bool:
    """Whether the running code is part of one of these calls."""
    return any(found is calls and number in calls for found, number in _inside.get())

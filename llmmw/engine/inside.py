"""Which calls the running code is part of: a user's function that closes its own engine must not wait for itself."""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmmw.call import Call, Handler, Reply
    from llmmw.engine.inflight import InFlight

_inside: ContextVar[tuple[tuple[InFlight, int], ...]] = ContextVar("llmmw_inside", default=())


async def inside(calls: InFlight, number: int, handler: Handler, call: Call) -> Reply:
    """Have a call answered; what runs for it, and whatever that starts, is part of it as long as it lasts."""
    token = _inside.set((*_inside.get(), (calls, number)))
    try:
        return await handler(call)
    finally:
        _inside.reset(token)


def is_inside(calls: InFlight) -> bool:
    """Whether the running code is part of one of these calls."""
    return any(found is calls and number in calls for found, number in _inside.get())

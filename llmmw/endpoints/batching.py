"""Many calls at one endpoint, without a stack: what `generate_batch` of an endpoint does."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, TypeVar

from llmmw.call import Outcome, Party
from llmmw.errors import AmbiguousOutcome
from llmmw.fault import error_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from llmmw.call import Call, Place
    from llmmw.endpoints.base import BatchEndpoint
    from llmmw.env import Env
    from llmmw.layers.batch import BoundBatcher

T = TypeVar("T")


async def generate_batch(endpoint: BatchEndpoint, calls: Sequence[Call], env: Env) -> list[Outcome]:
    """Every call's outcome, in order: jointly where the endpoint takes that and it is worth it, else side by side.

    The rules are those of `Batcher`. Nothing is cached, retried or limited: that is a stack's.

    Args:
        endpoint: asked for all of them.
        calls: any; those of one group (operation, model, sampling fields, ...) may travel together.
        env: clock and sinks.
    """
    from llmmw.layers.batch import PartyBatcher  # noqa: PLC0415 — layers load when they are first needed

    party = Party(len(calls))
    batcher = PartyBatcher().bind(endpoint, env.endowed(lambda: endpoint.capabilities))

    def ask(call: Call) -> Awaitable[Outcome]:
        return _answered(batcher, call, party.join())

    tasks = [asyncio.ensure_future(outcome_of(ask, call)) for call in calls]
    party.close()
    try:
        return [await task for task in tasks]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await batcher.aclose()


async def _answered(batcher: BoundBatcher, call: Call, place: Place) -> Outcome:
    try:
        reply = await batcher(call.replace(place=place))
    finally:
        place.settle()
    return Outcome(reply=reply) if reply.ok else Outcome(error=error_of(reply))


async def outcome_of(work: Callable[[T], Awaitable[Outcome]], item: T) -> Outcome:
    """The outcome of one item among many: whatever becomes of it stays with it. The caller's cancellation is raised."""
    try:
        return await work(item)
    except Exception as error:  # noqa: BLE001 — every item's failure is its outcome
        return Outcome(error=error)
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        return Outcome(error=AmbiguousOutcome("the call was cancelled, and not by its caller"))

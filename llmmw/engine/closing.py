"""Closing several things, each of which may fail; and failing at the end without hiding what failed before."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Protocol

from llmmw.errors import Closed

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterable


DRAIN_S = 30.0
"""How long a close waits for calls in flight before it cancels them."""
GRACE_S = 5.0
"""How long it waits after a body that was interrupted (Ctrl-C, a cancellation): somebody wants to go."""


def patience_after(error: BaseException | None) -> float:
    """How long the close at the end of a body waits, given what the body raised."""
    return GRACE_S if isinstance(error, asyncio.CancelledError | KeyboardInterrupt) else DRAIN_S


class Closable(Protocol):
    """A bound layer or an endpoint."""

    async def aclose(self) -> None:
        """Release everything."""
        ...


async def close_all(parts: Iterable[Closable]) -> Exception | None:
    """Close each of them, in order, also after one has failed; returns the first error."""
    first: Exception | None = None
    for part in parts:
        try:
            await part.aclose()
        except Exception as error:  # noqa: BLE001 — a user's layer or endpoint may raise anything
            first = first or error
    return first


def end_by_hand(watch: AsyncGenerator[None] | None) -> None:
    """Close a generator that has nothing to await any more, without its loop, which may never run again."""
    if watch is not None:
        with contextlib.suppress(StopIteration, RuntimeError):  # RuntimeError: its loop is closing it right now
            watch.aclose().send(None)


async def give_up(task: asyncio.Task[None] | None) -> None:
    """Cancel a task of the running loop, which ends, and wait for it."""
    if task is not None and not task.done() and task.get_loop() is asyncio.get_running_loop():
        task.cancel()
        await asyncio.wait([task])


def note_or_raise(error: BaseException | None, problem: Exception) -> None:
    """What goes wrong at the end never hides the error of the body, where there is one."""
    if error is None:
        raise problem
    error.add_note(f"(closing failed too: {type(problem).__name__}: {problem})")


def closed_error() -> Closed:
    """What a call to a closed engine gets."""
    return Closed("this engine is closed; make a new one (or keep it open with `async with` / `with`)")

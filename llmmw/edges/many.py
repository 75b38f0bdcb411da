"""Many items at once: each gets its Outcome, in order, and no more of them are in memory than are being worked on."""

from __future__ import annotations

import asyncio
from collections.abc import Sized
from typing import TYPE_CHECKING, TypeVar

from llmmw.call import Outcome
from llmmw.endpoints.batching import outcome_of
from llmmw.env import ambient_clock
from llmmw.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Sequence

    from llmmw.call import Call

    Progress = Callable[[int, int], object]

T = TypeVar("T")

MAX_TASKS = 1024
"""Items in the stack at once; the limiter's `concurrency` is what reaches the server."""

_AT_ONCE = 500
_PENDING = Outcome()


async def build_all(items: Iterable[T], build: Callable[[T], Call], *, keep: bool) -> list[Call]:
    """The calls of all items (none of them, without `keep`): what is malformed is found before anything is sent.

    Raises:
        ConfigError: an item cannot become a call.
    """
    found: list[Call] = []
    for index, item in enumerate(items):
        try:
            call = build(item)
        except ConfigError as error:
            raise ConfigError(f"item {index}: {error.message}") from None
        if keep:
            found.append(call)
        if index % _AT_ONCE == _AT_ONCE - 1:
            await ambient_clock().sleep(0)  # others on the loop get their turn
    return found


def what_failed(items: Sequence[T], previous: Sequence[Outcome]) -> list[T]:
    """The items that an earlier run has no answer for.

    Raises:
        ConfigError: it was another number of items, or these are no outcomes.
    """
    if not all(isinstance(old, Outcome) for old in previous):  # pyright: ignore[reportUnnecessaryIsInstance] — a caller's mistake
        raise ConfigError("map(previous=): expected the outcomes of an earlier map()")
    if len(previous) != len(items):
        raise ConfigError(f"map(previous=): {len(previous)} outcomes for {len(items)} requests")
    return [item for item, old in zip(items, previous, strict=True) if not old.ok]


async def outcomes_of(
    items: Iterable[T],
    work: Callable[[T], Awaitable[Outcome]],
    on_progress: Progress | None = None,
    when_taken: Callable[[], object] = lambda: None,
) -> list[Outcome]:
    """The outcome of every item, in order.

    Args:
        items: taken one by one, as places become free. What the iterable raises ends everything and is raised.
        work: gets the outcome of one item; an exception from it is the item's outcome.
        on_progress: called with (done, total) after each item; of an iterable without a length the total is how many
            were taken so far. What it raises ends everything likewise.
        when_taken: called when the last item has been taken.
    """
    outcomes: list[Outcome] = []
    rest = iter(items)
    done = 0

    def told() -> None:
        if on_progress is not None:
            on_progress(done, len(items) if isinstance(items, Sized) else len(outcomes))

    def place() -> int:
        outcomes.append(_PENDING)
        return len(outcomes) - 1

    async def worker(index: int, item: T) -> None:
        nonlocal done
        while True:
            outcomes[index] = await outcome_of(work, item)
            done += 1
            told()
            try:
                item = next(rest)
            except StopIteration:
                when_taken()
                return
            index = place()

    try:
        async with asyncio.TaskGroup() as group:
            for _, item in zip(range(MAX_TASKS), rest, strict=False):
                group.create_task(worker(place(), item))
            if len(outcomes) < MAX_TASKS:
                when_taken()
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return outcomes

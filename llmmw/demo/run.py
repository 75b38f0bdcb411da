"""Run the three ways one after another with live progress."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from llmmw.demo.ways import Result, Setting, bare, through_llmmw
from llmmw.errors import MissingExtra

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from llmmw.demo.ways import Progress, World

    Way = Callable[[World, Setting, Progress], Coroutine[Any, Any, Result]]


async def _one_by_one(world: World, setting: Setting, progress: Progress) -> Result:
    return await bare(world, setting, progress, concurrently=False)


async def _all_at_once(world: World, setting: Setting, progress: Progress) -> Result:
    return await bare(world, setting, progress, concurrently=True)


WAYS: tuple[tuple[str, Way], ...] = (
    ("bare SDK, one by one", _one_by_one),
    ("bare SDK, all at once", _all_at_once),
    ("llmmw", through_llmmw),
)


def progress_bars(console: Any) -> Any:
    """A rich Progress with a bar, counts, and a field `failed` per task.

    Raises:
        MissingExtra: rich is not installed.
    """
    try:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn  # noqa: PLC0415 — an extra
        from rich.progress import Progress as Bars  # noqa: PLC0415 — an extra
    except ImportError as error:
        raise MissingExtra("progress is shown with rich: pip install 'llmmw[cli]'") from error
    return Bars(
        TextColumn("{task.description:<24}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[failed]} failed"),
        TimeElapsedColumn(),
        console=console,
    )


def run(world: World, setting: Setting, console: Any) -> list[Result]:
    """Every way, with a progress bar each; returns their figures in order.

    Args:
        world: where the questions go.
        setting: workload and model.
        console: a rich Console.
    """
    results: list[Result] = []
    with progress_bars(console) as bars:
        for name, way in WAYS:
            task = bars.add_task(name, total=setting.workload.total, failed=0)

            def progress(answered: int, failed: int, task: Any = task) -> None:
                bars.update(task, completed=answered + failed, failed=failed)

            results.append(asyncio.run(way(world, setting, progress)))
    return results

"""Stepping many agents at once: each exactly once, nobody's failure lost, nobody held up by another's.

"overlap": the steps run side by side, as far as they wait for anything. "snapshot": the agents think side by side, and
what they do to the world (`apply_plan`) happens one after another in activation order, each step's whole rest.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import math
import random
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Literal

from llmmw import ConfigError
from llmmw_mesa.acting import acting
from llmmw_mesa.report import Result, StepError, StepReport
from llmmw_mesa.turns import Turns, undo_half_steps, watch_commits

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

Mode = Literal["overlap", "snapshot"]
OnError = Literal["raise", "skip", "continue", "retry"]
_RETRIES = 2
"""So often a step that has done nothing yet is tried again with `on_error="retry"`."""


async def astep_agents(
    agents: Iterable[Any],
    mode: Mode = "overlap",
    order: Literal["shuffle", "given"] = "shuffle",
    on_error: OnError = "raise",
    timeout: float | None = None,  # noqa: ASYNC109 — of each agent, and `step_agents` has it too
    max_concurrency: int | None = None,
) -> StepReport:
    """Step each agent once, many at a time.

    An agent with an `astep` of its own runs on this loop, one with only a `step` on a thread, so that both overlap.
    One that is removed before its turn is not stepped; one that is added meanwhile waits for the next time.

    Args:
        agents: an AgentSet or any iterable; members of a MetaAgent that is stepped too are not stepped twice.
        mode: "overlap" or "snapshot".
        order: of activation: shuffled by the model's own random numbers, or as given.
        on_error: "raise" a StepError when all others have finished; "skip" (or "continue"): warn and report; "retry":
            step those again, up to twice, that have failed before they did anything to the world.
        timeout: seconds per agent; None: as long as it takes.
        max_concurrency: steps under way at once; None: all.

    Returns:
        The report, one result per agent.

    Raises:
        StepError: with `on_error="raise"`.
        ConfigError: a value that cannot work.
    """
    _check(mode, order, on_error, timeout, max_concurrency)
    run = _Run(_activation(agents, order), mode, on_error, timeout, max_concurrency)
    report = await run.everybody()
    failures = [result for result in report if result.error is not None]
    if failures and on_error == "raise":
        names = ", ".join(str(getattr(result.agent, "unique_id", result.agent)) for result in failures[:10])
        error = StepError(
            f"{len(failures)} of {len(report)} agents failed ({names})", [_as_exception(r) for r in failures]
        )
        error.report = report
        raise error
    for result in failures:
        who = getattr(result.agent, "unique_id", result.agent)
        warnings.warn(f"agent {who} did not step: {result.error!r}", RuntimeWarning, stacklevel=2)
    return report


def step_agents(
    agents: Iterable[Any],
    mode: Mode = "overlap",
    order: Literal["shuffle", "given"] = "shuffle",
    on_error: OnError = "raise",
    timeout: float | None = None,
    max_concurrency: int | None = None,
) -> StepReport:
    """`astep_agents` for plain code, also inside a running loop (which stands still meanwhile: rather await there).

    All steps of a thread run on one loop that stays, so what agents keep between steps keeps working.
    """
    return _runner().run(astep_agents(agents, mode, order, on_error, timeout, max_concurrency))


def _check(mode: str, order: str, on_error: str, timeout: float | None, most: int | None) -> None:
    if mode not in {"overlap", "snapshot"}:
        raise ConfigError(f'mode={mode!r}: must be "overlap" or "snapshot"')
    if order not in {"shuffle", "given"}:
        raise ConfigError(f'order={order!r}: must be "shuffle" or "given"')
    if on_error not in {"raise", "skip", "continue", "retry"}:
        raise ConfigError(f'on_error={on_error!r}: must be "raise", "skip", "continue" or "retry"')
    if timeout is not None and not 0 < timeout < math.inf:
        raise ConfigError(f"timeout={timeout!r}: must be a positive number of seconds, or None")
    if most is not None and (isinstance(most, bool) or not isinstance(most, int) or most < 1):
        raise ConfigError(f"max_concurrency={most!r}: must be a whole number of at least 1, or None")


def _activation(agents: Iterable[Any], order: str) -> list[Any]:
    found = list(agents)
    members = {id(part) for agent in found for part in getattr(agent, "_constituting_set", ())}
    found = [agent for agent in found if id(agent) not in members]
    if order == "shuffle" and found:
        dice = getattr(agents, "random", None) or getattr(getattr(found[0], "model", None), "random", None)
        (dice or random.Random()).shuffle(found)  # noqa: S311 — no secret depends on it
    return found


def _as_exception(result: Result) -> Exception:
    error = result.error
    who = getattr(result.agent, "unique_id", result.agent)
    if not isinstance(error, Exception):
        error = RuntimeError(f"the step ended with {error!r}")
    note = f"in the step of agent {who}"
    if note not in getattr(error, "__notes__", ()):
        error.add_note(note)
    return error


class _Run:
    """One activation of some agents."""

    def __init__(
        self, agents: Sequence[Any], mode: Mode, on_error: str, timeout: float | None, most: int | None
    ) -> None:
        self._agents = agents
        self._tries = 1 + (_RETRIES if on_error == "retry" else 0)
        self._timeout = timeout
        self._places = asyncio.Semaphore(most or max(1, len(agents)))
        # Places are for thinking: who has thought waits for its turn without one.
        loop, release = asyncio.get_running_loop(), self._places.release
        snapshot = mode == "snapshot"
        self._turns = Turns(len(agents), lambda: loop.call_soon_threadsafe(release)) if snapshot else None
        self._under_way = 0
        self._report = StepReport([Result(agent) for agent in agents])

    async def everybody(self) -> StepReport:
        """The report, when all have ended."""
        async with asyncio.TaskGroup() as group:
            for number, result in enumerate(self._report.results):
                group.create_task(self._one(number, result))
        return self._report

    async def _one(self, number: int, result: Result) -> None:
        await self._places.acquire()
        try:
            await self._tries_of(number, result)
        finally:
            if self._turns is None:
                self._places.release()
            else:
                self._turns.done(number)

    async def _tries_of(self, number: int, result: Result) -> None:
        for attempt in range(1, self._tries + 1):
            result.attempts = attempt
            if getattr(result.agent, "model", self) is None:
                return  # removed by somebody else's step
            self._under_way += 1
            self._report.most_at_once = max(self._report.most_at_once, self._under_way)
            watch = watch_commits(result.agent, self._turns, number)
            try:
                with watch:
                    await self._step(result.agent)
            except asyncio.CancelledError:
                undo_half_steps(result.agent)
                raise
            except BaseException as error:  # noqa: BLE001 — every failure is in the report
                undo_half_steps(result.agent)
                result.error = error
                result.timed_out = isinstance(error, _TooLate)
                if watch.committed or result.timed_out:
                    return
            else:
                result.error = None
                return
            finally:
                self._under_way -= 1

    async def _step(self, agent: Any) -> None:
        if not has_async_step(agent):
            work = self._on_thread(agent, getattr(agent, "step", None))
        elif self._turns is None:
            work = self._on_loop(agent)
        else:  # it may wait for its turn in plain code, which would hold up this loop
            work = self._on_thread(agent, lambda: asyncio.run(agent.astep()))
        if self._timeout is None:
            await work
            return
        try:
            async with asyncio.timeout(self._timeout) as limit:
                await work
        except TimeoutError:
            if limit.expired():
                raise _TooLate(f"the step took longer than {self._timeout:g} s") from None
            raise

    async def _on_loop(self, agent: Any) -> None:
        with acting(agent):
            await agent.astep()

    async def _on_thread(self, agent: Any, step: Callable[[], object] | None) -> None:
        if step is None:
            return
        with acting(agent) as part:
            ended = run_beside(step)
        try:
            await ended
        except asyncio.CancelledError:
            part.over = True  # the thread cannot be stopped; what it asks from now on is refused
            raise


class _TooLate(TimeoutError):
    """An agent's step took too long."""


def run_beside(work: Callable[[], Any]) -> asyncio.Future[Any]:
    """Run on a thread of its own, in a copy of this context; one that hangs keeps neither a pool nor the process."""
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[Any] = loop.create_future()
    context = contextvars.copy_context()

    def settle(value: Any, error: BaseException | None) -> None:
        if not ended.done():
            ended.set_result(value) if error is None else ended.set_exception(error)

    def main() -> None:
        try:
            told = (context.run(work), None)
        except BaseException as error:  # noqa: BLE001 — the step's own, handed over
            told = (None, RuntimeError("the step raised StopIteration") if isinstance(error, StopIteration) else error)
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(settle, *told)

    threading.Thread(target=main, name="mesa-step", daemon=True).start()
    return ended


def has_async_step(agent: Any) -> bool:
    """Whether its class has an `astep` of its own; LLMAgent's merely calls `step` and would block everybody."""
    from mesa_llm.llm_agent import LLMAgent  # noqa: PLC0415 — Mesa-LLM imports this late, too

    own = getattr(type(agent), "astep", None)
    if own is None:
        return False
    inherited = getattr(LLMAgent, "astep", None)
    return own is not inherited or getattr(type(agent), "step", None) is getattr(LLMAgent, "step", None)


# ── plain code ──────────────────────────────────────────────────────────────────────────────────────────────────────


class _Runners(threading.local):
    """Each thread's loop."""

    def __init__(self) -> None:
        self.here: asyncio.Runner | None = None
        self.beside: _Beside | None = None


class _Beside:
    """A loop on another thread, for callers whose own thread runs one already."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="mesa-steps")
        self._runner = asyncio.Runner()

    def run(self, work: Any) -> Any:
        return self._thread.submit(contextvars.copy_context().run, self._runner.run, work).result()


_runners = _Runners()


def _runner() -> Any:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        if _runners.here is None:
            _runners.here = asyncio.Runner()
        return _runners.here
    if _runners.beside is None:
        _runners.beside = _Beside()
    return _runners.beside

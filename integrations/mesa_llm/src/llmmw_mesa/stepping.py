"""Stepping many agents at once: each exactly once, nobody's failure lost, nobody held up by another's.

"overlap": the steps run side by side, as far as they wait for anything. "snapshot": the agents think side by side, and
what they do to the world (`apply_plan`, messages, `remove`) happens one after another in activation order, each step's
whole rest. In both, what an agent draws from `model.random` and `model.rng` does not depend on who answers first.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from llmmw_mesa.activation import activation
from llmmw_mesa.loops import run_here
from llmmw_mesa.report import StepError, StepReport
from llmmw_mesa.running import Run
from llmmw_mesa.settings import Mode, OnError, Order, Settings, check_settings

if TYPE_CHECKING:
    from collections.abc import Iterable


async def astep_agents(
    agents: Iterable[Any],
    mode: Mode = "overlap",
    order: Order = "shuffle",
    on_error: OnError = "raise",
    timeout: float | None = None,  # noqa: ASYNC109 — of each agent, and `step_agents` has it too
    max_concurrency: int | None = None,
) -> StepReport:
    """Step each agent once, many at a time.

    An agent with an `astep` of its own runs on this loop, one with only a `step` on a thread, so that both overlap. On
    threads, too, run async steps that would hold up the loop: those of "snapshot", those among agents with an
    EpisodicMemory (it asks for grades in plain code), and with Mesa-LLM 0.2 those of agents whose memory asks.
    One that is removed before its turn is not stepped; one that is added meanwhile waits for the next time. After a
    failure, a time-out or a cancellation no half entry stays in an agent's memory; what others said to it does.

    Args:
        agents: an AgentSet or any iterable; members of a MetaAgent that steps them are not stepped twice.
        mode: "overlap" or "snapshot".
        order: of activation: shuffled by the model's own random numbers, or as given.
        on_error: "raise" a StepError when all others have finished; "skip" (or "continue"): warn and report; "retry":
            step those again, up to twice, that have failed before they did anything to the world.
        timeout: seconds per agent, without those in which it waits for its turn; None: as long as it takes.
        max_concurrency: steps under way at once; None: all. In "snapshot" those that wait for their turn do not count.

    Returns:
        The report, one result per agent.

    Raises:
        StepError: with `on_error="raise"`.
        ConfigError: a value that cannot work.
    """
    settings = check_settings(mode, order, on_error, timeout, max_concurrency)
    return _told(await _stepped(agents, order, settings), settings)


def step_agents(
    agents: Iterable[Any],
    mode: Mode = "overlap",
    order: Order = "shuffle",
    on_error: OnError = "raise",
    timeout: float | None = None,
    max_concurrency: int | None = None,
) -> StepReport:
    """`astep_agents` for plain code, also inside a running loop (which stands still meanwhile: rather await there).

    All steps of a thread run on one loop that stays, so what agents keep between steps keeps working.
    """
    settings = check_settings(mode, order, on_error, timeout, max_concurrency)
    return _told(run_here(_stepped(agents, order, settings)), settings)


async def _stepped(agents: Iterable[Any], order: str, settings: Settings) -> StepReport:
    return await Run(activation(agents, order), settings).everybody()


def _told(report: StepReport, settings: Settings) -> StepReport:
    """Failures are raised or warned of, never kept quiet."""
    if report.ok:
        return report
    if settings.on_error == "raise":
        raise StepError.of(report)
    warnings.warn(str(report), RuntimeWarning, stacklevel=3)
    return report

"""Why replicas did not answer one call: what their balancer goes by, and what the caller is told in the end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmmw.call import Reply
from llmmw.fault import FaultKind
from llmmw.layers.attempt import after, annotate
from llmmw.layers.routes import Failure, history

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llmmw.call import Attempt


class Miss(Failure, frozen=True):
    """Why one replica did not answer."""

    again_at: float
    """When the replica will be there for the call, where that is known; on the env clock's monotonic scale."""


def attempts_of(failures: Sequence[Failure]) -> tuple[Attempt, ...]:
    """Every attempt, those of a Retry inside included."""
    return tuple(attempt for failure in failures for attempt in history(failure))


def verdict_on(failures: Sequence[Miss]) -> Reply | Exception:
    """The last failure that was one; where every replica refused without being asked, the earliest to return."""
    attempts = attempts_of(failures)
    real = [miss for miss in failures if miss.fault.kind is not FaultKind.REFUSED]
    outcome: Reply | Exception = (real[-1] if real else min(failures, key=lambda miss: miss.again_at)).outcome
    if isinstance(outcome, Reply):
        return after(outcome, attempts)
    annotate(outcome, attempts)
    return outcome


def sent(failures: Sequence[Failure]) -> int:
    """How many replicas got the call."""
    return sum(failure.fault.kind is not FaultKind.REFUSED for failure in failures)


def tried(failures: Sequence[Failure]) -> int:
    """How many of them failed; one that says when it has room for the call did not."""
    return sum(failure.fault.kind not in {FaultKind.REFUSED, FaultKind.RATE} for failure in failures)

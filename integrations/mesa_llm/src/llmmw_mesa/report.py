"""What became of each agent of a step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


@dataclass
class Result:
    """How one agent's step ended."""

    agent: Any
    error: BaseException | None = None
    attempts: int = 1
    timed_out: bool = False

    @property
    def success(self) -> bool:
        """Whether it was done."""
        return self.error is None

    def __iter__(self) -> Iterator[Any]:
        """As (agent, success, exception)."""
        return iter((self.agent, self.success, self.error))


@dataclass
class StepReport:
    """What became of each agent, in the order of activation."""

    results: list[Result] = field(default_factory=list)
    most_at_once: int = 0
    """Steps that were under way at the same time, at most."""

    @property
    def succeeded(self) -> list[Result]:
        """Those who stepped."""
        return [result for result in self.results if result.success]

    @property
    def failed(self) -> list[Result]:
        """Those whose step raised."""
        return [result for result in self.results if not result.success and not result.timed_out]

    @property
    def timed_out(self) -> list[Result]:
        """Those who took too long."""
        return [result for result in self.results if result.timed_out]

    @property
    def ok(self) -> bool:
        """Whether everybody stepped."""
        return all(result.success for result in self.results)

    def __iter__(self) -> Iterator[Result]:
        return iter(self.results)

    def __len__(self) -> int:
        return len(self.results)


class StepError(ExceptionGroup[Exception]):
    """Agents failed; the others have stepped. `report` says who and why."""

    report: StepReport

    def derive(self, excs: Sequence[Exception]) -> StepError:
        """As ExceptionGroup wants it."""
        made = StepError(self.message, list(excs))
        made.report = self.report
        return made

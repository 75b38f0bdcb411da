"""What became of each agent of a step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_NAMED = 10
"""So many failed agents are named in a report's line; the rest counts."""


@dataclass(slots=True)
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

    @property
    def name(self) -> str:
        """The agent's id; whatever stepped, if it has none."""
        return str(getattr(self.agent, "unique_id", self.agent))

    def __iter__(self) -> Iterator[Any]:
        """As (agent, success, exception)."""
        return iter((self.agent, self.success, self.error))

    def as_exception(self) -> Exception:
        """The error, with a note that says whose it is; what is no Exception is wrapped in one."""
        error = self.error
        if not isinstance(error, Exception):
            made = RuntimeError(f"the step ended with {error!r}")
            made.__cause__ = error
            error = made
        note = f"in the step of agent {self.name}"
        if note not in getattr(error, "__notes__", ()):
            error.add_note(note)
        return error


@dataclass(repr=False)
class StepReport:
    """What became of each agent, in the order of activation."""

    results: list[Result] = field(default_factory=list[Result])
    most_at_once: int = 0
    """Steps that were under way at the same time, at most."""
    calls: int = 0
    """Questions that the agents asked through llmmw."""
    most_calls_at_once: int = 0
    """Of these, under way at the same time, at most."""
    removed: list[Any] = field(default_factory=list[Any])
    """Agents that others removed before their turn came; they have not stepped and are not among the results."""

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
    def failed_ids(self) -> list[Any]:
        """The `unique_id` of all that failed or took too long: for a DataCollector."""
        return [getattr(result.agent, "unique_id", None) for result in self.results if not result.success]

    @property
    def ok(self) -> bool:
        """Whether everybody stepped."""
        return all(result.success for result in self.results)

    def __iter__(self) -> Iterator[Result]:
        return iter(self.results)

    def __len__(self) -> int:
        return len(self.results)

    def __repr__(self) -> str:
        # asyncio asks for it at the end of every step, however many agents there are, and whatever their own does.
        return f"<StepReport of {len(self)} agents>"

    def __str__(self) -> str:
        failures = [result for result in self.results if not result.success]
        if not failures:
            return f"{len(self)} agents stepped"
        names = ", ".join(result.name for result in failures[:_NAMED]) + (", ..." if len(failures) > _NAMED else "")
        return f"{len(failures)} of {len(self)} agents did not step: {names} ({failures[0].error!r})"


class StepError(ExceptionGroup[Exception]):
    """Agents failed; the others have stepped. `report` says who and why."""

    report: StepReport

    @classmethod
    def of(cls, report: StepReport) -> StepError:
        """Made from a report with failures."""
        made = cls(str(report), [result.as_exception() for result in report if not result.success])
        made.report = report
        return made

    def derive(self, excs: Sequence[Exception], /) -> StepError:  # type: ignore[override]  # — narrower on purpose
        """As ExceptionGroup wants it."""
        made = StepError(self.message, list(excs))
        made.report = self.report
        return made

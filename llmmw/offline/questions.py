"""What a run of offline batches is asked, and what became of it: one question may be several items'."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from llmmw.call import Outcome
from llmmw.errors import ConfigError, LLMMWError
from llmmw.keys import Uncacheable, is_deterministic, key_of

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Sequence

    from llmmw.call import Call
    from llmmw.offline.dialect import Dialect

    Progress = Callable[[int, int], object]


class Question(msgspec.Struct, eq=False):
    """What is asked once, for every item that asks it."""

    call: Call
    custom_id: str
    line: bytes
    items: list[int]


class Questions:
    """The items of one run.

    Args:
        total: how many items there are.
        dialect: writes the requests, and has limits.
        max_requests: of a batch, if lower than the API's own.
        max_bytes: likewise.
        on_progress: called with (done, total) when that changed.
    """

    def __init__(
        self,
        total: int,
        dialect: Dialect,
        *,
        max_requests: int | None,
        max_bytes: int | None,
        on_progress: Progress | None,
    ) -> None:
        self.open: dict[str, Question] = {}
        """What has no outcome yet, by custom id, in order."""
        self._outcomes: dict[int, Outcome] = {}
        self._total = total
        self._dialect = dialect
        self._max_requests = min(max_requests or dialect.max_requests, dialect.max_requests)
        self._max_bytes = min(max_bytes or dialect.max_bytes, dialect.max_bytes) - dialect.overhead
        self._on_progress = on_progress
        self._told = -1
        self._seen: dict[str, int] = {}

    def add(self, index: int, call: Call) -> None:
        """Take in an item; equal ones whose answers may differ get a question each. What cannot be asked has failed."""
        try:
            self._ask(index, self._dialect.translated(call))
        except Uncacheable as error:
            self._outcomes[index] = Outcome(error=ConfigError(f"an offline batch needs keys, but: {error.reason}"))
        except LLMMWError as error:
            self._outcomes[index] = Outcome(error=error)
        except (TypeError, ValueError, RecursionError) as error:
            self._outcomes[index] = Outcome(error=ConfigError(f"the request cannot be written as JSON: {error}"))

    def _ask(self, index: int, call: Call) -> None:
        if call.native is not None:
            raise ConfigError("extra_headers cannot travel in an offline batch; give them to the client")
        # Whose credential it is does not matter for the name: a key may be exchanged while its batch runs.
        named = call.replace(namespace="")
        custom_id = base = key_of(named, remote_content=True).hex()
        number = self._seen[base] = self._seen.get(base, -1) + 1
        sample = call.context.sample
        if not is_deterministic(call) and (number or sample is not None):
            lane = f"offline {0 if sample is None else sample}.{number}"
            custom_id = key_of(named, lane=lane, remote_content=True).hex()
        question = self.open.get(custom_id)
        if question is not None:
            question.items.append(index)
            return
        line = self._dialect.line(call, custom_id)
        if len(line) + 1 > self._max_bytes:
            raise ConfigError(f"a request of {len(line)} bytes is larger than a whole batch may be")
        self.open[custom_id] = Question(call, custom_id, line, [index])

    def settle(self, custom_id: str, outcome: Outcome) -> None:
        """The outcome of a question that has none yet; of any other it is nobody's."""
        question = self.open.pop(custom_id, None)
        if question is not None:
            for index in question.items:
                self._outcomes[index] = outcome

    def fail(self, custom_ids: Iterable[str], make_error: Callable[[], Exception]) -> None:
        """Each of them has failed with an error of its own."""
        for custom_id in list(custom_ids):
            self.settle(custom_id, Outcome(error=make_error()))

    def tell(self, running: int = 0) -> None:
        """Tell of progress; `running` have an outcome that was not read yet."""
        done = min(self._total, len(self._outcomes) + running)
        if self._on_progress is not None and done > self._told:
            self._told = done
            self._on_progress(done, self._total)

    def outcomes(self) -> list[Outcome]:
        """Every item's, in order."""
        return [self._outcomes[index] for index in range(self._total)]

    def parts(self, without: set[str]) -> list[list[Question]]:
        """What is open, but for some, in portions that fit into a batch each."""
        groups: dict[Hashable, list[Question]] = {}
        for question in self.open.values():
            if question.custom_id not in without:
                groups.setdefault(self._dialect.batch_of(question.call), []).append(question)
        return [part for group in groups.values() for part in self._portions(group)]

    def _portions(self, questions: Sequence[Question]) -> list[list[Question]]:
        parts: list[list[Question]] = []
        size = 0
        for question in questions:
            size += len(question.line) + 1
            if not parts or len(parts[-1]) >= self._max_requests or size > self._max_bytes:
                parts.append([])
                size = len(question.line) + 1
            parts[-1].append(question)
        return parts

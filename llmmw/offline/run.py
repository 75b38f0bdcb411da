"""One run of offline batches: what is known already, what is under way, what must be submitted, and waiting for it.

Nothing is paid twice: a manifest is on disk before a submission begins, a submission of unknown outcome is looked
for before it is repeated, and one directory has one run at a time.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from llmmw.algo.batchmates import urgency_of
from llmmw.call import Outcome
from llmmw.errors import ConfigError, DeadlineExceeded, ProtocolError, StatusError
from llmmw.offline.anthropic import Anthropic
from llmmw.offline.api import Api, TooLate
from llmmw.offline.dialect import never_run
from llmmw.offline.openai import OpenAI
from llmmw.offline.questions import Questions
from llmmw.offline.shelf import Shelf
from llmmw.offline.submit import Submissions
from llmmw.stream.copies import own_error

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from llmmw.call import Call, Reply
    from llmmw.engine import Engine
    from llmmw.offline import OfflineBatch
    from llmmw.offline.api import Server
    from llmmw.offline.dialect import Dialect, Standing
    from llmmw.offline.questions import Progress
    from llmmw.offline.shelf import Manifest

_DIALECTS: dict[str, Callable[[], Dialect]] = {"openai": OpenAI, "anthropic": Anthropic}
_ROUNDS = 4
"""So often what a batch left open (refused whole for somebody else's line, taken for another's) is submitted anew."""
_GONE = frozenset({404, 410})
_FIRST_LOOK_S, _SLOWER = 1.0, 1.5
_READINGS = 3


async def run(
    engine: Engine, endpoint: Server, settings: OfflineBatch, calls: Sequence[Call], on_progress: Progress | None
) -> list[Outcome]:
    """The outcome of every call, in order.

    Args:
        engine: the client's; its cache is asked first, and its endpoint carries the requests.
        endpoint: the client's.
        settings: directory and API.
        calls: what is asked.
        on_progress: called with (done, total) when that changed.

    Raises:
        ConfigError: the directory cannot be used.
        LLMMWError: the API cannot be asked how a batch stands.
    """
    shelf = await asyncio.to_thread(Shelf, settings.directory)
    try:
        shelf.lock()
        deadline = urgency_of(calls).deadline if calls else None
        return await Run(engine, endpoint, settings, shelf, deadline).outcomes(calls, on_progress)
    finally:
        shelf.unlock()


async def cancel(engine: Engine, endpoint: Server, settings: OfflineBatch) -> int:
    """Cancel what is under way in a directory, if it is certainly ours; how many batches."""
    shelf = await asyncio.to_thread(Shelf, settings.directory)
    dialect = _DIALECTS[settings.api]()
    api = Api(engine, endpoint, tries=settings.tries)
    told = 0
    for manifest in await asyncio.to_thread(shelf.load):
        if manifest.done or not manifest.sent or (manifest.api, manifest.target) != (dialect.name, api.name):
            continue
        batch = manifest.batch
        if not batch and dialect.proves:
            batch = await dialect.find(api, manifest, frozenset()) or ""
        if batch and not manifest.assumed and await _is_under_way(dialect, api, batch):
            await dialect.cancel(api, batch)
            told += 1
    return told


async def _is_under_way(dialect: Dialect, api: Api, batch: str) -> bool:
    try:
        return (await dialect.look(api, batch)).ended is None
    except StatusError as error:
        if error.status not in _GONE:
            raise
        return False


class Run:
    """The state of one run.

    Args:
        engine: the client's.
        endpoint: the client's.
        settings: directory and API.
        shelf: the manifests, locked.
        deadline: until when the run waits.
    """

    def __init__(
        self, engine: Engine, endpoint: Server, settings: OfflineBatch, shelf: Shelf, deadline: float | None
    ) -> None:
        self._engine = engine
        self._settings = settings
        self._shelf = shelf
        self._dialect = _DIALECTS[settings.api]()
        self._api = Api(engine, endpoint, tries=settings.tries, deadline=deadline)
        self._submissions = Submissions(shelf, self._dialect, self._api, settle_s=float(settings.settle))

    async def outcomes(self, calls: Sequence[Call], on_progress: Progress | None) -> list[Outcome]:
        """Every call's outcome, in order."""
        settings = self._settings
        self._questions = questions = Questions(
            len(calls),
            self._dialect,
            max_requests=settings.max_requests,
            max_bytes=settings.max_bytes,
            on_progress=on_progress,
        )
        async for index, call in self._api.in_turns(enumerate(calls)):
            questions.add(index, call)
        submissions = self._submissions
        await submissions.load()
        await self._recall()
        try:
            await self._collect()
            for _ in range(_ROUNDS):
                if not questions.open:
                    break
                under_way = await submissions.under_way(questions)
                await self._wait(under_way + await submissions.submit_rest(questions))
        except TooLate:
            self._too_late()
        questions.fail(questions.open, lambda: ProtocolError("no batch gave it an outcome", endpoint=self._api.name))
        questions.tell()
        return questions.outcomes()

    def _too_late(self) -> None:
        """What is open has missed the deadline."""
        late = "the deadline passed before the batch had ended; the same call again waits on for it"
        self._questions.fail(
            self._questions.open.keys() & self._submissions.submitted, lambda: DeadlineExceeded(late, sent=True)
        )
        self._questions.fail(
            self._questions.open, lambda: DeadlineExceeded("the deadline passed before a batch was made", sent=False)
        )

    async def _recall(self) -> None:
        """What the cache has."""
        asked = list(self._questions.open.values())
        for question, reply in zip(asked, await self._engine.recall([each.call for each in asked]), strict=True):
            if reply is not None:
                self._questions.settle(question.custom_id, Outcome(reply=reply))

    async def _collect(self) -> None:
        """What batches of earlier runs answered. What failed in them is asked again."""
        for manifest in self._submissions.done:
            if self._questions.open.keys().isdisjoint(manifest.ids):
                continue
            try:
                standing = await self._dialect.look(self._api, manifest.batch)
                results = await self._results(standing)
            except StatusError as error:
                if error.status not in _GONE:
                    raise
                await self._submissions.drop(manifest)  # servers keep results for about a month
            else:
                await self._hand_out(manifest, results, failures=False)

    # ── waiting ─────────────────────────────────────────────────────────────────────────────────────────────────

    async def _wait(self, manifests: Sequence[Manifest]) -> None:
        """Look at every batch now and then, until all have ended and were read."""
        waiting = list(manifests)
        pause_s, longest_s = min(_FIRST_LOOK_S, float(self._settings.poll)), float(self._settings.poll)
        while True:
            running = 0
            for manifest in list(waiting):
                standing = await self._look(manifest)
                if standing.ended is not None:
                    waiting.remove(manifest)
                    await self._read(manifest, standing)
                else:
                    running += standing.finished
            self._questions.tell(running)
            if not waiting:
                return
            await self._api.pause(pause_s)
            pause_s = min(longest_s, pause_s * _SLOWER)

    async def _results(self, standing: Standing) -> list[tuple[str, Reply | Exception]]:
        """What an ended batch says. A file that holds less than it should may have been cut on its way."""
        results = await self._dialect.results(self._api, standing)
        for _ in range(_READINGS - 1):
            if len(results) >= standing.finished:
                break
            await self._api.pause(_FIRST_LOOK_S)
            results = await self._dialect.results(self._api, standing)
        return results

    async def _look(self, manifest: Manifest) -> Standing:
        """How its batch stands."""
        try:
            return await self._dialect.look(self._api, manifest.batch)
        except StatusError as error:
            if error.status not in _GONE:
                raise
            where = self._shelf.path(manifest)
            raise ConfigError(
                f"{self._api.name} does not know batch {manifest.batch} ({error.message}): is this the account that "
                f"submitted it? To give it up and submit its requests anew, remove {where}"
            ) from error

    async def _read(self, manifest: Manifest, standing: Standing) -> None:
        """Hand out what an ended batch has for this run."""
        wanted = [custom_id for custom_id in manifest.ids if custom_id in self._questions.open]
        if standing.ended == "failed":
            await self._refused(manifest, standing, wanted)
            return
        results = await self._results(standing)
        named = {custom_id for custom_id, _ in results}
        if manifest.assumed and named and named.isdisjoint(manifest.ids):
            manifest.foreign.append(manifest.batch)
            manifest.batch = ""
            await self._submissions.save(manifest)
            return
        await self._hand_out(manifest, results)
        why = standing.ended or "completed"
        self._questions.fail(
            [custom_id for custom_id in wanted if custom_id in self._questions.open],
            lambda: never_run(why, self._api.name, batch=standing.batch),
        )
        manifest.done = True
        await self._submissions.save(manifest)

    async def _hand_out(
        self, manifest: Manifest, results: Sequence[tuple[str, Reply | Exception]], *, failures: bool = True
    ) -> None:
        """Results by id: of one that comes twice neither counts, and one that nobody asked for is nobody's."""
        members = set(manifest.ids)
        found: dict[str, list[Reply | Exception]] = {}
        async for custom_id, outcome in self._api.in_turns(results):
            if custom_id in members and custom_id in self._questions.open:
                found.setdefault(custom_id, []).append(outcome)
        fresh: list[tuple[Call, Reply]] = []
        async for custom_id, outcomes in self._api.in_turns(found.items()):
            outcome = outcomes[0]
            if len(outcomes) > 1:
                outcome = ProtocolError(f"{len(outcomes)} results for one request", endpoint=self._api.name)
            if isinstance(outcome, Exception):
                if failures:
                    self._questions.settle(custom_id, Outcome(error=outcome))
                continue
            fresh.append((self._questions.open[custom_id].call, outcome))
            self._questions.settle(custom_id, Outcome(reply=outcome))
        await self._engine.keep(fresh)

    async def _refused(self, manifest: Manifest, standing: Standing, wanted: Sequence[str]) -> None:
        """A batch of which nothing was run: who is to blame has an outcome, the others are submitted without them."""
        await self._submissions.drop(manifest)
        blamed = {index: error for index, error in standing.spoilt if index is not None and index < len(manifest.ids)}
        for index, error in blamed.items():
            self._questions.settle(manifest.ids[index], Outcome(error=error))
        if not blamed:
            told = next((error for _, error in standing.spoilt), None)
            whole: Exception = told or ProtocolError(f"batch {standing.batch} failed", endpoint=self._api.name)
            self._questions.fail(wanted, lambda: own_error(whole))

"""Submitting batches, and finding again those whose submission nobody saw succeed. Never twice the same."""

from __future__ import annotations

import asyncio
import itertools
from functools import partial
from typing import TYPE_CHECKING

from llmmw.errors import Closed, ConfigError, LLMMWError
from llmmw.events import BatchFlushed
from llmmw.offline.shelf import new_manifest
from llmmw.stream.copies import own_error

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llmmw.offline.api import Api
    from llmmw.offline.dialect import Dialect
    from llmmw.offline.questions import Question, Questions
    from llmmw.offline.shelf import Manifest, Shelf

_SUBMISSIONS = 3


class Submissions:
    """The manifests of one API and server in a directory, and the batches they stand for.

    Args:
        shelf: the manifests, locked.
        dialect: the API.
        api: asks the server.
        settle_s: how long after a submission its batch may still turn up.
    """

    def __init__(self, shelf: Shelf, dialect: Dialect, api: Api, *, settle_s: float) -> None:
        self._shelf = shelf
        self._dialect = dialect
        self._api = api
        self._settle_s = settle_s
        self._manifests: list[Manifest] = []

    async def load(self) -> None:
        """Read the directory."""
        ours = (self._dialect.name, self._api.name)
        found = await asyncio.to_thread(self._shelf.load)
        self._manifests = [manifest for manifest in found if (manifest.api, manifest.target) == ours]

    @property
    def done(self) -> list[Manifest]:
        """Batches whose results were handed out by an earlier run."""
        return [manifest for manifest in self._manifests if manifest.done]

    @property
    def submitted(self) -> set[str]:
        """The custom ids of what is in a batch that may exist and was not read."""
        made = [manifest for manifest in self._manifests if manifest.sent and not manifest.done]
        return {custom_id for manifest in made for custom_id in manifest.ids}

    async def save(self, manifest: Manifest) -> None:
        """Write it to disk."""
        await asyncio.to_thread(self._shelf.save, manifest)

    async def drop(self, manifest: Manifest) -> None:
        """There is no such batch."""
        self._manifests.remove(manifest)
        await asyncio.to_thread(self._shelf.drop, manifest)

    async def under_way(self, questions: Questions) -> list[Manifest]:
        """Batches that were submitted, by this run or another, and have something that is still wanted."""
        found: list[Manifest] = []
        for manifest in list(self._manifests):
            if manifest.done or questions.open.keys().isdisjoint(manifest.ids):
                continue
            if not manifest.batch and manifest.sent and await self._search(manifest):
                await self.save(manifest)
            if manifest.batch:
                found.append(manifest)
            else:
                await self.drop(manifest)  # it was never submitted
        return found

    async def _search(self, manifest: Manifest) -> bool:
        """Find the batch of a submission whose outcome is unknown, if there is one; it may take a while to appear."""
        others = {other.batch for other in self._manifests if other is not manifest and other.batch}
        taken = frozenset(others | set(manifest.foreign))
        found = await self._dialect.find(self._api, manifest, taken)
        left_s = self._settle_s - (self._api.env.clock.wall() - manifest.sent)
        if found is None and left_s > 0:
            await self._api.pause(min(left_s, self._settle_s))  # the clock may have been set back since
            found = await self._dialect.find(self._api, manifest, taken)
        manifest.batch, manifest.assumed = found or "", not self._dialect.proves
        return found is not None

    async def submit_rest(self, questions: Questions) -> list[Manifest]:
        """Put what is in no batch yet into new ones. A refusal is the outcome of those it concerns."""
        running = [manifest for manifest in self._manifests if manifest.batch and not manifest.done]
        inside = {custom_id for manifest in running for custom_id in manifest.ids}
        found: list[Manifest] = []
        for part in questions.parts(without=inside):
            try:
                found.append(await self._submit(part))
            except LLMMWError as error:
                if isinstance(error, ConfigError):
                    raise
                questions.fail([question.custom_id for question in part], partial(own_error, error))
        return found

    async def _submit(self, questions: Sequence[Question]) -> Manifest:
        await self._api.pause(0.0)  # not after the deadline
        ids = [question.custom_id for question in questions]
        wall = self._api.env.clock.wall()
        manifest = new_manifest(self._dialect.name, self._api.name, questions[0].call.op, ids, wall)
        await self.save(manifest)
        self._manifests.append(manifest)
        lines = [question.line for question in questions]
        for number in itertools.count(1):
            try:
                manifest.batch = await self._dialect.submit(self._api, manifest, lines, self.save)
                manifest.assumed = False
            except LLMMWError as error:
                if isinstance(error, Closed):
                    raise  # perhaps in the middle of it: the next run looks
                if not self._api.is_unsure(error):
                    if number == 1:
                        await self.drop(manifest)
                    raise
                known = bool(manifest.sent) and await self._search(manifest)
                if not known and number >= _SUBMISSIONS:
                    raise
            if manifest.batch:
                break
        await self.save(manifest)
        self._api.env.emit(BatchFlushed(len(ids), "offline"))
        return manifest

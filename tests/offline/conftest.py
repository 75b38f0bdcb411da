"""The embedded server's batch routes without sockets, so that tests of offline batches run on manual time."""

from __future__ import annotations

from collections import Counter
from email.utils import formatdate
from urllib.parse import urlsplit

import pytest

from llmmw.call import Reply
from llmmw.env import Env
from llmmw.offline import OfflineBatch
from llmmw.offline.run import run
from llmmw.stack import Stack
from llmmw.testing.fake import chat_call
from llmmw.testing.server.core import Core, ServerConfig
from llmmw.testing.server.errors import ApiError
from llmmw.testing.server.exchange import Exchange
from llmmw.testing.server.offline import offline_route
from llmmw.testing.server.side import refusal
from llmmw.testing.server.stats import Record
from llmmw.wire import HTTPRequest

MODEL = "llmmw-embedded"


class World:
    """A server with batches, and what is asked of it: an endpoint for an engine, and the client's endpoint too.

    `before[name]` and `after[name]` are errors or replies in place of an answer (lists, in order; None lets one pass),
    before the server did anything, or after.
    """

    name = "http://fake.test/v1"

    def __init__(self, **config):
        self.core = Core(ServerConfig(**config))
        self.asked = Counter()
        self.before = {}
        self.after = {}
        self.bodies = []
        self.ahead_s = 0.0
        self.clock = None

    def request(self, method, path, body=b"", headers=None, **_):
        return HTTPRequest(
            method,
            f"http://fake.test{'' if path.startswith('/v1/') else '/v1'}{path}",
            tuple((headers or {}).items()),
            body,
        )

    async def __call__(self, call):
        request = call.native
        parts = urlsplit(request.url)
        target = f"{parts.path}?{parts.query}" if parts.query else parts.path
        name, handler = offline_route(request.method, target, dict(request.headers).get("content-type", ""))
        self.asked[name] += 1
        self.bodies.append((name, request.body))
        instead = self._next(self.before, name)
        if instead is not None:
            return instead
        known = len(self.batches)
        try:
            answer = await handler(Exchange(self.core, Record(0, 0.0, name), request.body, ""))
        except ApiError as error:
            answer = refusal(self.core.config, error, name)
        for batch in self.batches[known:]:
            batch.created_at = self.clock.wall() + self.ahead_s
        instead = self._next(self.after, name)
        date = formatdate(self.clock.wall() + self.ahead_s, usegmt=True)
        headers = (("content-type", answer.content_type), ("date", date))
        return instead or Reply(data=answer.body, status=answer.status, headers=headers)

    @staticmethod
    def _next(faults, name):
        found = faults[name].pop(0) if faults.get(name) else None
        if isinstance(found, BaseException):
            raise found
        return found(name) if callable(found) else found

    @property
    def batches(self):
        return list(self.core.offline.batches.values())


class Desk:
    """Runs of offline batches in one directory."""

    def __init__(self, directory, clock, world, *, stack=None, **options):
        self.world = world
        world.clock = clock
        self.clock = clock
        self.stack = stack or Stack()
        self.options = OfflineBatch(directory, **options)
        self.told = []

    async def run(self, *prompts, **fields):
        calls = [chat_call(prompt, **{"model": MODEL, "max_tokens": 4, **fields}) for prompt in prompts]
        return await self.run_calls(calls)

    async def run_calls(self, calls):
        async with self.engine() as engine:
            return await run(engine, self.world, self.options, calls, lambda *told: self.told.append(told))

    def engine(self):
        return self.stack.bind(self.world, env=Env(clock=self.clock, seed=1))


@pytest.fixture
def desk(tmp_path):
    """``desk(clock, world, ...)`` over one directory."""
    return lambda clock, world, **options: Desk(tmp_path / "batches", clock, world, **options)


@pytest.fixture
def world():
    return World

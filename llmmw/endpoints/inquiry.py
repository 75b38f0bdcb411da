"""What a vLLM server says about itself, asked for once and never in the way of a call."""

from __future__ import annotations

import asyncio
import dataclasses
import os
from contextvars import Context
from math import inf
from typing import TYPE_CHECKING, TypeVar

import msgspec

from llmmw.answer import items, mapping
from llmmw.call import Reply
from llmmw.env import SYSTEM_CLOCK, Env
from llmmw.errors import UpstreamError, UpstreamTimeout, bare
from llmmw.fault import error_of
from llmmw.wire import HTTPRequest, url_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from llmmw.env import Clock
    from llmmw.pool import BoundPool, ConnectionPool
    from llmmw.wire import Headers
    from llmmw.wire.secrets import Secrets

    Get = Callable[[str], Awaitable[tuple[int, bytes]]]
    """Status and body of a path below the server's root; raises UpstreamError."""

T = TypeVar("T")

BATCH_PATH = "/v1/chat/completions/batch"
_THERE = {405: True, 404: False}
_OK, _REDIRECT, _TOO_MANY, _SERVER_ERROR = 200, 300, 429, 500
_MAX_MODELS, _MAX_NAME = 1000, 200
_CONNECTIONS = 2
_LIMIT_S = 10.0
_MAX_BYTES = 8 * 1024 * 1024
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 5.0, 300.0


class Model(msgspec.Struct, frozen=True):
    """A model that a server offers."""

    id: str
    max_model_len: int | None = None
    """Tokens of prompt and output together."""
    parent: str | None = None
    """Of a LoRA adapter: the model it belongs to."""


class About(msgspec.Struct, frozen=True):
    """What a server says about itself."""

    models: tuple[Model, ...] = ()
    version: str | None = None
    """Of vLLM, such as "0.24.0"; None where it does not say."""
    has_batch_chat: bool | None = None
    """Whether it takes several conversations in one request; None where it does not say."""

    def model(self, name: str) -> Model | None:
        """The model of that name, if it is offered."""
        return next((model for model in self.models if model.id == name), None)


async def ask_about(get: Get) -> About:
    """Three small questions, one after the other.

    The batch endpoint answers a GET with 405 where it is there and with 404 where it is not. (The list of all routes,
    /openapi.json, would tell more; making it holds up the server's event loop for seconds.)

    Raises:
        UpstreamError: it cannot be reached, or is too busy to tell.
    """
    listed = mapping(_decoded(*await get("/v1/models")))
    models = [_model(mapping(entry)) for entry in items(listed.get("data"))[:_MAX_MODELS]]
    told = mapping(_decoded(*await get("/version"))).get("version")
    version = told[:_MAX_NAME] if isinstance(told, str) and told else None
    status, body = await get(BATCH_PATH)
    _decoded(status, body)
    return About(tuple(model for model in models if model is not None), version, _THERE.get(status))


def _decoded(status: int, body: bytes) -> object:
    """The JSON of an answer; None for a refusal or what is none.

    Raises:
        StatusError: a refusal that passes.
    """
    if status == _TOO_MANY or status >= _SERVER_ERROR:
        raise error_of(Reply(data=body, status=status))
    if not _OK <= status < _REDIRECT:
        return None
    try:
        return msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return None


def _model(entry: dict[str, object]) -> Model | None:
    name, limit, parent = entry.get("id"), entry.get("max_model_len"), entry.get("parent")
    if not isinstance(name, str) or not 0 < len(name) <= _MAX_NAME:
        return None
    known = limit if isinstance(limit, int) and not isinstance(limit, bool) and limit > 0 else None
    return Model(name, known, parent[:_MAX_NAME] if isinstance(parent, str) and parent else None)


class Inquiry:
    """Asks a server about itself, over connections of its own: calls neither wait for them nor hold them up.

    Args:
        base_url: of the calls; the server's own pages lie beside its "/v1".
        headers: sent with every question.
        settings: of the calls' connections; these are like them, but few.
        allow_hosts: hosts exempt from the ban on link-local and metadata addresses.
        secrets_of: what a question holds that must not be shown.
        told: gets what the server has said.
    """

    def __init__(
        self,
        base_url: str,
        headers: Headers,
        settings: ConnectionPool,
        *,
        allow_hosts: Iterable[str],
        secrets_of: Callable[[HTTPRequest], Secrets],
        told: Callable[[About], None],
    ) -> None:
        place, mark, query = base_url.partition("?")
        self._root = f"{place.rstrip('/').removesuffix('/v1')}{mark}{query}"
        self._headers = headers
        self._settings = dataclasses.replace(settings, max_connections=_CONNECTIONS, prewarm=0, drain_timeout=0.0)
        self._allow_hosts = allow_hosts
        self._secrets_of = secrets_of
        self._told = told
        self._clock = SYSTEM_CLOCK
        self._pool: BoundPool | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pid = 0
        self._task: asyncio.Task[About] | None = None
        self._pause_s = _FIRST_PAUSE_S
        self.due_at = -inf
        """When a call that comes by begins it, on the env clock's monotonic scale; infinity once the server told."""

    def start(self, clock: Clock) -> None:
        """The engine's clock."""
        self._clock = clock

    def begin(self) -> None:
        """A call is made, on the loop that this belongs to: ask in the background."""
        self._settle(asyncio.get_running_loop())
        self._begin()

    def doubt(self) -> None:
        """The server was away: another one may have come in its place."""
        if self._task is not None and self._task.done():
            self.due_at = min(self.due_at, self._clock.monotonic() + self._pause_s)

    async def about(self) -> About:
        """Ask now; whoever asks at the same time shares the answer.

        Raises:
            UpstreamError: no answer, or the server is too busy to tell.
        """
        return await self._at_home(lambda: asyncio.shield(self._begin()))

    async def get(self, path: str, limit_s: float | None = None) -> tuple[int, bytes]:
        """Status and body of a path below the server's root.

        Raises:
            UpstreamError: no answer in time.
        """
        return await self._at_home(lambda: self._get(path, _LIMIT_S if limit_s is None else limit_s))

    def _settle(self, here: asyncio.AbstractEventLoop) -> None:
        task, pid = self._task, os.getpid()
        if task is not None and not task.done() and (task.get_loop() is not here or pid != self._pid):
            self._task = None  # its loop ended before it did
        self._loop, self._pid = here, pid

    def _begin(self) -> asyncio.Task[About]:
        task = self._task
        if task is None or task.done():
            self.due_at = self._clock.monotonic() + self._pause_s
            work = ask_about(lambda path: self._get(path, _LIMIT_S))
            # In no caller's context: what that holds (a whole request of a web server) would be kept as long.
            task = self._task = asyncio.get_running_loop().create_task(work, context=Context())
            task.add_done_callback(self._ended, context=Context())
        return task

    def _ended(self, task: asyncio.Task[About]) -> None:
        if task is not self._task or task.cancelled():
            return
        if task.exception() is None:
            self.due_at, self._pause_s = inf, _FIRST_PAUSE_S
            self._told(task.result())
        else:
            self.due_at = self._clock.monotonic() + self._pause_s
            self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)

    async def _get(self, path: str, limit_s: float) -> tuple[int, bytes]:
        try:
            async with asyncio.timeout(limit_s):
                return await self._answer(path)
        except TimeoutError:
            pass  # and told below, where it is no context of the error: its frames hold the same
        except UpstreamError as error:
            # Raised anew from here, for the frames below hold the request with its key.
            raise bare(error)  # noqa: B904 — it is the same error
        raise UpstreamTimeout(f"the server did not answer GET {path} within {limit_s:g} s")

    async def _answer(self, path: str) -> tuple[int, bytes]:
        if self._pool is None:
            self._pool = self._settings.open(Env(clock=self._clock), allow_hosts=self._allow_hosts)
        request = HTTPRequest("GET", url_of(self._root, path), self._headers, max_bytes=_MAX_BYTES)
        try:
            response = await self._pool.request(request, duplicate_ok=True)
            return response.status, await response.body.read()
        except UpstreamError as error:
            error.args = (self._secrets_of(request).hide(error.message),)
            raise

    async def _at_home(self, ask: Callable[[], Awaitable[T]]) -> T:
        """Run it on the loop that the connections belong to, whichever loop asks."""
        home, here = self._loop, asyncio.get_running_loop()
        if home is None or home is here or not home.is_running() or self._pid != os.getpid():
            self._settle(here)
            return await ask()

        async def asked() -> T:
            return await ask()

        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(asked(), home))

    def rehome(self) -> None:
        """Whatever is under way belongs to a dead loop."""
        self._loop = None
        if self._task is not None and not self._task.done():
            self._task, self.due_at = None, -inf
        if self._pool is not None:
            self._pool.rehome()

    async def aclose(self) -> None:
        """Break off what is under way, and close the connections."""
        task = self._task
        if task is not None and not task.done() and task.get_loop() is asyncio.get_running_loop():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        if self._pool is not None:
            await self._pool.aclose()

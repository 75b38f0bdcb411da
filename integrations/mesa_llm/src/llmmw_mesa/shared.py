"""One engine for all ModuleLLMs that ask the same server with the same credential and settings.

Every agent owns two ModuleLLMs; a pool, a limiter and a cache for each would be none.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import itertools
import os
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, WeakSet

from llmmw import ConfigError
from llmmw.keys.identity import Namespaces
from llmmw_mesa.frames import EngineStats
from llmmw_mesa.upstream import LiteLLMEndpoint

if TYPE_CHECKING:
    from llmmw import Engine
    from llmmw_mesa.options import Options


@dataclass(frozen=True)
class Identity:
    """What must be equal to share an engine."""

    model: str
    api_base: str | None
    credential: str
    """A fingerprint, good in this process."""
    options: Options


class Shared:
    """An engine on a loop of its own, for sync and async callers of any thread. Opens again when it is needed.

    Args:
        identity: whose it is.
        namespace: fingerprint of the credential on which all processes with the same cache directory agree.
    """

    def __init__(self, identity: Identity, namespace: str) -> None:
        self.identity = identity
        self.namespace = namespace
        self.name = f"{identity.model}@{identity.api_base}" if identity.api_base else identity.model
        self.users: WeakSet[Any] = WeakSet()
        self._forget_run()
        self._engine: Engine | None = None
        self._last: dict[str, Any] | None = None
        self._closing: set[asyncio.Task[None]] = set()
        self.after_fork()

    def after_fork(self) -> None:
        """The locks may have been held by threads that do not exist in the child."""
        self._lock = threading.RLock()
        """Held for a moment, never while another thread is waited for: somebody's `__del__` may call `leave` anywhere,
        also in the thread that holds it."""
        self._opening = threading.Lock()
        """Held while an engine is made or told something; `leave` does not need it."""

    def engine(self, user: object) -> Engine:
        """The engine, open; who asks counts as a user from now on."""
        engine = self._engine
        if engine is not None and not engine.closed and user in self.users:
            return engine
        with self._opening:
            with self._lock:
                self.users.add(user)
                engine = self._engine
            if engine is None or engine.closed:
                engine = self.identity.options.layers().bind(LiteLLMEndpoint(self.name, self.identity.api_base))
                engine.__enter__()  # a thread of its own: callers' loops come and go with every step
                self._engine = engine
        return engine

    def number_of(self, user: object) -> int:
        """Which of those that asked this is, in order of their first question; once all have left, they begin anew."""
        with self._lock:
            found = self._numbers.get(user)
            if found is None:
                found = self._numbers[user] = next(self._counter)
            return found

    def steps_for(self, model: object) -> None:
        """An agent of this simulation asks. Another simulation of the same name is the same run once more."""
        if model in self._models:
            return
        with self._opening:
            engine = self._engine
            if model not in self._models and self._models and engine is not None and not engine.closed:
                engine.begin_run()
            self._models.add(model)

    def _forget_run(self) -> None:
        self._models: WeakSet[Any] = WeakSet()
        self._counter = itertools.count(1)
        self._numbers: WeakKeyDictionary[Any, int] = WeakKeyDictionary()

    async def aclose(self, user: object) -> None:
        """One user fewer; the last closes the engine."""
        engine = self._left_by(user)
        if engine is not None:
            await engine.aclose()
            self._keep(engine)

    def close(self, user: object, *, drain_timeout: float | None = None) -> None:
        """`aclose` for plain code, also for a `__del__` that the collector runs on the engine's own thread."""
        engine = self._left_by(user)
        if engine is None:
            return
        try:
            engine.close() if drain_timeout is None else engine.close(drain_timeout=drain_timeout)
        except ConfigError:  # on that thread nobody can wait
            task = asyncio.get_running_loop().create_task(engine.aclose())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)
        self._keep(engine)

    def _left_by(self, user: object) -> Engine | None:
        with self._lock:
            self.users.discard(user)
            if self.users:
                return None
            engine, self._engine = self._engine, None
            self._forget_run()
        if engine is not None:
            self._keep(engine)
        return engine

    def _keep(self, engine: Engine) -> None:
        self._last = engine.get_performance_stats()

    def stats(self) -> dict[str, Any]:
        """What the engine did; after it was closed, what it had done."""
        engine = self._engine
        if engine is not None:
            return engine.get_performance_stats()
        if self._last is None:
            self._keep(self.identity.options.layers().bind(LiteLLMEndpoint(self.name, None)))
        return self._last or {}

    def is_forsaken(self) -> bool:
        """Whether all who used the engine are gone and none of them closed it."""
        return self._engine is not None and not self.users


_all: dict[Identity, Shared] = {}
_lock = threading.Lock()
_fingerprints = Namespaces()
_MOST_FORSAKEN = 8
"""A run may be repeated with the same settings by other objects: what it has learnt is kept that long."""


def shared_by(model: str, api_base: str | None, credential: str | None, options: Options) -> Shared:
    """The one for these."""
    identity = Identity(model, api_base, _fingerprints.of(credential), options)
    found = _all.get(identity)
    if found is None:
        close_forsaken()
        namespace = Namespaces(options.layers().cache_directory).of(credential)
        with _lock:
            found = _all.setdefault(identity, Shared(identity, namespace))
    return found


def close_forsaken(*, keep: int = _MOST_FORSAKEN) -> None:
    """Close engines whose users are gone, but the youngest: a sweep over seeds has one after the other.

    Not when the collector finds out: it may run anywhere, and must not wait.
    """
    forsaken = [shared for shared in list(_all.values()) if shared.is_forsaken()]
    for shared in forsaken[: max(0, len(forsaken) - keep)]:
        shared.close(shared)


def global_stats() -> EngineStats:
    """What every engine did, by "model@api_base"; those of one name are numbered. `to_frame()` makes a table of it."""
    found = EngineStats()
    for shared in list(_all.values()):
        name, number = shared.name, 1
        while name in found:
            number += 1
            name = f"{shared.name}#{number}"
        found[name] = shared.stats()
    return found


def close_all() -> None:
    """Close every engine and forget its figures; a later call opens one again."""
    with _lock:
        every = [_all.popitem()[1] for _ in range(len(_all))]
    for shared in every:
        shared.users.clear()
        shared.close(shared)


class _Process:
    """The interpreter."""

    ending = False


def is_ending() -> bool:
    """Whether the interpreter ends, so that nothing opens again."""
    return _Process.ending


def _at_exit() -> None:
    _Process.ending = True
    for shared in list(_all.values()):
        shared.users.clear()
        with contextlib.suppress(Exception):  # the interpreter is ending
            shared.close(shared, drain_timeout=0.0)


atexit.register(_at_exit)


def _after_fork_in_child() -> None:
    global _lock  # noqa: PLW0603 — as `Shared.after_fork`
    _lock = threading.Lock()
    for shared in list(_all.values()):
        shared.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)

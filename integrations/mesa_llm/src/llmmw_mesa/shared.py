"""One engine for all ModuleLLMs that ask the same server with the same credential and settings.

Every agent owns two ModuleLLMs; a pool, a limiter and a cache for each would be none.
"""

from __future__ import annotations

import atexit
import contextlib
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from llmmw.keys.identity import Namespaces
from llmmw_mesa.upstream import LiteLLMEndpoint

if TYPE_CHECKING:
    from llmmw import Engine
    from llmmw_mesa.options import Options


@dataclass(frozen=True)
class Identity:
    """What must be equal to share an engine."""

    model: str
    api_base: str | None
    namespace: str
    """Fingerprint of the credential."""
    options: Options


class Shared:
    """An engine on a loop of its own, for sync and async callers of any thread. Opens again when it is needed."""

    def __init__(self, identity: Identity) -> None:
        self.identity = identity
        self.name = f"{identity.model}@{identity.api_base}" if identity.api_base else identity.model
        self.users: WeakSet[Any] = WeakSet()
        self._lock = threading.Lock()
        self._engine: Engine | None = None
        self._last: dict[str, Any] | None = None

    def engine(self, user: object) -> Engine:
        """The engine, open; who asks counts as a user from now on."""
        engine = self._engine
        if engine is None or engine.closed or user not in self.users:
            with self._lock:
                self.users.add(user)
                engine = self._engine
                if engine is None or engine.closed:
                    endpoint = LiteLLMEndpoint(self.name, self.identity.api_base)
                    engine = self._engine = self.identity.options.layers().bind(endpoint)
                    engine.__enter__()  # a thread of its own: callers' loops come and go with every step
        return engine

    def leave(self, user: object) -> Engine | None:
        """One user fewer; the engine to close if it was the last."""
        with self._lock:
            self.users.discard(user)
            if self.users:
                return None
            engine, self._engine = self._engine, None
            if engine is not None:
                self._last = engine.get_performance_stats()
            return engine

    def stats(self) -> dict[str, Any]:
        """What the engine did; after it was closed, what it had done."""
        engine = self._engine
        if engine is not None:
            return engine.get_performance_stats()
        return (
            self._last or self.identity.options.layers().bind(LiteLLMEndpoint(self.name, None)).get_performance_stats()
        )


_all: dict[Identity, Shared] = {}
_lock = threading.Lock()
_namespaces = Namespaces()


def shared_by(model: str, api_base: str | None, credential: str | None, options: Options) -> Shared:
    """The one for these."""
    identity = Identity(model, api_base, _namespaces.of(credential), options)
    found = _all.get(identity)
    if found is None:
        with _lock:
            found = _all.setdefault(identity, Shared(identity))
    return found


def global_stats() -> dict[str, dict[str, Any]]:
    """What every engine did, by "model@api_base"; those of one name are numbered."""
    found: dict[str, dict[str, Any]] = {}
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
        engine = shared.leave(shared)
        if engine is not None:
            engine.close()


def _at_exit() -> None:
    for shared in list(_all.values()):
        shared.users.clear()
        engine = shared.leave(shared)
        if engine is not None:
            with contextlib.suppress(Exception):  # the interpreter is ending
                engine.close(drain_timeout=0.0)


atexit.register(_at_exit)

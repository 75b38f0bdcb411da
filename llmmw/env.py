"""Clock, randomness and event sinks: the only module that reads time or random.

Layers get an `Env` when they are bound; tests hand them one with a manual clock and a fixed seed
(`llmmw.testing.ManualClock`). Waiting uses the event loop (`asyncio.timeout`, `clock.sleep`), so a test that
runs on `llmmw.testing.ManualLoop` controls it too.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from contextvars import ContextVar
from copy import copy
from typing import TYPE_CHECKING, Protocol
from weakref import WeakSet

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from llmmw.events import Event

    Sink = Callable[[Event], object]


class Clock(Protocol):
    """Two readings and one wait. `monotonic` is for intervals and memory, `wall` for what is written to disk."""

    def monotonic(self) -> float:
        """Seconds that never run backwards."""
        ...

    def wall(self) -> float:
        """Seconds since 1970."""
        ...

    async def sleep(self, delay: float, /) -> None:
        """Wait that many seconds."""
        ...


class SystemClock:
    """The machine's own clock."""

    monotonic = staticmethod(time.monotonic)
    wall = staticmethod(time.time)
    sleep = staticmethod(asyncio.sleep)

    def __repr__(self) -> str:
        return "SystemClock()"


SYSTEM_CLOCK: Clock = SystemClock()
_ambient: ContextVar[Clock] = ContextVar("llmmw_clock", default=SYSTEM_CLOCK)


def ambient_clock() -> Clock:
    """The clock that code outside any engine reads (`using(deadline=)`, `Env()`); tests replace it."""
    return _ambient.get()


def set_ambient_clock(clock: Clock) -> Callable[[], None]:
    """Make `clock` the ambient one in this context; returns what restores the former."""
    token = _ambient.set(clock)
    return lambda: _ambient.reset(token)


class Env:
    """What a layer may use of the outside world: `clock`, `rng` and `emit`. One per engine.

    `capabilities` is what the endpoint inside the layer can do now (its own `capabilities` attribute, if it has one):
    "batch:chat" and "batch:complete" (many calls in one request), "n" (several samples in one request), "idempotent"
    (repeating a lost call costs nothing but computing time, as at a local vLLM). Some learn that as they work, so it is
    asked whenever it matters. Above a router it is what all its endpoints can do.
    """

    __slots__ = ("__weakref__", "_can", "_family", "_sinks", "clock", "emit", "observed", "rng")

    def __init__(self, *, clock: Clock | None = None, seed: int | None = None, sinks: tuple[Sink, ...] = ()) -> None:
        self.clock: Clock = clock or ambient_clock()
        self.rng: random.Random = random.Random(seed)
        self._sinks: list[Sink] = list(sinks)
        self._family: WeakSet[Env] = WeakSet((self,))
        """Those that differ in capabilities only; they have one list of sinks."""
        self._can: Callable[[], Iterable[str]] = frozenset
        self.emit: Callable[[Event], object] = self._tell
        """Tell every sink. A sink that raises is a broken observer, never a broken call: it is dropped."""
        self.observed = bool(sinks)
        """Whether anybody but the engine's own statistics listens; what only others want is else not even built."""

    @property
    def capabilities(self) -> frozenset[str]:
        """What the endpoint inside the layer can do now."""
        return frozenset(self._can())

    def endowed(self, capabilities: Iterable[str] | Callable[[], Iterable[str]]) -> Env:
        """The same env (clock, randomness, sinks added later too) with capabilities, or with whatever tells them."""
        found = copy(self)
        found._can = capabilities if callable(capabilities) else lambda: capabilities  # noqa: SLF001 — its own kind
        self._family.add(found)
        return found

    def _tell(self, event: Event) -> None:
        for sink in self._sinks.copy():
            try:
                sink(event)
            except Exception:  # noqa: BLE001 — whatever a user's sink raises must not reach the call
                self._sinks[:] = [kept for kept in self._sinks if kept is not sink]

    def add_sink(self, sink: Sink, *, own: bool = False) -> None:
        """Also tell this callable of every event; it must be quick and thread-safe. `own`: the engine's statistics."""
        self._sinks.append(sink)
        observed = self.observed or not own
        for env in self._family:
            env.observed = observed
            env.emit = self._tell if observed else sink  # the engine's statistics alone never raise

    def __repr__(self) -> str:
        return f"Env(clock={self.clock!r}, sinks={len(self._sinks)})"


def variable(name: str, default: str = "") -> str:
    """An environment variable such as LLMMW_CACHE."""
    return os.environ.get(name, default)


def disabled() -> bool:
    """Whether LLMMW_DISABLE switches all layers off."""
    return variable("LLMMW_DISABLE").lower() not in {"", "0", "false", "no"}

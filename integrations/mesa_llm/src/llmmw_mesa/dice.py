"""Random numbers of agents that step at the same time: each draws from a stream of its own.

Whoever answers first would otherwise draw first from the model's generators, and no run would repeat another. The
streams follow from one draw from the model's generator and the agent's place in the order of activation.
"""

from __future__ import annotations

import random
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from llmmw_mesa import acting

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable


class Streams:
    """One agent's random numbers in one step; made when they are first asked for."""

    __slots__ = ("_numpy", "_plain", "_seed")

    def __init__(self, seed: tuple[int, int]) -> None:
        self._seed = seed
        self._plain: random.Random | None = None
        self._numpy: np.random.Generator | None = None

    @property
    def plain(self) -> random.Random:
        """For what draws from `model.random`."""
        if self._plain is None:
            self._plain = random.Random(f"{self._seed[0]}:{self._seed[1]}")  # noqa: S311 — no secret depends on it
        return self._plain

    @property
    def numpy(self) -> np.random.Generator:
        """For what draws from `model.rng`."""
        if self._numpy is None:
            self._numpy = np.random.default_rng(self._seed)
        return self._numpy


def _streams() -> Streams | None:
    part = acting.current_part()
    return None if part is None else part.streams


class KeyedRandom(random.Random):
    """What `model.random` is while agents step: the same object, for agents, cells and sets that keep it."""

    def _of(self) -> Any:
        found = _streams()
        return super() if found is None else found.plain

    def random(self) -> float:
        """As everything else that draws."""
        return self._of().random()  # type: ignore[no-any-return]  # — a Random's, whichever

    def getrandbits(self, k: int, /) -> int:
        """The other source of all draws."""
        return self._of().getrandbits(k)  # type: ignore[no-any-return]  # — as above

    def gauss(self, mu: float = 0.0, sigma: float = 1.0) -> float:
        """Keeps every other number for the next draw: that must be the same agent's."""
        return self._of().gauss(mu, sigma)  # type: ignore[no-any-return]  # — as above

    def seed(self, *args: Any, **kwargs: Any) -> None:
        """An agent that seeds in its step seeds its own."""
        self._of().seed(*args, **kwargs)

    def getstate(self) -> tuple[Any, ...]:
        """Of the stream that is drawn from here."""
        return self._of().getstate()  # type: ignore[no-any-return]  # — as above

    def setstate(self, state: tuple[Any, ...]) -> None:
        """As above."""
        self._of().setstate(state)

    def __reduce__(self) -> tuple[Any, ...]:
        return random.Random, (), super().getstate()


class KeyedGenerator(np.random.Generator):
    """What `model.rng` is meanwhile."""

    def __getattribute__(self, name: str) -> Any:
        found = None if name.startswith("__") else _streams()
        return super().__getattribute__(name) if found is None else getattr(found.numpy, name)


_lock = threading.Lock()
_users: dict[int, tuple[Any, int]] = {}
"""By the id of a generator, or of the model of a numpy one: how many activations use it."""


@contextmanager
def keyed(models: Iterable[Any]) -> Generator[int]:
    """Inside, agents with streams draw from them. Gives the number that the streams follow from."""
    held: list[Any] = []
    with _lock:
        # Inside another agent's step this is that agent's own draw.
        plain: list[Any] = [found for model in models if type(found := getattr(model, "random", None)) in _PLAIN]
        base = plain[0].getrandbits(64) if plain else random.getrandbits(64)
        for found in plain:
            _hold(found, held)
            found.__class__ = KeyedRandom
        for model in models:
            rng = getattr(model, "rng", None)
            if type(rng) in _NUMPY:
                _hold(model, held)
                if type(rng) is np.random.Generator:
                    model.rng = _Lent(rng).keyed
    try:
        yield base
    finally:
        with _lock:
            for found in held:
                _let_go(found)


_PLAIN = (random.Random, KeyedRandom)
_NUMPY = (np.random.Generator, KeyedGenerator)


class _Lent:
    """A model's numpy generator and what stands in for it."""

    by_keyed: dict[int, _Lent] = {}  # noqa: RUF012 — of all models

    def __init__(self, own: np.random.Generator) -> None:
        self.own = own
        self.keyed = KeyedGenerator(own.bit_generator)
        self.by_keyed[id(self.keyed)] = self


def _hold(what: Any, held: list[Any]) -> None:
    _users[id(what)] = (what, _users.get(id(what), (what, 0))[1] + 1)
    held.append(what)


def _let_go(what: Any) -> None:
    count = _users.pop(id(what))[1] - 1
    if count:
        _users[id(what)] = (what, count)
    elif isinstance(what, KeyedRandom):
        what.__class__ = random.Random  # type: ignore[assignment]  # — what it was
    elif not isinstance(what, random.Random):
        lent = _Lent.by_keyed.pop(id(getattr(what, "rng", None)), None)
        if lent is not None:
            what.rng = lent.own

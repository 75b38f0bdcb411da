"""Which replica a balancer asks next: the choice of `algo.balance` among those whose circuits let a call through."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

from llmmw.algo.balance import Balance
from llmmw.algo.load import Load
from llmmw.errors import ConfigError
from llmmw.settings import number

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Collection, Sequence

    from llmmw.algo.balance import BalanceRules
    from llmmw.algo.circuit import Standing
    from llmmw.call import Call
    from llmmw.endpoints.replicas import Replicas
    from llmmw.env import Env
    from llmmw.layers.breaker import BoundBreaker

_MAX_SICK = 1024
"""Replicas are ejected for a model, and model names come from callers."""


class Chooser:
    """The replicas with their circuits, their work and what became of them.

    Args:
        replicas: names and weights.
        breakers: one for each.
        env: clock and chance.
        rules: how calls are spread.
    """

    def __init__(self, replicas: Replicas, breakers: Sequence[BoundBreaker], env: Env, rules: BalanceRules) -> None:
        self._env = env
        self._targets = tuple(member.name for member in replicas.members)
        self._labels = replicas.labels
        self._members = replicas.members
        self._breakers = tuple(breakers)
        self._balance = Balance(replicas.labels, replicas.weights, rules)
        self._sick: dict[tuple[int, str], None] = {}
        """Replicas, each for a model, whose circuit was seen open and that have not answered since."""
        count = len(self._breakers)
        self._loads: list[object] = [None] * count
        self._requests, self._failures, self._ejections = [0] * count, [0] * count, [0] * count
        self._judged = [0] * count
        """The joint request (by its number) that each failed last."""
        self._at_home = self._spilled = 0

    # ── choosing ────────────────────────────────────────────────────────────────────────────────────────────────

    def first(self, call: Call, key: str | None) -> int | None:
        """Who gets a call; one that may be well again gets it as a probe, if another could make up for that."""
        if self._sick:
            due = self._due(call.model)
            if due is not None and self.has_well(call.model, (due,)):
                return due
        found = self.next(call, key, ())
        if key is not None and found is not None:
            own = found == self._balance.homes(key)[0]
            self._at_home += own
            self._spilled += not own
        return found

    def next(self, call: Call, key: str | None, but: Sequence[int]) -> int | None:
        """Who gets a call that is not for some any more: a well one, else one that may be well again; else None."""
        now, draw = self._env.clock.monotonic(), self._env.rng.random
        if not self._sick and not but:
            return self._balance.choose(now, draw, self._works, key)
        found = self._balance.choose(now, draw, partial(self._is, "well", call.model, but), key)
        if found is None:
            found = self._balance.choose(now, draw, partial(self._is, "due", call.model, but), key)
        return found

    def resting(self, call: Call, but: Sequence[int]) -> int | None:
        """Of those that rest the one that was well last."""
        left = [index for index in range(len(self._targets)) if index not in but and self._works(index)]
        return max(left, key=lambda index: (self._well_until(call, index), -index), default=None)

    def has_well(self, model: str, but: Sequence[int]) -> bool:
        """Whether there is another that is well."""
        if not self._sick:
            return len(self._targets) - self._balance.weights.count(0.0) > len({*but})
        return any(self._is("well", model, but, index) for index in range(len(self._targets)))

    def is_resting(self, index: int, model: str) -> bool:
        """Whether a call would be refused there."""
        return self._breakers[index].standing(self._targets[index], model) == "resting"

    def _works(self, index: int) -> bool:
        return self._balance.weights[index] > 0

    def _is(self, standing: Standing, model: str, but: Sequence[int], index: int) -> bool:
        found = self._breakers[index].standing(self._targets[index], model)
        return found == standing and index not in but and self._works(index)

    def _due(self, model: str) -> int | None:
        return next((index for index, sick in self._sick if sick == model and self._is("due", model, (), index)), None)

    # ── what became of it ───────────────────────────────────────────────────────────────────────────────────────

    def begin(self, index: int) -> int:
        """A call goes there; returns what `end` must be given."""
        self._requests[index] += 1
        return self._balance.begin(index)

    def end(self, index: int, generation: int) -> None:
        """That call is over, its body included."""
        self._balance.end(index, generation)
        load = getattr(self._members[index], "load", None)
        if load is not self._loads[index] and isinstance(load, Load):
            self._loads[index] = load
            self._balance.heard(index, load.waiting or 0, self._env.clock.monotonic())

    def succeeded(self, index: int, model: str) -> None:
        """The replica answered."""
        self._balance.answered(index)
        if not self._sick:
            return
        if (index, model) in self._sick:
            del self._sick[index, model]
            self._balance.succeeded(index, self._env.clock.monotonic())
        elif not any(sick == index and self.is_resting(index, other) for sick, other in self._sick):
            self._balance.recovered(index)

    def missed(self, index: int) -> None:
        """A call's deadline passed there."""
        self._balance.missed(index, self._env.clock.monotonic())

    def failed(self, index: int, model: str, exchange: int) -> None:
        """The replica did not answer as it should; one request that failed for many calls is one failure."""
        self._failures[index] += 1
        if not exchange or exchange != self._judged[index]:
            self._judged[index] = exchange
            self._balance.failed(index, self._env.clock.monotonic())
        self._look_at(index, model)

    def refused(self, index: int, model: str) -> None:
        """The call was not sent there, by a circuit or a limit of our own."""
        self._requests[index] -= 1
        self._look_at(index, model)

    def _look_at(self, index: int, model: str) -> None:
        if self.is_resting(index, model):
            if (index, model) not in self._sick:
                self._ejections[index] += 1
                if len(self._sick) >= _MAX_SICK:
                    del self._sick[next(iter(self._sick))]
                self._sick[index, model] = None
            self._balance.rests(index)

    # ── as one ──────────────────────────────────────────────────────────────────────────────────────────────────

    def rests_since(self, call: Call) -> float | None:
        """Until when one of them was well for calls like this one; None where one is."""
        found = max(self._well_until(call, index) for index in range(len(self._targets)))
        return None if found == math.inf else found

    def news(self, call: Call) -> tuple[float, asyncio.Future[None]] | None:
        """Of the first one that is being probed."""
        for breaker, target in zip(self._breakers, self._targets, strict=True):
            found = breaker.news(call.replace(target=target))
            if found is not None:
                return found
        return None

    def _well_until(self, call: Call, index: int) -> float:
        found = self._breakers[index].rests_since(call.replace(target=self._targets[index]))
        return math.inf if found is None else found

    def weighing(self, weights: Mapping[str, float], others: Collection[str]) -> Callable[[], None]:
        """What changes some weights, by name; those of `others` are somebody else's.

        Raises:
            ConfigError: no mapping, an unknown name, a weight below 0, or none above.
        """
        option = "reconfigure(weights=)"
        if not isinstance(weights, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance] — a user's value
            raise ConfigError(f"{option}: must be a mapping from names of replicas to numbers")
        found = dict(zip(self._labels, self._balance.weights, strict=True))
        for label, weight in weights.items():
            if label in found:
                found[label] = number(option, weight)
            elif label not in others:
                known = ", ".join(dict.fromkeys((*found, *sorted(others))))
                raise ConfigError(f"{option}: no replica {label!r}; there are {known}")
        if not any(found.values()):
            raise ConfigError(f"{option}: one replica must keep a weight above 0")
        return partial(self._balance.weigh, [*found.values()])

    def rehome(self) -> None:
        """What was under way is lost."""
        self._balance.release()

    def gauges(self) -> dict[str, object]:
        """Calls at and away from the home of their agent, and the figures of each replica."""
        now, balance = self._env.clock.monotonic(), self._balance
        replicas = {
            label: {
                "requests": self._requests[index],
                "in_flight": balance.outstanding[index],
                "failures": self._failures[index],
                "ejected": balance.is_resting(index),
                "ejections": self._ejections[index],
                "weight": balance.weights[index],
                "ease": balance.ease(index, now),
            }
            for index, label in enumerate(self._labels)
        }
        return {"at_home": self._at_home, "spilled": self._spilled, "replicas": replicas}

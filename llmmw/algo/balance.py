"""Which of several like servers gets a call: the one its agent is at home at, else the less busy of two drawn ones.

*Two choices* (Mitzenmacher 2001): of two replicas drawn at random the one with less work is taken. That spreads work
almost as evenly as asking all would, without everybody running to the same least busy one.

*Home* (rendezvous hashing, Thaler and Ravishankar 1998; with weights w as w / -ln h, Schindelhauer and Schomaker 2005):
every agent has an order of preference of its own among the replicas, from hashes of both names. So what a server has
computed of an agent's prompts stays where it is used again; a replica that goes sends only its own agents elsewhere
(each to the next in its order), and one that comes takes only those that it will keep.

*Bounded load* (Mirrokni, Thorup and Zadimoghaddam 2016): an agent is not sent to a replica that would then have more
than `spill` times its share of the work, but to the next in its order.

*Ease*: a replica that comes back, or has just failed, counts as a fraction of itself, which grows back to one: an empty
server would else be drowned, and one that fails fast would always look idle and swallow every call.

Time and chance are given.
"""

from __future__ import annotations

import math
from hashlib import blake2b
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_EASE = 0.1
"""What counts of a replica that has just come back; Envoy's slow start begins with the same tenth."""
_DRAWS = 4
"""So often chance is asked for a replica that is fit before all are looked at."""
_PREFERENCES = 8
"""So many places of an agent's order are kept; where none of them will do, two choices decide."""
_MAX_HOMES = 16_384
_HALF_LIFE_S = 1.0
"""A reading of the server's queue counts half after so long: a replica that looked busy once and is therefore not asked
any more would else look busy for ever."""
_FORGOTTEN_S = 8.0
_LEAST = 0.5
"""Less than half a request is none: between idle replicas it would decide everything."""
_SUMMED_S = 0.05
"""The readings of all are added up at most this often, so that a choice costs the same among 4 replicas and 64."""
_MISSES = 3
"""So many calls in a row that got no answer in time, and a replica is nobody's home for a while; one call at a time may
then find out. A circuit takes no notice of deadlines, which may be short for reasons of their own."""
_SILENT_S = 5.0
_HASH_BITS = 52
"""So that a hash, in the middle of its step, is a float strictly between 0 and 1."""


class BalanceRules(msgspec.Struct, frozen=True):
    """How calls are spread."""

    spill: float = 1.25
    """An agent's own replica is passed over if it would have more than so many times its share of the work,"""
    room: int = 8
    """unless it has at most so many calls: a server that batches does as many as fast as one."""
    slow_start_s: float = 30.0
    """From a tenth to its whole weight; 0: at once."""


class Balance:
    """The work of each replica, and who gets the next call.

    Args:
        names: of the replicas; who is at home where depends on nothing else (nor on their order).
        weights: relative capacities, above 0.
        rules: how calls are spread.
    """

    __slots__ = ("_easing", "_heard", "_homes", "_missed", "_names", "_resting", "_rules", "_summed", "_summed_at",
                 "_total", "_weight", "generation", "outstanding", "weights")  # fmt: skip

    def __init__(self, names: Sequence[str], weights: Sequence[float], rules: BalanceRules) -> None:
        self._names = tuple(names)
        self._rules = rules
        self._homes: dict[str, tuple[int, ...]] = {}
        self._easing: dict[int, tuple[float, float]] = {}
        """Replicas that do not count whole: how much they did when."""
        self._resting: set[int] = set()
        self._heard: dict[int, tuple[float, float]] = {}
        """What servers said of their queues: how many wait, and when that was."""
        self._summed, self._summed_at = 0.0, -math.inf
        self._missed: dict[int, tuple[int, float]] = {}
        """Calls in a row that a replica did not answer in time, and when the last was given up."""
        self._total = 0
        self.generation = 0
        self.outstanding = [0] * len(self._names)
        """Calls under way, by replica."""
        self.weights: tuple[float, ...] = ()
        self.weigh(weights)

    def weigh(self, weights: Sequence[float]) -> None:
        """Change the capacities; an agent moves only to a replica that grew, or away from one that shrank."""
        self.weights = tuple(weights)
        self._weight = math.fsum(self.weights)
        self._homes.clear()

    # ── what is heard ───────────────────────────────────────────────────────────────────────────────────────────

    def begin(self, index: int) -> int:
        """A call goes to this replica; returns what `end` must be given."""
        self.outstanding[index] += 1
        self._total += 1
        return self.generation

    def end(self, index: int, generation: int) -> None:
        """That call is over, its body included; one that was lost with its loop is not counted any more."""
        if generation == self.generation:
            self.outstanding[index] -= 1
            self._total -= 1

    def release(self) -> None:
        """Whatever is under way is lost (fork, new home loop)."""
        self.generation += 1
        self.outstanding = [0] * len(self._names)
        self._total = 0

    def succeeded(self, index: int, now: float) -> None:
        """The replica answered; one that rested is eased in from now on."""
        if index in self._resting:
            self._resting.discard(index)
            self._slow_down(index, 0.0, now)

    def failed(self, index: int, now: float) -> None:
        """The replica failed: for a while it counts half of what it did."""
        self._slow_down(index, self.ease(index, now) / 2, now)

    def missed(self, index: int, now: float) -> None:
        """A call's deadline passed there before it was answered."""
        self._missed[index] = self._missed.get(index, (0, now))[0] + 1, now

    def answered(self, index: int) -> None:
        """A call was answered there."""
        if self._missed:
            self._missed.pop(index, None)

    def rests(self, index: int) -> None:
        """The replica is not asked any more, until `succeeded` (or `recovered`)."""
        self._resting.add(index)

    def recovered(self, index: int) -> None:
        """The replica counts whole again, without being eased in."""
        self._resting.discard(index)

    def heard(self, index: int, waiting: float, at: float) -> None:
        """The server said how many requests wait there, whoever sent them."""
        if waiting > 0 or index in self._heard:
            self._heard[index] = max(0.0, waiting), at
            self._summed_at = -math.inf

    # ── what follows from it ────────────────────────────────────────────────────────────────────────────────────

    def ease(self, index: int, now: float) -> float:
        """The part of the replica's weight that counts now, above 0 and at most 1."""
        found = self._easing.get(index)
        if found is None:
            return 1.0
        part, since = found
        return min(1.0, part + (1 - _EASE) * max(0.0, now - since) / self._rules.slow_start_s)

    def is_resting(self, index: int) -> bool:
        """Whether the replica was ejected and has not answered since."""
        return index in self._resting

    def is_silent(self, index: int, now: float) -> bool:
        """Whether the replica answers nobody in time, and it is not yet time to see again."""
        count, since = self._missed.get(index, (0, now))
        return count >= _MISSES and (self.outstanding[index] > 0 or now - since < _SILENT_S)

    def load(self, index: int, now: float) -> float:
        """Calls under way there, ours and those that wait in the server's queue."""
        found = self._heard.get(index)
        return self.outstanding[index] + (0.0 if found is None else _faded(*found, now))

    def is_full(self, index: int, now: float) -> bool:
        """Whether one call more would be more than the replica's share of the work, by the rule of bounded load."""
        rules, ease = self._rules, self.ease(index, now)
        after = self.load(index, now) + 1
        if after <= max(1.0, rules.room * ease):
            return False
        own, whole = self.weights[index] * ease, self._weight
        if self._easing or self._resting:
            whole = math.fsum(self._strength(other, now) for other in range(len(self.weights)))
        share = own / max(whole, own)
        return after > math.ceil(rules.spill * share * (self._total + self._waiting(now) + 1))

    def homes(self, key: str) -> tuple[int, ...]:
        """The first replicas in the order of preference of whoever has this name."""
        found = self._homes.get(key)
        if found is None:
            if len(self._homes) >= _MAX_HOMES:
                del self._homes[next(iter(self._homes))]
            scores = [weight / _distance(name, key) for name, weight in zip(self._names, self.weights, strict=True)]
            order = sorted(range(len(scores)), key=lambda index: (-scores[index], self._names[index]))
            found = self._homes[key] = tuple(order[:_PREFERENCES])
        return found

    def choose(
        self, now: float, draw: Callable[[], float], fit: Callable[[int], bool], key: str | None = None
    ) -> int | None:
        """The replica for the next call, or None where none is fit.

        Args:
            now: the time.
            draw: uniform numbers in [0, 1), a few per choice.
            fit: whether a replica may be asked at all.
            key: who asks; None: nobody who should be kept at one replica.
        """
        if self._easing:
            self._easing = {index: begun for index, begun in self._easing.items() if self.ease(index, now) < 1}
        if key is not None:
            for index in self.homes(key):
                if fit(index) and not self.is_full(index, now) and not self.is_silent(index, now):
                    return index
        first = self._drawn(draw, fit, None)
        second = None if first is None else self._drawn(draw, fit, first)
        if first is None or second is None:
            return first
        if self._missed and self.is_silent(first, now) is not self.is_silent(second, now):
            return second if self.is_silent(first, now) else first
        strengths = [self.weights[index] * self.ease(index, now) for index in (first, second)]
        work = [self.load(index, now) / strength for index, strength in zip((first, second), strengths, strict=True)]
        if work[0] == work[1]:  # mostly because both are idle: then they share by weight
            return first if draw() * sum(strengths) < strengths[0] else second
        return first if work[0] < work[1] else second

    def _drawn(self, draw: Callable[[], float], fit: Callable[[int], bool], but: int | None) -> int | None:
        count = len(self._names)
        for _ in range(_DRAWS):
            index = int(draw() * count)
            if index != but and fit(index):
                return index
        left = [index for index in range(count) if index != but and fit(index)]
        return left[int(draw() * len(left))] if left else None

    def _slow_down(self, index: int, part: float, now: float) -> None:
        if self._rules.slow_start_s > 0:
            self._easing[index] = max(_EASE, part), now

    def _strength(self, index: int, now: float) -> float:
        return 0.0 if index in self._resting else self.weights[index] * self.ease(index, now)

    def _waiting(self, now: float) -> float:
        if now - self._summed_at >= _SUMMED_S:
            for index, (_, at) in list(self._heard.items()):
                if now - at > _FORGOTTEN_S:
                    del self._heard[index]
            self._summed = math.fsum(_faded(*found, now) for found in self._heard.values())
            self._summed_at = now
        return self._summed


def _faded(waiting: float, at: float, now: float) -> float:
    left = waiting * math.exp2(-max(0.0, now - at) / _HALF_LIFE_S)
    return left if left >= _LEAST else 0.0


def _distance(name: str, key: str) -> float:
    """Exponentially distributed, from the hash of both names: the least of distance / weight is at home."""
    text = f"{len(name)} {name}{key}".encode("utf-8", "surrogatepass")
    drawn = int.from_bytes(blake2b(text, digest_size=8).digest(), "big") >> (64 - _HASH_BITS)
    return -math.log((drawn + 0.5) / 2.0**_HASH_BITS)

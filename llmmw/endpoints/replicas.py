"""Several like servers as one endpoint: what a list means where an endpoint is expected."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING, Any, cast

import msgspec

from llmmw.endpoints import as_endpoint
from llmmw.endpoints.base import Endpoint  # noqa: TC001 — msgspec evaluates it
from llmmw.errors import ConfigError
from llmmw.keys.identity import Asker
from llmmw.pool.guard import Guard, check_url
from llmmw.settings import number, settings

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_DIGITS = re.compile(r"(\d+)")


PLACES = "base URLs, endpoints, async callables or lists of such (replicas)"


def place_of(option: str, value: Any) -> Any:
    """A base URL or something to call, or several replicas of such as a tuple.

    Whether it can be called as an endpoint is seen when the stack is bound.

    Raises:
        ConfigError: neither.
    """
    if isinstance(value, list | tuple) and value:
        return tuple(place_of(option, one) for one in cast("Sequence[Any]", value))
    if isinstance(value, str):
        check_url(option, value, Guard())
    elif not isinstance(value, Replica) and (isinstance(value, type | list | tuple) or not callable(value)):
        raise ConfigError(f"{option}={value!r}: must be one of {PLACES}")
    return value


@settings
class Replica:
    """One of several like servers, where it is not worth the same as the others.

    Args:
        endpoint: an `Endpoint`, a base URL or an async callable, as `Stack.bind` takes it.
        weight: its capacity, relative to that of the others.

    Raises:
        ConfigError: no endpoint, or a weight that is not above 0.
    """

    endpoint: Any
    weight: float = 1.0

    def __post_init__(self) -> None:
        place_of("Replica(endpoint=)", () if isinstance(self.endpoint, list | tuple | Replica) else self.endpoint)
        number("Replica(weight=)", self.weight, open_low=True)


class Replicas(msgspec.Struct, frozen=True):
    """Like endpoints, in the order given; a single endpoint is one of them."""

    members: tuple[Endpoint, ...]
    weights: tuple[float, ...]
    labels: tuple[str, ...]
    """Their names, told apart: statistics go by them, and who is at home where."""
    first: int
    """The member by which all are known, whatever their order: the first by name, numbers by value. One that is added
    with a later name changes nothing, so what the cache holds is found again."""

    alias: str = ""
    """What the caller calls them instead."""

    @property
    def name(self) -> str:
        """The identity of all."""
        return self.alias or self.members[self.first].name

    @property
    def need_choosing(self) -> bool:
        """Whether a call must be addressed to one of them."""
        return len(self.members) > 1 or bool(self.alias)

    def told(self) -> list[str]:
        """A line for each, and one that says what they are together."""
        if not self.need_choosing:
            return [f"endpoint {self.name}"]
        each = [f"  {label}  weight {weight:g}" for label, weight in zip(self.labels, self.weights, strict=True)]
        return [f"endpoint, by the cache known as {self.name}, one of", *each]

    @property
    def asker(self) -> Asker:
        """Who asks, by the headers and query of the member that all are known by.

        Raises:
            ConfigError: headers that change the answer are not the same for all.
        """
        askers = [getattr(member, "asker", Asker()) for member in self.members]
        known = askers[self.first]
        for member, asker in zip(self.members, askers, strict=True):
            if asker.variant != known.variant:
                raise ConfigError(
                    f"{member.name} and {self.name} are sent other headers or another query "
                    f"({_names(asker)} and {_names(known)}): their answers differ, so they are no replicas"
                )
        return known


def replicas_of(value: object, make: Callable[[Any], Endpoint] = as_endpoint, *, alias: str = "") -> Replicas:
    """What was given for an endpoint: a list of replicas, or a single one.

    Args:
        value: an endpoint as `make` takes it, a `Replica`, or a list of such.
        make: an endpoint from what stands for it.
        alias: what they are called.

    Raises:
        ConfigError: an empty list, one that names an endpoint twice, or something that is no endpoint.
    """
    if isinstance(value, Replicas):
        return value
    given: list[Any] = [*value] if isinstance(value, list | tuple) else [value]  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]  # a user's list
    if not given:
        raise ConfigError("[]: a list of replicas must name at least one")
    places = [each.endpoint if isinstance(each, Replica) else each for each in given]
    weights = tuple(float(each.weight) if isinstance(each, Replica) else 1.0 for each in given)
    for at, place in enumerate(places):
        if any(place is other for other in places[:at]):
            raise ConfigError(f"{place!r} is named twice")
    members = tuple(make(place) for place in places)
    texts = [member.name for member, place in zip(members, places, strict=True) if isinstance(place, str)]
    twice = [name for name, count in Counter(texts).items() if count > 1]
    if twice:
        raise ConfigError(f"{twice[0]!r} is named twice")
    names = [member.name for member in members]
    labels = tuple(
        name if name not in names[:at] else f"{name} #{names[:at].count(name) + 1}" for at, name in enumerate(names)
    )
    first = min(range(len(names)), key=lambda at: (_by_value(names[at]), at))
    return Replicas(members, weights, labels, first, alias)


def _by_value(name: str) -> list[tuple[int, str]]:
    """A key that sorts numbers in a text by value: port 8000 before 10000."""
    return [(int(part), "") if at % 2 else (-1, part) for at, part in enumerate(_DIGITS.split(name))]


def _names(asker: Asker) -> str:
    return ", ".join(name for name, _ in asker.variant) or "none"

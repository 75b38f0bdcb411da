"""Layers become running state: once for each call, for each endpoint, and for each replica of one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from llmmw.endpoints.base import BatchEndpoint
from llmmw.endpoints.replicas import replicas_of
from llmmw.env import disabled
from llmmw.errors import ConfigError
from llmmw.layers.base import Bound, ForkingLayer, GroupingLayer
from llmmw.order import Role, is_per_endpoint

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from llmmw.call import Handler
    from llmmw.endpoints.base import Endpoint
    from llmmw.endpoints.replicas import Replicas
    from llmmw.env import Env
    from llmmw.layers.base import Layer

    Told = Callable[[], frozenset[str]]
    """What some endpoints can do, whenever that is asked."""


class Binding(msgspec.Struct, frozen=True):
    """Running state around endpoints."""

    handler: Handler
    """The outermost."""
    bounds: list[tuple[str, Bound]]
    """Every bound layer with its role, outermost first."""
    endpoints: list[Endpoint]
    """Every endpoint, the engine's own first."""


class _Branch:
    """What leads to an endpoint so far: a handler for each of its replicas, one where a balancer has joined them."""

    def __init__(self, replicas: Replicas, env: Env) -> None:
        self.replicas = replicas
        self.handlers: Sequence[Handler] = replicas.members
        self.told = [_capabilities_of(member) for member in replicas.members]
        self.envs = [env.endowed(told) for told in self.told]

    def through(self, layer: Layer) -> Sequence[Bound]:
        """Bind the layer once for each handler."""
        made = [layer.bind(handler, env) for handler, env in zip(self.handlers, self.envs, strict=True)]
        self.handlers = made
        return made

    def joined(self, bound: Bound, told: Told, env: Env) -> None:
        """From here outwards there is one handler."""
        self.handlers, self.told, self.envs = [bound], [told], [env.endowed(told)]


def bind(layers: Sequence[Layer], endpoint: object, env: Env) -> Binding:
    """Running state of the layers around an endpoint, a list of replicas of one, and the fallbacks.

    Args:
        layers: outermost first.
        endpoint: as `Stack.bind` takes it.
        env: of the engine.

    Raises:
        ConfigError: something is no endpoint, or a layer that chooses among replicas has others of its kind inside.
    """
    routers = [layer for layer in layers if isinstance(layer, ForkingLayer)]
    places = [endpoint, *(target for router in routers for target in router.targets)]
    branches = [_Branch(replicas_of(place), env) for place in places]
    endpoints = [member for branch in branches for member in branch.replicas.members]
    bounds: list[tuple[str, Bound]] = []
    for layer in reversed(complete(layers, [branch.replicas for branch in branches])):
        made: list[Bound] = []
        if isinstance(layer, ForkingLayer):
            if any(len(branch.handlers) > 1 for branch in branches):
                raise ConfigError(f"{layer!r} is bound around several replicas: a Balancer must stand inside of it")
            made.append(layer.bind_fork([branch.handlers[0] for branch in branches], env))
            branches[0].joined(made[0], _what_all_can([branch.told[0] for branch in branches]), env)
            del branches[1:]
        elif isinstance(layer, GroupingLayer):
            for branch in branches:
                if branch.replicas.need_choosing:
                    if len(branch.handlers) != len(branch.replicas.members):
                        raise ConfigError(f"{layer!r} stands outside what joins its replicas already")
                    made.append(layer.bind_group(branch.handlers, branch.replicas, env))
                    branch.joined(made[-1], _what_all_can(branch.told), env)
        else:
            made += [bound for branch in branches for bound in branch.through(layer)]
        bounds += [(str(layer.role), bound) for bound in made]
    bounds.reverse()
    return Binding(branches[0].handlers[0], bounds, endpoints)


def complete(layers: Sequence[Layer], places: Iterable[Replicas]) -> Sequence[Layer]:
    """The layers with those that the endpoints need besides: for joint requests, and to choose among replicas."""
    places = [*places]
    if any(isinstance(member, BatchEndpoint) for place in places for member in place.members):
        layers = _with_batches(layers)
    if any(place.need_choosing for place in places):
        layers = _with_balancer(layers)
    return layers


def _with_batches(layers: Sequence[Layer]) -> Sequence[Layer]:
    """The layers with what makes joint requests of a `generate_batch`, where there is no Batcher.

    It stands where a Batcher would, but never around a layer of somebody else's, which expects single calls.
    """
    roles = [layer.role for layer in layers]
    at = next((index for index, role in enumerate(roles) if role in {Role.LIMIT, Role.TIMEOUT}), len(layers))
    if Role.BATCH in roles or Role.CUSTOM in roles[at:] or disabled():
        return layers
    from llmmw.layers.batch import PartyBatcher  # noqa: PLC0415 — layers load when they are first needed

    return (*layers[:at], PartyBatcher(), *layers[at:])


def _with_balancer(layers: Sequence[Layer]) -> Sequence[Layer]:
    """The layers with a balancer where it belongs: directly inside the router, else around all that is per endpoint."""
    roles = [layer.role for layer in layers]
    if Role.BALANCE in roles:
        return layers
    from llmmw.layers.balance import Balancer  # noqa: PLC0415 — layers load when they are first needed

    inner = (at for at, role in enumerate(roles) if is_per_endpoint(role) and role is not Role.CUSTOM)
    at = roles.index(Role.ROUTE) + 1 if Role.ROUTE in roles else next(inner, len(roles))
    return (*layers[:at], Balancer(), *layers[at:])


def _capabilities_of(endpoint: object) -> Told:
    """What an endpoint says of itself whenever it is asked."""
    return lambda: frozenset(getattr(endpoint, "capabilities", ()))


def _what_all_can(told: Sequence[Told]) -> Told:
    return lambda: told[0]().intersection(*(each() for each in told))

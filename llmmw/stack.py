"""The stack: layers in a checked order, as an immutable value. Bound to an endpoint it becomes an `Engine`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeVar

from llmmw import order
from llmmw.engine import Engine
from llmmw.env import Env, disabled
from llmmw.errors import ConfigError
from llmmw.layers.base import Layer
from llmmw.order import Finding, Role, Rule
from llmmw.settings import accepting, instance, named_as_given, texts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from llmmw.edges.function import Wrapped
    from llmmw.layers.base import Bound

P = ParamSpec("P")
R = TypeVar("R")

_TRANSPARENT_TO_HITS = {Role.DEADLINE}
"""Layers outside the cache that have nothing to do for a call that is answered at once."""


class Stack:
    """Layers, outermost first. Immutable: every change makes a new stack, checked again.

    Args:
        layers: each role at most once, in an order that `llmmw.order.RULES` accepts.
        allow: ids of rules to leave unenforced.

    Raises:
        OrderError: the order breaks a rule; the message says which and why.
        ConfigError: something is not a layer, or `allow` names no rule.
    """

    __slots__ = ("_allow", "_layers")

    @accepting
    def __init__(self, *layers: Layer, allow: Sequence[str] = ()) -> None:
        for layer in layers:
            _check_layer(layer)
        self._layers = layers
        self._allow = (allow,) if isinstance(allow, str) else texts("Stack(allow=)", allow)
        order.enforce([layer.role for layer in layers], self._allow, self._own_rules())

    @classmethod
    @accepting
    def recommended(
        cls,
        *,
        deadline: float | str | None = None,
        cache_ttl: float | str | None = None,
        cache_directory: str | None = None,
        sampling: Literal["share", "lanes", "deterministic"] = "share",
        fallbacks: Sequence[object] = (),
        attempts: int = 3,
        rpm: int | None = None,
        tpm: int | None = None,
        concurrency: int | str = 64,
        timeout: float | str = 120,
    ) -> Stack:
        """The stack most programs want; what is not asked for is left out.

        Args:
            deadline: for a whole call, waiting included (seconds or text). Only with one (or `using(deadline=)`) a call
                waits for an open circuit.
            cache_ttl: switches the cache on.
            cache_directory: keeps cached answers on disk too.
            sampling: who shares an answer: "share", "lanes" or "deterministic".
            fallbacks: other endpoints, asked in order when the first fails.
            attempts: tries per endpoint.
            rpm: requests per minute.
            tpm: tokens per minute.
            concurrency: calls in flight per endpoint.
            timeout: per attempt (seconds or text).

        Raises:
            ConfigError: an option's value cannot work.
        """
        # The layers load when they are first needed, so `import llmmw` stays light.
        from llmmw.layers.breaker import CircuitBreaker  # noqa: PLC0415 — as said above
        from llmmw.layers.cache import TTLCache  # noqa: PLC0415 — as said above
        from llmmw.layers.coalesce import Coalescer  # noqa: PLC0415 — as said above
        from llmmw.layers.deadline import Deadline  # noqa: PLC0415 — as said above
        from llmmw.layers.limit import RateLimiter  # noqa: PLC0415 — as said above
        from llmmw.layers.retry import Retry  # noqa: PLC0415 — as said above
        from llmmw.layers.route import ErrorRouter  # noqa: PLC0415 — as said above
        from llmmw.layers.timeout import Timeout  # noqa: PLC0415 — as said above

        for option, value in (("cache_directory", cache_directory), ("sampling", sampling)):
            if cache_ttl is None and value not in {None, "share"}:
                raise ConfigError(
                    f"{option}={value!r} without cache_ttl: say how long answers live, e.g. cache_ttl='12h'"
                )
        chosen: list[Layer] = []
        with named_as_given("Stack.recommended", _GIVEN_AS):
            if deadline is not None:
                chosen.append(Deadline(deadline))
            if cache_ttl is not None:
                chosen.append(TTLCache(cache_ttl, directory=cache_directory, sampling=sampling))
            chosen.append(Coalescer())
            chosen.append(ErrorRouter(fallbacks=fallbacks))  # with one endpoint it waits for an open circuit
            chosen.append(Retry(attempts=attempts))
            chosen.append(CircuitBreaker())
            chosen.append(RateLimiter(rpm=rpm, tpm=tpm, concurrency=concurrency))
            chosen.append(Timeout(timeout))
        return cls(*chosen)

    # ── reading ─────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def layers(self) -> tuple[Layer, ...]:
        """Outermost first."""
        return self._layers

    def check(self) -> tuple[Finding, ...]:
        """What is broken but allowed, and what is merely unwise; empty for a sound stack."""
        return tuple(order.find_violations([layer.role for layer in self._layers], self._own_rules()))

    def explain(self, endpoint: object = None) -> str:
        """The stack as text: its layers with settings, the rules that fixed their order, and any findings.

        Args:
            endpoint: what it will be bound to, as for `bind`; then with its replicas, and the layers they need.
        """
        layers, places = self._layers, ["endpoint"]
        if endpoint is not None:
            from llmmw.endpoints.replicas import replicas_of  # noqa: PLC0415 — likewise
            from llmmw.engine.binding import complete  # noqa: PLC0415 — endpoints load their HTTP engine

            replicas = replicas_of(endpoint)
            layers, places = tuple(complete(layers, [replicas])), replicas.told()
        lines = ["call"]
        per_endpoint = False
        for layer in layers:
            if order.is_per_endpoint(layer.role) and not per_endpoint and layer.role is not Role.CUSTOM:
                per_endpoint = True
                lines.append("  ── below: once per endpoint ──")
            lines.append(f"  ↓ {layer.role:<10} {layer!r}")
        lines += places
        roles = [layer.role for layer in layers]
        every = [*order.RULES, *(rule for _, rule in self._own_rules())]
        rules = [rule for rule in every if rule.outer in roles and rule.inner in roles]
        if rules:
            lines.append("why this order:")
            lines += [f"  {rule.outer} > {rule.inner}: {rule.why}  [{rule.id}]" for rule in rules]
        lines += [f"{finding.severity}: {finding.message}  [{finding.rule}]" for finding in self.check()]
        return "\n".join(lines)

    def _own_rules(self) -> list[tuple[int, Rule]]:
        """Rules that layers bring along besides the general ones, with the place of the layer."""
        found: list[tuple[int, Rule]] = []
        for index, layer in enumerate(self._layers):
            rules: tuple[Rule, ...] = getattr(layer, "rules", ())
            found += [(index, rule) for rule in rules if rule not in order.RULES]
        return found

    def __iter__(self) -> Iterator[Layer]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def __contains__(self, role: object) -> bool:
        return any(layer.role == role for layer in self._layers)

    def __getitem__(self, role: Role | str) -> Layer:
        return self._layers[self._index(role)]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stack) and (self._layers, self._allow) == (other._layers, other._allow)

    def __hash__(self) -> int:
        return hash((self._layers, self._allow))

    def __repr__(self) -> str:
        allow = f", allow={self._allow!r}" if self._allow else ""
        return f"Stack({', '.join(map(repr, self._layers))}{allow})"

    @property
    def cache_directory(self) -> Path | None:
        """Where its cache keeps answers on disk, or None: the place of the secret behind namespaces."""
        return getattr(self[Role.CACHE], "place", None) if Role.CACHE in self else None

    # ── changing (into a new stack) ─────────────────────────────────────────────────────────────────────────────

    def inside(self, role: Role | str, layer: Layer) -> Stack:
        """A stack with `layer` placed directly inside (after) the layer of that role."""
        at = self._index(role) + 1
        return Stack(*self._layers[:at], layer, *self._layers[at:], allow=self._allow)

    def outside(self, role: Role | str, layer: Layer) -> Stack:
        """A stack with `layer` placed directly outside (before) the layer of that role."""
        at = self._index(role)
        return Stack(*self._layers[:at], layer, *self._layers[at:], allow=self._allow)

    def replacing(self, role: Role | str, layer: Layer) -> Stack:
        """A stack with `layer` in place of the layer of that role."""
        at = self._index(role)
        return Stack(*self._layers[:at], layer, *self._layers[at + 1 :], allow=self._allow)

    def without(self, role: Role | str) -> Stack:
        """A stack without the layer of that role."""
        at = self._index(role)
        return Stack(*self._layers[:at], *self._layers[at + 1 :], allow=self._allow)

    def _index(self, role: Role | str) -> int:
        for index, layer in enumerate(self._layers):
            if layer.role == role:
                return index
        present = ", ".join(layer.role for layer in self._layers) or "none"
        raise ConfigError(f"this stack has no {role!r} layer; it has: {present}")

    # ── using ───────────────────────────────────────────────────────────────────────────────────────────────────

    def bind(self, endpoint: object, *, env: Env | None = None) -> Engine:
        """Running state around an endpoint.

        Args:
            endpoint: an `Endpoint`, a base URL, or an async callable from Call to Reply; or a list of such, which are
                then replicas of each other: a `Balancer` spreads the calls, one with default settings where the
                stack has none.
            env: clock, randomness and sinks; the machine's own by default.

        Raises:
            ConfigError: the endpoint is none of these, or one is named twice.
        """
        from llmmw.engine.binding import bind  # noqa: PLC0415 — endpoints load their HTTP engine

        env = Env() if env is None else instance("env", env, Env, "Env(seed=1)")
        bound = bind(() if disabled() else self._layers, endpoint, env)
        handler, bounds = bound.handler, bound.bounds
        timely = None
        if Role.DEADLINE not in self and not disabled():
            from llmmw.layers.deadline import BoundDeadline  # noqa: PLC0415 — layers load when they are first needed

            timely = BoundDeadline(handler, env, math.inf)
        hits = _hit_source(bounds)
        return Engine(handler, bounds=bounds, endpoints=bound.endpoints, env=env, hit_source=hits, timely=timely)

    def wrap(self, function: Callable[P, R], **options: Any) -> Wrapped[P, R]:
        """Put the stack around a sync function, async function or async generator; see `llmmw.edges.function.wrap`."""
        from llmmw.edges.function import wrap  # noqa: PLC0415 — the one import upward: `wrap` is how edges are offered

        return wrap(function, self, **options)


def _hit_source(bounds: Sequence[tuple[str, Bound]]) -> Bound | None:
    """The cache, if everything outside it lets a hit pass untouched."""
    for role, bound in bounds:
        if role == Role.CACHE:
            return bound
        if role not in _TRANSPARENT_TO_HITS:
            return None
    return None


def _check_layer(layer: object) -> None:
    if isinstance(layer, type) or not isinstance(layer, Layer):
        hint = f"; write {layer.__name__}(...)" if isinstance(layer, type) else ""
        raise ConfigError(f"Stack: {layer!r} is not a layer (it needs `role` and `bind(inner, env)`){hint}")
    if not isinstance(layer.role, Role):  # pyright: ignore[reportUnnecessaryIsInstance]  # a user's own layer
        raise ConfigError(f"Stack: {layer!r} has role={layer.role!r}: must be a Role, e.g. llmmw.Role.CUSTOM")


_GIVEN_AS = {
    "Deadline(seconds=": "deadline", "TTLCache(ttl=": "cache_ttl", "TTLCache(directory=": "cache_directory",
    "TTLCache(sampling=": "sampling", "ErrorRouter(fallbacks=": "fallbacks", "Retry(attempts=": "attempts",
    "RateLimiter(rpm=": "rpm", "RateLimiter(tpm=": "tpm", "RateLimiter(concurrency=": "concurrency",
    "Timeout(total=": "timeout",
}  # fmt: skip
"""The option of `Stack.recommended` behind a layer's own."""

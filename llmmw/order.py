"""Where layers may stand: roles, and rules about pairs of roles as data.

`Stack` enforces the rules when it is built and `explain()` prints them; an `OrderError` quotes the rule's *why*.
"""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Literal

import msgspec

from llmmw.errors import ConfigError, OrderError

if TYPE_CHECKING:
    from collections.abc import Sequence


class Role(StrEnum):
    """The job of a layer, by which rules and `Stack.inside/outside/replacing/without` name it."""

    DEADLINE = "deadline"
    CACHE = "cache"
    COALESCE = "coalesce"
    ROUTE = "route"
    BALANCE = "balance"
    RETRY = "retry"
    BREAKER = "breaker"
    BATCH = "batch"
    LIMIT = "limit"
    TIMEOUT = "timeout"
    CUSTOM = "custom"
    """A user's own layer: anywhere, any number of times."""


class Rule(msgspec.Struct, frozen=True):
    """`outer` must stand outside (before) `inner`, because `why`."""

    id: str
    outer: Role
    inner: Role
    why: str
    severity: Literal["error", "warning"] = "error"


class Finding(msgspec.Struct, frozen=True):
    """Something `Stack.check()` noticed; errors raise, warnings are listed."""

    rule: str
    message: str
    severity: Literal["error", "warning"]


def _rule(outer: Role, inner: Role, why: str) -> Rule:
    return Rule(f"{outer}-outside-{inner}", outer, inner, why)


_PER_CALL = (Role.DEADLINE, Role.CACHE, Role.COALESCE, Role.ROUTE, Role.BALANCE)
_PER_ENDPOINT = (Role.RETRY, Role.BREAKER, Role.BATCH, Role.LIMIT, Role.TIMEOUT)

RULES: tuple[Rule, ...] = (
    *(
        _rule(Role.DEADLINE, inner, "the deadline covers everything a call waits for")
        for inner in Role
        if inner not in {Role.DEADLINE, Role.CUSTOM}
    ),
    _rule(Role.CACHE, Role.COALESCE, "a hit joins no flight, and one flight stores once"),
    *(
        _rule(Role.CACHE, inner, "a hit must spend no permit, retry, circuit or fallback")
        for inner in (Role.ROUTE, Role.BALANCE, *_PER_ENDPOINT)
    ),
    *(
        _rule(Role.COALESCE, inner, "identical calls share one chain of attempts, not one each")
        for inner in (Role.ROUTE, Role.BALANCE, *_PER_ENDPOINT)
    ),
    _rule(Role.ROUTE, Role.BALANCE, "a fallback is asked when no replica answers"),
    *(_rule(Role.ROUTE, inner, "policy, health and quota are kept per endpoint") for inner in _PER_ENDPOINT),
    *(_rule(Role.BALANCE, inner, "policy, health and quota are kept per replica") for inner in _PER_ENDPOINT),
    _rule(Role.RETRY, Role.BREAKER, "each attempt is judged, and an open circuit ends the loop"),
    _rule(Role.RETRY, Role.BATCH, "a bad item enters again alone, without its batch mates"),
    _rule(Role.RETRY, Role.LIMIT, "each attempt is billed, and no permit is held during back-off"),
    _rule(Role.RETRY, Role.TIMEOUT, "the time-out is per attempt; Deadline covers the whole call"),
    _rule(Role.BREAKER, Role.BATCH, "nobody queues for a dead endpoint"),
    _rule(Role.BREAKER, Role.LIMIT, "nobody waits for a permit of a dead endpoint"),
    _rule(Role.BREAKER, Role.TIMEOUT, "a time-out is an outcome that the breaker must see"),
    _rule(Role.BATCH, Role.LIMIT, "a batch takes one request permit and the sum of its tokens"),
    _rule(Role.BATCH, Role.TIMEOUT, "waiting for batch mates is not service"),
    _rule(Role.LIMIT, Role.TIMEOUT, "waiting for a permit is not service"),
)

ONE_PER_ROLE = "one-per-role"


def rules_of(role: Role) -> tuple[Rule, ...]:
    """The rules that a role takes part in."""
    return tuple(rule for rule in RULES if role in {rule.outer, rule.inner})


def find_violations(roles: Sequence[Role], own: Sequence[tuple[int, Rule]] = ()) -> list[Finding]:
    """Every rule that a list of roles breaks; and what is merely unwise.

    Args:
        roles: outermost first.
        own: rules that layers bring along, with the index of the layer; "custom" in such a rule means that layer.
    """
    findings: list[Finding] = []
    position = {role: index for index, role in reversed(list(enumerate(roles)))}
    for role in position:
        if role is not Role.CUSTOM and roles.count(role) > 1:
            message = f"two {role} layers: the second would repeat or defeat the first; keep one"
            findings.append(Finding(ONE_PER_ROLE, message, "error"))
    for index, rule in [*((None, rule) for rule in RULES), *own]:
        outer, inner = (
            index if index is not None and role is Role.CUSTOM else position.get(role)
            for role in (rule.outer, rule.inner)
        )
        if outer is not None and inner is not None and outer > inner:
            message = f"{rule.outer} must be outside {rule.inner} ({rule.why})"
            findings.append(Finding(rule.id, message, rule.severity))
    if Role.COALESCE in position and Role.CACHE not in position:
        message = "coalescer without cache: only calls that are in flight together are shared, the next one pays again"
        findings.append(Finding("coalesce-without-cache", message, "warning"))
    return findings


def enforce(roles: Sequence[Role], allow: Sequence[str], own: Sequence[tuple[int, Rule]] = ()) -> None:
    """Raise for the first rule that is broken and not allowed; arguments as for `find_violations`.

    Raises:
        OrderError: naming the rule, its reason and the override.
        ConfigError: `allow` names no rule.
    """
    known = {rule.id for rule in RULES} | {rule.id for _, rule in own} | {ONE_PER_ROLE}
    unknown = [name for name in allow if name not in known]
    if unknown:
        raise ConfigError(f"Stack(allow={unknown!r}): no such rule; rules: {', '.join(sorted(known))}")
    for finding in find_violations(roles, own):
        if finding.severity == "error" and finding.rule not in allow:
            order = " > ".join(roles)
            raise OrderError(
                f"{finding.message}. Got {order}. Rule {finding.rule!r}; allow=({finding.rule!r},) overrides it",
                rule=finding.rule,
            )


def is_per_endpoint(role: Role) -> bool:
    """Whether the layer is bound once per endpoint below a router."""
    return role not in _PER_CALL

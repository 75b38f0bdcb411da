"""Whether a failed attempt is repeated at the same endpoint, and after how long. Pure: time and chance are given."""

from __future__ import annotations

import msgspec

from llmmw.fault import Fault, FaultKind

MAX_JITTER_ON_REQUEST_S = 5.0
"""Retry-After is a lower bound; more jitter than this above it (botocore's bound) would only idle."""

MAX_FREE_TRIES = 20
"""So many 429s of one call do not count as attempts; more, and the server does not mean its own Retry-After."""

_NEVER = frozenset({FaultKind.INVALID, FaultKind.QUOTA, FaultKind.CANCELLED, FaultKind.REFUSED})
"""Not even `x-should-retry: true` revives these."""
_ON_REQUEST_ONLY = frozenset({FaultKind.AUTH, FaultKind.CONTEXT_LENGTH, FaultKind.CONTENT_FILTER})
_COSTLY = frozenset({FaultKind.AMBIGUOUS, FaultKind.MALFORMED})


class Rules(msgspec.Struct, frozen=True):
    """What a caller allows."""

    attempts: int = 3
    base_s: float = 0.5
    cap_s: float = 20.0
    rate_patience_s: float = 60.0
    duplicate_ok: bool = False
    idempotent: bool = False
    """Repeating a lost call once costs computing time only (a local vLLM)."""


class Room(msgspec.Struct, frozen=True):
    """What the surroundings of this call allow."""

    left_s: float | None = None
    """Until the deadline."""
    tries_left: int | None = None
    """Attempts the router still grants."""
    rate_wait_s: float | None = None
    """A longer wait for a rate limit is not worth it: another endpoint could answer."""
    paced: bool = False
    """A limiter inside makes the call wait for what the server asked."""


class Progress(msgspec.Struct, frozen=True):
    """What one call has been through at this endpoint."""

    tries: int = 0
    counted: int = 0
    """Tries that use up `Rules.attempts`."""
    ambiguous: int = 0
    rate_waited_s: float = 0.0


class Verdict(msgspec.Struct, frozen=True):
    """What to do after a failed attempt."""

    again: bool
    wait_s: float
    """Slept before the next attempt; 0 where the limiter inside does the waiting."""
    reason: str
    """Why not again; "" for again."""
    progress: Progress


def cost_of(fault: Fault, *, paced: bool) -> int:
    """What repeating after this fault takes from the retry budget (SPEC 7).

    A 429 behind a limiter costs nothing: the limiter's gate spaces the repetitions, so they cannot pile up, and a
    thousand agents told "in 2 s" by one server all get their answer.
    """
    if fault.kind is FaultKind.RATE and paced:
        return 0
    return 10 if fault.kind in _COSTLY else 5


def decide(rules: Rules, progress: Progress, fault: Fault, *, draw: float, room: Room) -> Verdict:
    """Judge one failed attempt.

    A 429 whose waits, summed up, stay within `rate_patience_s` does not count as an attempt: the server is well and
    said when to come back. Everything else counts, and so does a 429 beyond the patience.

    Args:
        rules: the settings.
        progress: before this attempt.
        fault: how it failed.
        draw: uniform in [0, 1), for the jitter.
        room: what is left of time and tries.
    """
    asked = fault.retry_after_s
    jitter = draw * min(rules.cap_s, rules.base_s * 2.0 ** min(progress.tries, 60))
    delay = jitter if asked is None else asked + min(jitter, MAX_JITTER_ON_REQUEST_S)
    is_rate = fault.kind is FaultKind.RATE
    rate_waited = progress.rate_waited_s + (delay if is_rate else 0.0)
    free_tries = progress.tries - progress.counted
    free = is_rate and rate_waited <= rules.rate_patience_s and free_tries < MAX_FREE_TRIES
    after = Progress(
        tries=progress.tries + 1,
        counted=progress.counted + (not free),
        ambiguous=progress.ambiguous + (fault.kind is FaultKind.AMBIGUOUS),
        rate_waited_s=rate_waited,
    )
    reason = _forbidden(rules, progress, fault) or _unaffordable(rules, after, room, delay, is_rate=is_rate)
    left_to_limiter = is_rate and room.paced and asked is not None
    return Verdict(not reason, 0.0 if left_to_limiter else delay, reason, after)


def _forbidden(rules: Rules, progress: Progress, fault: Fault) -> str:
    """Why this fault is not repeated, however much time there is."""
    if fault.kind in _NEVER:
        return "cannot help"
    if fault.should_retry is False:
        return "the server says not to"
    if fault.kind in _ON_REQUEST_ONLY and not fault.should_retry:
        return "cannot help"
    if fault.kind is FaultKind.AMBIGUOUS and not rules.duplicate_ok:
        allowed = 1 if rules.idempotent else 0
        if progress.ambiguous >= allowed:
            return "may be done already"
    return ""


def _unaffordable(rules: Rules, after: Progress, room: Room, delay: float, *, is_rate: bool) -> str:
    if after.counted >= rules.attempts:
        return "attempts used up"
    if room.tries_left is not None and after.counted >= room.tries_left:
        return "attempts of all endpoints used up"
    if is_rate and room.rate_wait_s is not None and delay > room.rate_wait_s:
        return "another endpoint answers sooner"
    if room.left_s is not None and delay > room.left_s:
        return "beyond the deadline"
    return ""

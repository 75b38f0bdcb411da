"""What happened, as small frozen records. Layers emit them through `Env.emit`; `stats.py` folds them.

An event holds no prompt, answer, key or credential.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from llmmw.answer import NO_USAGE, Usage

CallResult = Literal["hit", "coalesced", "upstream", "failed", "cancelled"]


class Event(msgspec.Struct, frozen=True):
    """Root of all events."""


class CallStarted(Event, frozen=True):
    """A call entered the engine."""

    agent: str | None = None


class CallEnded(Event, frozen=True):
    """A call left the engine; for a stream at the end of its body. Exactly one per CallStarted."""

    result: CallResult
    duration_s: float
    agent: str | None = None
    usage: Usage = NO_USAGE
    """Tokens of the answer, whoever paid for them."""
    error: str = ""
    """Type name of the error, for "failed"."""


class CacheHit(Event, frozen=True):
    """An answer came from the cache."""

    tier: str
    usage: Usage = NO_USAGE
    saved_s: float = 0.0
    """Seconds of service that the original call took."""
    stale: bool = False
    agent: str | None = None


class CacheMiss(Event, frozen=True):
    """The cache was asked and had no answer."""


class CacheStored(Event, frozen=True):
    """An answer was written."""

    size: int


class CacheSkipped(Event, frozen=True):
    """A call or an answer that is not cached, and why."""

    reason: str


class CacheTrouble(Event, frozen=True):
    """The cache did not work (corrupt row, full disk, lock held); the call went on without it."""

    kind: str


class Coalesced(Event, frozen=True):
    """A call joined another in flight."""

    agent: str | None = None


class UpstreamStarted(Event, frozen=True):
    """A request goes to an endpoint (each attempt counts)."""

    endpoint: str
    agent: str | None = None


class UpstreamEnded(Event, frozen=True):
    """An attempt at an endpoint ended; for a stream at the end of its body."""

    endpoint: str
    ok: bool
    duration_s: float
    usage: Usage = NO_USAGE
    agent: str | None = None


class UsageShared(Event, frozen=True):
    """An agent's part of the tokens of a joint request, which itself belongs to nobody."""

    agent: str
    usage: Usage


class RetryScheduled(Event, frozen=True):
    """An attempt failed and will be repeated at the same endpoint."""

    endpoint: str
    fault: str
    wait_s: float


class FellBack(Event, frozen=True):
    """The router turned to another endpoint."""

    source: str
    target: str
    fault: str


class Rerouted(Event, frozen=True):
    """A balancer turned to another replica."""

    source: str
    target: str
    fault: str


class CircuitChanged(Event, frozen=True):
    """A circuit breaker changed its state: "closed", "open" or "half_open"."""

    endpoint: str
    state: str


class LimiterWaited(Event, frozen=True):
    """A call had to wait for a permit (only waits above zero are told)."""

    endpoint: str
    wait_s: float
    agent: str | None = None


class LimiterPaused(Event, frozen=True):
    """A 429 closed the gate of an endpoint for everybody."""

    endpoint: str
    pause_s: float


class RefusedEarly(Event, frozen=True):
    """A layer refused a call before it was sent."""

    layer: str
    reason: str


class BatchFlushed(Event, frozen=True):
    """The batcher released a group."""

    size: int
    cause: str
    """"size", "bytes", "tokens", "interval", "idle", "few" (waiting could not have helped), "together"
    (a `generate_batch` was complete), "deadline", "barrier", "close", "samples" (one request with n), or "offline" (a
    batch API)."""


class ConnectionOpened(Event, frozen=True):
    """The pool opened a connection."""

    origin: str


class ConnectionReused(Event, frozen=True):
    """A request went over a kept-alive connection."""

    origin: str


class Warned(Event, frozen=True):
    """Something the user should know and can mend; told once per engine and kind."""

    kind: str
    message: str

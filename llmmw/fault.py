"""What went wrong, as one of eleven classes (SPEC 7): a reply or an exception becomes a `Fault`."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from llmmw.call import Reply


class FaultKind(StrEnum):
    """The fault classes."""

    NOT_SENT = "not_sent"
    RATE = "rate"
    QUOTA = "quota"
    AUTH = "auth"
    SERVER = "server"
    AMBIGUOUS = "ambiguous"
    CONTEXT_LENGTH = "context_length"
    INVALID = "invalid"
    CONTENT_FILTER = "content_filter"
    MALFORMED = "malformed"
    CANCELLED = "cancelled"
    REFUSED = "refused"
    """llmmw's own refusal (open circuit, no permit in time): nothing was sent."""


class Fault(msgspec.Struct, frozen=True):
    """One failed attempt, classified."""

    kind: FaultKind
    retry_after_s: float | None = None
    """Seconds the server asks to wait, already parsed and clamped; None where it says nothing usable."""
    should_retry: bool | None = None
    """The server's `x-should-retry`, if any."""
    status: int | None = None
    code: str | None = None
    message: str = ""
    """The server's own words, bounded and without secrets."""


def classify(outcome: Reply | BaseException, *, wall: float) -> Fault | None:
    """The fault of an attempt, or None for a success.

    Args:
        outcome: a reply (a status of 400 or more is a fault) or what was raised.
        wall: wall-clock seconds now, against which dates in headers are read when the response has no Date.
    """
    raise NotImplementedError

"""What went wrong, as one of eleven classes (SPEC 7): a reply or an exception becomes a `Fault`.

`bodies.py` reads error bodies, `names.py` foreign exceptions; here they are judged.
"""

from __future__ import annotations

import re
from enum import StrEnum
from typing import TYPE_CHECKING

import msgspec

from llmmw.algo.headers import retry_after
from llmmw.call import Reply
from llmmw.errors import (
    AllEndpointsFailed,
    ConfigError,
    ConnectionFailed,
    LLMMWError,
    ProtocolError,
    Refused,
    ResponseTooLarge,
    StatusError,
    StreamInterrupted,
    UpstreamTimeout,
)
from llmmw.fault import names as foreign
from llmmw.fault.bodies import ErrorBody, decode_error, read_decoded, redact

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


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
    """The server's `x-should-retry`, if any; False also where repeating would only repeat the failure."""
    status: int | None = None
    code: str | None = None
    message: str = ""
    """The server's own words, bounded and without secrets."""
    local: bool = False
    """Our own connection pool was full: the failure says nothing about the endpoint."""


HURTS_ENDPOINT = frozenset({FaultKind.NOT_SENT, FaultKind.SERVER, FaultKind.AMBIGUOUS, FaultKind.MALFORMED})
"""Classes that count against an endpoint's health (unless `local`)."""

HURTS_CREDENTIAL = frozenset({FaultKind.QUOTA, FaultKind.AUTH})
"""Classes that count against the credential only."""

_QUOTA_CODES = frozenset({
    "insufficient_quota", "billing_hard_limit_reached", "billing_not_active", "billing_error", "quota_exceeded",
    "insufficient_balance", "insufficient_credits", "access_terminated", "payment_required", "budget_exceeded",
})  # fmt: skip
_QUOTA_WORDS = re.compile(
    r"credit balance is too low|insufficient (?:balance|credits?|funds)|reached your (?:specified )?api usage limits"
    r"|billing hard limit|insufficient_quota|used all available credits|monthly spending limit"
    r"|out of call volume quota|budget has been exceeded"
)
_AUTH_CODES = frozenset({"invalid_api_key", "authentication_error", "permission_error", "api_key_invalid"})
_FILTER_CODES = frozenset({
    "content_filter", "content_policy_violation", "responsibleaipolicyviolation", "content_filter_error",
})  # fmt: skip
_FILTER_WORDS = re.compile(
    r"content filtering policy|content management policy|flagged by .*moderation|contentpolicyviolationerror"
    r"|flagged as potentially violating|requires moderation"
)
_LENGTH_CODES = frozenset({"context_length_exceeded", "request_too_large", "string_above_max_length", "context_window"})
_LENGTH_WORDS = re.compile(
    r"maximum context length|max_model_len|prompt is too long|context (?:length|window|size) (?:is |was )?exceed"
    r"|exceeds? (?:the |this |your )?(?:model's )?(?:available |maximum )?context"
    r"|input token count .*exceeds|too many (?:input )?tokens|input is too long|maximum prompt length"
    r"|longer than the (?:maximum model|model's context) length|you passed \d+ input tokens"
    r"|input length and .*exceed context limit|reduce the length of the (?:input|messages|prompt)"
    r"|`inputs` (?:tokens \+ `max_new_tokens` must be|must have less than)|contextwindowexceedederror"
)
_RATE_CODES = frozenset({"rate_limit_exceeded", "rate_limit_error", "resource_exhausted"})
_FULL_QUEUE = "try again later or on a different instance"
"""vLLM's refusal of what its queue has no room for, a 503: the server is well, and takes calls again in a moment."""
_NO_ALLOWANCE = re.compile(r"limit: 0(?![\d.])|(?:requests|tokens|models)[- ]per[- ]day|\((?:rpd|tpd)\)")
"""What no wait of seconds heals: a quota per day (OpenAI, Groq, OpenRouter), and Gemini's 429 for a model that the free
tier does not have."""

_MAX_JUDGED = 4000
"""Characters of a message that are searched for words: some of the patterns are quadratic on a hostile one."""

_FINISHED_BY_FILTER = re.compile(
    rb'"(?:finish_reason|stop_reason|finishReason)"\s*:\s*"(?:content_filter|refusal|SAFETY|PROHIBITED_CONTENT|BLOCKLIST)"'
)
_ASKS_AGAIN = frozenset({408, 409, 424, 425, 498})
"""Statuses below 500 that are no judgement on the request: request time-out, conflict (openai: a lock), failed
dependency (TGI, Azure: the generation broke off), too early, and Groq's 498, capacity exceeded."""


def classify(outcome: Reply | BaseException, *, wall: float) -> Fault | None:
    """The fault of an attempt, or None for a success.

    Args:
        outcome: a reply (a status of 400 or more is a fault, and a success that a content filter ended) or what was
            raised. An exception that looks like nothing known (a user's ValueError) is INVALID: not retried, not
            sent elsewhere, no breaker's business.
        wall: wall-clock seconds now, against which dates in headers are read when the response has no Date.
    """
    if isinstance(outcome, Reply):
        return _of_reply(outcome, wall)
    return _of_exception(outcome, wall)


def error_of(reply: Reply, *, wall: float = 0.0) -> StatusError:
    """The exception for a refusal (a reply with status >= 400): the server's words, bounded, without credentials.

    Args:
        reply: the refusal.
        wall: wall-clock seconds now, for a Retry-After date without a Date header.
    """
    fault = _of_reply(reply, wall) or Fault(FaultKind.INVALID)
    said = f": {fault.message}" if fault.message else ""
    return StatusError(
        f"{reply.endpoint or 'the server'} answered {reply.status}{said}",
        endpoint=reply.endpoint,
        status=reply.status,
        code=fault.code,
        fault=fault.kind.value,
        retry_after_s=fault.retry_after_s,
        request_id=reply.header("x-request-id") or reply.header("request-id"),
        attempts=reply.attempts,
    )


def _of_reply(reply: Reply, wall: float) -> Fault | None:
    if reply.ok:
        # Searching costs 0.1 µs for a body without these words; only the rare other one meets the regular expression.
        data = reply.data or b""
        suspect = b"content_filter" in data or b"refusal" in data or b"finishReason" in data
        if suspect and _FINISHED_BY_FILTER.search(data):
            return Fault(FaultKind.CONTENT_FILTER, status=reply.status, code="content_filter")
        return None
    return _of_answer(reply.status, reply.headers, *decode_error(reply.data), wall)


def _of_answer(status: int, headers: Iterable[tuple[str, str]], said: ErrorBody, decoded: object, wall: float) -> Fault:
    pairs = tuple(headers)
    wish = next((value.strip().lower() for name, value in pairs if name == "x-should-retry"), "")
    return Fault(
        kind=_judge(status, said),
        retry_after_s=retry_after(pairs, decoded, wall),
        should_retry={"true": True, "false": False}.get(wish),
        status=status,
        code=said.code or said.inner or said.type or None,
        message=redact(said.message),
    )


class _Refusal(msgspec.Struct, frozen=True):
    """A refusal, as the rules below look at it."""

    status: int
    names: frozenset[str]
    words: str
    said: ErrorBody

    @property
    def is_rate(self) -> bool:
        return self.status == 429 or not self.names.isdisjoint(_RATE_CODES)  # noqa: PLR2004 — HTTP


_RULES: tuple[tuple[FaultKind, Callable[[_Refusal], object]], ...] = (
    # The first that holds. Exact codes stand before words, and what no waiting heals before what waiting does.
    (FaultKind.QUOTA, lambda r: r.status == 402 or r.names & _QUOTA_CODES or r.said.per_day),  # noqa: PLR2004 — HTTP
    (FaultKind.QUOTA, lambda r: _QUOTA_WORDS.search(r.words) or (r.is_rate and _NO_ALLOWANCE.search(r.words))),
    (FaultKind.CONTENT_FILTER, lambda r: r.said.flagged or r.names & _FILTER_CODES or _FILTER_WORDS.search(r.words)),
    (FaultKind.AUTH, lambda r: r.status in {401, 403} or r.names & _AUTH_CODES),
    (FaultKind.CONTEXT_LENGTH, lambda r: r.status == 413 or r.names & _LENGTH_CODES),  # noqa: PLR2004 — HTTP
    (FaultKind.CONTEXT_LENGTH, lambda r: r.status == 400 and r.said.param == "input_tokens"),  # noqa: PLR2004 — HTTP
    (FaultKind.CONTEXT_LENGTH, lambda r: r.is_rate and "request too large" in r.words),
    (FaultKind.RATE, lambda r: r.is_rate),
    # 500: proxies that lose the upstream's status.
    (FaultKind.CONTEXT_LENGTH, lambda r: r.status in {400, 422, 500} and _LENGTH_WORDS.search(r.words)),
    (FaultKind.INVALID, lambda r: r.status in {501, 505}),
    (FaultKind.RATE, lambda r: r.status == 503 and _FULL_QUEUE in r.words),  # noqa: PLR2004 — HTTP
    (FaultKind.SERVER, lambda r: r.status >= 500 or r.status in _ASKS_AGAIN or "overloaded_error" in r.names),  # noqa: PLR2004 — HTTP
)


def _judge(status: int, said: ErrorBody) -> FaultKind:
    refusal = _Refusal(status, said.names, said.message[:_MAX_JUDGED].lower(), said)
    return next((kind for kind, holds in _RULES if holds(refusal)), FaultKind.INVALID)


def _of_exception(error: BaseException, wall: float) -> Fault:
    if isinstance(error, LLMMWError):
        return _of_ours(error, wall)
    if foreign.is_cancelled(error):
        return Fault(FaultKind.CANCELLED)
    status = None if foreign.decides_alone(error) else foreign.status_of(error)
    body = foreign.body_of(error)
    said = read_decoded(body) if body is not None else ErrorBody()
    headers = foreign.headers_of(error)
    if status is not None and status >= 400:  # noqa: PLR2004 — HTTP
        return _of_answer(status, headers, said, body, wall)
    kind = foreign.kind_of(error)
    if kind is None:
        # An SDK's error event inside a stream has a body and no status; a plain exception has neither.
        if not said.names:
            return Fault(FaultKind.INVALID)
        return _of_answer(_STATUS_OF_EVENT.get(said.type, 500), headers, said, body, wall)
    return Fault(
        FaultKind(kind),
        retry_after_s=retry_after(headers, body, wall),
        status=status,
        code=said.code or None,
        message=redact(said.message),
        local=kind == FaultKind.NOT_SENT and foreign.from_pool(error),
    )


_STATUS_OF_EVENT = {
    "invalid_request_error": 400,
    "badrequesterror": 400,
    "bad request": 400,
    "authentication_error": 401,
    "permission_error": 403,
    "not_found_error": 404,
    "notfounderror": 404,
    "rate_limit_error": 429,
    "billing_error": 402,
    "request_too_large": 413,
    "timeout_error": 504,
}
"""An error event in a stream has no status; its type stands for one (else 500)."""


def fault_of_event(decoded: object, *, wall: float) -> Fault | None:
    """The fault in one decoded event of a stream, or None where it is not an error event."""
    if not isinstance(decoded, dict) or not decoded.get("error"):  # pyright: ignore[reportUnknownMemberType]  # JSON
        return None
    said = read_decoded(decoded)  # pyright: ignore[reportUnknownArgumentType]  # JSON
    return _of_answer(_STATUS_OF_EVENT.get(said.type, 500), (), said, decoded, wall)  # pyright: ignore[reportUnknownArgumentType]


_OURS: tuple[tuple[type[LLMMWError], Fault], ...] = (
    (ConfigError, Fault(FaultKind.INVALID)),
    (ProtocolError, Fault(FaultKind.MALFORMED)),
    # The next answer would be as large, so this endpoint is not asked again; another one may behave.
    (ResponseTooLarge, Fault(FaultKind.MALFORMED, should_retry=False)),
    (StreamInterrupted, Fault(FaultKind.AMBIGUOUS, should_retry=False)),
)


def _of_ours(error: LLMMWError, wall: float) -> Fault:
    if isinstance(error, Refused):
        return Fault(FaultKind.REFUSED, retry_after_s=error.retry_after_s, code=type(error).__name__)
    if isinstance(error, AllEndpointsFailed):
        return _of_exception(error.exceptions[-1], wall)
    if isinstance(error, StatusError):
        words = ErrorBody(error.message, error.code or "")
        kind = FaultKind(error.fault) if error.fault else _judge(error.status, words)
        return Fault(kind, error.retry_after_s, status=error.status, code=error.code, message=error.message)
    if isinstance(error, ConnectionFailed) or (isinstance(error, UpstreamTimeout) and not error.sent):
        return Fault(FaultKind.NOT_SENT, local=foreign.from_pool(error))
    return next((fault for kind, fault in _OURS if isinstance(error, kind)), Fault(FaultKind.AMBIGUOUS))

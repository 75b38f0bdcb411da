"""What a server says about its rate limits, read from headers and error bodies. Nothing here raises.

Spellings read: `retry-after` (seconds, duration or HTTP date), `retry-after-ms`, Gemini's `google.rpc.RetryInfo`;
OpenAI, Azure and Groq `x-ratelimit-{limit,remaining,reset}-{requests,tokens}`; Anthropic
`anthropic-ratelimit-{requests,tokens,input-tokens,output-tokens}-{limit,remaining,reset}`. vLLM says nothing of these,
but, where it is asked, how long its queue is (`load.py`).
What cannot be read is ignored and counted, because proxies send garbage: Azure a remaining of -1 and a reset of 0.
"""

from __future__ import annotations

import math
import re
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

import msgspec

from llmmw.algo.load import LOAD_HEADER, load_of_header
from llmmw.answer import items, mapping

if TYPE_CHECKING:
    from collections.abc import Iterable

MAX_WAIT_S = 3600.0
"""A longer wait is clamped: nobody's process should sleep for a day because of one header."""

Measure = Literal["requests", "tokens", "input_tokens", "output_tokens"]

_MAX_TEXT = 64
_PLAIN_DIGITS = 20
_NUMBER = re.compile(r"[+-]?[0-9]{1,20}(?:\.[0-9]{1,20})?(?:[eE][+-]?[0-9]{1,4})?")
_PART = re.compile(r"([0-9]{1,12}(?:\.[0-9]{1,12})?)(ns|us|µs|ms|s|m|h|d)")
_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_PREFIXES = ("x-ratelimit-", "anthropic-ratelimit-")
_MEASURES: dict[str, Measure] = {
    "requests": "requests",
    "tokens": "tokens",
    "input-tokens": "input_tokens",
    "output-tokens": "output_tokens",
}


class Reading(msgspec.Struct, frozen=True):
    """What a server said about one measure; a field is None where it was absent or unusable."""

    measure: Measure
    limit: int | None = None
    remaining: int | None = None
    reset_s: float | None = None
    """Seconds until the full limit is available again, within [0, 3600]."""


class Feedback(msgspec.Struct, frozen=True):
    """All readings of one response, how many values in it were garbage, and how long the server's queue is."""

    readings: tuple[Reading, ...] = ()
    ignored: int = 0
    waiting: int | None = None
    """Sequences in the server's queue, where it says so."""


NO_FEEDBACK = Feedback()


def feedback(headers: Iterable[tuple[str, str]], wall: float) -> Feedback:
    """The rate-limit readings in response headers.

    Args:
        headers: pairs with lower-case names; of a repeated name the first counts.
        wall: seconds since 1970, against which dates are read when the response has no usable Date.
    """
    found: dict[str, str] = {}
    date = waiting = None
    for name, value in headers:
        if name.startswith(_PREFIXES):
            found.setdefault(name, value)
        elif name == "date" and date is None:
            date = value
        elif name == LOAD_HEADER and waiting is None:
            waiting = load_of_header(value).waiting
    if not found:
        return NO_FEEDBACK if waiting is None else Feedback(waiting=waiting)
    readings: dict[Measure, dict[str, float]] = {}
    ignored = 0
    for name, text in found.items():
        place = _split(name)
        if place is None:
            continue
        measure, field = place
        reading = _reset(text, date, wall) if field == "reset" else _count(text)
        if reading is None:
            ignored += 1
        else:
            readings.setdefault(measure, {})[field] = reading
    return Feedback(tuple(_reading(measure, fields) for measure, fields in readings.items()), ignored, waiting)


def retry_after(headers: Iterable[tuple[str, str]], body: object, wall: float) -> float | None:
    """Seconds the server asks to wait, in (0, 3600]; None where it asks nothing that can be used.

    Zero, negative, past, NaN, infinite and unreadable values are None: the caller's own back-off applies.

    Args:
        headers: pairs with lower-case names.
        body: the decoded error body (any JSON value), where Gemini puts its RetryInfo.
        wall: seconds since 1970, against which a date is read when the response has no usable Date.
    """
    found: dict[str, str] = {}
    for name, value in headers:
        if name in {"retry-after", "retry-after-ms", "date"}:
            found.setdefault(name, value)
    candidates = (
        _scaled(_number(found.get("retry-after-ms", "")), 0.001),
        _wait(found.get("retry-after", ""), found.get("date"), wall),
        _retry_info(body),
    )
    for wait in candidates:
        if wait is not None and wait > 0:
            return min(wait, MAX_WAIT_S)
    return None


def duration(text: str) -> float | None:
    """Seconds in "6m0s", "12ms", "1s", "45.837906927s", "1.5" or "1e3"; None if it is none of these or not finite."""
    text = text.strip()
    if len(text) > _MAX_TEXT:
        return None
    plain = _number(text)
    if plain is not None:
        return plain
    total, position = 0.0, 0
    for match in _PART.finditer(text):
        if match.start() != position:
            return None
        total += float(match[1]) * _UNITS[match[2]]
        position = match.end()
    return total if position and position == len(text) else None


def _reading(measure: Measure, fields: dict[str, float]) -> Reading:
    limit, remaining = fields.get("limit"), fields.get("remaining")
    return Reading(
        measure,
        None if limit is None else int(limit),
        None if remaining is None else int(remaining),
        fields.get("reset"),
    )


def _number(text: str) -> float | None:
    """A finite number in plain ASCII (Python's float() would also take "1_000" and Arabic digits)."""
    if text.isdecimal() and text.isascii() and len(text) < _PLAIN_DIGITS:
        return float(text)
    text = text.strip()
    if not _NUMBER.fullmatch(text):
        return None
    value = float(text)
    return value if math.isfinite(value) else None


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _count(text: str) -> float | None:
    value = _number(text)
    return None if value is None or value < 0 or value > 1e15 else value  # noqa: PLR2004 — beyond any provider


def moment(text: str) -> float | None:
    """Seconds since 1970 of an RFC 3339 or HTTP date; None for anything else."""
    text = text.strip()
    if not text or len(text) > _MAX_TEXT:
        return None
    try:
        parsed = datetime.fromisoformat(text) if text[0].isdigit() else parsedate_to_datetime(text)
        return (parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        return None


def _server_time(date: str | None, wall: float) -> float:
    """The server's own clock where it told it: then skew between the two machines does no harm."""
    found = moment(date) if date else None
    return wall if found is None else found


def _wait(text: str, date: str | None, wall: float) -> float | None:
    found = duration(text)
    if found is None:
        until = moment(text)
        found = None if until is None else until - _server_time(date, wall)
    return found


def _reset(text: str, date: str | None, wall: float) -> float | None:
    """A reset as seconds in (0, 3600]; 0 and less are Azure's way of saying nothing."""
    found = _wait(text, date, wall)
    return None if found is None or found <= 0 else min(found, MAX_WAIT_S)


def _retry_info(body: object) -> float | None:
    """`retryDelay` of google.rpc.RetryInfo, in an error or in Gemini's list of one error."""
    root = mapping(body) or (mapping(items(body)[0]) if items(body) else {})
    for detail in items(mapping(root.get("error")).get("details")):
        entry = mapping(detail)
        delay = entry.get("retryDelay")
        if isinstance(delay, str) and str(entry.get("@type", "")).endswith("google.rpc.RetryInfo"):
            return duration(delay)
    return None


@lru_cache(maxsize=64)
def _split(name: str) -> tuple[Measure, str] | None:
    """("requests", "limit") from "x-ratelimit-limit-requests" or "anthropic-ratelimit-requests-limit"."""
    if name.startswith("x-"):
        field, _, what = name[len("x-ratelimit-") :].partition("-")
    else:
        what, _, field = name[len("anthropic-ratelimit-") :].rpartition("-")
    measure = _MEASURES.get(what)
    return None if measure is None or field not in {"limit", "remaining", "reset"} else (measure, field)

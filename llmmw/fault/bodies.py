"""What an error body says, whichever of the usual shapes it has: OpenAI, Azure, Anthropic, Gemini, vLLM, FastAPI, text.

`classify.py` judges what is read here. Nothing raises: a body from a server may be anything.
"""

from __future__ import annotations

import re
from typing import Any, cast

import msgspec

from llmmw.answer import items, mapping

MAX_MESSAGE = 500
"""Characters of a server's message that are kept."""

_MAX_BODY = 256 * 1024
"""A longer error body is a page, not a message, and is not decoded."""

_SECRET = re.compile(
    r"(?i)(bearer\s+)\S+"
    r"|((?:api[-_ ]?key|[?&]key|token|secret|password)[\"']?\s*[=:]\s*[\"']?)[^\s\"'&,;]+"
    r"|\b(?:sk|pk|rk|gsk|xai|hf|key|r8|pplx)[-_][\w*.\-]{6,}"
    r"|\bAIza[\w\-]{8,}|\beyJ[\w\-]{8,}\.[\w.\-]+"
    r"|\b(?=[a-f0-9]*\d)[a-f0-9]{32,}\b"
)


class ErrorBody(msgspec.Struct, frozen=True):
    """An error as the server put it; empty where it said nothing."""

    message: str = ""
    code: str = ""
    """The server's code, lower-case ("context_length_exceeded"); never the HTTP status repeated."""
    type: str = ""
    """The server's type or Google's status, lower-case ("overloaded_error", "resource_exhausted")."""
    param: str = ""
    inner: str = ""
    """A more exact code below the first one (Azure's innererror, Google's ErrorInfo reason), lower-case."""
    per_day: bool = False
    """A quota per day is named in the details (Google)."""
    flagged: bool = False
    """The details say that moderation flagged the input (OpenRouter)."""

    @property
    def names(self) -> frozenset[str]:
        """All codes together."""
        return frozenset((self.code, self.type, self.inner)) - {""}


def redact(text: str) -> str:
    """A message without what looks like a credential, on one line, bounded."""
    shown = _SECRET.sub(lambda found: (found[1] or found[2] or "") + "***", text[: 4 * MAX_MESSAGE])
    shown = " ".join(shown.split())
    return shown if len(shown) <= MAX_MESSAGE else shown[: MAX_MESSAGE - 1] + "…"


def decode_error(body: bytes | None) -> tuple[ErrorBody, object]:
    """Read the body of a refusal: what it says, and its decoded JSON (None if it is none)."""
    if not body or len(body) > _MAX_BODY:
        return ErrorBody(), None
    try:
        decoded = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        text = body[: 8 * MAX_MESSAGE].decode("utf-8", "replace").strip()
        return ErrorBody("" if text.startswith("<") else text), None
    return read_decoded(decoded), decoded


def read_decoded(value: object) -> ErrorBody:
    """Read decoded JSON (an SDK's exception carries that)."""
    for _ in range(3):  # Gemini wraps a streamed error in a list; proxies wrap one error in another
        if isinstance(value, list):
            value = cast("list[object]", value)[0] if value else None
        elif isinstance(value, dict) and "errors" in value and "error" not in value:
            value = cast("dict[str, object]", value)["errors"]
        else:
            break
    if isinstance(value, str):
        return ErrorBody(value)
    root = mapping(value)  # pyright: ignore[reportUnknownArgumentType]  # JSON
    if "detail" in root and "error" not in root:
        return ErrorBody(_detail(root["detail"]))
    error = root.get("error")
    if isinstance(error, str):
        said = root.get("message")
        return ErrorBody(said if isinstance(said, str) else error, _word(root.get("code")), _word(root.get("type")))
    return _read_object(mapping(error) or root)


def _read_object(error: dict[str, Any]) -> ErrorBody:
    message = error.get("message")
    if not isinstance(message, str):
        message = _detail(mapping(message).get("detail")) if message else ""
    inner = _word(mapping(error.get("innererror")).get("code"))
    per_day = False
    for detail in map(mapping, items(error.get("details"))):
        inner = inner or _word(detail.get("reason"))
        quotas = [mapping(detail.get("metadata")).get("quota_limit")]
        quotas += [mapping(violation).get("quotaId") for violation in items(detail.get("violations"))]
        per_day = per_day or any("perday" in str(quota).lower() for quota in quotas)
    kind = _word(error.get("type"))
    if kind in {"", "error"}:
        kind = _word(error.get("status")) or kind
    flagged = "flagged_input" in mapping(error.get("metadata"))
    return ErrorBody(message, _word(error.get("code")), kind, _word(error.get("param")), inner, per_day, flagged)


def _word(value: object) -> str:
    """A code as lower-case text; a number is the HTTP status again and says nothing new."""
    if not isinstance(value, str) or value.isdigit():
        return ""
    return value.lower()[:80]


def _detail(detail: object) -> str:
    """FastAPI's detail: text, or a list of {loc, msg}."""
    if isinstance(detail, str):
        return detail
    if isinstance(detail, dict):
        found = mapping(cast("object", detail))
        return str(found.get("message") or found.get("msg") or found.get("error") or "")
    parts = [
        f"{'.'.join(map(str, items(part.get('loc'))))}: {part.get('msg', '')}" for part in map(mapping, items(detail))
    ]
    return "; ".join(parts)


_LIMITS = (
    re.compile(r"(?:context|prompt|model) (?:length|window)(?: is| of| limit is|:)?(?: only)? \(?(\d+)"),
    re.compile(r"(?:> |with )(\d+) maximum"),
    re.compile(r"tokens allowed \((\d+)\)"),
    re.compile(r"max_model_len[= ](\d+)"),
    re.compile(r"`inputs` (?:tokens \+ `max_new_tokens` must be <=|must have less than) (\d+)"),
)


def context_limit(message: str) -> int | None:
    """The context length, in tokens, that a "too long" message names."""
    text = message.lower().replace(",", "")
    for pattern in _LIMITS:
        found = pattern.search(text)
        if found is not None:
            return int(found[1][:12])
    return None

"""Replies and errors as what an HTTP client sees: a response in parts, or the name of its library's exception."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import msgspec

from llmmw.errors import (
    AllEndpointsFailed,
    ConnectionFailed,
    LLMMWError,
    ProtocolError,
    RateLimited,
    Refused,
    ResponseTooLarge,
    StaleConnection,
    StatusError,
    UpstreamTimeout,
)
from llmmw.wire import HOP_BY_HOP

if TYPE_CHECKING:
    from llmmw.call import Reply

RawHeaders = list[tuple[bytes, bytes]]
Failure = Literal["ReadTimeout", "ConnectTimeout", "ConnectError", "ReadError", "RemoteProtocolError"]
"""Exception classes that httpx and httpx2 both have."""

_NOT_RETURNED = HOP_BY_HOP | {"content-length", "content-encoding"}
"""The body has been decoded."""
_OF_ONE_CONNECTION = frozenset({"set-cookie", "date", "age"})
"""Not repeated with an answer that this request did not cause."""


class Answer(msgspec.Struct, frozen=True):
    """A response in parts: what an HTTP library needs to build its own."""

    status: int
    headers: RawHeaders
    body: bytes = b""


def answer_of(reply: Reply, *, final: bool) -> Answer:
    """The response to a reply; of a stream without its body.

    Args:
        reply: from the engine.
        final: whether a refusal has been repeated already, so that the SDK need not.
    """
    source = reply.source
    own = source not in {"cache", "coalesced"}
    headers: RawHeaders = []
    typed = False
    for name, value in reply.headers:
        if name in _NOT_RETURNED or not (own or name not in _OF_ONE_CONNECTION):
            continue
        if name == "x-should-retry" and final and not reply.ok:
            continue
        typed = typed or name == "content-type"
        headers.append((name.encode("latin-1"), value.encode("latin-1")))
    if not typed and reply.ok:  # an answer out of a store, or of another kind of endpoint
        headers.append((b"content-type", b"application/json" if reply.chunks is None else b"text/event-stream"))
    headers.append((b"x-llmmw-source", source.encode()))
    headers.append((b"x-llmmw-attempts", _count_attempts(reply)))
    if reply.fallback:
        headers.append((b"x-llmmw-endpoint", reply.endpoint.encode("latin-1", "replace")))
    if final and not reply.ok:
        headers.append((b"x-should-retry", b"false"))
    body = reply.data or b""
    if reply.chunks is None:
        headers.append((b"content-length", b"%d" % len(body)))
    return Answer(reply.status, headers, body)


def _count_attempts(reply: Reply) -> bytes:
    # A refusal's own attempt is among its attempts, where a Retry layer made the list.
    return b"0" if reply.source == "cache" else b"%d" % max(1, len(reply.attempts) + reply.ok)


def failure_of(error: BaseException) -> Answer | Failure:
    """What an HTTP client sees of an error of llmmw: a response, or the name of its library's exception."""
    if isinstance(error, AllEndpointsFailed):
        found = failure_of(error.exceptions[-1])
        waits = [getattr(one, "retry_after_s", None) for one in error.exceptions]
        soonest = min((wait for wait in waits if wait is not None), default=None)
        return _refusal(found.status, error, soonest) if isinstance(found, Answer) else found
    if isinstance(error, StatusError):
        return _refusal(error.status, error, error.retry_after_s, error.code)
    if isinstance(error, Refused):
        return _refusal(429 if isinstance(error, RateLimited) else 503, error, error.retry_after_s)
    kind = stream_failure(error)
    if isinstance(error, ProtocolError | ResponseTooLarge) or kind is None:
        return _refusal(502, error)
    return kind


def stream_failure(error: BaseException) -> Failure | None:
    """The library's exception for an error of the way to the server; None where it has none."""
    if isinstance(error, UpstreamTimeout):
        return "ReadTimeout" if error.sent else "ConnectTimeout"
    if isinstance(error, ConnectionFailed):
        return "ConnectError"
    if isinstance(error, StaleConnection | ProtocolError):
        return "RemoteProtocolError"
    return "ReadError" if isinstance(error, LLMMWError) and not isinstance(error, Refused) else None


_SNAKE = str.maketrans({letter: f"_{letter.lower()}" for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"})


def _refusal(status: int, error: BaseException, retry_after_s: float | None = None, code: str | None = None) -> Answer:
    """A response in llmmw's own name; its body has the shape of OpenAI's and of Anthropic's errors at once."""
    kind = type(error).__name__.translate(_SNAKE).removeprefix("_")
    message = error.message if isinstance(error, LLMMWError) else str(error)
    told = {"message": f"llmmw: {message}", "type": kind, "param": None, "code": code or kind}
    body = msgspec.json.encode({"type": "error", "error": told})
    headers: RawHeaders = [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
        (b"x-should-retry", b"false"),
        (b"x-llmmw-attempts", b"%d" % len(getattr(error, "attempts", ()))),
    ]
    if retry_after_s is not None and 0 <= retry_after_s < math.inf:
        headers.append((b"retry-after", b"%d" % math.ceil(retry_after_s)))
    return Answer(status, headers, body)

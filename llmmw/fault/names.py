"""What an exception of a foreign library means, told by duck typing: no SDK or HTTP library is imported.

Names are looked up along the class's MRO, so subclasses count. Known: openai, anthropic, litellm, google-genai,
httpx/httpx2, httpcore, aiohttp, requests, urllib3 and the operating system's errors.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import ssl
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from collections.abc import Iterator

_BY_NAME: dict[str, str] = {
    # nothing left this machine
    "ConnectError": "not_sent",
    "ConnectTimeout": "not_sent",
    "ConnectTimeoutError": "not_sent",
    "ConnectionTimeoutError": "not_sent",  # aiohttp: while connecting
    "NewConnectionError": "not_sent",
    "NameResolutionError": "not_sent",
    "PoolTimeout": "not_sent",
    "ProxyError": "not_sent",
    "ClientConnectorError": "not_sent",  # aiohttp: refused, DNS, TLS
    "ClientSSLError": "not_sent",
    "SSLError": "not_sent",
    # sent, and then nothing is known
    "APITimeoutError": "ambiguous",
    "APIConnectionError": "ambiguous",
    "Timeout": "ambiguous",
    "TimeoutException": "ambiguous",
    "ReadTimeoutError": "ambiguous",
    "ServerTimeoutError": "ambiguous",
    "NetworkError": "ambiguous",
    "RemoteProtocolError": "ambiguous",
    "ServerDisconnectedError": "ambiguous",
    "ClientOSError": "ambiguous",
    "ClientPayloadError": "ambiguous",
    "ChunkedEncodingError": "ambiguous",
    "IncompleteRead": "ambiguous",
    # a success status with a body that is no answer
    "APIResponseValidationError": "malformed",
    "ContentTypeError": "malformed",
    "DecodingError": "malformed",
    # the server's judgement, where an SDK has a class for it
    "ContextWindowExceededError": "context_length",
    "ContentPolicyViolationError": "content_filter",
    "ContentFilterFinishReasonError": "content_filter",
    "BudgetExceededError": "quota",
    "AuthenticationError": "auth",
    "PermissionDeniedError": "auth",
    "RateLimitError": "rate",
    "OverloadedError": "server",
    "ServiceUnavailableError": "server",
    "InternalServerError": "server",
    # a request that can never be sent
    "UnsupportedProtocol": "invalid",
    "InvalidURL": "invalid",
    "LocalProtocolError": "invalid",
    "TooManyRedirects": "invalid",
}

_DECIDES_BEFORE_STATUS = frozenset({
    "ContextWindowExceededError", "ContentPolicyViolationError", "ContentFilterFinishReasonError",
    "BudgetExceededError", "APIResponseValidationError", "ContentTypeError", "APIConnectionError",
    "APITimeoutError", "Timeout",
})  # fmt: skip
"""Classes that know more than their status: litellm gives a lost connection a made-up 500 and a time-out a 408."""

_WRAPPERS = frozenset(
    {"APIConnectionError", "APITimeoutError", "Timeout", "ConnectionError", "URLError", "MaxRetryError"}
)
"""An SDK's connection error: whether anything was sent is known only by its cause."""

_UNREACHABLE = frozenset({errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EADDRNOTAVAIL, errno.ENETDOWN, errno.EMFILE})

_MAX_CHAIN = 16


def _names(error: BaseException) -> list[str]:
    return [cls.__name__ for cls in type(error).__mro__]


def causes(error: BaseException) -> Iterator[BaseException]:
    """The exception and, outermost first, what it says it was caused by (bounded, cycle-safe)."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen and len(seen) < _MAX_CHAIN:
        seen.add(id(current))
        yield current
        following = current.__cause__
        if following is None and not current.__suppress_context__:
            following = current.__context__
        current = following


def _is_timeout(error: BaseException) -> bool:
    return isinstance(error, TimeoutError) or any("Timeout" in name for name in _names(error))


def is_cancelled(error: BaseException) -> bool:
    """Whether the caller's own cancellation (or Ctrl-C, or exit) is behind this exception.

    A time-out ends the search: `asyncio.timeout` raises TimeoutError from the CancelledError it caused itself.
    """
    for link in causes(error):
        if not isinstance(link, Exception):
            return True
        if _is_timeout(link):
            return False
        for name in ("original_exception", "original_error", "exception"):
            held = getattr(link, name, None)
            if isinstance(held, asyncio.CancelledError | KeyboardInterrupt):
                return True
        if isinstance(link, BaseExceptionGroup):
            members = cast("tuple[BaseException, ...]", link.exceptions)  # pyright: ignore[reportUnknownMemberType]
            if any(is_cancelled(member) for member in members):
                return True
    return False


def status_of(error: BaseException) -> int | None:
    """The HTTP status an exception carries, under any of the usual names."""
    response = getattr(error, "response", None)
    candidates = (
        getattr(error, "status_code", None),
        getattr(error, "status", None),
        getattr(response, "status_code", None),
        getattr(response, "status", None),
        getattr(error, "code", None),  # google-genai, urllib
    )
    for value in candidates:
        if isinstance(value, int) and not isinstance(value, bool) and 100 <= value <= 599:  # noqa: PLR2004 — HTTP
            return int(value)
    return None


def headers_of(error: BaseException) -> tuple[tuple[str, str], ...]:
    """Response headers of the answer behind an exception, with lower-case names."""
    for holder in (getattr(error, "response", None), error):
        headers = getattr(holder, "headers", None)
        pairs = getattr(headers, "items", None)
        if callable(pairs):
            found = cast("Any", pairs())
            return tuple((str(name).lower(), str(value)) for name, value in found)
    return ()


def body_of(error: BaseException) -> object:
    """The error body an SDK kept, decoded; None where it kept none."""
    for name in ("body", "details"):
        value = getattr(error, name, None)
        if isinstance(value, dict | list | str):
            return cast("object", value)
    return None


def decides_alone(error: BaseException) -> bool:
    """Whether the class says more than the status it carries."""
    return not _DECIDES_BEFORE_STATUS.isdisjoint(_names(error))


def from_pool(error: BaseException) -> bool:
    """Whether our own connection pool was full: the endpoint has no part in it."""
    return any("PoolTimeout" in _names(link) for link in causes(error))


def kind_of(error: BaseException) -> str | None:
    """The fault class (its value) of a foreign exception without a status; None for one that says nothing."""
    names = _names(error)
    if not _WRAPPERS.isdisjoint(names):
        for cause in list(causes(error))[1:]:
            inner = _kind_of_one(cause, _names(cause))
            if inner is not None:
                return inner
    return _kind_of_one(error, names)


def _kind_of_one(error: BaseException, names: list[str]) -> str | None:
    if isinstance(error, OSError):
        found = _kind_of_os_error(error)
        if found is not None:
            return found
    for name in names:
        if name in _BY_NAME:
            return _BY_NAME[name]
    return None


def _kind_of_os_error(error: OSError) -> str | None:
    """None for those of files: they are the function's own business."""
    if isinstance(error, ConnectionRefusedError | socket.gaierror | ssl.SSLError) or error.errno in _UNREACHABLE:
        return "not_sent"
    if any(name in _BY_NAME for name in _names(error)):
        return None  # aiohttp's and requests' errors derive from OSError and are more exact
    return "ambiguous" if isinstance(error, ConnectionError | TimeoutError) else None

"""The error tree.

    LLMMWError
    ├── ConfigError (also ValueError)         found when something is built
    │   ├── OrderError                        layers in an order that breaks a rule
    │   └── MissingExtra (also ImportError)   an optional package is not installed
    ├── Refused                               never sent; `retry_after_s` says when it may work
    │   ├── RateLimited   CircuitOpen   QueueFull   DeadlineExceeded   Closed
    ├── UpstreamError                         sent, or tried to be; `status`, `endpoint`
    │   ├── StatusError                       the server answered with a status of 400 or more
    │   ├── UpstreamTimeout   ConnectionFailed   StaleConnection   AmbiguousOutcome
    │   ├── ProtocolError                     a success status with a body that is no answer
    │   ├── ResponseTooLarge
    │   └── StreamInterrupted                 broke after bytes were delivered; `partial`, `usage`
    │       └── TruncatedStream (also ProtocolError)   ended without its terminator or finish reason
    └── AllEndpointsFailed (also ExceptionGroup)   one error per endpoint

Every error pickles, lists the `attempts` that led to it, and holds no header, body, stream or socket.
"""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any, Self, TypeVar

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llmmw.answer import Usage
    from llmmw.call import Attempt


E = TypeVar("E", bound=BaseException)


class LLMMWError(Exception):
    """Root of everything llmmw raises itself."""

    attempts: tuple[Attempt, ...] = ()
    """Every try that was made, oldest first."""
    exchange: int = 0
    """Number of the request that carried several calls (see `Reply.exchange`)."""

    def __init__(self, message: str = "", *, attempts: tuple[Attempt, ...] = ()) -> None:
        super().__init__(message)
        if attempts:
            self.attempts = attempts

    @property
    def message(self) -> str:
        """The text without notes."""
        return str(self.args[0]) if self.args else ""


class ConfigError(LLMMWError, ValueError):
    """A setting that cannot work; the message names option, value and what is allowed."""


class OrderError(ConfigError):
    """Layers in an order that breaks a rule; `rule` is its id, which `Stack(..., allow=(id,))` overrides."""

    def __init__(self, message: str = "", *, rule: str = "") -> None:
        super().__init__(message)
        self.rule = rule


class MissingExtra(ConfigError, ImportError):
    """An optional package is missing; the message holds the pip command that adds it."""


class Refused(LLMMWError):
    """The call was never sent (but see `DeadlineExceeded.sent`), so it cost nothing and may be made again."""

    def __init__(
        self,
        message: str = "",
        *,
        retry_at: float | None = None,
        retry_after_s: float | None = None,
        attempts: tuple[Attempt, ...] = (),
    ) -> None:
        super().__init__(message, attempts=attempts)
        self.retry_at = retry_at
        """Monotonic time (env clock) from which the call may succeed, if known."""
        self.retry_after_s = retry_after_s
        """The same as seconds from when the error was raised."""


class RateLimited(Refused):
    """The limiter predicts no permit before the deadline, or the call is larger than the whole limit."""


class CircuitOpen(Refused):
    """The circuit breaker of the endpoint is open."""


class QueueFull(Refused):
    """A bounded queue is full."""


class DeadlineExceeded(Refused):
    """The caller's deadline passed, or too little of it is left for an attempt.

    The one refusal that may come when the call is under way: with `sent` the request may be served and billed.
    """

    def __init__(
        self,
        message: str = "",
        *,
        sent: bool = False,
        retry_at: float | None = None,
        retry_after_s: float | None = None,
        attempts: tuple[Attempt, ...] = (),
    ) -> None:
        super().__init__(message, retry_at=retry_at, retry_after_s=retry_after_s, attempts=attempts)
        self.sent = sent


class Closed(Refused):
    """The engine, client or pool was closed."""


class UpstreamError(LLMMWError):
    """Something went wrong at or on the way to an endpoint."""

    def __init__(
        self,
        message: str = "",
        *,
        endpoint: str = "",
        status: int | None = None,
        attempts: tuple[Attempt, ...] = (),
    ) -> None:
        super().__init__(message, attempts=attempts)
        self.endpoint = endpoint
        self.status = status


class StatusError(UpstreamError):
    """The server answered with a status of 400 or more."""

    def __init__(
        self,
        message: str = "",
        *,
        endpoint: str = "",
        status: int = 0,
        code: str | None = None,
        fault: str = "",
        retry_after_s: float | None = None,
        request_id: str | None = None,
        attempts: tuple[Attempt, ...] = (),
    ) -> None:
        super().__init__(message, endpoint=endpoint, status=status, attempts=attempts)
        self.status: int = status
        self.code = code
        """The server's own code or type, such as "context_length_exceeded"."""
        self.fault = fault
        """Fault class (SPEC 7)."""
        self.retry_after_s = retry_after_s
        self.request_id = request_id


class UpstreamTimeout(UpstreamError):
    """No complete answer in time; `sent` says whether the request may have been served."""

    def __init__(
        self,
        message: str = "",
        *,
        endpoint: str = "",
        sent: bool = True,
        attempts: tuple[Attempt, ...] = (),
    ) -> None:
        super().__init__(message, endpoint=endpoint, attempts=attempts)
        self.sent = sent


class ConnectionFailed(UpstreamError):
    """No connection, or none from the pool in time: the request was not sent."""


class PoolTimeout(ConnectionFailed):
    """Our own pool had no connection free in time: not sent, and no sign of a sick endpoint."""


class StaleConnection(UpstreamError):
    """A kept-alive connection died before any byte of the response."""


class AmbiguousOutcome(UpstreamError):
    """Sent, then lost: the server may have done (and billed) the work, so it is not repeated by itself."""


class AmbiguousTimeout(AmbiguousOutcome, UpstreamTimeout):
    """A time-out after sending that was not repeated, because the work may be done and billed."""


class ProtocolError(UpstreamError):
    """A success status with a body that is no answer (HTML, cut-off JSON, an error object, no choices)."""


class ResponseTooLarge(UpstreamError):
    """The body, a line or the headers exceed the configured bound."""


class StreamInterrupted(UpstreamError):
    """A stream broke after something had been delivered."""

    def __init__(
        self,
        message: str = "",
        *,
        endpoint: str = "",
        partial: str = "",
        usage: Usage | None = None,
        attempts: tuple[Attempt, ...] = (),
    ) -> None:
        super().__init__(message, endpoint=endpoint, attempts=attempts)
        self.partial = partial
        """The text that had arrived, of the first choice."""
        self.usage = usage


class TruncatedStream(StreamInterrupted, ProtocolError):
    """A stream ended without its terminator or without a finish reason."""


class AllEndpointsFailed(LLMMWError, ExceptionGroup[Exception]):
    """Every endpoint of the router failed; `exceptions` holds the last error of each, in the order asked.

    It always pickles: of a member that does not (the SDKs' exceptions), type and text arrive as an UpstreamError.
    """

    def __new__(cls, message: str, exceptions: Sequence[Exception], *, attempts: tuple[Attempt, ...] = ()) -> Self:
        """Groups are made in `__new__`."""
        del attempts
        return super().__new__(cls, message, exceptions)

    def __init__(self, message: str, exceptions: Sequence[Exception], *, attempts: tuple[Attempt, ...] = ()) -> None:
        Exception.__init__(self, message, exceptions)
        if attempts:
            self.attempts = attempts

    def derive(self, excs: Sequence[Exception], /) -> AllEndpointsFailed:  # type: ignore[override]  # narrower on purpose
        """A group of the same kind, as `split` and `subgroup` need."""
        return AllEndpointsFailed(self.message, excs, attempts=self.attempts)

    def __reduce__(self) -> tuple[Any, ...]:
        """Members that do not survive the journey travel as what they say."""
        members = [error if _survives(error) else UpstreamError(_said(error)) for error in self.exceptions]
        return (type(self), (self.message, members), self.__dict__)


def bare(error: E) -> E:
    """The same error without the frames it came through and without what other libraries raised before it.

    Those hold the request with its headers, the body and the connection, for as long as somebody keeps the error.
    """
    cause = error.__cause__
    error.__cause__ = bare(cause) if isinstance(cause, LLMMWError) and cause is not error else None
    error.__context__ = None
    return error.with_traceback(None)


def _survives(error: Exception) -> bool:
    try:
        return type(pickle.loads(pickle.dumps(error))) is type(error)  # noqa: S301 — our own bytes
    except Exception:  # noqa: BLE001 — a foreign class may raise anything
        return False


def _said(error: Exception) -> str:
    try:
        text = str(error)
    except Exception:  # noqa: BLE001 — likewise
        text = "without words"
    return f"{type(error).__qualname__}: {text[:500]}"

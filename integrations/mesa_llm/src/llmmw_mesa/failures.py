"""What went wrong, as the exception that Mesa-LLM's users catch: LiteLLM's own, with the attempts as a note."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import litellm

from llmmw import (
    AllEndpointsFailed,
    CircuitOpen,
    ConfigError,
    DeadlineExceeded,
    LLMMWError,
    RateLimited,
    StatusError,
    UpstreamTimeout,
)
from llmmw.fault import error_of
from llmmw_mesa.upstream import OnlyTry

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llmmw.call import Attempt, Reply

_BY_STATUS: dict[int, Any] = {
    400: litellm.BadRequestError,
    401: litellm.AuthenticationError,
    403: litellm.PermissionDeniedError,
    404: litellm.NotFoundError,
    408: litellm.Timeout,
    422: litellm.UnprocessableEntityError,
    429: litellm.RateLimitError,
    503: litellm.ServiceUnavailableError,
}


def refused(reply: Reply, model: str) -> Exception:
    """The exception for a refusal: LiteLLM's own object, or for a follower one like it."""
    if isinstance(reply.native, Exception):
        return _noted(reply.native, reply.attempts)
    return _noted(_made(reply.status, str(error_of(reply)), model), reply.attempts)


def failed(error: Exception, model: str) -> Exception:
    """The exception for what was raised on the way. Settings that cannot work stay llmmw's own ConfigError."""
    if isinstance(error, OnlyTry):
        return error.error
    if not isinstance(error, LLMMWError) or isinstance(error, ConfigError):
        return error
    if isinstance(error, AllEndpointsFailed) and error.exceptions:
        return _noted(failed(error.exceptions[-1], model), error.attempts)
    cause = error.__cause__
    if isinstance(cause, Exception) and type(cause).__module__.startswith("litellm"):
        return _noted(cause, error.attempts)
    return _noted(_translated(error, model), error.attempts)


def _translated(error: LLMMWError, model: str) -> Exception:
    said, provider = f"{type(error).__name__}: {error}", _provider(model)
    if isinstance(error, StatusError):
        made = _made(error.status or 500, said, model)
    elif isinstance(error, RateLimited):
        made = litellm.RateLimitError(message=said, llm_provider=provider, model=model)
    elif isinstance(error, DeadlineExceeded | UpstreamTimeout):
        made = litellm.Timeout(message=said, model=model, llm_provider=provider)
    elif isinstance(error, CircuitOpen):
        made = litellm.ServiceUnavailableError(message=said, llm_provider=provider, model=model)
    else:
        made = litellm.APIConnectionError(message=said, llm_provider=provider, model=model)
    made.__cause__ = error
    return made


def _made(status: int, said: str, model: str) -> Exception:
    kind = _BY_STATUS.get(status)
    provider = _provider(model)
    if kind is None:
        other: Exception = litellm.APIError(status_code=status, message=said, llm_provider=provider, model=model)
        return other
    if kind in {litellm.PermissionDeniedError, litellm.UnprocessableEntityError}:
        import httpx  # noqa: PLC0415 — only these two classes insist on a response

        response = httpx.Response(status, request=httpx.Request("POST", "http://127.0.0.1"))
        found: Exception = kind(message=said, llm_provider=provider, model=model, response=response)
        return found
    made: Exception = kind(message=said, llm_provider=provider, model=model)
    return made


def _provider(model: str) -> str:
    return model.partition("/")[0]


def _noted(error: Exception, attempts: Sequence[Attempt]) -> Exception:
    if len(attempts) > 1:
        told = ", ".join(one.error or (str(one.status) if one.status else "ok") for one in attempts)
        note = f"llmmw tried {len(attempts)} times: {told}"
        if note not in getattr(error, "__notes__", ()):
            error.add_note(note)
    return error

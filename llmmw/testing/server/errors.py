"""Refusals, and their bodies in the three shapes that clients meet: vLLM, OpenAI, Anthropic."""

from collections.abc import Mapping
from typing import Any, Final

ANTHROPIC_TYPES: Final[Mapping[int, str]] = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    529: "overloaded_error",
}


class ApiError(Exception):
    """A refusal that becomes a response.

    Attributes:
        status: the HTTP status.
        kind: vLLM's ``error.type``.
        param: the offending field, or None.
        code: OpenAI's ``error.code`` text; the vLLM shape carries the status there.
        openai_kind: OpenAI's ``error.type``.
        headers: extra response headers.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "BadRequestError",
        param: str | None = None,
        code: str | None = None,
        openai_kind: str = "invalid_request_error",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.param = param
        self.code = code
        self.openai_kind = openai_kind
        self.headers: Mapping[str, str] = headers or {}

    def body(self, style: str) -> dict[str, Any]:
        """The JSON body in the shape ``vllm``, ``openai`` or ``anthropic``."""
        if style == "anthropic":
            kind = ANTHROPIC_TYPES.get(self.status, "api_error")
            return {"type": "error", "error": {"type": kind, "message": self.message}}
        if style == "openai":
            error = {"message": self.message, "type": self.openai_kind, "param": self.param, "code": self.code}
            return {"error": error}
        if self.status == 401:  # noqa: PLR2004 — vLLM's middleware answers with a bare string
            return {"error": "Unauthorized"}
        return {
            "error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.status},
        }


def bad_value(message: str, param: str | None = None) -> ApiError:
    """A field of the right type with a value the server refuses."""
    return ApiError(400, message, param=param)


def bad_shape(message: str, param: str | None = None) -> ApiError:
    """A body that does not parse: vLLM says "Bad Request" with a space and ``body.x`` as parameter."""
    return ApiError(400, message, kind="Bad Request", param=param)


def unauthorized() -> ApiError:
    """A missing or unknown API key."""
    return ApiError(401, "Incorrect API key provided.", kind="Unauthorized", code="invalid_api_key")


def unknown_model(model: str) -> ApiError:
    """A model this server does not list."""
    message = f"The model `{model}` does not exist."
    return ApiError(404, message, kind="NotFoundError", param="model", code="model_not_found")


def too_long(limit: int, prompt_tokens: int, output_tokens: int) -> ApiError:
    """A prompt beyond the context, in the words of vLLM >= 0.16."""
    message = (
        f"This model's maximum context length is {limit} tokens. However, you requested {output_tokens} output"
        f" tokens and your prompt contains at least {prompt_tokens} input tokens, for a total of at least"
        f" {prompt_tokens + output_tokens} tokens. Please reduce the length of the input prompt or the number of"
        f" requested output tokens. (parameter=input_tokens, value={prompt_tokens})"
    )
    return ApiError(400, message, param="input_tokens", code="context_length_exceeded")


def overloaded() -> ApiError:
    """A full queue: vLLM's opt-in cap answers 503 without Retry-After."""
    message = "The engine is currently busy and cannot accept new requests."
    elsewhere = "Please try again later or on a different instance."
    return ApiError(503, f"{message} {elsewhere}", kind="Service Unavailable", openai_kind="server_error")


def no_quota() -> ApiError:
    """The account is out of credit: a 429 that no waiting heals."""
    message = "You exceeded your current quota, please check your plan and billing details."
    return ApiError(429, message, kind="RateLimitError", code="insufficient_quota", openai_kind="insufficient_quota")


def rate_limited(what: str, wait_s: float, headers: Mapping[str, str]) -> ApiError:
    """Too many requests or tokens; ``what`` is ``requests`` or ``tokens``."""
    message = f"Rate limit reached on {what}. Please try again in {wait_s:.3f}s."
    return ApiError(429, message, kind="RateLimitError", code="rate_limit_exceeded", openai_kind=what, headers=headers)

"""Offline batches in both shapes: /v1/files and /v1/batches (OpenAI), /v1/messages/batches (Anthropic).

A batch advances by being looked at and not by time: it ends with look number ``offline_looks``. Its requests are
answered by the routes of single calls. Requests that contain ``offline_expire`` expire. A canceled batch has answered
the first half of its requests. Results come in an order of their own.
"""

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Final
from urllib.parse import parse_qs

from . import anthropic_batches as anthropic
from . import openai_batches as openai
from .exchange import Answer, Exchange

Handler = Callable[..., Awaitable[Answer]]

_ROUTES: Final[tuple[tuple[str, str, str, Handler], ...]] = (
    ("POST", "/v1/files", "/v1/files", openai.upload),
    ("GET", "/v1/files/*/content", "/v1/files/content", openai.content),
    ("POST", "/v1/batches", "/v1/batches", openai.create),
    ("GET", "/v1/batches", "/v1/batches/list", openai.listing),
    ("GET", "/v1/batches/*", "/v1/batches/look", openai.look),
    ("POST", "/v1/batches/*/cancel", "/v1/batches/cancel", openai.cancel),
    ("POST", "/v1/messages/batches", "/v1/messages/batches", anthropic.create),
    ("GET", "/v1/messages/batches", "/v1/messages/batches/list", anthropic.listing),
    ("GET", "/v1/messages/batches/*", "/v1/messages/batches/look", anthropic.look),
    ("GET", "/v1/messages/batches/*/results", "/v1/messages/batches/results", anthropic.results),
    ("POST", "/v1/messages/batches/*/cancel", "/v1/messages/batches/cancel", anthropic.cancel),
)
"""Method, path, the name under which it is counted (and that fault rules match), and what answers it."""


def offline_route(
    method: str, target: str, media_type: str
) -> tuple[str, Callable[[Exchange], Awaitable[Answer]]] | None:
    """The name of a request's route and what answers it; None for what is no offline batch."""
    path, _, query = target.partition("?")
    parts = path.split("/")
    for wanted, pattern, name, handler in _ROUTES:
        fields = pattern.split("/")
        matches = len(fields) == len(parts) and all(a in {"*", b} for a, b in zip(fields, parts, strict=True))
        if method == wanted and matches:
            given: dict[str, Any] = {"name": parts[fields.index("*")]} if "*" in fields else {}
            if handler is openai.upload:
                given["media_type"] = media_type
            elif name.endswith("/list"):
                given["query"] = parse_qs(query)
            return name, partial(handler, **given)
    return None

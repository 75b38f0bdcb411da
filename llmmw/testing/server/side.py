"""The routes that are not model calls: models, health, version, load, metrics."""

from collections.abc import Callable, Mapping
from typing import Any, Final

from aiohttp import web

from .config import ServerConfig
from .core import Core
from .errors import ApiError, unauthorized
from .exchange import Plain, encode
from .metrics import metrics
from .send import SERVER, plain

VERSION: Final = "0.0.0+llmmw.embedded"


def refusal(config: ServerConfig, error: ApiError, route: str) -> Plain:
    """The answer to a refused request, in the shape its route speaks."""
    style = "anthropic" if route.startswith("/v1/messages") else config.error_style
    return Plain(encode(error.body(style)), error.status, headers=dict(error.headers))


def side(core: Core, request: web.BaseRequest) -> web.Response:
    """Answer a GET that is not a model call; vLLM's 404 otherwise."""
    path = request.raw_path.partition("?")[0]
    page = _PAGES.get(path) if request.method == "GET" else None
    if page is None:
        return plain(Plain(encode({"detail": "Not Found"}), 404))
    keys = core.config.api_keys
    if keys and path.startswith("/v1/"):
        given = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if given not in keys and request.headers.get("x-api-key") not in keys:
            return plain(refusal(core.config, unauthorized(), path))
    return plain(page(core))


def not_allowed() -> web.Response:
    """A model route asked with another verb than POST."""
    return plain(Plain(encode({"detail": "Method Not Allowed"}), 405))


def _models(core: Core) -> Plain:
    return Plain(encode({"object": "list", "data": [_card(core, name) for name in core.config.models]}))


def _card(core: Core, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": core.started_at,
        "owned_by": "llmmw: embedded test server, not a model",
        "root": name,
        "parent": None,
        "max_model_len": core.config.max_model_len,
        "permission": [],
    }


def _healthy(_: Core) -> Plain:
    return Plain(b"")


def _version(_: Core) -> Plain:
    return Plain(encode({"version": VERSION, "note": SERVER}))


def _load(core: Core) -> Plain:
    return Plain(encode({"server_load": core.stats.in_flight}))


def _metrics(core: Core) -> Plain:
    return Plain(metrics(core).encode(), content_type="text/plain; version=0.0.4; charset=utf-8")


_PAGES: Final[Mapping[str, Callable[[Core], Plain]]] = {
    "/v1/models": _models,
    "/health": _healthy,
    "/ping": _healthy,
    "/version": _version,
    "/load": _load,
    "/metrics": _metrics,
}

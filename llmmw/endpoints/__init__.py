"""Where calls go: the innermost handlers."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, TypeGuard

from llmmw.endpoints.base import Endpoint, counted
from llmmw.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from llmmw.call import Call, Reply
    from llmmw.env import Env


def as_endpoint(value: object) -> Endpoint:
    """An endpoint from an `Endpoint`, a base URL, or an async callable from Call to Reply.

    Raises:
        ConfigError: none of these.
    """
    if isinstance(value, str):
        from llmmw.endpoints.openai import HTTPEndpoint  # noqa: PLC0415 — loads the HTTP engine

        return HTTPEndpoint(value)
    if _is_endpoint(value):
        return value
    function: Any = value
    call_method: Any = getattr(function, "__call__", None)  # noqa: B004 — the method is what is asked for
    if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(call_method):
        return CallableEndpoint(function)
    raise ConfigError(f"endpoint={value!r}: expected a base URL, an Endpoint, or an async function from Call to Reply")


def endpoint_at(place: object, **options: Any) -> Endpoint:
    """What a client asks: an HTTPEndpoint for a base URL, or an endpoint of the caller's own.

    Args:
        place: the base URL or the endpoint.
        options: those of HTTPEndpoint; an endpoint has been given its own.

    Raises:
        ConfigError: the URL or an option cannot work, or there are options besides an endpoint.
    """
    if not _is_endpoint(place):
        if not isinstance(place, str):
            must = "must be a URL such as http://127.0.0.1:8000/v1, an Endpoint, or a list of such"
            raise ConfigError(f"base_url: {must}; got {type(place).__name__}")
        from llmmw.endpoints.openai import HTTPEndpoint  # noqa: PLC0415 — loads the HTTP engine

        return HTTPEndpoint(place, **options)
    given = [name for name, value in options.items() if value is not None and value != ()]
    if given:
        raise ConfigError(f"{', '.join(given)}: belongs to the endpoint; give it to {type(place).__name__}(...)")
    return place


def _is_endpoint(value: object) -> TypeGuard[Endpoint]:
    return isinstance(value, Endpoint) and not isinstance(value, type)


class CallableEndpoint:
    """An async callable from Call to Reply as an endpoint."""

    def __init__(self, function: Callable[[Call], Awaitable[Reply]]) -> None:
        self._function = function
        self.name: str = getattr(function, "__qualname__", type(function).__name__)

    def start(self, env: Env) -> None:
        """Counts attempts through `env`."""
        self._env = env

    async def __call__(self, call: Call, /) -> Reply:
        """Ask the callable."""
        return await counted(self._env, self.name, call, self._function)

    def rehome(self) -> None:
        """Nothing is held."""

    async def aclose(self) -> None:
        """Nothing is held."""

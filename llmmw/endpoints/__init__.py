"""Where calls go: the innermost handlers."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

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
    if isinstance(value, Endpoint):
        return value
    function: Any = value
    call_method: Any = getattr(function, "__call__", None)  # noqa: B004 — the method is what is asked for
    if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(call_method):
        return CallableEndpoint(function)
    raise ConfigError(f"endpoint={value!r}: expected a base URL, an Endpoint, or an async function from Call to Reply")


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

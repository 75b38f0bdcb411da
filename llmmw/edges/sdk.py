"""`wrap_client`: an OpenAI or Anthropic SDK client whose `create()` methods go through a stack.

Intercepting above the SDK saves its own work (0.8 ms of building, sending and parsing) on every hit. What is taken
over: chat.completions, completions, embeddings and responses of openai, messages of anthropic, with and without
`stream=True`. What builds on these (openai's `chat.completions.stream()`) comes along. Everything else, also
`.parse`, `.with_raw_response`, `.with_streaming_response`, `beta.*` and anthropic's `messages.stream()`, stays the
SDK's own; for those use the transport edge, which is below all of them.

Errors are the SDK's own exceptions, as the transport edge would cause them (`http.py`), with llmmw's as the cause.
"""

from __future__ import annotations

import functools
import inspect
import operator
import secrets
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast
from urllib.parse import urlsplit

from llmmw.edges.sdkmethod import Method
from llmmw.endpoints.sdk import SDKEndpoint
from llmmw.env import disabled
from llmmw.errors import ConfigError
from llmmw.keys.identity import ACCOUNT_FIELDS, PROVIDERS, Namespaces, account_of, asker_of, has_provider
from llmmw.order import Role
from llmmw.pool.guard import origin_of
from llmmw.settings import accepting, text
from llmmw.stack import Stack

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from llmmw.engine import Engine
    from llmmw.env import Env

T = TypeVar("T")

_RESOURCES: dict[str, dict[str, str]] = {
    "openai": {
        "chat": "chat.completions",
        "complete": "completions",
        "embed": "embeddings",
        "responses": "responses",
    },
    "anthropic": {"messages": "messages"},
}
_CLIENTS = frozenset({"OpenAI", "AsyncOpenAI", "Anthropic", "AsyncAnthropic"})
_MARK = "_llmmw_wrapping"


@accepting
def wrap_client(client: T, stack: Stack, *, tenant: str | None = None, env: Env | None = None) -> T:
    """Send an SDK client's completions through a stack. Returns the same object.

    The client then also carries `engine`, `get_performance_stats()`; its copies (`with_options`) share the engine, and
    closing it closes the engine too. Where the stack has a Retry layer the client's own `max_retries` becomes 0.

    Args:
        client: openai.OpenAI, AsyncOpenAI (or Azure's), anthropic.Anthropic or AsyncAnthropic.
        stack: the layers.
        tenant: whose answers may be shared; by default everybody's with the same credential.
        env: clock, randomness and sinks, for tests.

    Raises:
        ConfigError: not such a client, wrapped already, or not a stack.
    """
    if not isinstance(stack, Stack):  # pyright: ignore[reportUnnecessaryIsInstance]  # users pass lists
        raise ConfigError(f"wrap_client(stack={stack!r}): expected a Stack, e.g. Stack(TTLCache(300), Coalescer())")
    if tenant is not None:
        text("tenant", tenant)
    package = _package_of(client)
    if hasattr(client, _MARK):
        raise ConfigError("wrap_client: this client is wrapped already; unwrap_client(client) undoes it")
    shared = Shared(package, stack, tenant, env, _target_of(client))
    Wrapping(client, shared)
    return client


def unwrap_client(client: T) -> T:
    """Undo `wrap_client`; the engine stays open (its owner closes it). Returns the same object.

    Raises:
        ConfigError: the client is not wrapped.
    """
    wrapping: Wrapping | None = getattr(client, _MARK, None)
    if wrapping is None:
        raise ConfigError("unwrap_client: this client is not wrapped")
    wrapping.undo()
    return client


def _package_of(client: object) -> str:
    for base in type(client).__mro__:
        package = base.__module__.partition(".")[0]
        if package in _RESOURCES and base.__name__ in _CLIENTS:
            return package
    known = ", ".join(sorted(_CLIENTS))
    raise ConfigError(f"wrap_client({type(client).__module__}.{type(client).__name__}): expected one of {known}")


def _target_of(client: Any) -> str:
    parts = urlsplit(str(client.base_url))
    return origin_of(parts) + parts.path.rstrip("/")


class Shared:
    """What a client and its copies have in common."""

    def __init__(self, package: str, stack: Stack, tenant: str | None, env: Env | None, target: str) -> None:
        self.package = package
        self.endpoint = SDKEndpoint(target)
        self.engine: Engine = stack.bind(self.endpoint, env=env)
        self.retries = Role.RETRY in stack and not disabled()
        self.tenant = tenant
        self.namespaces = Namespaces(stack.cache_directory)
        sdk = sys.modules[package]
        self.absent = tuple(getattr(sdk, name) for name in ("NotGiven", "Omit") if hasattr(sdk, name))
        self.provider_token = secrets.token_hex(16)
        """Stands for a credential that changes by itself: shared within this engine only."""


class Standing(NamedTuple):
    """Where a call goes and who makes it."""

    target: str
    credential: str
    variant: tuple[tuple[str, str], ...]
    """What chooses another behaviour of the server; see `Asker`."""


class Wrapping:
    """One client's patched methods, and what its calls have in common."""

    def __init__(self, client: Any, shared: Shared) -> None:
        self.client = client
        self.shared = shared
        self.library, self.bodies = _library_of(client)
        shared.endpoint.sends_with(client._client)  # noqa: SLF001 — the SDKs have no public name for it
        self._patched: list[tuple[Any, str]] = []
        self._max_retries = client.max_retries
        if shared.retries:
            client.max_retries = 0
        watched = ("_base_url", "_custom_headers", "_custom_query", *ACCOUNT_FIELDS, *PROVIDERS)
        self._watch = operator.attrgetter(*(name for name in watched if hasattr(client, name)))
        self._known: tuple[object, Standing] = (None, Standing("", "", ()))
        for op, path in _RESOURCES[shared.package].items():
            resource = operator.attrgetter(path)(client)
            self._patch(resource, "create", Method(self, op, resource).caller())
        self._patch(client, "engine", shared.engine)
        self._patch(client, "get_performance_stats", shared.engine.get_performance_stats)
        self._patch(client, "close", self._closer(client.close))
        for name in ("copy", "with_options"):
            self._patch(client, name, self._copier(getattr(client, name)))
        self._patch(client, _MARK, self)

    def _patch(self, holder: Any, name: str, value: object) -> None:
        setattr(holder, name, value)
        self._patched.append((holder, name))

    def undo(self) -> None:
        """Back to the class's own methods."""
        for holder, name in self._patched:
            delattr(holder, name)
        self.client.max_retries = self._max_retries

    def _copier(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def copy(*args: Any, **kwargs: Any) -> Any:
            found = original(*args, **kwargs)
            Wrapping(found, self.shared)
            return found

        return copy

    def _closer(self, original: Callable[..., Any]) -> Callable[..., Any]:
        engine, endpoint = self.shared.engine, self.shared.endpoint
        if inspect.iscoroutinefunction(original):

            async def aclose() -> None:
                await engine.aclose()
                endpoint.closed()
                await original()

            return functools.wraps(original)(aclose)

        def close() -> None:
            engine.close()
            original()

        return functools.wraps(original)(close)

    def standing(self, headers: Mapping[str, Any], query: Mapping[str, Any] | None) -> Standing:
        """Where a call goes and who makes it: the client's settings as they are now, and what the call adds to them."""
        if headers or query:
            return self._stand(headers, query or {})
        settings, (known, standing) = self._watch(self.client), self._known
        if settings != known:
            standing = self._stand({}, {})
            self._known = (tuple(map(_as_it_is, settings)), standing)
        return standing

    def _stand(self, added_headers: Mapping[str, Any], added_query: Mapping[str, Any]) -> Standing:
        client = self.client
        held = account_of(client)
        if has_provider(client):
            held["provider"] = self.shared.provider_token
        headers = {**client._custom_headers, **added_headers}  # noqa: SLF001 — the SDK shows them merged with a dozen others only
        query = {**client._custom_query, **added_query}  # noqa: SLF001 — the SDK has no public one
        asker = asker_of(
            ((name, str(value)) for name, value in headers.items()),
            ((name, str(value)) for name, value in query.items()),
        )
        account = "".join(f"\n{name}={value}" for name, value in held.items())
        return Standing(_target_of(client), account + asker.credential, asker.variant)


def _as_it_is(setting: Any) -> Any:
    """A setting that stays what it is: mappings may be changed in place."""
    return dict(cast("dict[str, Any]", setting)) if isinstance(setting, dict) else setting


def _library_of(client: Any) -> tuple[Any, Any]:
    """Which of httpx and httpx2 the client sends with, and our binding of it."""
    http = client._client  # noqa: SLF001 — the SDKs have no public name for it
    for name in ("httpx2", "httpx"):
        library = sys.modules.get(name)
        if library is not None and isinstance(http, library.Client | library.AsyncClient):
            return library, import_module(f"llmmw.edges.{name}")
    raise ConfigError(f"wrap_client: the client sends with {type(http)!r}; expected a client of httpx or httpx2")

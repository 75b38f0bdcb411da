"""The function edge: a stack around a user's own sync function, async function or async generator."""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING, Any, ParamSpec, Protocol, TypeVar, overload

from llmmw.call import Call, Item, Reply, current_context
from llmmw.codec import Codec, Undecodable
from llmmw.endpoints.function import FunctionEndpoint, FunctionKind, Invocation
from llmmw.errors import ConfigError
from llmmw.keys.code import code_digest
from llmmw.keys.identity import namespace_of
from llmmw.settings import accepting, instance, texts
from llmmw.stack import Stack

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Mapping

    from llmmw.engine import Engine
    from llmmw.env import Env

P = ParamSpec("P")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)


class Wrapped(Protocol[P, R_co]):
    """A wrapped function: called as before, and carrying its engine."""

    engine: Engine
    __name__: str
    __wrapped__: Callable[..., Any]

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R_co:
        """Call through the stack."""
        ...

    def get_performance_stats(self) -> dict[str, Any]:
        """What the stack did for this function."""
        ...

    def invalidate(self, *args: P.args, **kwargs: P.kwargs) -> int:
        """Forget the stored answer to these arguments (a method's with its `self`); returns how many entries went."""
        ...

    def invalidate_tag(self, tag: str) -> int:
        """Forget every answer stored under `using(tags=tag)`, also one in flight; returns how many entries went."""
        ...

    def invalidate_tenant(self, tenant: str) -> int:
        """Forget every answer stored under `using(tenant=tenant)`, also one in flight; returns how many went."""
        ...

    async def aclose(self) -> None:
        """Wait for calls in flight and release everything; from any loop."""
        ...

    def close(self) -> None:
        """`aclose` for plain code."""
        ...


class Binder:
    """Arguments of a call as a mapping by parameter name, defaults filled in: the payload that layers read.

    So layers find `temperature`, `max_tokens`, `model`, `messages` or `prompt` where the function has them.
    """

    def __init__(self, function: Callable[..., Any], ignore: tuple[str, ...]) -> None:
        self._signature = inspect.signature(function)
        parameters = self._signature.parameters.values()
        unknown = set(ignore) - {parameter.name for parameter in parameters}
        if unknown:
            names = ", ".join(self._signature.parameters)
            raise ConfigError(
                f"ignore={sorted(unknown)!r}: {function.__name__} has no such parameter (it has: {names})"
            )
        self._ignore = ignore
        plain = {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}
        self._simple = all(parameter.kind in plain for parameter in parameters)
        self._positional = [p.name for p in parameters if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
        self._defaults = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
        self._names = frozenset(self._signature.parameters)
        self._can_be_plain = self._simple and len(self._positional) == len(self._names)

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The payload.

        Raises:
            TypeError: the arguments do not fit, with Python's own message.
        """
        if self._can_be_plain and not kwargs and len(args) == len(self._positional):
            payload = dict(zip(self._positional, args, strict=True))
        else:
            payload = self._bind_named(args, kwargs)
        for name in self._ignore:
            payload.pop(name, None)
        return payload

    def _bind_named(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        given = dict(zip(self._positional, args, strict=False))
        fits = (
            self._simple
            and len(args) <= len(self._positional)
            and given.keys().isdisjoint(kwargs)
            and self._names >= kwargs.keys()
        )
        payload = {**self._defaults, **given, **kwargs} if fits else {}
        return payload if fits and len(payload) == len(self._names) else self._bind_slowly(args, kwargs)

    def _bind_slowly(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        payload = dict(bound.arguments)
        for parameter in self._signature.parameters.values():
            if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
                payload[parameter.name] = list(payload[parameter.name])
        return payload


class FunctionEdge:
    """Turns arguments into calls and replies into values, for one wrapped function."""

    def __init__(
        self, function: Callable[..., Any], kind: FunctionKind, stack: Stack, ignore: tuple[str, ...], env: Env | None
    ) -> None:
        self.name = f"{function.__module__}.{function.__qualname__}"
        self._variant = (("code", code_digest(function)),)
        self._binder = Binder(function, ignore)
        self._codec = Codec(_return_annotation(function))
        self._stream = kind == "async generator"
        self.engine: Engine = stack.bind(FunctionEndpoint(function, kind, self.name, self._codec), env=env)

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """The call for these arguments."""
        payload = self._binder.bind(args, kwargs)
        model = payload.get("model")
        context = current_context()
        return Call(
            "function",
            model if isinstance(model, str) else "",
            payload,
            self._stream,
            context,
            Invocation(args, kwargs),
            self.name,
            "" if context.tenant is None else namespace_of(context.tenant),
            self._variant,
            inherits_context=True,
        )

    def value(self, reply: Reply) -> Any:
        """What the function returned, as itself for its own caller, as a copy for everybody else.

        Raises:
            Undecodable: a stored answer of a class that is unknown in this process.
        """
        if reply.source == "upstream" or reply.data is None:
            return reply.native
        return self._codec.decode(reply.data)

    def item(self, chunk: bytes | Item, source: str) -> Any:
        """The same for a piece of a stream."""
        if isinstance(chunk, bytes):
            return self._codec.decode(chunk)
        if source == "upstream" or chunk.data is None:
            return chunk.value
        return self._codec.decode(chunk.data)

    def invalidate(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        """Forget the stored answer."""
        return self.engine.invalidate(self.call(args, kwargs))


def _return_annotation(function: Callable[..., Any]) -> Any:
    try:
        return inspect.signature(function, eval_str=True).return_annotation
    except Exception:  # noqa: BLE001 — an annotation that cannot be evaluated is merely no help
        return None


def _kind_of(function: Callable[..., Any]) -> FunctionKind:
    if not callable(function) or not hasattr(function, "__qualname__") or not hasattr(function, "__module__"):
        raise ConfigError(f"wrap({function!r}): expected a function; write one that calls this")
    if inspect.isasyncgenfunction(function):
        return "async generator"
    if inspect.iscoroutinefunction(function):
        return "async"
    if inspect.isgeneratorfunction(function):
        name = getattr(function, "__name__", "it")
        raise ConfigError(f"wrap({name}): a sync generator cannot be wrapped; make {name} an async generator")
    return "sync"


@accepting
def wrap(
    function: Callable[P, R], stack: Stack, *, ignore: str | tuple[str, ...] = (), env: Env | None = None
) -> Wrapped[P, R]:
    """Put a stack around a function. Its signature, exceptions and return type stay what they are.

    Args:
        function: sync function, async function or async generator function.
        stack: the layers.
        ignore: parameters that do not change the answer (a client object, `self`): not part of the cache key.
        env: clock, randomness and sinks, for tests.

    Raises:
        ConfigError: not a function, a sync generator, or `ignore` names no parameter.
    """
    kind = _kind_of(function)
    instance("stack", stack, Stack, "Stack(TTLCache(300), Coalescer())")
    names = (ignore,) if isinstance(ignore, str) else texts("ignore", ignore)
    edge = FunctionEdge(function, kind, stack, names, env)
    caller = {"sync": _sync_caller, "async": _async_caller, "async generator": _stream_caller}[kind](edge)
    wrapped: Any = functools.wraps(function)(caller)
    wrapped.engine = edge.engine
    wrapped.get_performance_stats = edge.engine.get_performance_stats

    def invalidate(*args: Any, **kwargs: Any) -> int:
        return edge.invalidate(args, kwargs)

    wrapped.invalidate = invalidate
    wrapped.invalidate_tag = edge.engine.invalidate_tag
    wrapped.invalidate_tenant = edge.engine.invalidate_tenant
    wrapped.aclose = edge.engine.aclose
    wrapped.close = edge.engine.close
    return wrapped  # type: ignore[no-any-return]  # functools.wraps keeps the signature; Wrapped says so


def _async_caller(edge: FunctionEdge) -> Callable[..., Any]:
    engine = edge.engine

    async def call(*args: Any, **kwargs: Any) -> Any:
        request = edge.call(args, kwargs)
        try:
            return edge.value(await engine.call(request))
        except Undecodable:
            engine.invalidate(request)
            return edge.value(await engine.call(request))

    return call


def _sync_caller(edge: FunctionEdge) -> Callable[..., Any]:
    engine = edge.engine

    def call(*args: Any, **kwargs: Any) -> Any:
        request = edge.call(args, kwargs)
        try:
            return edge.value(engine.call_sync(request))
        except Undecodable:
            engine.invalidate(request)
            return edge.value(engine.call_sync(request))

    return call


def _stream_caller(edge: FunctionEdge) -> Callable[..., Any]:
    engine = edge.engine

    async def call(*args: Any, **kwargs: Any) -> AsyncGenerator[Any]:
        reply = await engine.call(edge.call(args, kwargs))
        chunks = reply.chunks
        if chunks is None:
            raise RuntimeError("a generator's reply must be a stream")
        try:
            async for chunk in chunks:
                yield edge.item(chunk, reply.source)
        finally:
            await chunks.aclose()

    return call


@overload
def middleware(function: Callable[P, R], /) -> Wrapped[P, R]: ...


@overload
def middleware(*, ignore: str | tuple[str, ...] = ..., **options: Any) -> Callable[[Callable[P, R]], Wrapped[P, R]]: ...


def middleware(
    function: Callable[..., Any] | None = None, /, *, ignore: str | tuple[str, ...] = (), **options: Any
) -> Any:
    """The recommended stack as a decorator, with or without arguments.

    `@middleware(cache_ttl=300, rpm=600, tpm=200_000, concurrency=64)` is `Stack.recommended(...).wrap`; for the
    options see `Stack.recommended`. Several functions that should share one cache and one limiter share a Client or
    call one wrapped function.

    Raises:
        ConfigError: an unknown option or a value that cannot work.
    """
    if function is not None:
        return wrap(function, Stack.recommended(), ignore=ignore)
    known = inspect.signature(Stack.recommended).parameters
    unknown = ", ".join(repr(option) for option in options if option not in known)
    if unknown:
        raise ConfigError(f"middleware: unexpected keyword argument {unknown} (options: {', '.join(known)}, ignore)")
    stack = Stack.recommended(**options)

    def decorate(target: Callable[P, R]) -> Wrapped[P, R]:
        return wrap(target, stack, ignore=ignore)

    return decorate

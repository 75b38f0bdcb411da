"""The function edge: a stack around a user's own sync function, async function or async generator."""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING, Any, ParamSpec, Protocol, TypeVar, overload

from llmmw.call import Call, Item, Reply, current_context
from llmmw.codec import Codec, Undecodable
from llmmw.edges.arguments import Binder
from llmmw.endpoints.function import FunctionEndpoint, FunctionKind
from llmmw.errors import ConfigError
from llmmw.events import Warned
from llmmw.keys.canonical import module_name
from llmmw.keys.code import FunctionCode
from llmmw.keys.identity import namespace_of
from llmmw.settings import accepting, instance, texts
from llmmw.stack import Stack

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

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


class FunctionEdge:
    """Turns arguments into calls and replies into values, for one wrapped function."""

    def __init__(
        self, function: Callable[..., Any], kind: FunctionKind, stack: Stack, ignore: tuple[str, ...], env: Env | None
    ) -> None:
        self.name = f"{module_name(function)}.{function.__qualname__}"
        self._code = FunctionCode(function, ignore)
        self._binder = Binder(function, ignore)
        self._codec = Codec(_return_annotation(function))
        self._stream = kind == "async generator"
        self._directory = stack.cache_directory
        self._told = False
        self.engine: Engine = stack.bind(FunctionEndpoint(function, kind, self.name, self._codec), env=env)

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """The call for these arguments."""
        if not self._told:
            self._tell()
        payload = self._binder.bind(args, kwargs)
        model = payload.get("model")
        context = current_context()
        return Call(
            "function",
            model if isinstance(model, str) else "",
            payload,
            self._stream,
            context,
            (args, kwargs),
            self.name,
            "" if context.tenant is None else namespace_of(context.tenant),
            self._code.variant(),
            inherits_context=True,
        )

    def _tell(self) -> None:
        self._told = True
        unknown = self._code.private_for
        if unknown and self._directory is not None:
            text = (
                f"{self.name} closes over {unknown!r}, whose content is unknown: its answers are not shared with other "
                f"processes; wrap it with ignore={unknown!r} if that does not change them"
            )
            self.engine.env.emit(Warned("cache: private function", text))

    def forget_undecodable(self, call: Call) -> None:
        """What another process stored is of a class that this one does not know."""
        text = (
            f"{self.name} returns objects of a class that its annotation does not name, so what other processes stored "
            f"is of no use here: annotate it, as in def {self.name.rpartition('.')[2]}(...) -> ChatCompletion"
        )
        self.engine.env.emit(Warned("cache: not annotated", text))
        self.engine.invalidate(call)

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
        ignore: what does not change the answer and is not part of the cache key: parameters (a client object, `self`,
            also of a bound method), globals that the function reads, variables that it closes over.
        env: clock, randomness and sinks, for tests.

    Raises:
        ConfigError: not a function, a sync generator, or `ignore` names none of these.
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
            found = engine.at_once(request)
            return edge.value(found if isinstance(found, Reply) else await engine.go_on(found))
        except Undecodable:
            edge.forget_undecodable(request)
            return edge.value(await engine.call(request))

    return call


def _sync_caller(edge: FunctionEdge) -> Callable[..., Any]:
    engine = edge.engine

    def call(*args: Any, **kwargs: Any) -> Any:
        request = edge.call(args, kwargs)
        try:
            return edge.value(engine.call_sync(request))
        except Undecodable:
            edge.forget_undecodable(request)
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

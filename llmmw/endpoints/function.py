"""A user's own function as the endpoint: sync (on a worker thread), async, or an async generator."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from llmmw.answer import NO_USAGE, Usage, usage_of
from llmmw.call import Item, Reply
from llmmw.endpoints.base import counted
from llmmw.endpoints.running import Run

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from llmmw.call import Call, Chunk
    from llmmw.codec import Codec
    from llmmw.env import Env

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""The native request of the function edge."""

FunctionKind = Literal["sync", "async", "async generator"]

_THREADS = 512
"""Upper bound on worker threads for a sync function; the stack's `concurrency` is the limit that is meant to bind."""


class FunctionEndpoint:
    """Runs the function with the caller's context variables; its exceptions come through unchanged.

    Args:
        function: what the user decorated.
        kind: how it is called.
        name: its qualified name, the endpoint's identity.
        codec: encodes its values.
    """

    def __init__(self, function: Callable[..., Any], kind: FunctionKind, name: str, codec: Codec) -> None:
        self._function = function
        self._kind = kind
        self.name = name
        self._codec = codec
        self._env: Env | None = None
        self._threads: Any = None

    def start(self, env: Env) -> None:
        """Take the engine's env."""
        self._env = env

    async def __call__(self, call: Call, /) -> Reply:
        """Run the function once."""
        if self._env is None:
            raise RuntimeError("FunctionEndpoint used before start()")
        return await counted(self._env, self.name, call, self._answer)

    async def _answer(self, call: Call) -> Reply:
        given: Arguments = call.native
        args, kwargs = given
        if self._kind == "async generator":
            values = self._function(*args, **kwargs)
            return Reply(chunks=ValueChunks(values, self._codec, self))
        with Run(self):
            if self._kind == "async":
                value = await self._function(*args, **kwargs)
            else:
                value = await self._on_thread(args, kwargs)
        return Reply(data=self._codec.encode(value), native=value, usage=usage_in(value))

    async def _on_thread(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        from anyio import CapacityLimiter, to_thread  # noqa: PLC0415 — only sync functions pay for anyio

        if self._threads is None:
            self._threads = CapacityLimiter(_THREADS)
        return await to_thread.run_sync(
            lambda: self._function(*args, **kwargs),
            limiter=self._threads,
            abandon_on_cancel=True,
        )

    def rehome(self) -> None:
        """The capacity limiter belongs to a loop."""
        self._threads = None

    async def aclose(self) -> None:
        """A function holds nothing of ours."""

    def __repr__(self) -> str:
        return f"FunctionEndpoint({self.name})"


class ValueChunks:
    """The values of an async generator as a stream of Items; the generator runs as part of its owner's work."""

    def __init__(self, values: AsyncGenerator[Any], codec: Codec, owner: object) -> None:
        self._values = values
        self._codec = codec
        self._run = Run(owner)
        self.usage: Usage = NO_USAGE

    def __aiter__(self) -> ValueChunks:
        return self

    async def __anext__(self) -> Chunk:
        self._run.begin()
        try:
            value = await self._values.__anext__()
        except BaseException:
            self._run.end()
            raise
        finally:
            self._run.pause()
        found = usage_in(value)
        if found.reported:
            self.usage = found
        return Item(value, self._codec.encode(value))

    async def aclose(self) -> None:
        """Close the generator, so that its `finally` blocks run."""
        try:
            await self._values.aclose()
        finally:
            self._run.end()


def usage_in(value: object) -> Usage:
    """Token usage in a function's value: a dict shaped like an API answer, or an object with a `usage` attribute."""
    if type(value) is str:
        return NO_USAGE
    if isinstance(value, dict):
        return usage_of(value)  # pyright: ignore[reportUnknownArgumentType]  # judged inside
    usage = getattr(value, "usage", None)
    if usage is None:
        return NO_USAGE
    names = ("prompt_tokens", "completion_tokens", "input_tokens", "output_tokens")
    return usage_of({"usage": {name: getattr(usage, name, None) for name in names}})

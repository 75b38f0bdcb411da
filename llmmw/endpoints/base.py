"""What an endpoint is: the innermost handler, with an identity and a life of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

from llmmw.events import UpstreamEnded, UpstreamStarted
from llmmw.stream import at_end

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from llmmw.call import Call, Reply
    from llmmw.env import Env
    from llmmw.stream import End


@runtime_checkable
class Endpoint(Protocol):
    """Answers calls by doing the work. It may serve several engines only if it says so itself.

    A refusal by the server (status 400 or more) is returned as a Reply; what could not be obtained is raised
    (`UpstreamError`, or a user function's own exception). A 2xx body that is no answer raises ProtocolError.
    It emits UpstreamStarted and UpstreamEnded for every attempt.
    """

    @property
    def name(self) -> str:
        """Identity without secrets: "scheme://host:port/prefix", or a function's qualified name."""
        ...

    def start(self, env: Env) -> None:
        """The engine's env, told once before the first call."""
        ...

    async def __call__(self, call: Call, /) -> Reply:
        """Make one attempt."""
        ...

    def rehome(self) -> None:
        """Drop what belongs to a dead loop or to the parent process, without waiting."""
        ...

    async def aclose(self) -> None:
        """Release connections. Idempotent."""
        ...


async def counted(env: Env, name: str, call: Call, work: Callable[[Call], Awaitable[Reply]]) -> Reply:
    """One attempt, told as UpstreamStarted and, at the end of its body, UpstreamEnded; service time is filled in."""
    agent, began = call.context.agent, env.clock.monotonic()
    env.emit(UpstreamStarted(name, agent))
    if call.on_sent is not None:
        call.on_sent()
    try:
        reply = await work(call)
    except BaseException:
        env.emit(UpstreamEnded(name, ok=False, duration_s=env.clock.monotonic() - began, agent=agent))
        raise
    took_s = env.clock.monotonic() - began
    told = reply.replace(endpoint=name, service_s=took_s)
    if reply.chunks is None:
        env.emit(UpstreamEnded(name, reply.ok, took_s, reply.usage, agent))
        return told

    def ended(end: End) -> None:
        ok = reply.ok and end.how == "finished"
        env.emit(UpstreamEnded(name, ok, env.clock.monotonic() - began, end.usage, agent))

    return at_end(told, ended)

"""What an endpoint is: the innermost handler, with an identity and a life of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

from msgspec.structs import replace

from llmmw.events import UpstreamEnded, UpstreamStarted
from llmmw.stream import at_end

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from llmmw.call import Call, Outcome, Reply
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


@runtime_checkable
class BatchEndpoint(Endpoint, Protocol):
    """An endpoint that may take many calls in one.

    What it takes jointly it says in `capabilities`, which is read at every group, so it may find out while it works:

    - "batch:chat": a call with op "chat_batch", whose `messages` are a list of conversations;
    - "batch:complete": op "complete" with a list of prompts (all texts, or all lists of token ids).

    The other fields hold for all of them, the reply is one body whose choices carry the position as `index`, with one
    usage, and one refusal refuses all. So a joint call is a call: limits, time-outs, statistics and the judgement of
    failures need nothing of their own for it, and the answer is taken apart in one place (`layers/exchange.py`).
    """

    @property
    def capabilities(self) -> frozenset[str]:
        """What it can do now (`Env.capabilities` names the words)."""
        ...

    async def generate_batch(self, calls: Sequence[Call]) -> list[Outcome]:
        """Every call's own outcome, in order; jointly where that is possible and worth it, else side by side."""
        ...


async def counted(env: Env, name: str, call: Call, work: Callable[[Call], Awaitable[Reply]]) -> Reply:
    """One attempt, told as UpstreamStarted and, at the end of its body, UpstreamEnded; service time is filled in."""
    clock, agent = env.clock.monotonic, call.context.agent
    began = clock()
    env.emit(UpstreamStarted(name, agent))
    if call.on_sent is not None:
        call.on_sent()
    try:
        reply = await work(call)
    except BaseException:
        env.emit(UpstreamEnded(name, ok=False, duration_s=clock() - began, agent=agent))
        raise
    took_s = clock() - began
    told = replace(reply, endpoint=name, service_s=took_s)
    if reply.chunks is None:
        env.emit(UpstreamEnded(name, reply.ok, took_s, reply.usage, agent))
        return told

    def ended(end: End) -> None:
        ok = reply.ok and end.how == "finished"
        env.emit(UpstreamEnded(name, ok, clock() - began, end.usage, agent))

    return at_end(told, ended)

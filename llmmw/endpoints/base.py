"""What an endpoint is: the innermost handler, with an identity and a life of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from llmmw.call import Call, Reply
    from llmmw.env import Env


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

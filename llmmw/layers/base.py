"""The two shapes every layer has: `Layer`, its frozen settings, and `Bound`, its running state in one engine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

from llmmw.errors import ConfigError
from llmmw.order import rules_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from llmmw.call import Call, Handler, Reply
    from llmmw.endpoints.replicas import Replicas
    from llmmw.env import Env
    from llmmw.order import Role, Rule
    from llmmw.stores.base import Match


@runtime_checkable
class Layer(Protocol):
    """Settings that can be bound, many times, around a handler. Comparable and printable.

    A layer of somebody else may also carry `rules`, a tuple of `Rule`s about where it may stand; in them
    `Role.CUSTOM` means this layer.
    """

    role: ClassVar[Role]
    """The layer's job, which decides where it may stand."""

    def bind(self, inner: Handler, env: Env) -> Bound:
        """Running state around `inner`; called once per engine (once per endpoint below a router)."""
        ...


class Positioned:
    """A layer whose role has rules of its own in `llmmw.order`."""

    role: ClassVar[Role]

    @property
    def rules(self) -> tuple[Rule, ...]:
        """Where the layer may stand, and why."""
        return rules_of(self.role)


@runtime_checkable
class ForkingLayer(Protocol):
    """A layer that sends a call to one of several endpoints: what stands inside it is bound once for each."""

    @property
    def targets(self) -> Sequence[object]:
        """Endpoints besides the engine's own (anything `endpoints.as_endpoint` accepts)."""
        ...

    def bind_fork(self, targets: Sequence[Handler], env: Env) -> Bound:
        """Running state over one handler per endpoint, the engine's own first."""
        ...


@runtime_checkable
class GroupingLayer(Protocol):
    """A layer that makes one endpoint of several replicas; what stands inside is bound once for each of them."""

    def bind_group(self, handlers: Sequence[Handler], replicas: Replicas, env: Env) -> Bound:
        """Running state over one handler per replica."""
        ...


class Bound:
    """A layer's running state: a handler around `inner`, living on the engine's home loop.

    All methods but `peek` and `gauges` run on the home loop, so plain attributes need no lock.
    """

    def __init__(self, inner: Handler, env: Env) -> None:
        self.inner = inner
        self.env = env

    async def __call__(self, call: Call, /) -> Reply:
        """Answer the call, usually by asking `inner`. A stream's end is seen by wrapping `reply.chunks`."""
        return await self.inner(call)

    def peek(self, call: Call) -> Reply | None:
        """An answer that is at hand without waiting; called from any thread. Default: none.

        Whoever gives it to a caller tells of the hit (`stats.cache_hit`), here as with `look`.
        """
        del call
        return None

    def look(self, call: Call) -> Reply | Call:
        """The answer that is at hand, on the home loop; else the call as it goes in, for what was found out about it.

        Default: nothing is at hand, and nothing was found out.
        """
        return call

    def invalidate(self, call: Call) -> int:
        """Forget what is stored for this call; returns how many entries went. Default: nothing is stored."""
        del call
        return 0

    async def recall(self, call: Call) -> Reply | None:
        """What is stored for this call, without asking inside. Default: nothing is stored."""
        del call
        return None

    def keep(self, call: Call, reply: Reply) -> None:
        """Store an answer that was obtained another way (an offline batch), if that is what this layer does."""
        del call, reply

    def discard(self, match: Match) -> int:
        """Forget what is stored of a namespace or with a tag; returns how many entries went. Default: nothing is."""
        del match
        return 0

    def begin_run(self) -> None:
        """What follows is a run of its own: forget how often each agent asked. Default: nothing is counted."""

    paces: ClassVar[bool] = False
    """True for a layer that holds calls back until the endpoint's rate limit lets them through."""

    def most_at_once(self, call: Call) -> int | None:
        """How many calls like this one may be under way inside; None: any number."""
        return self.inner.most_at_once(call) if isinstance(self.inner, Bound) else None

    def shed(self, call: Call, make_error: Callable[[], Exception]) -> int:
        """The endpoint was declared dead for calls like this one (same target and model): fail those that wait here.

        Only what was not sent may be failed; permits and tokens go back. Returns how many. Default: nothing waits.
        """
        del call, make_error
        return 0

    def reconfigure(self, **changes: Any) -> None:
        """Change settings while running, effective at once.

        Raises:
            ConfigError: a value that cannot work, or (the default) settings that cannot change.
        """
        raise ConfigError(f"{type(self).__name__}: {', '.join(changes)} cannot change while the layer works")

    def change(self, beside: Sequence[Bound], **changes: Any) -> Callable[[], None]:
        """Check such settings; what is returned makes them effective. Default: `reconfigure` does both.

        Args:
            beside: every layer of this role, for which the settings are meant as well.
            changes: the settings.

        Raises:
            ConfigError: as `reconfigure`.
        """
        del beside
        return lambda: self.reconfigure(**changes)

    def rehome(self) -> None:
        """The home loop changed or the process forked: drop tasks, futures and sockets, keep levels and entries."""

    def closing(self) -> None:
        """No new calls will come: send what is queued. `aclose` follows when the calls in flight have ended."""

    async def aclose(self) -> None:
        """Release everything. Idempotent."""

    def gauges(self) -> dict[str, object]:
        """Readings of the moment for `get_performance_stats()["layers"]`, from any thread."""
        return {}


def endpoint_below(inner: Handler) -> Handler:
    """What the innermost of some bound layers asks."""
    while isinstance(inner, Bound):
        inner = inner.inner
    return inner

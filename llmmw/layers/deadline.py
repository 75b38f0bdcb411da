"""Deadline: the whole call, from entering the stack to the end of its body, ends by one absolute moment."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from llmmw.errors import DeadlineExceeded
from llmmw.events import RefusedEarly
from llmmw.interrupt import Alarms, Until, until_deadline
from llmmw.layers.base import Bound, Positioned
from llmmw.order import Role
from llmmw.settings import positive_seconds, settings
from llmmw.stats import cache_hit

if TYPE_CHECKING:
    from llmmw.call import Call, Handler, Reply
    from llmmw.env import Env


@settings
class Deadline(Positioned):
    """How long a caller waits at most; `using(deadline=)` can only shorten it.

    The moment travels in the call's context, so inner layers can refuse early what cannot be done in time. It covers
    queueing, retries, fallbacks and reading a stream to its end.

    Args:
        seconds: from entering the stack (or text such as "20s").

    Raises:
        ConfigError: not a duration above zero.
        DeadlineExceeded: from a call, when the moment has come; what was running for this caller alone is cancelled.
    """

    role: ClassVar[Role] = Role.DEADLINE
    seconds: float | str

    def __post_init__(self) -> None:
        object.__setattr__(self, "seconds", positive_seconds("Deadline(seconds=)", self.seconds))

    def bind(self, inner: Handler, env: Env) -> BoundDeadline:
        """Running state; it keeps nothing between calls."""
        return BoundDeadline(inner, env, positive_seconds("Deadline(seconds=)", self.seconds))


class BoundDeadline(Bound):
    """Guards each call that has to wait, with one timer for most of them."""

    def __init__(self, inner: Handler, env: Env, seconds: float) -> None:
        super().__init__(inner, env)
        self._seconds = seconds
        self._alarms = Alarms(env.clock)

    async def __call__(self, call: Call, /) -> Reply:
        """Answer within the deadline.

        Raises:
            DeadlineExceeded: the deadline passed, or had passed before (then only a hit at hand is given).
        """
        clock = self.env.clock
        now = clock.monotonic()
        until = now + self._seconds
        given = call.context.deadline
        if given is not None and given < until:
            until = given
            if given <= now:
                return self._too_late(call)
        timely = call if until == given else call.within(deadline=until)
        reply = await Until(self.inner(timely), clock, lambda: until, _exceeded, alarms=self._alarms)
        if reply.chunks is None:
            return reply
        return reply.replace(chunks=until_deadline(reply.chunks, clock, until, _exceeded))

    def rehome(self) -> None:
        """The waits are gone with their loop."""
        self._alarms.rehome()

    def peek(self, call: Call) -> Reply | None:
        """What is at hand inside; it takes no time, so no deadline matters."""
        return self.inner.peek(call) if isinstance(self.inner, Bound) else None

    def _too_late(self, call: Call) -> Reply:
        hit = self.peek(call)
        if hit is None:
            self.env.emit(RefusedEarly("deadline", "already passed"))
            raise DeadlineExceeded("the deadline had passed before the call was made")
        self.env.emit(cache_hit(hit, call.context.agent))
        return hit


def _exceeded() -> DeadlineExceeded:
    return DeadlineExceeded("the deadline passed before the answer was complete", sent=True)

"""Timeout: one attempt, from the permit to the end of its body, takes so long and no longer."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

from llmmw.algo.service import ServiceTimes
from llmmw.errors import DeadlineExceeded, UpstreamTimeout
from llmmw.events import RefusedEarly
from llmmw.interrupt import Alarms, TimedChunks, Until
from llmmw.layers.base import Bound, Positioned
from llmmw.order import Role
from llmmw.settings import positive_seconds, settings
from llmmw.stream import at_end

if TYPE_CHECKING:
    from llmmw.answer import Usage
    from llmmw.call import Call, Chunk, Chunks, Handler, Reply
    from llmmw.env import Env
    from llmmw.stream import Ending


@settings
class Timeout(Positioned):
    """Limits of one attempt at one endpoint. Waiting for a permit and back-off are not part of it (see Deadline).

    Args:
        total: seconds (or text such as "30s") from the permit to the end of the body.
        connect: seconds for making a connection; handed to endpoints that connect. Default: the pool's own.
        first_byte: of a stream, seconds until its first chunk. Default: no limit but `total`.
        between_chunks: of a stream, seconds that the endpoint may be silent while somebody reads. Default: none.

    Raises:
        ConfigError: not a duration above zero.
        UpstreamTimeout: from an attempt; `sent` is true where the server may have served it, false while it was still
            connecting.
        DeadlineExceeded: from an attempt where the caller's deadline was the nearer limit; if too little time was
            left for nine of ten answers of this model, without asking the endpoint.
    """

    role: ClassVar[Role] = Role.TIMEOUT
    total: float | str
    connect: float | str | None = None
    first_byte: float | str | None = None
    between_chunks: float | str | None = None

    def __post_init__(self) -> None:
        for name in ("total", "connect", "first_byte", "between_chunks"):
            value = getattr(self, name)
            if value is not None or name == "total":
                object.__setattr__(self, name, positive_seconds(f"Timeout({name}=)", value))

    def bind(self, inner: Handler, env: Env) -> BoundTimeout:
        """Running state: how long service took lately."""
        return BoundTimeout(inner, env, self)


class BoundTimeout(Bound):
    """Guards each attempt and learns how long attempts take."""

    def __init__(self, inner: Handler, env: Env, options: Timeout) -> None:
        super().__init__(inner, env)
        self._total = _limit(options.total)
        self._connect = None if options.connect is None else _limit(options.connect)
        self._first_byte = _limit(options.first_byte)
        self._between = _limit(options.between_chunks)
        self._times = ServiceTimes()
        self._alarms = Alarms(env.clock)

    async def __call__(self, call: Call, /) -> Reply:
        """Make the attempt if there is time for it.

        Raises:
            DeadlineExceeded: the deadline passed, or too little is left of it.
            UpstreamTimeout: a limit of this layer passed.
        """
        clock = self.env.clock
        began = clock.monotonic()
        deadline = call.deadline
        if deadline is not None:
            self._refuse_if_hopeless(call, deadline - began, began)
        if self._connect is not None:
            call = call.replace(connect_s=self._connect)
        watch = _Watch(call, began, self._total)
        if call.stream:
            watch.limit_silence("first_byte", began, self._first_byte)
        reply = await Until(self.inner(call), clock, watch.due, watch.error, alarms=self._alarms)
        if reply.chunks is not None:
            reply = reply.replace(chunks=_Watched(reply.chunks, self.env, watch, self._between))
            return at_end(reply, lambda end: self._ended(call, reply, began, end.how))
        self._ended(call, reply, began, "finished")
        return reply

    def rehome(self) -> None:
        """The waits are gone with their loop."""
        self._alarms.rehome()

    def _ended(self, call: Call, reply: Reply, began: float, how: Ending) -> None:
        if reply.ok and how == "finished":
            now = self.env.clock.monotonic()
            self._times.add((call.op, call.model), now, now - began)

    def _refuse_if_hopeless(self, call: Call, left_s: float, now: float) -> None:
        if left_s <= 0:
            self.env.emit(RefusedEarly("timeout", "deadline passed"))
            raise DeadlineExceeded("the deadline passed before the attempt could be made")
        if self._times.lacks((call.op, call.model), now, left_s):
            self.env.emit(RefusedEarly("timeout", "too little time left"))
            raise DeadlineExceeded(
                f"{left_s:.3g} s are left until the deadline, and nine of ten answers of {call.model!r} took longer"
            )


class _Watch:
    """The limits of one attempt: which comes next, and the error that says which it was."""

    __slots__ = ("_call", "_end", "_silence", "_silent_name", "_total")

    def __init__(self, call: Call, began: float, total: float) -> None:
        self._call = call
        self._total = total
        self._end = began + total
        self._silence = math.inf
        self._silent_name = ""

    def limit_silence(self, name: str, now: float, limit: float) -> None:
        """From now on the endpoint may be silent this long."""
        self._silent_name = f"{name} ({limit:g} s)"
        self._silence = now + limit

    def due(self) -> float:
        """The next limit. The deadline is asked anew each time: a shared call's moves later with its followers."""
        deadline = self._call.deadline
        nearest = min(self._end, self._silence)
        return nearest if deadline is None else min(nearest, deadline)

    def error(self) -> UpstreamTimeout | DeadlineExceeded:
        """What passed, as an exception."""
        deadline, own = self._call.deadline, min(self._end, self._silence)
        if deadline is not None and deadline < own:
            return DeadlineExceeded("the deadline passed while the endpoint was working", sent=True)
        name = self._silent_name if self._silence < self._end else f"total ({self._total:g} s)"
        return UpstreamTimeout(f"no complete answer within the limit {name}", endpoint=self._call.target, sent=True)


class _Watched:
    """A stream under the attempt's limits; silence counts only while somebody waits for a chunk."""

    def __init__(self, inner: Chunks, env: Env, watch: _Watch, between: float) -> None:
        self._inner = TimedChunks(inner, env.clock, watch.due, watch.error)
        self._clock = env.clock
        self._watch = watch
        self._between = between
        self._begun = False

    @property
    def usage(self) -> Usage:
        """What the stream reported so far."""
        return self._inner.usage

    def __aiter__(self) -> _Watched:
        return self

    async def __anext__(self) -> Chunk:
        if self._begun:
            self._watch.limit_silence("between_chunks", self._clock.monotonic(), self._between)
        chunk = await self._inner.__anext__()
        self._begun = True
        return chunk

    async def aclose(self) -> None:
        """Close the stream."""
        await self._inner.aclose()


def _limit(option: float | str | None) -> float:
    """Seconds of a checked option; infinite where it was not given."""
    return math.inf if option is None else float(option)

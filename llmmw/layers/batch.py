"""Batcher: releases compatible calls together, in one request where the endpoint takes that."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, ClassVar

from llmmw.algo.batchmates import grouping
from llmmw.algo.batchplan import GroupSize, Limits
from llmmw.endpoints.running import as_part_of, runs_inside
from llmmw.errors import QueueFull
from llmmw.events import RefusedEarly
from llmmw.layers.base import Bound, Positioned
from llmmw.layers.entrance import Entrance
from llmmw.layers.exchange import JointOps
from llmmw.layers.gather import GO, Gathering, closed_error
from llmmw.order import Role
from llmmw.settings import choice, positive_seconds, settings, whole

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from llmmw.algo.batchmates import Grouping
    from llmmw.call import Call, Handler, Reply
    from llmmw.env import Env


MAX_SIZE = 128
"""Requests of 64, 128 or 256 chats take as long as each other (`make bench-joint`); one that fails concerns all."""
MIN_SIZE = 32
"""A joint request saves nothing up to 16 calls and 8 to 27 % of the time at 64 (vLLM 0.32, CPU)."""
_AT_A_TIME = 2
"""Where more are to be made than may be under way, so many joint requests have room at a time: while the last answers
of one are waited for, the others keep the server busy. A bound that leaves less than `MIN_SIZE` to each means single
calls."""


@settings
class Batcher(Positioned):
    """Gathers calls of equal operation, model, sampling parameters, priority and tenant, and lets them go together.

    At an endpoint with a batch call a group becomes one request and its answer is taken apart again; elsewhere the
    calls go side by side. While nothing of this batcher is under way a call waits only for the others of the same
    loop turn. Streams, tools and n > 1 go straight through.

    Worth it at a local vLLM with more than about 32 equal calls at a time; below that a joint request saves nothing, so
    while fewer are inside, none waits either.

    Args:
        max_size: calls in a group.
        min_size: calls from which on a group shares a request (at most `max_size`); fewer go side by side.
        flush_interval: longest wait for batch mates.
        max_bytes: prompts of a group together, in bytes of JSON; one above it goes alone. None: no limit.
        max_tokens: likewise in estimated tokens, prompts and permitted output.
        max_queue: calls taken in and not yet answered. One made from inside another needs no room: the other waits for
            it, and might wait for ever.
        when_full: "wait" for room, or "refuse" with QueueFull.
        joint: "auto" sends joint requests where the endpoint says that it takes them (one of your own, by its
            `capabilities`), "on" also to any other until it refuses the path (vLLM: /chat/completions/batch, and a list
            of prompts), "off" never.
        barrier: calls with a step (`using(step=)`) wait until so many agents of it have asked, or `tick()`, or the
            interval; also at an idle endpoint. What a step asks after that waits no longer than any other call. Only
            calls that come as far as the batcher of one endpoint count: where agents may be answered by a cache, by
            another's flight or by another endpoint, end steps with `tick()`. None: steps do not matter.
        drain: on closing send what waits; False fails it with Closed.

    Raises:
        ConfigError: a value that cannot work.
    """

    role: ClassVar[Role] = Role.BATCH
    max_size: int = MAX_SIZE
    min_size: int = MIN_SIZE
    flush_interval: float | str = 0.02
    max_bytes: int | None = None
    max_tokens: int | None = None
    max_queue: int = 10_000
    when_full: str = "wait"
    joint: str = "auto"
    barrier: int | None = None
    drain: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "flush_interval", positive_seconds("Batcher(flush_interval=)", self.flush_interval))
        for name in ("max_size", "min_size", "max_queue", "max_bytes", "max_tokens", "barrier"):
            value = getattr(self, name)
            if value is not None or name in {"max_size", "min_size", "max_queue"}:
                whole(f"Batcher({name}=)", value)
        choice("Batcher(when_full=)", self.when_full, ("wait", "refuse"))
        choice("Batcher(joint=)", self.joint, ("auto", "on", "off"))

    def bind(self, inner: Handler, env: Env) -> BoundBatcher:
        """Running state: what waits and what is under way."""
        return BoundBatcher(inner, env, self)


@settings
class PartyBatcher(Positioned):
    """What a stack without a Batcher has in its place: it gathers the calls of a `generate_batch`, and no others."""

    role: ClassVar[Role] = Role.BATCH

    def bind(self, inner: Handler, env: Env) -> BoundPartyBatcher:
        """Running state."""
        return BoundPartyBatcher(inner, env, Batcher())


class BoundBatcher(Bound):
    """The groups of one endpoint."""

    _tells: ClassVar[bool] = True
    """Whether calls that go one by one count as a group."""

    def __init__(self, inner: Handler, env: Env, options: Batcher) -> None:
        super().__init__(inner, env)
        self._options = options
        self._joint_ops = JointOps(options.joint, env)
        self._group_size = GroupSize(options.max_size)
        self._gathering = self._begin()
        self._draining = self._closed = False

    def _begin(self) -> Gathering:
        options = self._options
        limits = Limits(
            options.max_size, options.max_bytes, options.max_tokens, interval_s=float(options.flush_interval)
        )
        return Gathering(
            self._ask,
            self.env,
            limits,
            Entrance(options.max_queue, lambda: runs_inside((self,))),
            barrier=options.barrier,
            joint_ops=self._joint_ops,
            group_size=self._group_size,
            worth=min(options.min_size, options.max_size),
            tells=self._tells,
        )

    async def __call__(self, call: Call, /) -> Reply:
        """Answer, together with others where that is possible.

        Raises:
            QueueFull: too many unanswered calls, and `when_full="refuse"`.
            Closed: the engine was closed before the call was sent.
        """
        gathering, place = self._gathering, call.place
        entrance = gathering.entrance
        if entrance.full and self._options.when_full == "refuse":
            self.env.emit(RefusedEarly("batch", "queue full"))
            raise QueueFull(f"Batcher(max_queue={self._options.max_queue}): so many calls are unanswered")
        if place is not None and entrance.full:
            place.settle()  # those inside cannot wait for who waits for them
        await entrance.enter(call)
        try:
            if self._closed or (self._draining and not self._options.drain):
                raise closed_error()
            group = None if self._draining else grouping(call)
            if group is not None:
                return await self._wait(gathering, call, group)
            if place is not None:
                place.settle()
            return await self._ask(call)
        finally:
            entrance.leave()

    async def _ask(self, call: Call) -> Reply:
        return await as_part_of(self, self.inner(call))

    async def _wait(self, gathering: Gathering, call: Call, group: Grouping) -> Reply:
        waiter: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        item = gathering.submit(call, group, waiter)
        try:
            landed = await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled() and waiter.result() is GO:
                gathering.over()
            elif item.leave(waiter):
                gathering.withdraw(item)
            raise
        if landed is GO:
            accepted = False
            try:
                reply = await self._ask(call)
                accepted = reply.ok
                return reply
            finally:
                gathering.over(accepted=accepted)
        if isinstance(landed, BaseException):
            try:
                raise landed
            finally:
                del landed, waiter, item  # an error that its traceback leads back to waits for the collector
        joint: Reply = landed
        return joint

    def tick(self) -> None:
        """Every agent of the step has asked: let everything go."""
        self._gathering.tick()

    def shed(self, call: Call, make_error: Callable[[], Exception]) -> int:
        """Fail what waits here for the same endpoint and model."""
        gathering = self._gathering
        return gathering.entrance.turn_away(call, make_error) + gathering.shed(call, make_error)

    def begin_run(self) -> None:
        """Steps are counted anew."""
        self._gathering.forget_steps()

    def closing(self) -> None:
        """Send what waits, or fail it (`drain=False`); what still comes, such as a repetition, waits for nobody."""
        self._draining = True
        self._gathering.close(send=self._options.drain)

    def rehome(self) -> None:
        """What waited belongs to a dead loop; how large a group the server takes is still true."""
        self._gathering = self._begin()

    async def aclose(self) -> None:
        """Cancel what is under way; its callers get Closed."""
        self._draining = self._closed = True
        await self._gathering.aclose()

    def gauges(self) -> dict[str, object]:
        """Calls that wait, and requests or calls under way."""
        return {**self._gathering.gauges(), "joint": bool(self._joint_ops)}


class BoundPartyBatcher(BoundBatcher):
    """The groups of one endpoint, of calls made together; others pass at the cost of a look."""

    _tells = False

    def __call__(self, call: Call, /) -> Coroutine[Any, Any, Reply]:  # pyright: ignore[reportIncompatibleMethodOverride] — what it returns is awaited
        """As the batcher; a call that belongs to no party, or has no mates at this endpoint, goes on as it is."""
        place = call.place
        if place is None:
            return self.inner(call)
        if call.op not in self._joint_ops:
            place.settle()
            return self.inner(call)
        self._group_size.cap = self._room_for(call, place.among)
        return super().__call__(call)

    def _room_for(self, call: Call, among: int | None) -> int:
        """The largest request that leaves the calls under way within their bound."""
        most = self.most_at_once(call)
        if most is None:
            return MAX_SIZE
        return max(most if among is not None and among <= most else most // _AT_A_TIME, 1)

    def gauges(self) -> dict[str, object]:
        """Nothing where there are no joint requests."""
        return super().gauges() if self._joint_ops else {}

"""A bound stack: it answers calls, keeps the figures and owns every lifetime.

`Stack.bind` builds it; edges call it. Its home loop is explained in `home.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
from itertools import groupby
from typing import TYPE_CHECKING, Any, Self

from llmmw.answer import NO_USAGE
from llmmw.call import Reply
from llmmw.endpoints.running import runs_inside
from llmmw.engine.changing import Changing
from llmmw.engine.closing import DRAIN_S, close_all, closed_error, give_up, note_or_raise, patience_after
from llmmw.engine.figures import Figures
from llmmw.engine.forgetting import Forgetting
from llmmw.engine.home import Home
from llmmw.engine.inflight import InFlight
from llmmw.engine.keeping import Keeping
from llmmw.engine.readers import GuardedChunks, bridged, whose
from llmmw.errors import Closed
from llmmw.events import CallEnded, CallStarted
from llmmw.layers.flight import current_flight
from llmmw.stats import Stats, result_of

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence
    from types import TracebackType

    from llmmw.answer import Usage
    from llmmw.call import Call, Handler
    from llmmw.endpoints.base import Endpoint
    from llmmw.env import Env
    from llmmw.events import CallResult
    from llmmw.layers.base import Bound
    from llmmw.stream import End


class Engine(Forgetting, Keeping, Changing, Figures):
    """One stack at work. Use it from any thread, loop or plain code; close it with `async with`, `with` or `aclose`.

    At the end of its body `with` waits 30 s for calls in flight, after an interrupt (Ctrl-C, a cancellation) 5 s.

    Args:
        handler: the outermost handler.
        bounds: every bound layer with its role, outermost first.
        endpoints: every endpoint, the engine's own first.
        env: clock, randomness and sinks; statistics are added as a sink.
        hit_source: the bound layer whose `peek` may answer without the home loop, if hits need nothing else.
        timely: `handler` under the deadline of `using(deadline=)`, where no layer of the stack keeps that.
    """

    def __init__(
        self,
        handler: Handler,
        *,
        bounds: Sequence[tuple[str, Bound]],
        endpoints: Sequence[Endpoint],
        env: Env,
        hit_source: Bound | None,
        timely: Bound | None = None,
    ) -> None:
        self._handler = handler
        self._timely = timely or handler
        self._bounds = tuple(bounds)
        self._endpoints = tuple(endpoints)
        kept = () if timely is None else (timely,)
        self._parts: tuple[Bound | Endpoint, ...] = (*kept, *(bound for _, bound in bounds), *endpoints)
        self._hit_source = hit_source
        self.env = env
        self._stats = Stats()
        env.add_sink(self._stats.__call__, own=True)  # a bound method is called faster than an object
        self._home = Home(self._leave, self._rehome, self._forked)
        self._calls = InFlight()
        self._closed = False
        self._released = False
        self._closing: asyncio.Task[None] | None = None
        for endpoint in self._endpoints:
            endpoint.start(env)

    # ── calls ───────────────────────────────────────────────────────────────────────────────────────────────────

    async def call(self, call: Call) -> Reply:
        """Answer a call from any event loop.

        Raises:
            Closed: the engine was closed.
            LLMMWError: what the layers and the endpoint raise; a user function's own exceptions come through as is.
        """
        found = self.at_once(call)
        return found if isinstance(found, Reply) else await self.go_on(found)

    def at_once(self, call: Call) -> Reply | Call:
        """The first half of `call`, which takes no waiting: the answer from memory, else the call for `go_on`.

        Raises:
            Closed: the engine was closed.
        """
        if self._closed:
            return self._last_hit(call)
        home = self._home
        return self._at_hand(call, here=home.loop is asyncio.get_running_loop() or home.adopt())

    async def go_on(self, call: Call) -> Reply:
        """The second half of `call`."""
        if self._home.adopt():
            return await self._serve(call)
        return bridged(self._home, await self._home.run(lambda: self._serve(call)))

    def call_sync(self, call: Call) -> Reply:
        """Answer a call from plain code; a stream's chunks are then read with `next_chunk_sync`.

        Raises:
            ConfigError: called on the home loop's own thread.
            Closed: the engine was closed.
        """
        if self._closed:
            return self._last_hit(call)
        reply = self._peek(call)
        if reply is not None:
            return reply
        return bridged(self._home, self._home.run_sync(lambda: self._serve(call)))

    def _last_hit(self, call: Call) -> Reply:
        """While calls in flight are waited for, what is in memory is still answered: it needs nothing that closes."""
        reply = None if self._released else self._peek(call)
        if reply is None:
            raise closed_error()
        return reply

    def _peek(self, call: Call) -> Reply | None:
        found = self._at_hand(call, here=False)
        return found if isinstance(found, Reply) else None

    def _at_hand(self, call: Call, *, here: bool) -> Reply | Call:
        """The answer that can be given at once; else the call, as it goes on where that is here, on the home loop.

        Such a call costs no entry among those in flight.
        """
        source = self._hit_source
        if source is None or call.stream or call.direct:
            return call
        env, monotonic = self.env, self.env.clock.monotonic
        began = monotonic()
        found = source.look(call) if here else source.peek(call)
        if not isinstance(found, Reply):
            return found or call
        took_s, agent = monotonic() - began, call.context.agent
        if found.source == "cache" and found.ok and not (found.stale or env.observed):  # nearly every one
            self._stats.hit(found, took_s, agent)
        else:
            self._tell_hit(found, took_s, agent)
        return found

    async def _serve(self, call: Call) -> Reply:
        """One call on the home loop, counted from start to the end of its body."""
        if self._closed:
            raise closed_error()
        env, agent, task = self.env, call.context.agent, asyncio.current_task(self._home.loop)
        began = env.clock.monotonic()
        number = self._calls.begin(task)
        if env.observed:
            env.emit(CallStarted(agent))
        try:
            layered = self._handler if call.context.deadline is None else self._timely
            handler = self._endpoints[0] if call.direct else layered
            reply = await handler(call)
        except BaseException as error:
            result: CallResult = "cancelled" if isinstance(error, asyncio.CancelledError) else "failed"
            self._finish(number, result, began, agent, NO_USAGE, type(error).__name__)
            if isinstance(error, asyncio.CancelledError) and self._calls.was_cancelled_here(task):
                raise closed_error() from None
            raise
        if reply.chunks is None:
            result, error_name = result_of(reply)
            self._finish(number, result, began, agent, reply.usage, error_name)
            return reply

        def ended(end: End) -> None:
            result, error_name = result_of(reply)
            if end.how == "failed":
                result, error_name = "failed", type(end.error).__name__
            elif end.how != "finished":
                result = "cancelled"
            self._finish(number, result, began, agent, end.usage, error_name)

        guarded = GuardedChunks(reply.chunks, ended)
        self._calls.hand_over(number, guarded)
        return reply.replace(chunks=guarded)

    def _finish(
        self, number: int, result: CallResult, began: float, agent: str | None, usage: Usage, error: str
    ) -> None:
        self._calls.end(number)
        self.env.emit(CallEnded(result, self.env.clock.monotonic() - began, agent, usage, error))

    # ── lifetime ────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def closed(self) -> bool:
        """Whether `aclose` was called."""
        return self._closed

    async def aclose(self, *, drain_timeout: float = DRAIN_S) -> None:
        """Refuse new calls, wait for those in flight, then release everything. Idempotent, from any loop.

        A stream that the closer itself was reading is broken off at once; who reads on gets Closed.
        """
        self._closed, me = True, whose()
        with self._ending():
            if not self._released:
                await self._home.run(lambda: self._close_here(drain_timeout, me))

    def close(self, *, drain_timeout: float = DRAIN_S) -> None:
        """`aclose` for plain code.

        Raises:
            ConfigError: called on the home loop's own thread; use `await aclose()` there.
        """
        self._home.refuse_own_thread()
        self._closed, me = True, whose()
        with self._ending():
            if not self._released:
                self._home.run_sync(lambda: self._close_here(drain_timeout, me))

    @contextlib.contextmanager
    def _ending(self) -> Generator[None]:
        try:
            with contextlib.suppress(Closed):  # somebody else was quicker
                yield
        finally:
            if self._released:
                self._home.join_thread()

    async def _close_here(self, drain_timeout: float, closer: object) -> None:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        if self._closing is None or self._closing.get_loop() is not loop:
            self._closing = loop.create_task(self._close(task, drain_timeout, closer))
            self._closing.add_done_callback(lambda _: self._home.stop_thread())  # also when nobody waits for it
        if not self._is_inside():  # it would wait for itself: the close goes on alone
            await asyncio.shield(self._closing)

    def _is_inside(self) -> bool:
        """Whether the running code is part of a call of ours."""
        flight = current_flight()
        shared = flight is not None and flight.runs and any(flight.owner is bound for _, bound in self._bounds)
        return shared or runs_inside(self._endpoints)

    async def _close(self, task: asyncio.Task[Any] | None, drain_timeout: float, closer: object) -> None:
        for _, bound in self._bounds:
            bound.closing()
        self._calls.forget(task)  # closed from inside a call: it cannot wait for itself
        await self._calls.drain(drain_timeout, closer)
        try:
            await self._release()
        finally:
            if self._released:
                await self._home.settle_down()

    async def _release(self) -> None:
        failed = await close_all(self._parts)
        self._released = True  # and not where that was cancelled
        if failed is not None:
            raise failed

    async def _leave(self) -> None:
        """The home loop shuts down without `aclose`: drop sockets and tasks there, keep entries and levels."""
        await give_up(self._closing)  # whoever waits for it goes on elsewhere
        self._rehome()
        if self._closed and not self._released:  # `aclose` was cancelled, and then the loop ended
            await self._release()
        await self.env.clock.sleep(0)  # transports close in the next turn

    def _rehome(self) -> None:
        self._calls.forget()
        for part in self._parts:
            part.rehome()

    def _forked(self) -> None:
        """In a forked child: nothing of the parent's loop, threads and sockets is ours."""
        self._stats.after_fork()
        self._closing = None
        self._rehome()

    async def __aenter__(self) -> Self:
        self._home.adopt()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            await self.aclose(drain_timeout=patience_after(error))
        except Exception as problem:  # noqa: BLE001 — told all the same
            note_or_raise(error, problem)

    def __enter__(self) -> Self:
        self._home.adopt_thread()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.close(drain_timeout=patience_after(error))
        except Exception as problem:  # noqa: BLE001 — as above
            note_or_raise(error, problem)

    def __repr__(self) -> str:
        layers = " > ".join(role for role, _ in groupby(name for name, _ in self._bounds))  # once for all endpoints
        where = ", ".join(endpoint.name for endpoint in self._endpoints)
        return f"Engine({layers or 'no layers'} -> {where}{', closed' if self._closed else ''})"

"""The engines in service on one event loop of one process: their slots, their replacement, their ends."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

from llmmw.errors import Closed, PoolTimeout

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from llmmw.env import Env
    from llmmw.pool.engine import Engine, EngineOptions

LEAK_CHECK_S = 1.0
"""Connections held beyond the requests in flight for this long have leaked (httpx does it under cancellation)."""


class Generation:
    """One engine and how many requests it carries; retired, it takes no more and closes after the last."""

    __slots__ = ("active", "born", "checked", "engine", "heard", "retired", "suspect")

    def __init__(self, engine: Engine, now: float) -> None:
        self.engine = engine
        self.born = now
        self.checked = now
        self.suspect = False
        self.heard = 0
        """Answers that have begun to arrive."""
        self.active = 0
        self.retired = False


class Fleet:
    """Engines and slots on the loop that runs when it is made."""

    def __init__(
        self,
        make: Callable[[EngineOptions], Engine],
        options: EngineOptions,
        env: Env,
        max_connections: int,
        max_age_s: float | None,
    ) -> None:
        self._make = make
        self._options = options
        self._env = env
        self._max_age_s = max_age_s
        self._loop = asyncio.get_running_loop()
        self._pid = os.getpid()
        self._free = max_connections
        self._queue: OrderedDict[asyncio.Future[None], None] = OrderedDict()
        self._current: Generation | None = None
        self._generations: set[Generation] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._idle: asyncio.Future[None] | None = None
        self.active = 0
        """Requests inside, those waiting for a slot included."""
        self.dead = False

    @property
    def waiting(self) -> int:
        """Requests that wait for a slot."""
        return len(self._queue)

    @property
    def is_open(self) -> bool:
        """Whether there are engines, and so perhaps sockets."""
        return bool(self._generations)

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The loop that everything here belongs to."""
        return self._loop

    def is_here(self) -> bool:
        """Whether the running loop is this one, in this process."""
        return self._loop is asyncio.get_running_loop() and self._pid == os.getpid()

    def try_enter(self) -> bool:
        """Take a slot if one is free and nobody waits for it."""
        if self._free <= 0:
            return False
        self._free -= 1
        self.active += 1
        return True

    async def enter(self, limit_s: float | None) -> None:
        """Take a slot, in order of arrival.

        Raises:
            PoolTimeout: none came free within `limit_s`, or within a time-out that only interrupted the wait.
            Closed: the pool was closed while waiting.
        """
        turn: asyncio.Future[None] = self._loop.create_future()
        self._queue[turn] = None
        self.active += 1
        task = asyncio.current_task()
        cancelling = 0 if task is None else task.cancelling()
        try:
            async with asyncio.timeout(limit_s):
                await turn
        except (TimeoutError, asyncio.CancelledError) as stopped:
            if turn.done() and not turn.cancelled():
                self.leave()  # the slot came together with the end of the wait
            else:
                self._queue.pop(turn, None)
                self._left()
            # `Until` (interrupt.py) cancels the future and not the task: a time-out of ours, and nothing was sent.
            if isinstance(stopped, TimeoutError) or (task is not None and task.cancelling() == cancelling):
                raise PoolTimeout("no connection of the pool came free in time; nothing was sent") from None
            raise
        if self.dead:
            self.leave()
            raise Closed("the connection pool was closed before a connection became free")

    def leave(self) -> None:
        """Give the slot back, to whoever waits longest."""
        while self._queue:
            turn, _ = self._queue.popitem(last=False)
            if not turn.done():
                turn.set_result(None)
                break
        else:
            self._free += 1
        self._left()

    def _left(self) -> None:
        self.active -= 1
        if not self.active and self._idle is not None and not self._idle.done():
            self._idle.set_result(None)

    def start(self) -> Generation:
        """The connections to use now, one request more on them."""
        now = self._env.clock.monotonic()
        current = self._current
        if current is not None and self._is_worn(current, now):
            self.retire(current)
            current = None
        if current is None:
            current = self._current = Generation(self._make(self._options), now)
            self._generations.add(current)
        current.active += 1
        return current

    def _is_worn(self, generation: Generation, now: float) -> bool:
        if self._max_age_s is not None and now - generation.born > self._max_age_s:
            return True
        if now - generation.checked < LEAK_CHECK_S:
            return False
        generation.checked = now
        held = generation.engine.held()
        leaking = held is not None and held > generation.active
        worn, generation.suspect = leaking and generation.suspect, leaking
        return worn

    def stop(self, generation: Generation) -> None:
        """One request less."""
        generation.active -= 1
        if generation.retired and not generation.active:
            self._close_engine(generation)

    def finish(self, generation: Generation) -> None:
        """A response is over: connection and slot are free."""
        self.stop(generation)
        self.leave()

    def retire(self, generation: Generation) -> None:
        """Use its connections for nothing new; they close when their requests are done."""
        if self._current is generation:
            self._current = None
        if not generation.retired:
            generation.retired = True
            if not generation.active:
                self._close_engine(generation)

    def _close_engine(self, generation: Generation) -> None:
        self._generations.discard(generation)
        if not self.dead:
            self.background(generation.engine.aclose())

    def background(self, work: Coroutine[Any, Any, None]) -> None:
        """Run something that closing waits for."""
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self, drain_s: float) -> None:
        """Wait for what is in flight, at most `drain_s`, then break it off and close every connection."""
        try:
            if self.active:
                self._idle = self._loop.create_future()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(drain_s):
                        await self._idle
        finally:
            self.dead = True
            engines = [generation.engine for generation in self._generations]
            self._generations.clear()
            await asyncio.gather(*(engine.aclose() for engine in engines), *self._tasks, return_exceptions=True)

    def drop(self) -> None:
        """Forget every socket, without the loop."""
        self.dead = True
        for generation in self._generations:
            generation.engine.drop()
        self._generations.clear()
        self._current = None

    def drop_from_anywhere(self) -> None:
        """The same from a finaliser, which may run on any thread."""
        if self._pid == os.getpid() and self._loop.is_running():
            self._loop.call_soon_threadsafe(self.drop)
        else:
            self.drop()

"""The home loop: the one event loop an engine lives on, and the bridge to it from everywhere else.

An engine's running state (tasks, futures, sockets) belongs to one loop, so its layers are plain single-threaded
asyncio code. The home is the running loop inside `async with`, a background thread's inside `with`, else the loop
of the first caller. Others are bridged to it. When it ends (every `asyncio.run` ends one) the next caller's loop
becomes the home; bridged calls that were in flight are run again there.

How the end of a loop is noticed without polling: a started async generator is closed by the loop's own
`shutdown_asyncgens`, which every `asyncio.run` calls last. Ours then closes the sockets while that still works.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import os
import threading
import weakref
from typing import TYPE_CHECKING, Any, TypeVar

from llmmw.errors import Closed, ConfigError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine

T = TypeVar("T")

_MAX_MOVES = 16
"""A call that outlived this many homes gives up instead of following them for ever."""
_JOIN_S = 5.0


_homes: weakref.WeakSet[Home] = weakref.WeakSet()


class HomeLost(Exception):
    """The home loop ended before the bridged work did."""


class LoopThread:
    """A daemon thread that runs an event loop until told to stop."""

    def __init__(self, on_start: Callable[[asyncio.AbstractEventLoop], None]) -> None:
        self._on_start = on_start
        self._started: concurrent.futures.Future[asyncio.AbstractEventLoop] = concurrent.futures.Future()
        self._thread = threading.Thread(target=self._main, name="llmmw-home", daemon=True)
        self._thread.start()
        self.loop = self._started.result()

    def _main(self) -> None:
        with asyncio.Runner() as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        self._stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        self._on_start(loop)
        del self._on_start  # the thread must not keep its owner alive
        self._started.set_result(loop)
        await self._stop.wait()

    def stop(self) -> None:
        """End the loop and wait for the thread, unless called on it."""
        with contextlib.suppress(RuntimeError):  # the loop is closed already
            self.loop.call_soon_threadsafe(self._stop.set)
        if threading.current_thread() is not self._thread:
            self._thread.join(_JOIN_S)


class Home:
    """Where an engine lives.

    Args:
        on_leave: awaited on the home loop while it shuts down: close what can only be closed there.
        on_move: called when a new loop is adopted after another one died: drop what belonged to it.
        on_fork: called in a forked child, where nothing of the parent's loop and threads exists.
    """

    def __init__(
        self,
        on_leave: Callable[[], Awaitable[None]],
        on_move: Callable[[], None],
        on_fork: Callable[[], None],
    ) -> None:
        self._on_leave = on_leave
        self._on_move = on_move
        self._on_fork = on_fork
        self._reset()
        _homes.add(self)

    def _reset(self) -> None:
        self._lock = threading.RLock()
        self.loop: asyncio.AbstractEventLoop | None = None
        self._used = False
        self._thread: LoopThread | None = None
        self._sentinel: AsyncGenerator[None] | None = None
        self._bridged: set[concurrent.futures.Future[Any]] = set()

    def after_fork(self) -> None:
        """Forget the parent's loop and threads."""
        self._reset()
        self._on_fork()

    # ── adopting ────────────────────────────────────────────────────────────────────────────────────────────────

    def adopt(self) -> bool:
        """Whether the running loop is the home; it becomes that if there is no living one."""
        running = asyncio.get_running_loop()
        if self.loop is running:
            return True
        with self._lock:
            if self._alive():
                return False
            self._settle(running)
        return True

    def adopt_thread(self) -> None:
        """Make a background thread the home, unless there is a living one."""
        with self._lock:
            if not self._alive():
                # The new thread settles while this one waits holding the lock, so nobody sees half a move.
                thread = self._thread = LoopThread(self._settle)
                weakref.finalize(self, thread.stop)

    def _alive(self) -> bool:
        loop = self.loop
        return loop is not None and not loop.is_closed() and loop.is_running()

    def _settle(self, loop: asyncio.AbstractEventLoop) -> None:
        """Make `loop`, on whose thread we are, the home; whoever asked for it holds the lock."""
        if self._used:
            self._fail_bridged()
            self._on_move()
        self._used = True
        self.loop = loop
        sentinel = self._watch(loop)
        with contextlib.suppress(StopIteration):  # runs to its first `yield`: no loop turn is needed
            sentinel.__anext__().send(None)
        self._sentinel = sentinel

    async def _watch(self, loop: asyncio.AbstractEventLoop) -> AsyncGenerator[None]:
        try:
            yield
        finally:
            if self.loop is loop:
                try:
                    await self._on_leave()
                finally:
                    self._forget()

    def _forget(self) -> None:
        with self._lock:
            self.loop = None
            self._sentinel = None
            self._fail_bridged()

    def _fail_bridged(self) -> None:
        for future in list(self._bridged):
            if not future.done():
                with contextlib.suppress(concurrent.futures.InvalidStateError):
                    future.set_exception(HomeLost())
        self._bridged.clear()

    # ── running ─────────────────────────────────────────────────────────────────────────────────────────────────

    async def run(self, make: Callable[[], Coroutine[Any, Any, T]], *, repeat: bool = True) -> T:
        """Run `make()` on the home loop from any loop.

        Args:
            make: builds the coroutine; called again on the new home if the old one ends first.
            repeat: False where a second run would be wrong (the next chunk of a stream): raises Closed then.
        """
        for _ in range(_MAX_MOVES):
            if self.adopt():
                return await make()
            try:
                return await asyncio.wrap_future(self._submit(make))
            except HomeLost:
                if not repeat:
                    break
        raise Closed("the event loop that served this call ended before the call did")

    def run_sync(self, make: Callable[[], Coroutine[Any, Any, T]], *, repeat: bool = True) -> T:
        """Run `make()` on the home loop and wait, from plain code.

        Raises:
            ConfigError: called on the home loop's own thread, where waiting would stop the loop for ever.
        """
        for _ in range(_MAX_MOVES):
            self.refuse_own_thread()
            self.adopt_thread()
            try:
                future = self._submit(make)
                try:
                    return future.result()
                except BaseException:
                    future.cancel()
                    raise
            except HomeLost:
                if not repeat:
                    break
        raise Closed("the event loop that served this call ended before the call did")

    def is_here(self) -> bool:
        """Whether the caller runs on the home loop."""
        try:
            return asyncio.get_running_loop() is self.loop
        except RuntimeError:
            return False

    def refuse_own_thread(self) -> None:
        """Raise where waiting for the home loop would stop it.

        Raises:
            ConfigError: called on the home loop's own thread.
        """
        if self.is_here():
            raise ConfigError(
                "a synchronous llmmw call on the thread of its own event loop would wait for itself; "
                "use the async form here (await client.chat(...), an async function), or call from another thread"
            )

    def _submit(self, make: Callable[[], Coroutine[Any, Any, T]]) -> concurrent.futures.Future[T]:
        result: concurrent.futures.Future[T] = concurrent.futures.Future()
        with self._lock:
            loop = self.loop
            if loop is None or not self._alive():
                raise HomeLost
            self._bridged.add(result)
            try:
                loop.call_soon_threadsafe(_start, loop, make, result)
            except RuntimeError:  # closed between the check and here
                self._bridged.discard(result)
                raise HomeLost from None
        result.add_done_callback(self._bridged.discard)
        return result

    # ── leaving ─────────────────────────────────────────────────────────────────────────────────────────────────

    async def settle_down(self) -> None:
        """The engine is closed, told on the home loop: stop watching it."""
        with self._lock:
            sentinel, self._sentinel = self._sentinel, None
            self.loop = None
        if sentinel is not None:
            await sentinel.aclose()

    def stop_thread(self) -> None:
        """End the background thread, if there is one."""
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.stop()


def _start(
    loop: asyncio.AbstractEventLoop,
    make: Callable[[], Coroutine[Any, Any, T]],
    result: concurrent.futures.Future[T],
) -> None:
    """On the home loop: run the coroutine as a task and carry outcome and cancellation across."""
    if result.done():
        return
    task = loop.create_task(make())

    def deliver(done: asyncio.Task[T]) -> None:
        with contextlib.suppress(concurrent.futures.InvalidStateError):
            if done.cancelled():
                # Nobody but the loop's own shutdown cancels a bridged task: the caller's wish arrives via `result`.
                if not result.done():
                    result.set_exception(HomeLost())
                return
            error = done.exception()
            if result.done():
                return
            if error is not None:
                result.set_exception(error)
            else:
                result.set_result(done.result())

    def withdraw(_: concurrent.futures.Future[T]) -> None:
        if result.cancelled():
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(task.cancel)

    task.add_done_callback(deliver)
    result.add_done_callback(withdraw)


def _after_fork_in_child() -> None:
    for home in list(_homes):
        home.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)

"""The home loop: the one event loop an engine lives on, and the bridge to it from everywhere else.

An engine's running state (tasks, futures, sockets) belongs to one loop, so its layers are plain single-threaded
asyncio code. The home is the running loop inside `async with`, a background thread's inside `with`, else the loop
of the first caller. Others are bridged to it. When it ends (every `asyncio.run` ends one) the next caller's loop
becomes the home; bridged calls that were in flight are run again, on a background thread.

How the end of a loop is noticed without polling: a started async generator is closed by the loop's own
`shutdown_asyncgens`, which every `asyncio.run` calls last. Ours then closes the sockets while that still works.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import weakref
from typing import TYPE_CHECKING, Any, TypeVar

from llmmw.engine.bridge import Bridged, HomeLost, LoopThread, StandsStill, outcome_of, outcome_of_sync
from llmmw.engine.closing import closed_error, end_by_hand
from llmmw.engine.readers import last_releases
from llmmw.errors import Closed, ConfigError

if TYPE_CHECKING:
    import concurrent.futures
    from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine

T = TypeVar("T")

_MAX_MOVES = 16
"""A call that outlived this many homes gives up instead of following them for ever."""
_DOUBT_S = 0.1
"""How long a home that stands still may take to show whether it is ending; after that it is merely paused."""
_REVIVE_S = 1.0
"""A loop that still runs this long after it cancelled our tasks was not ending."""
_LAST_WORDS_S = 5.0

_homes: weakref.WeakSet[Home] = weakref.WeakSet()


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
        self._over = False
        self._reset()
        _homes.add(self)

    def _reset(self) -> None:
        self._lock = threading.RLock()
        self.loop: asyncio.AbstractEventLoop | None = None
        self._used = False
        self._thread: LoopThread | None = None
        self._sentinel: AsyncGenerator[None] | None = None
        self._bridged: dict[int, Bridged[Any]] = {}
        self._runner = 0
        """The thread that the home was found on."""
        self._dying: asyncio.AbstractEventLoop | None = None
        self._paused: asyncio.AbstractEventLoop | None = None

    def after_fork(self) -> None:
        """Forget the parent's loop and threads."""
        self._reset()
        self._on_fork()

    # ── adopting ────────────────────────────────────────────────────────────────────────────────────────────────

    def adopt(self) -> bool:
        """Whether the running loop is the home; it becomes that if there is no living one.

        Raises:
            Closed: `settle_down` was called.
        """
        running = asyncio.get_running_loop()
        if self.loop is running:
            return True
        with self._lock:
            if self._over:
                raise closed_error()
            if self._alive() or self._in_doubt():
                return False
            self._settle(running)
        return True

    def adopt_thread(self) -> None:
        """Make a background thread the home, unless there is a living one.

        Raises:
            Closed: `settle_down` was called.
        """
        with self._lock:
            if self._over:
                raise closed_error()
            if not self._alive() and not self._in_doubt():
                # The new thread settles while this one waits holding the lock, so nobody sees half a move.
                thread = self._thread = LoopThread(self._settle)
                weakref.finalize(self, thread.finish)

    def _alive(self) -> bool:
        loop = self.loop
        return loop is not None and not loop.is_closed() and loop.is_running()

    def _in_doubt(self) -> bool:
        """Whether the home stands still, and may be between the last run and the clean-up of an `asyncio.run`.

        To move house then would let two threads work on the layers at once.
        """
        loop = self.loop
        return (
            loop is not None
            and loop is not self._paused
            and not loop.is_closed()
            and not loop.is_running()
            and self._runner != threading.get_ident()
        )

    def _settle(self, loop: asyncio.AbstractEventLoop) -> None:
        """Make `loop`, on whose thread we are, the home; whoever asked for it holds the lock."""
        if self._used:
            self._lose_bridged()
            self._on_move()
        self._used = True
        self.loop = loop
        self._runner = threading.get_ident()
        self._dying = self._paused = None
        end_by_hand(self._sentinel)
        sentinel = self._watch(loop)
        with contextlib.suppress(StopIteration):  # runs to its first `yield`: no loop turn is needed
            sentinel.__anext__().send(None)
        self._sentinel = sentinel

    async def _watch(self, loop: asyncio.AbstractEventLoop) -> AsyncGenerator[None]:
        try:
            yield
        finally:
            if self.loop is loop:
                self._dying = loop
                try:
                    await self._cancel_bridged()
                    await self._on_leave()
                    await last_releases(loop, _LAST_WORDS_S)
                finally:
                    self._forget()

    async def _cancel_bridged(self) -> None:
        """Calls that were bridged after the loop had cancelled its tasks."""
        for task in (tasks := [bridged.task for bridged in list(self._bridged.values()) if bridged.task is not None]):
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=_LAST_WORDS_S)

    def _forget(self) -> None:
        with self._lock:
            self.loop = None
            self._sentinel = None
            self._lose_bridged()

    def _lose_bridged(self) -> None:
        for bridged in list(self._bridged.values()):
            bridged.lose()
        self._bridged.clear()

    def _is_dying(self, loop: asyncio.AbstractEventLoop) -> bool:
        """The loop has cancelled bridged work at its end; its last word is the sentinel's."""
        if self.loop is not loop or self._sentinel is None:
            return False
        if self._dying is not loop:
            self._dying = loop
            loop.call_later(_REVIVE_S, self._revive, loop)
        return True

    def _revive(self, loop: asyncio.AbstractEventLoop) -> None:
        with self._lock:
            if self._dying is loop:
                self._dying = None
                self._lose_bridged()

    # ── running ─────────────────────────────────────────────────────────────────────────────────────────────────

    async def run(self, make: Callable[[], Coroutine[Any, Any, T]], *, repeat: bool = True) -> T:
        """Run `make()` on the home loop from any loop.

        Args:
            make: builds the coroutine; called again on the new home if the old one ends first.
            repeat: False where a second run would be wrong (the next chunk of a stream): raises Closed then.

        Raises:
            Closed: `settle_down` was called, or home after home ended.
        """
        for _ in range(_MAX_MOVES):
            if self.adopt():
                return await make()
            try:
                return await outcome_of(*self._submit(make))
            except HomeLost:
                if not repeat:
                    break
                self.adopt_thread()  # the next caller's loop might end as early, and the call be repeated once more
            except StandsStill:
                self._note_pause()
        raise Closed("the event loop that served this call ended before the call did")

    def run_sync(self, make: Callable[[], Coroutine[Any, Any, T]], *, repeat: bool = True) -> T:
        """Run `make()` on the home loop and wait, from plain code.

        Raises:
            ConfigError: called on the home loop's own thread, where waiting would stop the loop for ever.
            Closed: as for `run`.
        """
        for _ in range(_MAX_MOVES):
            self.refuse_own_thread()
            self.adopt_thread()
            try:
                return outcome_of_sync(*self._submit(make))
            except HomeLost:
                if not repeat:
                    break
            except StandsStill:
                self._note_pause()
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

    def _submit(self, make: Callable[[], Coroutine[Any, Any, T]]) -> tuple[concurrent.futures.Future[T], float | None]:
        """The result to wait for, and how long if the home stands still.

        Raises:
            HomeLost: there is none.
        """
        with self._lock:
            loop = self.loop
            if loop is None or loop.is_closed():
                raise HomeLost
            doubtful = self._in_doubt()
            if not doubtful and not loop.is_running():
                raise HomeLost
            bridged = Bridged(
                loop,
                make,
                # What a dying loop would only begin waits for its end, and then goes elsewhere.
                may_start=lambda: not doubtful and self._dying is not loop,
                on_dying=lambda: self._is_dying(loop),
            )
            self._bridged[key := id(bridged)] = bridged
            try:
                bridged.send()
            except RuntimeError:  # closed between the check and here
                del self._bridged[key]
                raise HomeLost from None
        bridged.result.add_done_callback(lambda _: self._bridged.pop(key, None))
        return bridged.result, _DOUBT_S if doubtful else None

    def _note_pause(self) -> None:
        with self._lock:
            if self.loop is not None and not self.loop.is_running():
                self._paused = self.loop

    # ── leaving ─────────────────────────────────────────────────────────────────────────────────────────────────

    async def settle_down(self) -> None:
        """The engine is closed, told on the home loop: stop watching it, and let nobody move in again."""
        with self._lock:
            self._over = True
            sentinel, self._sentinel = self._sentinel, None
            self.loop = None
        if sentinel is not None:
            await sentinel.aclose()

    def stop_thread(self) -> None:
        """Let the background thread end, if there is one."""
        if self._thread is not None:
            self._thread.stop()

    def join_thread(self) -> None:
        """Wait for its end, unless called on it."""
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.join()


def _after_fork_in_child() -> None:
    for home in list(_homes):
        home.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)

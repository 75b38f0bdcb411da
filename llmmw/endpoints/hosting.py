"""`Hosting`: an application in this process, on one event loop, whatever loops its callers come from and leave."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import warnings
from concurrent.futures import Future
from contextvars import Context
from importlib import import_module
from typing import TYPE_CHECKING

from llmmw.errors import Closed, ConfigError, ConnectionFailed
from llmmw.interrupt import mark_unsent

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractAsyncContextManager

    from llmmw.pool.engines.asgi import App


class Hosted:
    """What runs: an ASGI application and what is known about it.

    Args:
        app: the application.
        broken: why it will answer nothing any more, or None; called from any thread.
        unfinished: how many requests it works on, from any thread.
        by_priority: whether it takes urgent requests first.
    """

    def __init__(
        self,
        app: App,
        broken: Callable[[], str | None],
        unfinished: Callable[[], int | None],
        *,
        by_priority: bool = False,
    ) -> None:
        self.app = app
        self.broken = broken
        self.unfinished = unfinished
        self.by_priority = by_priority


class Hosting:
    """Opens an application when it is first wanted and closes it once, on one event loop.

    Callers may come and go with event loops of their own (every `asyncio.run` ends one): the application stays.

    Args:
        opening: makes the context in which the application lives; entered and left on its loop.
        loop: where it has to live; by default on a loop of its own, on a thread of its own.
        label: for messages and the thread.
    """

    def __init__(
        self,
        opening: Callable[[], AbstractAsyncContextManager[Hosted]],
        *,
        loop: asyncio.AbstractEventLoop | None = None,
        label: str = "application",
    ) -> None:
        self._opening = opening
        self._given = loop
        self._loop = loop
        self._label = label
        self._pid = 0
        self._hosted: Hosted | None = None
        self._opened: Future[None] | None = None
        self._over: Future[None] = Future()
        self._failure: ConfigError | ConnectionFailed | None = None
        self._stop = asyncio.Event()
        self._closed = False
        self._turn = threading.RLock()  # not a plain one: a finaliser may call `end` anywhere
        """Clients on several threads may share it, and it starts once, or not at all."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._thread: threading.Thread | None = None

    # ── what the engine of the pool asks (`Host`) ───────────────────────────────────────────────────────────────

    @property
    def hosted(self) -> Hosted:
        """What runs.

        Raises:
            ConnectionFailed: nothing does.
        """
        hosted = self._hosted
        if hosted is None:
            raise ConnectionFailed(self.broken() or "")
        return hosted

    @property
    def app(self) -> App:
        """The application."""
        return self.hosted.app

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """Where it runs, once it has been started."""
        if self._loop is None:
            raise ConnectionFailed(f"the {self._label} has not been started")
        return self._loop

    def is_here(self) -> bool:
        """Whether it was started by this process."""
        return self._pid == os.getpid()

    def broken(self) -> str | None:
        """Why it answers nothing now, or None."""
        if self._opened is None:
            return f"the {self._label} has not been started"
        if not self.is_here():
            return f"the {self._label} belongs to the process that started it ({self._pid}), not to this fork of it"
        if self._failure is not None:
            return self._failure.message
        if self.loop.is_closed() and not self._closed:
            return f"the event loop on which the {self._label} was made has ended"
        hosted = self._hosted
        if hosted is None:
            return f"the {self._label} {'is closed' if self._opened.done() else 'is being started'}"
        return hosted.broken()

    def unfinished(self) -> int | None:
        """How many requests it works on, where it is known; from any thread."""
        hosted = self._hosted
        return None if hosted is None else hosted.unfinished()

    def add(self, task: asyncio.Task[None]) -> None:
        """Keep a task, and cancel it when the application is closed."""
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # ── its life ────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def state(self) -> str:
        """One of "new", "starting", "running", "failed" and "closed"; from any thread."""
        if self._closed:
            return "closed"
        if self._opened is None:
            return "new"
        if not self._opened.done():
            return "starting"
        return "running" if self.broken() is None else "failed"

    async def ready(self) -> None:
        """Wait until it runs; the first caller starts it. Who stops waiting does not stop it.

        Raises:
            Closed: it was closed.
            ConfigError: it cannot work with its settings.
            ConnectionFailed: it did not start, or was started before this process was forked.
        """
        if self._hosted is not None and self.is_here():
            return
        with self._turn:
            if self._closed:
                raise Closed(f"the {self._label} is closed")
            opened = self._opened or self._start()
        if not self.is_here():
            raise ConnectionFailed(self.broken() or "")
        try:
            await _done(opened)
        except asyncio.CancelledError as error:
            mark_unsent(error)
            raise
        if self._failure is not None:
            # Anew for each caller: a shared one would collect their frames.
            raise type(self._failure)(self._failure.message)

    def _start(self) -> Future[None]:
        opened: Future[None] = Future()
        self._opened, self._pid = opened, os.getpid()
        if self._given is not None:
            if not self._given.is_closed():
                self._given.call_soon_threadsafe(self._begin_there, self._given, context=Context())
            else:
                self._failure = ConnectionFailed(f"the event loop on which the {self._label} was made has ended")
                opened.set_result(None)
            return opened
        self._loop = loop = _new_loop()
        # A daemon: a program that forgets to close must still be able to end.
        self._thread = threading.Thread(target=self._run, args=(loop,), name=f"llmmw {self._label}", daemon=True)
        self._thread.start()
        return opened

    def _begin_there(self, loop: asyncio.AbstractEventLoop) -> None:
        self._main = loop.create_task(self._live(), context=Context())  # kept: a loop holds its tasks weakly
        self._main.add_done_callback(lambda _: self._over.set_result(None))

    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        try:
            with asyncio.Runner(loop_factory=lambda: loop) as runner:
                runner.run(self._live())
        finally:
            self._over.set_result(None)

    async def _live(self) -> None:
        opened = self._opened or Future()
        try:
            async with self._opening() as hosted:
                self._hosted = hosted
                opened.set_result(None)
                try:
                    await self._stop.wait()
                finally:
                    self._hosted = None
                    await self._end_tasks()
        except Exception as error:  # noqa: BLE001 — whatever keeps it from starting is told to who asks for it
            if opened.done():
                warnings.warn(f"the {self._label} did not end well: {error!r}", RuntimeWarning, stacklevel=1)
            else:
                self._failure = _failure_of(error, self._label)
        finally:
            if not opened.done():
                self._failure = self._failure or ConnectionFailed(f"the start of the {self._label} was interrupted")
                opened.set_result(None)

    async def _end_tasks(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def end(self) -> None:
        """Close it without waiting; from any thread. Idempotent."""
        with self._turn:
            self._closed = True
        if self._loop is not None and self.is_here():
            with contextlib.suppress(RuntimeError):  # its loop has ended, and it with it
                self._loop.call_soon_threadsafe(self._stop.set)

    async def aclose(self) -> None:
        """Close it and wait until nothing of it is left. Idempotent.

        One that is just being started is closed when that is done: vLLM's start cannot be interrupted.
        """
        self.end()
        if self._opened is None or not self.is_here():
            return
        if self._given is not None and not self._given.is_running():
            return
        await _done(self._over)
        if self._thread is not None:
            self._thread.join()  # its last statement has run


def _failure_of(error: Exception, label: str) -> ConfigError | ConnectionFailed:
    if isinstance(error, ConfigError | ConnectionFailed):
        return error
    return ConnectionFailed(f"the {label} did not start: {type(error).__name__}: {error}")


def _new_loop() -> asyncio.AbstractEventLoop:
    try:
        return import_module("uvloop").new_event_loop()  # type: ignore[no-any-return]
    except ImportError:
        return asyncio.new_event_loop()


async def _done(source: Future[None]) -> None:
    """Wait for a future of another thread. Unlike `wrap_future`, leaving neither cancels it nor is told of it later."""
    loop = asyncio.get_running_loop()
    waiter = loop.create_future()

    def wake() -> None:
        if not waiter.done():
            waiter.set_result(None)

    def tell(_: Future[None]) -> None:
        with contextlib.suppress(RuntimeError):  # who waited is gone, loop and all
            loop.call_soon_threadsafe(wake, context=Context())

    source.add_done_callback(tell)
    await waiter

"""What a caller holds of a stream: a guard that notices when it is dropped, and a bridge to the loop it lives on."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import weakref
from typing import TYPE_CHECKING

from llmmw.errors import Closed, LLMMWError
from llmmw.stream import Tap

if TYPE_CHECKING:
    from collections.abc import Callable

    from llmmw.answer import Usage
    from llmmw.call import Chunk, Chunks, Reply
    from llmmw.engine.home import Home
    from llmmw.stream import End


def whose() -> object:
    """Who is running: the task, or the thread of plain code. Equal for the same one, and keeps nobody alive."""
    try:
        task = asyncio.current_task()
    except RuntimeError:
        task = None
    return threading.get_ident() if task is None else weakref.ref(task)


_releases: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, set[asyncio.Task[None]] | None] = (
    weakref.WeakKeyDictionary()
)
"""Streams that are being released on a loop; None where a home of ours ends: it has released them all itself."""


def _release(loop: asyncio.AbstractEventLoop, tap: Tap) -> None:
    tasks = _releases.setdefault(loop, set())
    if tasks is not None:
        tasks.add(task := loop.create_task(tap.aclose()))
        task.add_done_callback(tasks.discard)


async def last_releases(loop: asyncio.AbstractEventLoop, patience_s: float) -> None:
    """Wait for the releases under way on a loop that ends; none begins any more, for it could not come to its end."""
    tasks = _releases.get(loop)
    _releases[loop] = None
    if tasks:
        await asyncio.wait(tasks, timeout=patience_s)


class GuardedChunks:
    """The outermost stream: a reader that drops it unread releases everything all the same."""

    def __init__(self, inner: Chunks, on_end: Callable[[End], None]) -> None:
        self._over = False
        self._broken = ""
        self.loop = asyncio.get_running_loop()
        self.reader: object = whose()
        """Who made the call, then who read last."""
        self.is_bridged = False
        """Whether a bridge reads it and says for whom."""

        def ended(end: End) -> None:
            guard = this()
            if guard is not None:
                guard._over = True  # noqa: SLF001 — our own
            on_end(end)

        self._tap = Tap(inner, ended)
        this = weakref.ref(self)

    @property
    def usage(self) -> Usage:
        """What the stream reported so far."""
        return self._tap.usage

    def __aiter__(self) -> GuardedChunks:
        return self

    async def __anext__(self) -> Chunk:
        if not self.is_bridged:
            self.reader = whose()
        try:
            return await self._tap.__anext__()
        except (StopAsyncIteration, LLMMWError):
            if not self._broken:
                raise
        raise Closed(self._broken)

    async def aclose(self) -> None:
        """Stop reading and release everything."""
        await self._tap.aclose()

    async def break_off(self, why: str) -> None:
        """Release everything; whoever reads, now or later, gets Closed."""
        if not self._over:
            self._broken = why
            await self._tap.aclose()

    def release(self) -> None:
        """`aclose`, soon, from any thread: for a reader that is gone."""
        if not self._over and not self.loop.is_closed():
            with contextlib.suppress(RuntimeError):  # closed on its own thread meanwhile
                self.loop.call_soon_threadsafe(_release, self.loop, self._tap)

    def __del__(self) -> None:
        self.release()


class BridgedChunks:
    """A stream that lives on the home loop, read from elsewhere: from another loop, or from plain code."""

    def __init__(self, home: Home, inner: GuardedChunks) -> None:
        self._home = home
        self._inner = inner
        self._loop = inner.loop
        inner.is_bridged = True
        inner.reader = whose()

    @property
    def usage(self) -> Usage:
        """What the stream reported so far."""
        return self._inner.usage

    def __aiter__(self) -> BridgedChunks:
        return self

    async def __anext__(self) -> Chunk:
        self._inner.reader = whose()
        try:
            found = await self._home.run(self._next, repeat=False)
        except asyncio.CancelledError:
            self._inner.release()  # the chunk may have come in this moment: then nobody has told the stream
            raise
        if found is None:
            raise StopAsyncIteration
        return found

    async def aclose(self) -> None:
        """Stop reading and release the stream on its own loop."""
        with contextlib.suppress(Closed):  # whoever closed the engine has released it
            await self._home.run(self._close, repeat=False)

    def next_sync(self) -> Chunk | None:
        """The next chunk, or None at the end, from plain code."""
        self._inner.reader = whose()
        try:
            return self._home.run_sync(self._next, repeat=False)
        except KeyboardInterrupt:
            self._inner.release()  # as above
            raise

    def close_sync(self) -> None:
        """`aclose` from plain code."""
        if self._home.is_here():
            return  # inside a garbage collection, and dropping the stream releases it as well
        with contextlib.suppress(Closed):  # as above
            self._home.run_sync(self._close, repeat=False)

    async def _next(self) -> Chunk | None:
        if asyncio.get_running_loop() is not self._loop:
            raise Closed("the event loop that this stream came from has ended")
        # StopAsyncIteration cannot cross a future, so the end travels as None.
        try:
            return await self._inner.__anext__()
        except StopAsyncIteration:
            return None

    async def _close(self) -> None:
        if asyncio.get_running_loop() is self._loop:
            await self._inner.aclose()


def bridged(home: Home, reply: Reply) -> Reply:
    """The reply for a caller elsewhere than on the home loop."""
    chunks = reply.chunks
    return reply.replace(chunks=BridgedChunks(home, chunks)) if isinstance(chunks, GuardedChunks) else reply

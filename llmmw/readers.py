"""What a caller holds of a stream: a guard that notices when it is dropped, and a bridge to the loop it lives on."""

from __future__ import annotations

import asyncio
import weakref
from typing import TYPE_CHECKING

from llmmw.stream import Tap

if TYPE_CHECKING:
    from collections.abc import Callable

    from llmmw.answer import Usage
    from llmmw.call import Chunk, Chunks
    from llmmw.home import Home
    from llmmw.stream import End


class GuardedChunks:
    """The outermost stream: a reader that drops it unread releases everything all the same."""

    def __init__(self, inner: Chunks, on_end: Callable[[End], None]) -> None:
        self._over = False
        self._loop = asyncio.get_running_loop()

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
        return await self._tap.__anext__()

    async def aclose(self) -> None:
        """Stop reading and release everything."""
        await self._tap.aclose()

    def __del__(self) -> None:
        if not self._over and not self._loop.is_closed():
            loop, tap = self._loop, self._tap
            loop.call_soon_threadsafe(lambda: loop.create_task(tap.aclose()))


class BridgedChunks:
    """A stream that lives on the home loop, read from elsewhere: from another loop, or from plain code."""

    def __init__(self, home: Home, inner: Chunks) -> None:
        self._home = home
        self._inner = inner

    @property
    def usage(self) -> Usage:
        """What the stream reported so far."""
        return self._inner.usage

    def __aiter__(self) -> BridgedChunks:
        return self

    async def __anext__(self) -> Chunk:
        found = await self._home.run(self._next, repeat=False)
        if found is None:
            raise StopAsyncIteration
        return found

    async def aclose(self) -> None:
        """Stop reading and release the stream on its own loop."""
        await self._home.run(self._inner.aclose, repeat=False)

    def next_sync(self) -> Chunk | None:
        """The next chunk, or None at the end, from plain code."""
        return self._home.run_sync(self._next, repeat=False)

    def close_sync(self) -> None:
        """`aclose` from plain code."""
        self._home.run_sync(self._inner.aclose, repeat=False)

    async def _next(self) -> Chunk | None:
        # StopAsyncIteration cannot cross a future, so the end travels as None.
        try:
            return await self._inner.__anext__()
        except StopAsyncIteration:
            return None

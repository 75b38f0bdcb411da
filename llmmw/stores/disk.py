"""The disk tier: answers that outlive the process. Untrusted, bounded in time, never in the way.

The loop never touches the disk. Reads go to one I/O thread and are waited for briefly; writes are handed over and
forgotten; until a write is done, reads of its key are answered from what is waiting.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import threading
import weakref
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Final

from llmmw.stores.iothread import FLUSH_S, IOThread
from llmmw.stores.keeper import Keeper

if TYPE_CHECKING:
    from pathlib import Path

    from llmmw.env import Env
    from llmmw.stores.base import Codec, Match
    from llmmw.stores.entry import Entry

READ_BUDGET_S = 0.05
OPEN_BUDGET_S = 0.5
"""For reads that come before the database is open: importing and opening take about 50 ms, once."""
_SLACK_S = 0.001
"""A loop may fire a timer this much early."""
MAX_PENDING = 1024
MAX_PENDING_BYTES = 64 * 1024 * 1024
_MAX_SHARE = 0.1
_DELETED: Final = None


class _Nothing:
    """Says that nothing of a key waits to be written; None says that its deletion does."""


_NOTHING = _Nothing()

_stores: weakref.WeakSet[DiskStore] = weakref.WeakSet()
_inherited: list[object] = []
"""Database handles of the parent process: closing them here would touch its locks and its log."""


class DiskStore:
    """Entries in one directory, shared by processes.

    Args:
        directory: made if it is missing; see `place.prepare` for what is refused.
        env: clock, and sinks for trouble.
        max_bytes: size of the database.
        codec: transforms entries on their way.
        network: allows a network file system.
    """

    def __init__(
        self,
        directory: Path,
        env: Env,
        *,
        max_bytes: int,
        codec: Codec | None = None,
        network: bool = False,
    ) -> None:
        self._env = env
        self._max_bytes = max_bytes
        self._keeper = Keeper(directory, env, max_bytes=max_bytes, codec=codec, network=network)
        self._closed = False
        self._begin()

    def _begin(self) -> None:
        self._thread: IOThread | None = None
        self._finalizer: weakref.finalize[[], DiskStore] | None = None
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._pending: dict[bytes, Entry | None] = {}
        self._pending_bytes = 0
        self._discards = 0
        self._mailbox: _Mailbox | None = None
        self._asked = 0
        self._served = 0
        """Number of the latest read that the thread finished."""

    @property
    def max_item_bytes(self) -> int:
        """The largest body it takes."""
        return min(int(self._max_bytes * _MAX_SHARE), MAX_PENDING_BYTES)

    def _io(self) -> IOThread:
        if self._thread is None:
            self._thread = IOThread("llmmw-disk", self._keeper.close)
            self._finalizer = weakref.finalize(self, self._thread.stop)
            self._finalizer.atexit = False
            _stores.add(self)
        return self._thread

    async def get(self, key: bytes, /) -> Entry | None:
        """The entry; None where there is none, or it cannot be had within 50 ms."""
        waiting = self._pending.get(key, _NOTHING)
        if not isinstance(waiting, _Nothing):
            return waiting
        if self._closed or self._discards or self._keeper.down:
            return None
        loop, late = asyncio.get_running_loop(), 0 if self._mailbox is None else self._mailbox.late
        if late > self._served:  # the thread is stuck: one caller has waited for it, that is enough
            self._keeper.trouble("stalled")
            return None
        if self._mailbox is None or self._mailbox.loop is not loop:
            self._mailbox = _Mailbox(loop, self._keeper, late)
        self._asked = number = self._asked + 1
        found = self._mailbox.expect(number, READ_BUDGET_S if self._keeper.opened else OPEN_BUDGET_S)
        self._io().read(partial(self._read, number, key, self._mailbox, found), self._mailbox)
        return await found

    def _read(self, number: int, key: bytes, mailbox: _Mailbox, found: asyncio.Future[Entry | None]) -> None:
        entry, broken = (None, False) if found.done() else self._keeper.get(key)
        self._served = number
        if broken:
            self.delete(key)
        mailbox.post(found, entry)

    def put(self, key: bytes, entry: Entry, keep_s: float, /) -> None:
        """Write in the background; dropped and counted while too much waits."""
        if self._closed or self._keeper.given_up:
            return
        size = len(entry.data)
        if len(self._pending) >= MAX_PENDING or self._pending_bytes + size > MAX_PENDING_BYTES:
            self._keeper.trouble("write dropped")
            return
        self._note(key, entry)
        self._io().write(partial(self._write, key, entry, keep_s))

    def _write(self, key: bytes, entry: Entry, keep_s: float) -> bool:
        if self._pending.get(key) is not entry:
            return True  # a later write or deletion of this key is queued behind
        if not self._keeper.set(key, entry, keep_s):
            return False
        self._settle(key, entry)
        return True

    def delete(self, key: bytes, /) -> None:
        """Delete in the background; later reads do not see it. From any thread."""
        if not self._closed and not self._keeper.given_up:
            self._note(key, _DELETED)
            self._io().write(partial(self._delete, key))

    def _delete(self, key: bytes) -> bool:
        if key in self._pending and self._pending[key] is not _DELETED:
            return True
        if not self._keeper.delete(key):
            return False
        self._settle(key, _DELETED)
        return True

    def discard(self, match: Match, /) -> None:
        """Delete in the background what matches; until that is done, nothing is read from disk."""
        if self._closed or self._keeper.given_up:
            return
        with self._lock:
            for key, entry in self._pending.items():
                if entry is not None and match.fits(entry):
                    self._pending[key] = _DELETED
                    self._pending_bytes -= len(entry.data)
                    self._io().write(partial(self._delete, key))
            self._discards += 1
        self._io().write(partial(self._discard, match))

    def _discard(self, match: Match) -> bool:
        if not self._keeper.discard(match):
            return False
        with self._lock:
            self._discards -= 1
        return True

    def _note(self, key: bytes, entry: Entry | None) -> None:
        with self._lock:
            former = self._pending.get(key)
            self._pending_bytes += (len(entry.data) if entry else 0) - (len(former.data) if former else 0)
            self._pending[key] = entry

    def _settle(self, key: bytes, entry: Entry | None) -> None:
        with self._lock:
            if key in self._pending and self._pending[key] is entry:
                del self._pending[key]
                self._pending_bytes -= len(entry.data) if entry else 0

    def rehome(self) -> None:
        """In a forked child: a new thread and a new handle; what the parent had queued, the parent writes."""
        if os.getpid() != self._pid:
            if self._finalizer is not None:
                self._finalizer.detach()
            _inherited.append(self._keeper.abandon())
            self._begin()

    async def aclose(self) -> None:
        """Write what is queued, close the database and end the thread. Idempotent."""
        self._closed = True
        thread = self._let_go()
        if thread is None:
            return
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()

        def tell() -> None:
            with contextlib.suppress(RuntimeError):  # the loop closed before the disk was done
                loop.call_soon_threadsafe(ended.set)

        thread.stop(tell)
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(2 * FLUSH_S):
                    await ended.wait()
                    thread.join()
        except asyncio.CancelledError:
            thread.join()  # nobody else would wait for it
            raise
        self._count_losses()

    def flush(self) -> None:
        """`aclose` at the end of the process, where no loop runs."""
        thread = self._let_go()
        if thread is not None:
            thread.stop()
            thread.join()

    def _let_go(self) -> IOThread | None:
        thread, self._thread = self._thread, None
        if self._finalizer is not None:
            self._finalizer.detach()
        return thread if os.getpid() == self._pid else None

    def _count_losses(self) -> None:
        with self._lock:
            left = len(self._pending)
        if left:
            self._keeper.trouble("write dropped", f"{left} cached answers could not be written before the cache closed")

    def gauges(self) -> dict[str, object]:
        """What waits to be written, and whether the disk works."""
        return {"disk": "down" if self._keeper.down else "ok", "waiting writes": len(self._pending)}


class _Mailbox:
    """Reads that one loop waits for: results come in batches, with one wake-up, under one timer for all.

    Args:
        loop: whose reads these are.
        keeper: told of each read that is not there in time.
        late: number of the latest such read.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, keeper: Keeper, late: int) -> None:
        self.loop = loop
        self.late = late
        self._keeper = keeper
        self._posted: deque[tuple[asyncio.Future[Entry | None], Entry | None]] = deque()
        self._expected: deque[tuple[asyncio.Future[Entry | None], int, float]] = deque()
        """In the order in which the thread answers; those that are answered go when they come to the front."""
        self._timer: asyncio.TimerHandle | None = None

    def expect(self, number: int, budget_s: float) -> asyncio.Future[Entry | None]:
        """What the caller waits for; None after so many seconds."""
        found: asyncio.Future[Entry | None] = self.loop.create_future()
        self._expected.append((found, number, self.loop.time() + budget_s))
        if self._timer is None:
            self._timer = self.loop.call_later(budget_s, self._check)
        return found

    def post(self, found: asyncio.Future[Entry | None], entry: Entry | None) -> None:
        """From the I/O thread, which calls `wake` when it has nothing more to read."""
        self._posted.append((found, entry))

    def wake(self) -> None:
        """From the I/O thread: have delivered what was posted."""
        with contextlib.suppress(RuntimeError):  # the loop closed meanwhile: nobody waits
            self.loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        while self._posted:
            found, entry = self._posted.popleft()
            if not found.done():
                found.set_result(entry)
        self._forget_answered()

    def _forget_answered(self) -> None:
        while self._expected and self._expected[0][0].done():
            self._expected.popleft()
        if not self._expected and self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _check(self) -> None:
        self._timer = None
        now = self.loop.time()
        for found, number, due in self._expected:
            if due > now + _SLACK_S:
                break
            if not found.done():
                self.late = number
                self._keeper.trouble("slow", "the cache directory answers slowly; calls go on without it")
                found.set_result(None)
        self._forget_answered()
        if self._expected:
            self._timer = self.loop.call_at(self._expected[0][2], self._check)


def _flush_all() -> None:
    for store in list(_stores):
        store.flush()


atexit.register(_flush_all)

"""The disk tier: answers that outlive the process. Untrusted, bounded in time, never in the way.

The loop never touches the disk. Reads go to one I/O thread and are waited for briefly; writes are handed over and
forgotten; until a write is done, reads of its key are answered from what is waiting.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import weakref
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from llmmw.stores import iothread
from llmmw.stores.backlog import MAX_BYTES, Backlog, Nothing
from llmmw.stores.iothread import IOThread
from llmmw.stores.keeper import Keeper
from llmmw.stores.lease import Leases
from llmmw.stores.leasetable import Table
from llmmw.stores.mailbox import Mailbox

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from llmmw.env import Env
    from llmmw.stores.base import Codec, Match
    from llmmw.stores.entry import Entry
    from llmmw.stores.lease import Lease

T = TypeVar("T")

READ_BUDGET_S = 0.05
OPEN_BUDGET_S = 0.5
"""For reads that come before the database is open: importing and opening take about 50 ms, once."""
_MAX_SHARE = 0.1

_stores: weakref.WeakSet[DiskStore] = weakref.WeakSet()
_ending: list[IOThread] = []
"""Threads whose end nobody waits for before the process ends."""
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
        directory = directory.absolute()  # the process may change its working directory
        self._keeper = Keeper(directory, env, max_bytes=max_bytes, codec=codec, network=network)
        self._table = Table(directory, env, network=network)
        self._closed = False
        self.leases = Leases(self._table, self, env)
        """Who of several processes asks upstream."""
        self._begin()

    def _begin(self) -> None:
        self._thread: IOThread | None = None
        self._finalizer: weakref.finalize[[], DiskStore] | None = None
        self._pid = os.getpid()
        self._backlog = Backlog(self._keeper)
        self._mailbox: Mailbox | None = None
        self._asked = 0
        self._served = 0
        """Number of the latest read that the thread finished."""

    @property
    def max_item_bytes(self) -> int:
        """The largest body it takes."""
        return min(int(self._max_bytes * _MAX_SHARE), MAX_BYTES)

    def _io(self) -> IOThread | None:
        if self._thread is None:
            table, keeper = self._table, self._keeper
            on_stop, on_fork = partial(_each, table.close, keeper.close), partial(_each, table.rest, keeper.close)
            try:
                self._thread = IOThread("llmmw-disk", on_stop, on_fork)
            except RuntimeError:  # too many threads, or the interpreter is ending
                keeper.trouble("stuck")
                return None
            self._finalizer = weakref.finalize(self, self._thread.stop)
            self._finalizer.atexit = False
            _stores.add(self)
        return self._thread

    async def get(self, key: bytes, /) -> Entry | None:
        """The entry; None where there is none, or it cannot be had within 50 ms."""
        waiting = self._backlog.get(key)
        if not isinstance(waiting, Nothing):
            return waiting
        if self._backlog.discards or self._keeper.down:
            return None
        return self._keeper.ahead.take(key) or await self.ask(partial(self._read, key))

    def _read(self, key: bytes) -> Entry | None:
        entry, broken = self._keeper.get(key)
        if broken and key not in self._backlog:
            self.delete(key)
        return entry

    async def ask(self, job: Callable[[], T]) -> T | None:
        """What a job returns on the I/O thread; None if it cannot be had within 50 ms."""
        io = None if self._closed else self._io()
        if io is None:
            return None
        loop, late = asyncio.get_running_loop(), 0 if self._mailbox is None else self._mailbox.late
        if late > self._served:  # the thread is stuck: one caller has waited for it, that is enough
            self._keeper.trouble("stalled")
            return None
        if self._mailbox is None or self._mailbox.loop is not loop:
            self._mailbox = Mailbox(loop, self._keeper, late)
        self._asked = number = self._asked + 1
        found: asyncio.Future[T | None] = self._mailbox.expect(
            number, READ_BUDGET_S if self._keeper.opened else OPEN_BUDGET_S
        )
        io.read(partial(self._run, number, job, self._mailbox, found), self._mailbox)
        return await found

    def _run(self, number: int, job: Callable[[], object], mailbox: Mailbox, found: asyncio.Future[Any]) -> None:
        result = None if found.done() else job()
        self._served = number
        mailbox.post(found, result)

    def soon(self, job: Callable[[], object]) -> None:
        """Run a job on the I/O thread before writes that wait."""
        if not self._closed and (io := self._io()) is not None:
            io.read(job)

    def later(self, job: Callable[[], bool]) -> None:
        """Run a job on the I/O thread after writes that wait, again if it returns False."""
        if not self._closed and (io := self._io()) is not None:
            io.write(job)

    def put(self, key: bytes, entry: Entry, keep_s: float, lease: Lease | None = None, /) -> None:
        """Write in the background; dropped and counted while too much waits, or once the lease is lost."""
        if self._closed or self._keeper.given_up:
            return
        io = self._io()
        write = None if io is None else self._backlog.put(key, entry, keep_s, None if lease is None else lease.write)
        if io is None or write is None:
            self._keeper.trouble("write dropped")
        else:
            io.write(write)

    def delete(self, key: bytes, /) -> None:
        """Delete in the background; later reads do not see it. From any thread."""
        io = None if self._closed or self._keeper.given_up else self._io()
        if io is not None and (write := self._backlog.delete(key)) is not None:
            io.write(write)

    def discard(self, match: Match, /) -> None:
        """Delete in the background what matches; until that is done, nothing is read from disk."""
        io = None if self._closed or self._keeper.given_up else self._io()
        if io is not None:
            for write in self._backlog.discard(match):
                io.write(write)

    def rehome(self) -> None:
        """In a forked child: a new thread and a new handle; what the parent had queued, the parent writes."""
        if os.getpid() != self._pid:
            if self._finalizer is not None:
                self._finalizer.detach()
            _inherited.extend((self._keeper.abandon(), self._table.abandon()))
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
                async with asyncio.timeout(2 * iothread.FLUSH_S):
                    await ended.wait()
                    thread.join()
        except asyncio.CancelledError:
            if not thread.join(READ_BUDGET_S):  # a stuck disk must not hold up the loop as well
                _ending[:] = [one for one in (*_ending, thread) if not one.join(0)]
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
        left = len(self._backlog)
        if left:
            self._keeper.trouble("write dropped", f"{left} cached answers could not be written before the cache closed")

    def gauges(self) -> dict[str, object]:
        """What waits to be written, and whether the disk works."""
        return {"disk": self._keeper.state, "waiting writes": len(self._backlog)}


def _each(*acts: Callable[[], None]) -> None:
    for act in acts:
        act()


def _flush_all() -> None:
    for store in list(_stores):
        store.flush()
    for thread in _ending:
        thread.join()


atexit.register(_flush_all)

"""Where a shared counter is kept: the protocol of such a store, and one in a file for the processes of one machine."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar, cast, runtime_checkable

from llmmw.env import SYSTEM_CLOCK
from llmmw.stores import place
from llmmw.stores.iothread import IOThread
from llmmw.stores.schema import is_broken

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

_FILE = "limits.db"
_TABLE = "CREATE TABLE IF NOT EXISTS buckets (name BLOB PRIMARY KEY, state BLOB NOT NULL) WITHOUT ROWID"
_READ = "SELECT state FROM buckets WHERE name = ?"
_WRITE = "INSERT INTO buckets VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET state = excluded.state"


@runtime_checkable
class CounterStore(Protocol):
    """Keeps a few bytes per bucket for many processes. Any database with an atomic read-modify-write will do."""

    async def update(self, bucket: bytes, change: Callable[[bytes | None, float], tuple[bytes, T]], /) -> T:
        """Replace the state of a bucket: `change(old, now)` gives the new state and what to return.

        `old` is None the first time. `now` is the store's own clock: seconds from any origin, the same for every
        process, never running backwards while the store lives. `change` is quick and pure, so it may be called again
        where another process was quicker. Any exception means that the counter is lost.
        """
        ...

    async def aclose(self) -> None:
        """Release everything. Idempotent."""
        ...


class FileCounter:
    """A SQLite file in a directory, on a thread of its own. Its clock is the machine's, which all processes share.

    The directory must be ours and local, as for the cache (`stores.place`). After a fork the child opens its own.

    Args:
        directory: made if missing.
        patience_s: how long another process may hold the lock.
    """

    def __init__(self, directory: str, patience_s: float) -> None:
        self._directory = Path(directory).expanduser()
        self._patience_s = patience_s
        self._thread: IOThread | None = None
        self._database: sqlite3.Connection | None = None
        self._file = (0, 0)
        self._pid = os.getpid()

    async def update(self, bucket: bytes, change: Callable[[bytes | None, float], tuple[bytes, T]], /) -> T:
        """See CounterStore.

        Raises:
            sqlite3.Error, OSError, stores.place.Refused: the file cannot be used.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def work() -> None:
            failed: Exception | None = None
            result: T | None = None
            try:
                result = self._update(bucket, change)
            except Exception as error:  # noqa: BLE001 — the waiter judges it
                failed = error

            def tell() -> None:
                if future.done():
                    return
                if failed is not None:
                    future.set_exception(failed)
                else:
                    future.set_result(cast("T", result))

            with contextlib.suppress(RuntimeError):  # the loop has closed: nobody waits any more
                loop.call_soon_threadsafe(tell)

        self._own_thread().read(work)
        return await future

    async def aclose(self) -> None:
        """Close the file; does not wait."""
        thread, self._thread = self._thread, None
        if thread is not None and self._pid == os.getpid():
            thread.stop()

    def _own_thread(self) -> IOThread:
        if self._pid != os.getpid():  # the parent's thread and handle are not ours
            self._pid, self._thread, self._database = os.getpid(), None, None
        if self._thread is None:
            self._thread = IOThread("llmmw-counter", self._close)
        return self._thread

    # -- on the thread ------------------------------------------------------------------------------------------

    def _update(self, bucket: bytes, change: Callable[[bytes | None, float], tuple[bytes, T]]) -> T:
        try:
            if self._database is not None and _identity(self._directory / _FILE) != self._file:
                raise FileNotFoundError(f"{self._directory / _FILE} is another file now")
            database = self._database or self._open()
            database.execute("BEGIN IMMEDIATE")
            try:
                row = database.execute(_READ, (bucket,)).fetchone()
                old = None if row is None else row[0] if isinstance(row[0], bytes) else b""
                new, result = change(old, SYSTEM_CLOCK.monotonic())
                database.execute(_WRITE, (bucket, new))
                database.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    database.execute("ROLLBACK")
                raise
        except (sqlite3.Error, OSError) as error:
            self._close()  # whatever is there next time is looked at anew
            if is_broken(error):
                place.quarantine(self._directory, SYSTEM_CLOCK.wall(), database=_FILE, only=self._file)
            raise
        return result

    def _open(self) -> sqlite3.Connection:
        place.prepare(self._directory, database=_FILE)
        database = sqlite3.connect(
            self._directory / _FILE, timeout=self._patience_s, isolation_level=None, check_same_thread=False
        )
        self._database, self._file = database, _identity(self._directory / _FILE)
        # A mapping would turn a file cut short into SIGBUS. Not synced: after a power failure nothing is in the window.
        for pragma in ("journal_mode = WAL", "synchronous = OFF", "mmap_size = 0", "trusted_schema = OFF"):
            database.execute(f"PRAGMA {pragma}").fetchall()
        database.execute(_TABLE)
        return database

    def _close(self) -> None:
        database, self._database = self._database, None
        if database is not None:
            with contextlib.suppress(sqlite3.Error):
                database.close()

    def __repr__(self) -> str:
        return f"FileCounter({str(self._directory)!r})"


def _identity(path: Path) -> tuple[int, int]:
    """Device and number of the file; a deleted one that is still open would be shared with nobody new."""
    found = path.stat()
    return found.st_dev, found.st_ino

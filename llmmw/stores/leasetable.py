"""The table of leases: a small database of its own, in a folder of the cache directory.

A lease is a row: who holds it, until when, and a number from one counter that only grows (the fencing number). What
is stored under a lease is stored while the table is locked, and only if the number is still the row's.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeVar

from llmmw.events import CacheTrouble, Warned
from llmmw.stores.place import identity, prepare, quarantine
from llmmw.stores.schema import connect, is_broken

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from pathlib import Path

    from llmmw.env import Env

T = TypeVar("T")

FOLDER = "leases"
_TABLES = (
    "CREATE TABLE IF NOT EXISTS Lease (key BLOB PRIMARY KEY, owner TEXT, fence INTEGER, until REAL, seconds REAL)",
    "CREATE TABLE IF NOT EXISTS Fence (id INTEGER PRIMARY KEY, value INTEGER)",
    "INSERT OR IGNORE INTO Fence VALUES (1, 0)",
)
_ROW = "SELECT owner, fence, until, seconds FROM Lease WHERE key = ?"
_MINE = "SELECT 1 FROM Lease WHERE key = ? AND fence = ?"
_OPEN_S = 0.2
"""Processes that start together make the database together."""
_CLOCK_LEAD_S = 5.0
"""A lease that would end later than this beyond its length was written under another clock: it counts as over."""
_RETRY_S = 10.0
_FORGOTTEN_S = 3600.0


class Standing(NamedTuple):
    """What became of a request for a lease."""

    how: Literal["taken", "held", "over", "busy"]
    """"held": by another process. "over": it was, and that one gave it back. "busy": cannot be told now."""
    fence: int = 0


class Table:
    """The leases of one directory, as one engine sees them. Everything runs on the I/O thread.

    Args:
        directory: of the cache; the leases have a folder in it.
        env: clock, and sinks for trouble.
        network: allows a network file system.
    """

    def __init__(self, directory: Path, env: Env, *, network: bool) -> None:
        self._directory = directory / FOLDER
        self._env = env
        self._network = network
        self._connection: sqlite3.Connection | None = None
        self._file = (0, 0)
        """Which file is open."""
        self._owner = ""
        self._retry_at = float("-inf")
        self._told = False

    def take(self, key: bytes, lease_s: float, *, followed: bool) -> Standing | None:
        """Take the lease of a key, unless another living process holds it; None where leases do not work.

        Args:
            key: of the entry.
            lease_s: how long it lasts unless it is renewed.
            followed: the caller waited for a holder. If that one gave the lease back, nobody takes it up again:
                its answer was not worth storing, and who waits for one holder after the other waits for ever.
        """

        def take(connection: sqlite3.Connection) -> Standing:
            found = self._standing(connection, key, followed=followed)
            if found is not None:
                return found
            with _transaction(connection):
                found = self._standing(connection, key, followed=followed)
                return found or Standing("taken", self._grant(connection, key, lease_s))

        return self._do(take, broken=None, busy=Standing("busy"))

    def _standing(self, connection: sqlite3.Connection, key: bytes, *, followed: bool) -> Standing | None:
        """How the lease stands; None where it can be taken."""
        row = connection.execute(_ROW, (key,)).fetchone()
        if row is None:
            return Standing("over") if followed else None
        owner, _, until, seconds = row
        now = self._env.clock.wall()
        if owner == self._owner or not (isinstance(until, float) and isinstance(seconds, float)):
            return None
        return Standing("held") if now < until <= now + seconds + _CLOCK_LEAD_S else None

    def _grant(self, connection: sqlite3.Connection, key: bytes, lease_s: float) -> int:
        connection.execute("UPDATE Fence SET value = value + 1")
        (fence,) = connection.execute("SELECT value FROM Fence").fetchone()
        until = self._env.clock.wall() + lease_s
        connection.execute(
            "INSERT OR REPLACE INTO Lease VALUES (?, ?, ?, ?, ?)", (key, self._owner, fence, until, lease_s)
        )
        return int(fence)

    def renew(self, key: bytes, fence: int, lease_s: float) -> bool:
        """Hold it longer; False where that cannot be done now."""

        def renew(connection: sqlite3.Connection) -> bool:
            until = self._env.clock.wall() + lease_s
            connection.execute("UPDATE Lease SET until = ? WHERE key = ? AND fence = ?", (until, key, fence))
            return True

        return self._do(renew, broken=False, busy=False)

    def release(self, key: bytes, fence: int) -> bool:
        """Give it back; False: not yet."""

        def release(connection: sqlite3.Connection) -> bool:
            connection.execute("DELETE FROM Lease WHERE key = ? AND fence = ?", (key, fence))
            return True

        return self._do(release, broken=True, busy=False)

    def write(self, key: bytes, fence: int, write: Callable[[], bool]) -> bool:
        """Store under the lease, which nobody can take meanwhile; False: not yet. Refused if it is no longer ours."""

        def fenced(connection: sqlite3.Connection) -> bool | None:
            with _transaction(connection):
                is_mine = connection.execute(_MINE, (key, fence)).fetchone() is not None
                return write() if is_mine else None

        written = self._do(fenced, broken=None, busy=False)
        if written is None:
            self._env.emit(CacheTrouble("write under a lost lease"))
        return written is not False

    def close(self) -> None:
        """Give everything back and close, on the thread that opened it."""
        if self._connection is not None:
            with contextlib.suppress(sqlite3.Error):
                self._connection.execute("DELETE FROM Lease WHERE owner = ?", (self._owner,))
        self.rest()

    def rest(self) -> None:
        """Close, but keep the leases; whatever comes next opens anew."""
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(sqlite3.Error):
                connection.close()

    def abandon(self) -> object:
        """After a fork: forget the parent's handle without closing it; whoever gets it keeps it alive."""
        connection, self._connection = self._connection, None
        return connection

    def _do(self, work: Callable[[sqlite3.Connection], T], *, broken: T, busy: T) -> T:
        """What the work returns; what goes wrong is dealt with here. `busy`: another process holds the lock."""
        try:
            connection = self._current()
            return broken if connection is None else work(connection)
        except sqlite3.OperationalError as error:
            if "locked" in str(error):
                return busy
            self._failed(error)
        except Exception as error:  # noqa: BLE001 — the file may hold anything, and leases never break a call
            self._failed(error)
        return broken

    def _current(self) -> sqlite3.Connection | None:
        """The table; opened anew where another file has taken its place, for a deleted one is shared with nobody."""
        if self._connection is not None:
            with contextlib.suppress(OSError):
                if identity(self._directory) == self._file:
                    return self._connection
            self.rest()
        return self._open()

    def _open(self) -> sqlite3.Connection | None:
        if self._env.clock.monotonic() < self._retry_at:
            return None
        prepare(self._directory, network=self._network)
        self._file = identity(self._directory)
        connection = connect(self._directory, _OPEN_S)
        try:
            for pragma in ("journal_mode = wal", "synchronous = off"):
                connection.execute(f"PRAGMA {pragma}").fetchall()
            with _transaction(connection):
                for statement in _TABLES:
                    connection.execute(statement)
                connection.execute("DELETE FROM Lease WHERE until < ?", (self._env.clock.wall() - _FORGOTTEN_S,))
            connection.execute("PRAGMA busy_timeout = 0")
        except BaseException:
            connection.close()
            raise
        if not self._owner.startswith(f"{os.getpid()}-"):  # a fork's child is another one
            self._owner = f"{os.getpid()}-{os.urandom(8).hex()}"
        self._connection = connection
        return connection

    def _failed(self, error: Exception) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()
        if is_broken(error):
            with contextlib.suppress(OSError):
                quarantine(self._directory, self._env.clock.wall(), only=self._file)
        self._retry_at = self._env.clock.monotonic() + _RETRY_S
        self._env.emit(CacheTrouble("lease"))
        if not self._told:
            self._told = True
            text = f"leases in the cache directory do not work, so processes may ask twice: {error}"[:300]
            self._env.emit(Warned("cache: lease", text))


@contextlib.contextmanager
def _transaction(connection: sqlite3.Connection) -> Generator[None]:
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")

"""diskcache as a table of raw bytes: nothing in the database is executed, followed or trusted.

The stock `Disk` unpickles rows and opens the file names that rows carry (CVE-2025-69872). Ours knows one kind of
row: a blob as key, a blob as value, inline.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
from typing import TYPE_CHECKING, Any, NoReturn

import diskcache  # pyright: ignore[reportMissingTypeStubs]  # it has none

from llmmw.stores.place import DATABASE, Refused
from llmmw.stores.schema import SETTINGS, connect, inspect, is_busy

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator
    from pathlib import Path

_OPEN_TRIES, _OPEN_PAUSE_S = 100, 0.002
"""Processes that start together make the database together."""
_MODE_RAW = 1
MAX_VALUE_BYTES = 128 * 1024 * 1024
"""Twice the largest answer that is stored, because a codec may need room; a longer value is not even read."""
_VALUE = f"CASE WHEN mode = 1 AND filename IS NULL AND length(value) <= {MAX_VALUE_BYTES} THEN value ELSE 0 END"
"""A row of another kind reads as 0, which no value of ours is."""
_SELECT = f"SELECT rowid, {_VALUE} FROM Cache WHERE key = ? AND raw = 1"  # noqa: S608 — constants only
_SCAN = f"SELECT rowid, key, {_VALUE} FROM Cache WHERE raw = 1 ORDER BY rowid"  # noqa: S608 — likewise
_FOLLOWING = (  # others count as well: of a hundred thousand long rows no more are looked at than are wanted
    "SELECT rowid, key, CASE WHEN raw = 1 AND mode = 1 AND filename IS NULL AND length(value) <= ? THEN value END"
    " FROM Cache WHERE rowid > ? ORDER BY rowid LIMIT ?"
)
_AT_ONCE = 8
_EXPIRED = (
    "DELETE FROM Cache WHERE rowid IN (SELECT rowid FROM Cache WHERE expire_time < ? ORDER BY expire_time LIMIT ?)"
)
_OLDEST = "SELECT rowid, length(value) FROM Cache ORDER BY store_time LIMIT ?"
_CULLED_EXPIRED, _CULLED = 10, 200
"""Rows that one write removes at most: those whose time is over, and the oldest, while the database is too large."""
_ROW_BYTES = 200
"""What a row takes besides its value."""
_BATCH = 200
"""Rows deleted in one transaction, so that other processes' writes get in between."""


class BytesDisk(diskcache.Disk):  # type: ignore[misc]  # diskcache has no types
    """Rows of raw bytes, inline. Every other kind of row reads as b"", which no value of ours is."""

    def put(self, key: object) -> Any:
        """A key for the database: the blob, and that it is raw."""
        if type(key) is not bytes:
            raise TypeError("keys are bytes")
        return sqlite3.Binary(key), True

    def get(self, key: object, raw: object) -> bytes:
        """A key from the database."""
        return key if type(key) is bytes and raw == 1 else b""

    def store(self, value: object, read: object, key: object = None) -> Any:
        """A value for the database: size, mode, file name, blob."""
        del read, key
        if type(value) is not bytes:
            raise TypeError("values are bytes")
        return 0, _MODE_RAW, None, sqlite3.Binary(value)

    def fetch(self, mode: object, filename: object, value: object, read: object) -> bytes:
        """A value from the database."""
        del read
        return value if mode == _MODE_RAW and filename is None and type(value) is bytes else b""

    def filename(self, key: object = None, value: object = None) -> NoReturn:
        """No row of ours has a file."""
        del key, value
        raise TypeError("values are stored inline")

    def remove(self, file_path: object) -> None:
        """Whatever file a row names, it is none of ours."""


class Table(diskcache.Cache):  # type: ignore[misc]  # diskcache has no types
    """diskcache on one connection of ours, looked at before it is believed; locked is an error at once.

    Args:
        directory: a place that `prepare` has checked.
        max_bytes: above this size of the database, each write removes some of the oldest rows.

    Raises:
        Refused: diskcache would use another directory.
        Corrupt: the database holds something that neither we nor diskcache put there.
        sqlite3.Error: it cannot be opened; `DatabaseError` itself where it is no database.
    """

    def __init__(self, directory: Path, max_bytes: int) -> None:
        if os.path.expandvars(directory) != str(directory):
            raise Refused(f"{directory} has a part that diskcache takes for an environment variable")
        self._wal = str(directory / f"{DATABASE}-wal")
        self._connection = connect(directory, _OPEN_TRIES * _OPEN_PAUSE_S)
        self._opening = True
        self._max_bytes = max_bytes
        self._page_bytes = 0
        self.excess: int = 0
        """Bytes by which the last write found the database too large."""
        try:
            self._look()
            self._connection.execute("PRAGMA busy_timeout = 0")
            settings = SETTINGS | {"size_limit": max_bytes}
            super().__init__(str(directory), 0, BytesDisk, **settings)  # pyright: ignore[reportUnknownMemberType]  # see above
            ((self._page_bytes,),) = self._connection.execute("PRAGMA page_size").fetchall()
        except BaseException:
            self._connection.close()
            raise
        self._opening = False

    def _look(self) -> None:
        inspect(self._connection)
        # Set here, where a lock is an error after a moment; diskcache would try for a minute.
        if not self._connection.execute("PRAGMA page_count").fetchone()[0]:
            self._connection.execute("PRAGMA auto_vacuum = 1")
        self._connection.execute("PRAGMA journal_mode = wal").fetchall()

    @property
    def _con(self) -> sqlite3.Connection:
        return self._connection

    def close(self) -> None:
        """Close the database, on the thread that opened it; the constructor of diskcache calls this, too."""
        if not self._opening:
            self._connection.close()

    @property
    def _sql_retry(self) -> Any:
        execute = self._sql

        def patiently(*statement: Any) -> Any:
            if self._holds_already(*statement):
                return None  # opening would else write each setting anew, twice, and need the lock for it
            for _ in range(_OPEN_TRIES):
                try:
                    return execute(*statement)
                except sqlite3.OperationalError as error:
                    if not is_busy(error):
                        raise
                    threading.Event().wait(_OPEN_PAUSE_S)
            return execute(*statement)

        return patiently

    def _holds_already(self, sql: str, values: tuple[Any, ...] = ()) -> bool:
        """Whether a statement would write into Settings what stands there."""
        if sql.startswith("INSERT OR IGNORE INTO Settings"):
            query, values = "SELECT 1 FROM Settings WHERE key = ?", values[:1]
        elif sql.startswith("INSERT OR REPLACE INTO Settings"):
            query = "SELECT 1 FROM Settings WHERE key = ? AND value IS ?"
        elif sql.startswith("UPDATE Settings"):
            query = "SELECT 1 FROM Settings WHERE value IS ? AND key = ?"
        else:
            return False
        return self._sql(query, values).fetchone() is not None

    @contextlib.contextmanager
    def _transact(
        self,
        retry: object = False,  # noqa: FBT002 — the signature is diskcache's
        filename: object = None,
    ) -> Generator[tuple[Any, Callable[[object], None]]]:
        """A write. That of diskcache calls each failure to begin a time-out and hides others behind its ROLLBACK's."""
        del retry, filename
        connection = self._connection
        connection.execute("BEGIN IMMEDIATE")
        try:
            yield connection.execute, _leave_alone
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise

    def _cull(self, now: float, sql: Any, cleanup: object, limit: object = None) -> None:
        """Within a write: what expired, and no more of the oldest than is too much (diskcache takes ten at a time)."""
        del cleanup, limit
        sql(_EXPIRED, (now, _CULLED_EXPIRED))
        ((pages,),) = sql("PRAGMA page_count").fetchall()
        self.excess = pages * self._page_bytes - self._max_bytes
        if self.excess > 0:
            freed, gone = 0, list[int]()
            for row, length in sql(_OLDEST, (_CULLED,)):
                gone.append(row)
                freed += (length if type(length) is int else 0) + _ROW_BYTES
                if freed >= self.excess:
                    break
            sql(_delete_rows(gone))

    def shrink(self, now: float) -> None:
        """What a write removes, without the write."""
        with self._transact() as (sql, cleanup):
            self._cull(now, sql, cleanup)

    def find(self, key: bytes) -> tuple[int, object] | None:
        """The number of the row of a key and what stands there, expired or not, for entries know their own time.

        diskcache's `get` takes three times as long over the same query.
        """
        row: tuple[int, object] | None = self._connection.execute(_SELECT, (key,)).fetchone()
        return row

    def following(self, row: int, count: int, max_bytes: int) -> Generator[tuple[int, object, object]]:
        """Number, key and value of the next rows, except of longer ones; close it, for it holds a transaction."""
        cursor = self._connection.execute(_FOLLOWING, (max_bytes, row, count))
        try:
            while some := cursor.fetchmany(_AT_ONCE):
                yield from (one for one in some if one[2] is not None)
        finally:
            cursor.close()

    def rows(self) -> Iterator[tuple[int, object, object]]:
        """Number, key and value of every row that may be ours."""
        return self._connection.execute(_SCAN)

    def remove(self, key: bytes) -> None:
        """Delete the row of a key, expired or not (diskcache's `delete` leaves expired ones)."""
        self._connection.execute("DELETE FROM Cache WHERE key = ?", (key,))

    def remove_rows(self, numbers: list[int]) -> None:
        """Delete these rows, some at a time."""
        for first in range(0, len(numbers), _BATCH):
            self._connection.execute(_delete_rows(numbers[first : first + _BATCH]))

    def wal_bytes(self) -> int:
        """Length of the write-ahead log."""
        try:
            return os.stat(self._wal).st_size  # noqa: PTH116 — half the time of Path.stat, before every write
        except FileNotFoundError:
            return 0

    def checkpoint(self) -> None:
        """Move the write-ahead log into the database and empty it, if no reader is in the way."""
        self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()


def _leave_alone(file_name: object) -> None:
    """Whatever file a row names, it is none of ours."""
    del file_name


def _delete_rows(numbers: list[int]) -> str:
    return f"DELETE FROM Cache WHERE rowid IN ({','.join(map(str, numbers))})"  # noqa: S608 — integers of SQLite's

"""diskcache as a table of raw bytes: nothing in the database is executed, followed or trusted.

The stock `Disk` unpickles rows and opens the file names that rows carry (CVE-2025-69872). Ours knows one kind of
row: 32 bytes of key, one blob of value, inline. A digest over key and value stands before each value.
"""

from __future__ import annotations

import sqlite3
import threading
from hashlib import sha256
from typing import TYPE_CHECKING, Any, NoReturn

import diskcache  # pyright: ignore[reportMissingTypeStubs]  # it has none

from llmmw.stores.entry import BadEntry, NewerEntry, decode_entry, encode_entry
from llmmw.stores.place import DATABASE
from llmmw.stores.schema import SETTINGS, connect, inspect

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from llmmw.stores.base import Codec, Match
    from llmmw.stores.entry import Entry

Busy = diskcache.Timeout
"""Another process holds the write lock."""

MAX_WAL_BYTES = 64 * 1024 * 1024
_OPEN_TRIES, _OPEN_PAUSE_S = 100, 0.002
"""Processes that start together make the database together."""
_DIGEST_BYTES = 16
_MODE_RAW = 1
_SELECT = "SELECT CASE WHEN mode = 1 AND filename IS NULL THEN value ELSE 0 END FROM Cache WHERE key = ? AND raw = 1"
"""A row of another kind reads as 0, which no value of ours is."""


class BadRow(Exception):
    """One row is not what we wrote."""


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


class _Table(diskcache.Cache):  # type: ignore[misc]  # diskcache has no types
    """diskcache that tries for a fifth of a second, not for a minute, when the database is locked at opening."""

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
                    if "locked" not in str(error):
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

    def blob(self, key: bytes) -> object:
        """What stands under a key, or None; expired or not, for entries know their own time.

        diskcache's `get` takes three times as long over the same query.
        """
        row = self._sql(_SELECT, (key,)).fetchone()
        return None if row is None else row[0]

    def checkpoint(self) -> None:
        """Move the write-ahead log into the database and empty it, if no reader is in the way."""
        self._sql("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()


class Rows:
    """An open database; every method on one thread.

    Args:
        directory: a place that `prepare` has checked.
        max_bytes: above this size of the database, each write removes up to ten of the oldest rows.
        codec: transforms entries on their way.

    Raises:
        Corrupt: the database holds something that neither we nor diskcache put there.
        sqlite3.Error: it cannot be opened; `DatabaseError` itself where it is no database.
    """

    def __init__(self, directory: Path, max_bytes: int, codec: Codec | None = None) -> None:
        self._directory = directory
        self._codec = codec
        _inspect(directory)
        self._table: Any = _Table(str(directory), timeout=0, disk=BytesDisk, size_limit=max_bytes, **SETTINGS)

    def get(self, key: bytes) -> Entry | None:
        """The entry of a key.

        Raises:
            BadRow: what stands there is not what we wrote.
        """
        raw = self._table.blob(key)
        return None if raw is None else self._read(key, raw)

    def _read(self, key: bytes, raw: object) -> Entry | None:
        if type(raw) is not bytes:
            raise BadRow("type")
        payload = raw[_DIGEST_BYTES:]
        if raw[:_DIGEST_BYTES] != _digest(key, payload):
            raise BadRow("digest")
        name, sealed = _split(payload)
        if name != (self._codec.name if self._codec is not None else ""):
            return None
        try:
            return decode_entry(self._codec.open(sealed) if self._codec is not None else sealed)
        except NewerEntry:
            return None
        except BadEntry as error:
            raise BadRow(str(error)) from None
        except Exception as error:
            # A codec is the user's and may raise anything (a rotated key): then the row is unreadable.
            raise BadRow(type(error).__name__) from error

    def set(self, key: bytes, entry: Entry, keep_s: float) -> bool:
        """Write an entry; False where the write-ahead log is too long and cannot be emptied now.

        Raises:
            Busy: another process is writing.
        """
        if self._wal_bytes() > MAX_WAL_BYTES:
            self._table.checkpoint()
            if self._wal_bytes() > MAX_WAL_BYTES:
                return False
        data, name = encode_entry(entry), b""
        if self._codec is not None:
            data, name = self._codec.seal(data), self._codec.name.encode()
        payload = bytes([len(name)]) + name + data
        self._table.set(key, _digest(key, payload) + payload, expire=keep_s)
        return True

    def delete(self, key: bytes) -> None:
        """Remove a row.

        Raises:
            Busy: another process is writing.
        """
        self._table.delete(key)

    def discard(self, match: Match) -> None:
        """Remove all rows whose entries match.

        Raises:
            Busy: another process is writing; some may be gone already.
        """
        for key in self.keys():
            try:
                entry = self.get(key)
            except BadRow:
                continue
            if entry is not None and match.fits(entry):
                self._table.delete(key)

    def keys(self) -> Iterator[bytes]:
        """Every key of ours."""
        return (key for key in self._table if key)

    def close(self) -> None:
        """Close the database, on the thread that opened it."""
        self._table.close()

    def _wal_bytes(self) -> int:
        try:
            return (self._directory / f"{DATABASE}-wal").stat().st_size
        except FileNotFoundError:
            return 0


def _digest(key: bytes, payload: bytes) -> bytes:
    return sha256(key + payload).digest()[:_DIGEST_BYTES]


def _split(payload: bytes) -> tuple[str, bytes]:
    """The codec's name and the sealed entry."""
    if not payload:
        raise BadRow("empty")
    end = 1 + payload[0]
    return payload[1:end].decode("utf-8", "replace"), payload[end:]


def _inspect(directory: Path) -> None:
    connection = connect(directory, _OPEN_TRIES * _OPEN_PAUSE_S)
    try:
        if not connection.execute("PRAGMA page_count").fetchone()[0]:
            # Set here, where a lock is an error at once; diskcache would try for a minute.
            connection.execute("PRAGMA auto_vacuum = 1")
        connection.execute("PRAGMA journal_mode = wal").fetchall()
        inspect(connection)
    finally:
        connection.close()

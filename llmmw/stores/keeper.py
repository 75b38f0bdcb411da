"""The disk as seen from its own thread: opening, giving up, trying again. No failure leaves this module."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from typing import TYPE_CHECKING

from llmmw.events import CacheTrouble, Warned
from llmmw.stores.ahead import MAX_VALUE_BYTES, Ahead
from llmmw.stores.logs import Mapping, opening
from llmmw.stores.place import DATABASE, Refused, check, identity, prepare, quarantine
from llmmw.stores.schema import BadRow, Unsealable, is_broken, is_busy, is_full

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from llmmw.env import Env
    from llmmw.stores.base import Codec, Match
    from llmmw.stores.entry import Entry
    from llmmw.stores.rows import Rows

_FIRST_RETRY_S = 0.1
_LAST_RETRY_S = 60.0
_BUSY_IS_TROUBLE = 4
"""Tries of one write that found the database locked (about 0.1 s); fewer are everyday life among processes."""
_MAX_QUARANTINES = 3
"""A disk that spoils databases that fast is left alone."""
_NO_WRITES = {sqlite3.SQLITE_FULL, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_IOERR}
"""What a write may meet while reading still works."""
_WARNINGS = {
    "bad row": "a row of the cache database was changed by somebody else; it is deleted",
    "log too long": "a reader keeps the log of the cache database from being emptied; writes are dropped",
    "too full": "the cache database is far above its size; writes are dropped until it is smaller",
    "stuck": "the thread of the cache directory cannot be started; memory does its job",
}


class Keeper:
    """Keeps a database open while that works. Everything but `trouble`, `give_up` and `down` runs on the I/O thread."""

    def __init__(self, directory: Path, env: Env, *, max_bytes: int, codec: Codec | None, network: bool) -> None:
        self._directory = directory
        self._path = str(directory / DATABASE)
        self._env = env
        self._max_bytes = max_bytes
        self._codec = codec
        self._network = network
        self._rows: Rows | None = None
        self._mapping: Mapping | None = None
        self._file = (0, 0)
        """Which file is open; there may be another in its place by now."""
        self.ahead = Ahead(env.clock)
        """Rows that were read before anybody asked; `take` is for any thread."""
        self._retry = _Pause(env)
        self._writes = _Pause(env)
        self._quarantines = 0
        self._busy = 0
        self._told: set[str] = set()
        self.given_up = False
        """The place must not be used, or spoils every database: nothing is tried any more."""
        self.opened = False
        """Whether opening was tried at all."""

    @property
    def down(self) -> bool:
        """Whether asking is pointless now; from any thread."""
        return self.given_up or (self._rows is None and self._retry.is_on)

    @property
    def state(self) -> str:
        """How it is, in words; from any thread."""
        if self.down:
            return "down"
        return "no writes" if self._writes.is_on else "ok"

    def get(self, key: bytes) -> tuple[Entry | None, bool]:
        """The entry of a key or None, and whether a broken row stands there, to be deleted."""
        entry = self.ahead.take(key)
        if entry is not None:
            return entry, False
        rows, began = self._current(), self._env.clock.monotonic()
        if rows is None:
            return None, False
        try:
            entry, row = rows.find(key)
        except Exception as error:  # noqa: BLE001 — a damaged database makes SQLite raise anything
            return None, self._is_bad_row(error)
        self._retry.over()
        if entry is not None:
            self._read_on(rows, row, self._env.clock.monotonic() - began)
        return entry, False

    def _read_on(self, rows: Rows, row: int, took_s: float) -> None:
        count = self.ahead.wanted(row, took_s)
        if count:
            try:
                with contextlib.closing(rows.following(row, count, MAX_VALUE_BYTES)) as found:
                    self.ahead.fill(found)
            except Exception:  # noqa: BLE001 — nobody asked for it; whoever does will find out
                self.ahead.clear()

    def _is_bad_row(self, error: Exception) -> bool:
        """Whether only one row is broken; anything else is dealt with here."""
        if isinstance(error, BadRow):
            self.trouble("bad row")
            return True
        if is_busy(error):
            self.trouble("busy")
        else:
            self._failed(error)
        return False

    def set(self, key: bytes, entry: Entry, keep_s: float) -> bool:
        """Write an entry; False: not now, another process is writing. What cannot be written is dropped."""

        def write(rows: Rows) -> None:
            obstacle = rows.set(key, entry, keep_s)
            if obstacle is not None:
                self.trouble(obstacle)

        done = self._write(write)
        self.ahead.forget(key)
        if done is None:
            self.trouble("write dropped")
        return done is not False

    def delete(self, key: bytes) -> bool:
        """Remove a row; False: not yet."""
        self.ahead.forget(key)
        return self._write(lambda rows: rows.delete(key)) or self.given_up

    def discard(self, match: Match) -> bool:
        """Remove all rows that match; False: not yet."""
        self.ahead.clear()
        return self._write(lambda rows: rows.discard(match)) or self.given_up

    def _write(self, act: Callable[[Rows], None]) -> bool | None:
        """Whether it was done; None where it failed or nothing can be written for a while, False: another writes."""
        rows = None if self._writes.is_on else self._current()
        if rows is None:
            return None
        try:
            act(rows)
        except Exception as error:  # noqa: BLE001 — see get
            if not is_busy(error):
                self._write_failed(error)
                return None
            self._busy += 1
            if self._busy == _BUSY_IS_TROUBLE:
                self.trouble("busy")
            return False
        self._busy = 0
        self._writes.over()
        self._retry.over()
        return True

    def close(self) -> None:
        """Close the database."""
        self.ahead.clear()
        rows, self._rows = self._rows, None
        mapping, self._mapping = self._mapping, None
        if rows is not None:
            try:
                rows.close()
            except sqlite3.Error as error:
                self.trouble("close", str(error))
        if mapping is not None:
            mapping.close()

    def abandon(self) -> object:
        """After a fork: forget the parent's handle without closing it; whoever gets it keeps it alive."""
        self.ahead.clear()
        rows, self._rows = self._rows, None
        self._mapping = None
        self._retry.over()
        return rows

    def _current(self) -> Rows | None:
        """The database, if it can be had now; opened anew where another file (or none) has taken its place."""
        if self._rows is not None:
            try:
                found = os.lstat(self._path)
                if (found.st_dev, found.st_ino) == self._file:
                    return self._rows
            except OSError:
                pass  # deleted, or out of reach: opening will tell
            self.close()
            self.trouble("replaced")
        return None if self.down else self._open()

    def _open(self) -> Rows | None:
        try:
            from llmmw.stores.rows import Rows  # noqa: PLC0415 — diskcache is imported on this thread only

            prepare(self._directory, network=self._network)
            with opening(self._directory):
                self._file = identity(self._directory)
                self._rows = Rows(self._directory, self._max_bytes, self._codec)
                check(self._directory, network=True)  # once more: SQLite follows links
                self._mapping = Mapping(self._directory)
                if self._mapping.file != self._file:
                    raise OSError("the database was exchanged while it was opened")  # noqa: TRY301 — as if not there
        except Refused as error:
            self.close()
            self.give_up(str(error))
        except Exception as error:  # noqa: BLE001 — see get
            self._failed(error)
        self.opened = True
        return self._rows

    def _write_failed(self, error: Exception) -> None:
        if isinstance(error, Unsealable):
            self.trouble("codec", f"the codec cannot seal what is to be written, so it is not written: {error}")
        elif getattr(error, "sqlite_errorcode", 0) & 0xFF in _NO_WRITES and not is_broken(error):
            self.trouble(
                "unavailable", f"the cache directory takes no writes now; memory does its job: {_short(error)}"
            )
            if self._writes.failed and not is_full(error):
                self.close()  # twice in a row: what is open may be at fault, and not the disk
            self._writes.begin()
        else:
            self._failed(error)

    def _failed(self, error: Exception) -> None:
        """Close, put a broken database aside, and leave the disk alone for a while."""
        self.close()
        if is_broken(error):
            self._quarantine(error)
            return
        locked = isinstance(error, BlockingIOError) or is_busy(error)
        self.trouble(
            "busy" if locked else "unavailable",
            "" if locked else f"the cache on disk does not work and memory does its job: {_short(error)}",
        )
        self._retry.begin()

    def _quarantine(self, error: Exception) -> None:
        self._quarantines += 1
        self.trouble("corrupt", f"the cache database was broken ({_short(error)}) and put aside as *.corrupt-<time>")
        try:
            quarantine(self._directory, self._env.clock.wall(), only=self._file)
        except OSError as problem:
            self.trouble("unavailable", f"a broken cache database cannot be put aside: {_short(problem)}")
            self._retry.begin()
        if self._quarantines >= _MAX_QUARANTINES:
            self.given_up = True

    def give_up(self, reason: str) -> None:
        """Leave the disk alone for good. From any thread."""
        self.given_up = True
        self.trouble("refused", f"the cache directory is not used: {reason}")

    def trouble(self, kind: str, message: str = "") -> None:
        """Count it; with a message, warn once. From any thread."""
        self._env.emit(CacheTrouble(kind))
        message = message or _WARNINGS.get(kind, "")
        if message and kind not in self._told:
            self._told.add(kind)
            self._env.emit(Warned(f"cache: {kind}", message))


class _Pause:
    """A time in which something is not tried, twice as long after each failure."""

    def __init__(self, env: Env) -> None:
        self._clock = env.clock
        self._length_s = _FIRST_RETRY_S
        self.until = float("-inf")
        self.failed = False
        """Whether the last try did."""

    @property
    def is_on(self) -> bool:
        """Whether it lasts; from any thread."""
        return self._clock.monotonic() < self.until

    def begin(self) -> None:
        """It failed again."""
        self.failed = True
        self.until = self._clock.monotonic() + self._length_s
        self._length_s = min(2 * self._length_s, _LAST_RETRY_S)

    def over(self) -> None:
        """It works."""
        self.failed = False
        self.until = float("-inf")
        self._length_s = _FIRST_RETRY_S


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:200]

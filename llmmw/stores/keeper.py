"""The disk as seen from its own thread: opening, giving up, trying again. No failure leaves this module."""

from __future__ import annotations

import sqlite3
from typing import TYPE_CHECKING

from llmmw.events import CacheTrouble, Warned
from llmmw.stores.place import Refused, prepare, quarantine
from llmmw.stores.schema import Corrupt

if TYPE_CHECKING:
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


class Keeper:
    """Keeps a database open while that works. Everything but `trouble` and `down` runs on the I/O thread."""

    def __init__(self, directory: Path, env: Env, *, max_bytes: int, codec: Codec | None, network: bool) -> None:
        self._directory = directory
        self._env = env
        self._max_bytes = max_bytes
        self._codec = codec
        self._network = network
        self._rows: Rows | None = None
        self._retry_at = float("-inf")
        self._retry_s = _FIRST_RETRY_S
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
        return self.given_up or (self._rows is None and self._env.clock.monotonic() < self._retry_at)

    def get(self, key: bytes) -> tuple[Entry | None, bool]:
        """The entry of a key or None, and whether a broken row stands there, to be deleted."""
        rows = self._rows or self._open()
        if rows is None:
            return None, False
        try:
            return rows.get(key), False
        except Exception as error:  # noqa: BLE001 — a damaged database makes diskcache raise anything
            return None, self._is_bad_row(error)

    def _is_bad_row(self, error: Exception) -> bool:
        """Whether only one row is broken; anything else is dealt with here."""
        from llmmw.stores.rows import BadRow  # noqa: PLC0415 — diskcache is imported on this thread only

        if isinstance(error, BadRow):
            self.trouble("bad row", "a row of the cache database was changed by somebody else; it is deleted")
            return True
        self._failed(error)
        return False

    def set(self, key: bytes, entry: Entry, keep_s: float) -> bool:
        """Write an entry; False: not now, another process is writing. What cannot be written is dropped."""
        rows = self._open()
        if rows is None:
            self.trouble("write dropped")
            return True
        try:
            if not rows.set(key, entry, keep_s):
                self.trouble("log too long", "a reader keeps the log from being emptied; writes are dropped")
            self._busy = 0
        except Exception as error:  # noqa: BLE001 — see get
            return not self._is_busy(error)
        return True

    def delete(self, key: bytes) -> bool:
        """Remove a row; False: not yet."""
        rows = self._open()
        if rows is None:
            return self.given_up
        try:
            rows.delete(key)
            self._busy = 0
        except Exception as error:  # noqa: BLE001 — see get
            self._is_busy(error)
            return self.given_up
        return True

    def discard(self, match: Match) -> bool:
        """Remove all rows that match; False: not yet."""
        rows = self._open()
        if rows is None:
            return self.given_up
        try:
            rows.discard(match)
        except Exception as error:  # noqa: BLE001 — see get
            self._is_busy(error)
            return self.given_up
        return True

    def close(self) -> None:
        """Close the database."""
        rows, self._rows = self._rows, None
        if rows is not None:
            try:
                rows.close()
            except sqlite3.Error as error:
                self.trouble("close", str(error))

    def abandon(self) -> object:
        """After a fork: forget the parent's handle without closing it; whoever gets it keeps it alive."""
        rows, self._rows = self._rows, None
        self._retry_at = float("-inf")
        return rows

    def _open(self) -> Rows | None:
        if self._rows is not None or self.down:
            return self._rows
        from llmmw.stores.rows import Rows  # noqa: PLC0415 — see get

        try:
            prepare(self._directory, network=self._network)
            self._rows = Rows(self._directory, self._max_bytes, self._codec)
            self._retry_s = _FIRST_RETRY_S
        except Refused as error:
            self.given_up = True
            self.trouble("refused", f"the cache directory is not used: {error}")
        except Exception as error:  # noqa: BLE001 — see get
            self._failed(error)
        self.opened = True
        return self._rows

    def _is_busy(self, error: Exception) -> bool:
        """Whether trying again soon may help; anything else is dealt with here."""
        from llmmw.stores.rows import Busy  # noqa: PLC0415 — see get

        if isinstance(error, Busy) or (isinstance(error, sqlite3.OperationalError) and "locked" in str(error)):
            self._busy += 1
            if self._busy == _BUSY_IS_TROUBLE:
                self.trouble("busy")
            return True
        self._failed(error)
        return False

    def _failed(self, error: Exception) -> None:
        """Close, put a broken database aside, and leave the disk alone for a while."""
        self.close()
        broken = isinstance(error, Corrupt) or (
            isinstance(error, sqlite3.DatabaseError)
            and not isinstance(error, sqlite3.OperationalError | sqlite3.ProgrammingError)
        )
        if broken:
            self._quarantine(error)
            return
        locked = "locked" in str(error)
        self.trouble(
            "busy" if locked else "unavailable",
            "" if locked else f"the cache on disk does not work and memory does its job: {_short(error)}",
        )
        self._wait()

    def _quarantine(self, error: Exception) -> None:
        self._quarantines += 1
        self.trouble("corrupt", f"the cache database was broken ({_short(error)}) and put aside as *.corrupt-<time>")
        try:
            quarantine(self._directory, self._env.clock.wall())
        except OSError as problem:
            self.trouble("unavailable", f"a broken cache database cannot be put aside: {_short(problem)}")
            self._wait()
        if self._quarantines >= _MAX_QUARANTINES:
            self.given_up = True

    def _wait(self) -> None:
        self._retry_at = self._env.clock.monotonic() + self._retry_s
        self._retry_s = min(2 * self._retry_s, _LAST_RETRY_S)

    def trouble(self, kind: str, message: str = "") -> None:
        """Count it; with a message, warn once. From any thread."""
        self._env.emit(CacheTrouble(kind))
        if message and kind not in self._told:
            self._told.add(kind)
            self._env.emit(Warned(f"cache: {kind}", message))


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:200]

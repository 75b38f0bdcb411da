"""Reading ahead: who runs a program again asks for answers in the order in which they were stored.

Handing one question to another thread and its answer back costs several times what the read does. So a read that goes
on where the one before ended takes the rows that follow along, more each time, as file systems do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from llmmw.env import Clock
    from llmmw.stores.entry import Entry

_FIRST, _MOST = 8, 128
"""Rows taken along, twice as many each time."""
MAX_VALUE_BYTES = 16 * 1024
"""A longer answer is read when it is asked for."""
_NEAR = 64
"""Rows between two reads in order: calls that are made together are stored in any order."""
_QUICK_S = 0.001
"""A disk that took longer for the row that was asked for is not asked for more."""
_LONGEST_S = 0.005
"""No more rows are taken along after that: another read may wait by now."""
_KEPT_S = 1.0
"""As long as that, another process's deletions are not seen here; in memory they never are."""


class Ahead:
    """Rows that were read before anybody asked. Everything but `take` runs on the I/O thread.

    A row that is written or deleted by this process is forgotten there, after the act. Until then what waits to be
    written is asked first, so nothing here is ever served in its place.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._found: dict[bytes, Entry] = {}
        self._until = 0.0
        self._end = 0
        """The last row that was read."""
        self._window = 0

    def take(self, key: bytes) -> Entry | None:
        """The entry of a key, once; from any thread."""
        if not self._found or self._clock.monotonic() > self._until:
            return None
        return self._found.pop(key, None)

    def wanted(self, row: int, took_s: float) -> int:
        """How many rows to take along with one that was read in so many seconds."""
        apart = row - self._end
        if not -_NEAR <= apart <= _NEAR or took_s > _QUICK_S:
            self._window = 0
        elif apart > 0:
            self._window = min(max(_FIRST, 2 * self._window), _MOST)
        else:
            return 0  # of those that were taken along, or stored together with them
        self._end = row
        return self._window

    def fill(self, rows: Iterable[tuple[int, bytes, Entry]]) -> None:
        """Keep rows in place of those before, as many as can be had quickly."""
        found: dict[bytes, Entry] = {}
        until = self._clock.monotonic() + _LONGEST_S
        for row, key, entry in rows:
            self._end = row
            found[key] = entry
            if self._clock.monotonic() > until:
                break
        if not found:
            self._window = 0  # the next ones are long
        self._found = found
        self._until = self._clock.monotonic() + _KEPT_S

    def forget(self, key: bytes) -> None:
        """What stands under a key is another now."""
        self._found.pop(key, None)

    def clear(self) -> None:
        """Anything may be another now."""
        self._found = {}
        self._end = self._window = 0

"""What waits to be written to disk: read before the disk is, so that a write is seen at once.

The jobs here are what the I/O thread keeps until they are done, which may be never. So they know nothing of the store:
one that is dropped meanwhile can be collected, and ends its thread.
"""

from __future__ import annotations

import threading
from functools import partial
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

    from llmmw.stores.base import Match
    from llmmw.stores.entry import Entry
    from llmmw.stores.keeper import Keeper

    Write = Callable[[], bool]
    """False: not yet; it is tried again."""
    Guard = Callable[[Write], bool]
    """Runs a write under a lease, or refuses it."""

MAX_WRITES = 1024
MAX_BYTES = 64 * 1024 * 1024
MAX_DELETIONS = 65_536
"""A deletion is never dropped: where that many cannot be done, the disk is not read any more in this process."""
DELETED: Final = None


class Nothing:
    """Says that nothing of a key waits; None says that its deletion does."""


NOTHING: Final = Nothing()


class Backlog:
    """Writes, deletions and invalidations that are not done yet. Made from any thread, done on the I/O thread.

    Args:
        keeper: does them.
    """

    def __init__(self, keeper: Keeper) -> None:
        self._keeper = keeper
        self._lock = threading.Lock()
        self._waiting: dict[bytes, Entry | None] = {}
        self._bytes = 0
        self.discards = 0
        """Invalidations among them: until they are done, what is on disk cannot be told from what was invalidated."""

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, key: bytes) -> bool:
        return key in self._waiting

    def get(self, key: bytes) -> Entry | Nothing | None:
        """What will stand under a key: an entry, None where it will be deleted, NOTHING where nothing waits."""
        return self._waiting.get(key, NOTHING)

    def put(self, key: bytes, entry: Entry, keep_s: float, guard: Guard | None) -> Write | None:
        """The job that writes an entry; None if too much waits."""
        if len(self._waiting) >= MAX_WRITES or self._bytes + len(entry.data) > MAX_BYTES:
            return None
        self._note(key, entry)
        return partial(self._write, key, entry, keep_s, guard)

    def _write(self, key: bytes, entry: Entry, keep_s: float, guard: Guard | None) -> bool:
        if self._waiting.get(key) is not entry:
            return True  # a later write or deletion of this key is queued behind
        write = partial(self._keeper.set, key, entry, keep_s)
        if not (write() if guard is None else guard(write)):
            return False
        self._settle(key, entry)
        return True

    def delete(self, key: bytes) -> Write | None:
        """The job that deletes a key; None if one is queued."""
        if self._waiting.get(key, NOTHING) is DELETED:
            return None
        self._bound()
        self._note(key, DELETED)
        return partial(self._delete, key)

    def _bound(self) -> None:
        if len(self._waiting) + self.discards >= MAX_DELETIONS:
            self._keeper.give_up(f"it could not do {MAX_DELETIONS} deletions")

    def _delete(self, key: bytes) -> bool:
        if key in self._waiting and self._waiting[key] is not DELETED:
            return True
        if not self._keeper.delete(key):
            return False
        self._settle(key, DELETED)
        return True

    def discard(self, match: Match) -> list[Write]:
        """The jobs that delete what matches."""
        self._bound()
        jobs: list[Write] = []
        with self._lock:
            for key, entry in self._waiting.items():
                if entry is not None and match.fits(entry):
                    self._waiting[key] = DELETED
                    self._bytes -= len(entry.data)
                    jobs.append(partial(self._delete, key))
            self.discards += 1
        return [*jobs, partial(self._discard, match)]

    def _discard(self, match: Match) -> bool:
        if not self._keeper.discard(match):
            return False
        with self._lock:
            self.discards -= 1
        return True

    def _note(self, key: bytes, entry: Entry | None) -> None:
        with self._lock:
            former = self._waiting.get(key)
            self._bytes += (len(entry.data) if entry else 0) - (len(former.data) if former else 0)
            self._waiting[key] = entry

    def _settle(self, key: bytes, entry: Entry | None) -> None:
        with self._lock:
            if key in self._waiting and self._waiting[key] is entry:
                del self._waiting[key]
                self._bytes -= len(entry.data) if entry else 0

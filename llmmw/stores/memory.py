"""The memory tier: bounded in bytes and in number, on the monotonic clock, readable from any thread."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmmw.algo.calendar import Calendar
from llmmw.algo.evict import GDSF, Slot

if TYPE_CHECKING:
    from llmmw.call import Reply
    from llmmw.stores.base import Match
    from llmmw.stores.entry import Entry

_MAX_SHARE = 0.1
"""No item takes more than this share of the budget: one giant would cost many useful ones."""
_SWEEP = 16
"""Expired items dropped per write, so that no write pays for a whole generation expiring at once."""


class Resident:
    """An entry in memory, with its times on the monotonic clock."""

    __slots__ = ("drawer", "entry", "expires", "gone", "reply", "slot")

    def __init__(self, entry: Entry, expires: float, gone: float, slot: Slot, drawer: float) -> None:
        self.entry = entry
        self.expires = expires
        """Until then it is fresh."""
        self.gone = gone
        """Until then it may be served stale."""
        self.slot = slot
        self.drawer = drawer
        """Where the calendar has it."""
        self.reply: Reply | None = None
        """The hit as it is given to plain calls, once it was made."""


class MemoryStore:
    """Entries by key. `get` may be called from any thread, everything else from the home loop."""

    def __init__(self, max_bytes: int, max_entries: int) -> None:
        self._max_bytes = max_bytes
        self.max_item_bytes = int(max_bytes * _MAX_SHARE)
        """The largest entry it takes."""
        self._max_entries = max_entries
        self._entries: dict[bytes, Resident] = {}
        self._policy = GDSF()
        self._ends = Calendar()
        self._bytes = 0
        self.evicted = 0
        self.refused = 0

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def size(self) -> int:
        """Bytes in use."""
        return self._bytes

    def get(self, key: bytes, now: float) -> Resident | None:
        """The entry unless its time is over; counts as asked for."""
        resident = self._entries.get(key)
        if resident is None or now >= resident.gone:
            return None
        slot = resident.slot
        slot.hits += 1
        slot.floor = self._policy.floor
        return resident

    def put(self, key: bytes, entry: Entry, expires: float, gone: float, now: float) -> Resident | None:
        """Keep an entry, giving up others for it; None where it is too large to be kept at all."""
        size = entry.size
        entries, ends = self._entries, self._ends
        for over in ends.over(now, _SWEEP):
            self.delete(over)
        former = entries.get(key)
        if former is not None:
            self.delete(key)
        if size > self.max_item_bytes:
            self.refused += 1
            return None
        hits = former.slot.hits + 1 if former is not None else 1
        while entries and (self._bytes + size > self._max_bytes or len(entries) >= self._max_entries):
            self._evict()
        slot = self._policy.add(key, size, entry.header.cost_s, hits=hits)
        resident = entries[key] = Resident(entry, expires, gone, slot, ends.add(key, gone, now))
        self._bytes += size
        return resident

    def delete(self, key: bytes) -> bool:
        """Forget a key; whether it was there."""
        resident = self._entries.pop(key, None)
        if resident is None:
            return False
        self._bytes -= resident.slot.size
        self._policy.remove(resident.slot)
        self._ends.remove(key, resident.drawer)
        return True

    def discard(self, match: Match) -> int:
        """Forget all entries that match; returns how many went."""
        return sum(map(self.delete, [key for key, found in self._entries.items() if match.fits(found.entry)]))

    def _evict(self) -> None:
        slot = self._policy.evict()
        if slot is not None:
            self._ends.remove(slot.key, self._entries.pop(slot.key).drawer)
            self._bytes -= slot.size
            self.evicted += 1

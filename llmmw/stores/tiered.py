"""Memory in front, a slower tier behind: what is found behind moves to the front.

What was forgotten stays forgotten: a fill or a read from disk that began before an invalidation does not bring an
entry back.
"""

from __future__ import annotations

import math
from collections import deque
from typing import TYPE_CHECKING

from llmmw.stores.base import Match

if TYPE_CHECKING:
    from llmmw.env import Clock
    from llmmw.stores.base import Backing
    from llmmw.stores.entry import Entry
    from llmmw.stores.lease import Lease
    from llmmw.stores.memory import MemoryStore, Resident

_REMEMBERED = 256
"""Invalidations remembered one by one; a fill that is older than the oldest is not stored, to be safe."""


class TieredStore:
    """A memory store and, optionally, a backing tier.

    Args:
        memory: the front.
        backing: the slow tier, or None.
        clock: monotonic for the front, wall for what is written behind.
        grace_s: how long an expired entry is kept, for serving it stale.
        longest_s: no entry is older, whatever lifetime it was given by who wrote it.
    """

    def __init__(
        self,
        memory: MemoryStore,
        backing: Backing | None,
        clock: Clock,
        *,
        grace_s: float = 0.0,
        longest_s: float = math.inf,
    ) -> None:
        self.memory = memory
        self.backing = backing
        self.generation = 0
        """Counts invalidations; whoever begins a fill notes it."""
        self._clock = clock
        self._grace_s = grace_s
        self._longest_s = longest_s
        self._forgotten: deque[tuple[int, Match]] = deque(maxlen=_REMEMBERED)

    @property
    def max_item_bytes(self) -> int:
        """The largest body that any tier takes."""
        behind = self.backing.max_item_bytes if self.backing is not None else 0
        return max(self.memory.max_item_bytes, behind)

    def peek(self, key: bytes, now: float) -> Resident | None:
        """What is in memory at that monotonic time; from any thread."""
        return self.memory.get(key, now)

    async def fetch(self, key: bytes) -> Resident | None:
        """What the backing tier has, moved to the front unless it is too large for it."""
        if self.backing is None:
            return None
        since = self.generation
        entry = await self.backing.get(key)
        newer = self.peek(key, self._clock.monotonic())
        if newer is not None:  # stored while the disk was read
            return newer
        if entry is None or self._was_forgotten(entry, since):
            return None
        wall = self._clock.wall()
        left = min(entry.remaining_s(wall), entry.header.created + self._longest_s - wall)
        return self._admit(key, entry, left)

    def put(self, key: bytes, entry: Entry, *, since: int, lease: Lease | None = None) -> bool:
        """Keep a new entry; whether any tier took it.

        Args:
            key: its key.
            entry: not kept if it was invalidated meanwhile.
            since: `generation` when its fill began.
            lease: under which it was got; once that is lost, the backing tier does not take it.
        """
        if since != self.generation and self._was_forgotten(entry, since):
            return False
        taken = self._admit(key, entry, entry.header.ttl_s) is not None
        if self.backing is not None and len(entry.data) <= self.backing.max_item_bytes:
            self.backing.put(key, entry, entry.header.ttl_s + self._grace_s, lease)
            taken = True
        return taken

    def _admit(self, key: bytes, entry: Entry, remaining_s: float) -> Resident | None:
        now = self._clock.monotonic()
        expires = now + remaining_s
        gone = expires + self._grace_s
        if gone <= now:
            return None
        return self.memory.put(key, entry, expires, gone, now)

    def _was_forgotten(self, entry: Entry, since: int) -> bool:
        if since == self.generation:
            return False
        if self.generation - since > len(self._forgotten):
            return True
        return any(number > since and match.fits(entry) for number, match in self._forgotten)

    def forget(self, key: bytes) -> int:
        """Forget a request that has no lanes; returns how many entries left memory."""
        self._remember(Match("base", key))
        if self.backing is not None:
            self.backing.delete(key)
        return int(self.memory.delete(key))

    def discard(self, match: Match) -> int:
        """Forget all entries that match; returns how many left memory (the backing tier works on by itself)."""
        self._remember(match)
        if self.backing is not None:
            self.backing.discard(match)
        return self.memory.discard(match)

    def _remember(self, match: Match) -> None:
        self.generation += 1
        self._forgotten.append((self.generation, match))

    def rehome(self) -> None:
        """The home loop changed or the process forked."""
        if self.backing is not None:
            self.backing.rehome()

    async def aclose(self) -> None:
        """Release the backing tier."""
        if self.backing is not None:
            await self.backing.aclose()

    def gauges(self) -> dict[str, object]:
        """Entries, bytes and evictions of memory, and the readings of the backing tier."""
        memory = self.memory
        readings: dict[str, object] = {
            "entries": len(memory), "bytes": memory.size, "evicted": memory.evicted, "too large": memory.refused,
        }  # fmt: skip
        return readings | (self.backing.gauges() if self.backing is not None else {})

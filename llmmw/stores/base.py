"""What a store is, and what may be asked of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Protocol

import msgspec

if TYPE_CHECKING:
    from llmmw.call import Call
    from llmmw.stores.entry import Entry
    from llmmw.stores.lease import Lease, Leases


class Match(msgspec.Struct, frozen=True):
    """Which entries to forget: those of one request (all its lanes), of one namespace, or with one tag."""

    by: Literal["base", "namespace", "tag"]
    value: bytes | str

    def fits(self, entry: Entry) -> bool:
        """Whether the entry is meant."""
        header = entry.header
        if self.by == "tag":
            return self.value in header.tags
        return self.value == (header.base if self.by == "base" else header.namespace)

    def concerns(self, call: Call) -> bool:
        """Whether the answer to a call will be meant; of a request's own key a call knows nothing."""
        if self.by == "tag":
            return self.value in call.context.tags
        return self.by == "namespace" and self.value == call.namespace


class Codec(Protocol):
    """A reversible transformation of entries on their way to disk, such as encryption."""

    @property
    def name(self) -> str:
        """Short and constant; rows written under another name are not read."""
        ...

    def seal(self, data: bytes, /) -> bytes:
        """Bytes for the disk."""
        ...

    def open(self, data: bytes, /) -> bytes:
        """What `seal` was given. Whatever it raises makes the row a miss."""
        ...


class Backing(Protocol):
    """A slow tier behind the memory tier. Its failures are its own: every method degrades to "not found"."""

    @property
    def max_item_bytes(self) -> int:
        """The largest body it takes."""
        ...

    @property
    def leases(self) -> Leases:
        """Who of several processes asks upstream."""
        ...

    async def get(self, key: bytes, /) -> Entry | None:
        """The entry, or None where there is none or it cannot be had in time."""
        ...

    def put(self, key: bytes, entry: Entry, keep_s: float, lease: Lease | None = None, /) -> None:
        """Keep the entry for so many seconds, unless the lease is lost; nobody waits for it."""
        ...

    def delete(self, key: bytes, /) -> None:
        """Forget the key; seen by every later `get`."""
        ...

    def discard(self, match: Match, /) -> None:
        """Forget all entries that match; seen by every later `get`."""
        ...

    def rehome(self) -> None:
        """The home loop changed or the process forked."""
        ...

    async def aclose(self) -> None:
        """Write what is queued and release everything. Idempotent."""
        ...

    def gauges(self) -> dict[str, object]:
        """Readings of the moment, from any thread."""
        ...

"""A stored answer, and its form on disk: magic, header length, header (msgpack), body.

Reading trusts nothing: a typed decoder that builds this one class, or the row is a miss.
"""

from __future__ import annotations

import math
import struct
from typing import TYPE_CHECKING

import msgspec

from llmmw.answer import NO_USAGE, Usage

if TYPE_CHECKING:
    from collections.abc import Iterator

ENTRY_SCHEMA = 1
_MAGIC = b"LMW"
_PREFIX = struct.Struct(">3sBI")
_OVERHEAD = 1200
"""Bytes that an entry takes in memory besides its body: objects, key, places in heap and calendar, the reply that hits
are given (980 to 1,260 measured)."""

MAX_CLOCK_LEAD_S = 5.0
"""An entry from further in the future than this was written under another clock and is not trusted (SPEC 1)."""


class BadEntry(Exception):
    """Bytes that are no entry."""


class NewerEntry(Exception):
    """An entry of a later version of llmmw: not read, not deleted."""


class Header(msgspec.Struct, frozen=True, array_like=True):
    """What is known about a stored answer besides its bytes."""

    created: float
    """Wall-clock seconds."""
    ttl_s: float
    """Lifetime, jitter included."""
    base: bytes = b""
    """Key of the request without its lane."""
    namespace: str = ""
    tags: tuple[str, ...] = ()
    cost_s: float = 0.0
    """Seconds of service that the answer took, without queue and back-off."""
    usage: Usage = NO_USAGE
    status: int = 200
    content_type: str = ""
    endpoint: str = ""
    cuts: tuple[int, ...] | None = None
    """Of a stream: the length of each chunk."""
    items: bool = False
    """Whether the chunks are a function's items rather than a body's bytes."""
    stream_usage: bool = False
    """Whether the caller asked for a usage event in the stream."""


class Entry(msgspec.Struct, frozen=True):
    """A stored answer: its header and its body (the chunks of a stream one after the other)."""

    header: Header
    data: bytes

    @property
    def size(self) -> int:
        """Bytes it takes in memory, objects included."""
        header = self.header
        size = len(self.data) + len(header.namespace) + _OVERHEAD
        if header.tags:
            size += sum(map(len, header.tags))
        if header.cuts:
            size += len(header.cuts) * 36
        return size

    @property
    def is_stream(self) -> bool:
        """Whether it was recorded as a stream."""
        return self.header.cuts is not None

    def pieces(self) -> Iterator[bytes]:
        """The chunks of a recorded stream, with their boundaries."""
        start = 0
        for length in self.header.cuts or ():
            yield self.data[start : start + length]
            start += length

    def remaining_s(self, wall: float) -> float:
        """Seconds until it expires; negative once expired, and for an entry from the future."""
        created = self.header.created
        if created > wall + MAX_CLOCK_LEAD_S:
            return -float("inf")
        return created + self.header.ttl_s - wall


_encode_header = msgspec.msgpack.Encoder().encode
_decode_header = msgspec.msgpack.Decoder(Header).decode


def encode_entry(entry: Entry) -> bytes:
    """The entry as bytes."""
    header = _encode_header(entry.header)
    return _PREFIX.pack(_MAGIC, ENTRY_SCHEMA, len(header)) + header + entry.data


def decode_entry(raw: bytes) -> Entry:
    """The entry that `encode_entry` wrote.

    Raises:
        BadEntry: anything else.
        NewerEntry: written by a later version.
    """
    if len(raw) < _PREFIX.size:
        raise BadEntry("too short")
    magic, schema, length = _PREFIX.unpack_from(raw)
    if magic != _MAGIC:
        raise BadEntry("not an entry")
    if schema > ENTRY_SCHEMA:
        raise NewerEntry(f"schema {schema}")
    start = _PREFIX.size + length
    try:
        header = _decode_header(memoryview(raw)[_PREFIX.size : start])
    except (msgspec.MsgspecError, UnicodeError) as error:
        raise BadEntry(str(error)) from None
    entry = Entry(header, raw[start:])
    if not (math.isfinite(header.created) and math.isfinite(header.ttl_s) and 0 <= header.cost_s < math.inf):
        raise BadEntry("times that are none")
    if header.cuts is not None and (min(header.cuts, default=0) < 0 or sum(header.cuts) != len(entry.data)):
        raise BadEntry("chunks that do not add up")
    return entry

"""Entries as rows of the table: sealed by the codec, and a digest over key and value before each value."""

from __future__ import annotations

import contextlib
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Literal

from llmmw.stores.entry import BadEntry, NewerEntry, decode_entry, encode_entry
from llmmw.stores.schema import BadRow, Unsealable
from llmmw.stores.table import MAX_VALUE_BYTES, Table

if TYPE_CHECKING:
    from collections.abc import Generator
    from pathlib import Path

    from llmmw.stores.base import Codec, Match
    from llmmw.stores.entry import Entry

MAX_WAL_BYTES = 64 * 1024 * 1024
_MAX_EXCESS = 0.25
"""A database that much above its size (answers grew, or the limit shrank) takes no more until it is smaller."""
_DIGEST_BYTES = 16
_MAX_NAME_BYTES = 255

Obstacle = Literal["log too long", "too full"]


class Rows:
    """An open database; every method on one thread. Any may raise `sqlite3.Error`; see `is_busy`.

    Args:
        directory: a place that `prepare` has checked.
        max_bytes: above this size of the database, each write removes some of the oldest rows.
        codec: transforms entries on their way.

    Raises:
        Refused, Corrupt, sqlite3.Error: as `Table` says.
    """

    def __init__(self, directory: Path, max_bytes: int, codec: Codec | None = None) -> None:
        self._codec = codec
        self._max_excess = int(max_bytes * _MAX_EXCESS)
        self._table: Any = Table(directory, max_bytes)

    def find(self, key: bytes) -> tuple[Entry | None, int]:
        """The entry of a key, and the number of its row (0: there is none).

        Raises:
            BadRow: what stands there is not what we wrote.
        """
        found = self._table.find(key)
        return (None, 0) if found is None else (self._read(key, found[1]), found[0])

    def following(self, row: int, count: int, max_bytes: int) -> Generator[tuple[int, bytes, Entry]]:
        """Number, key and entry of the rows after one, without longer and broken ones; close it."""
        with contextlib.closing(self._table.following(row, count, max_bytes)) as rows:
            for number, key, value in rows:
                with contextlib.suppress(BadRow):  # it is dealt with when it is asked for
                    entry = self._read(key, value) if type(key) is bytes else None
                    if entry is not None:
                        yield number, key, entry

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
            return decode_entry(sealed if self._codec is None else bytes(self._codec.open(sealed)))
        except NewerEntry:
            return None
        except BadEntry as error:
            raise BadRow(str(error)) from None
        except Exception as error:
            # A codec is the user's and may raise anything (a rotated key): then the row is unreadable.
            raise BadRow(type(error).__name__) from error

    def set(self, key: bytes, entry: Entry, keep_s: float) -> Obstacle | None:
        """Write an entry; why not, where the database takes none now.

        Raises:
            Unsealable: the codec raises or returns no bytes, or too many.
        """
        table = self._table
        if table.wal_bytes() > MAX_WAL_BYTES:
            table.checkpoint()
            if table.wal_bytes() > MAX_WAL_BYTES:
                return "log too long"
        payload = self._seal(entry)
        if table.excess > self._max_excess:
            table.shrink(entry.header.created)
            return "too full"
        table.set(key, _digest(key, payload) + payload, expire=keep_s)
        return None

    def _seal(self, entry: Entry) -> bytes:
        sealed, name = encode_entry(entry), b""
        if self._codec is not None:
            try:
                sealed, name = self._codec.seal(sealed), self._codec.name.encode()
            except Exception as error:  # noqa: BLE001 — it is the user's and may raise anything
                raise Unsealable(type(error).__name__) from None
            if type(sealed) is not bytes or len(name) > _MAX_NAME_BYTES:
                raise Unsealable(f"{type(sealed).__name__} in place of bytes, or a name that is too long")
        if len(sealed) > MAX_VALUE_BYTES - 2 * _MAX_NAME_BYTES:
            raise Unsealable("too long")
        return bytes([len(name)]) + name + sealed

    def delete(self, key: bytes) -> None:
        """Remove a row."""
        self._table.remove(key)

    def discard(self, match: Match) -> None:
        """Remove all rows whose entries match. If it raises, some may be gone already."""
        self._table.remove_rows([row for row, key, value in self._table.rows() if self._fits(match, key, value)])

    def _fits(self, match: Match, key: object, value: object) -> bool:
        try:
            entry = self._read(key, value) if type(key) is bytes else None
        except BadRow:
            return False
        return entry is not None and match.fits(entry)

    def close(self) -> None:
        """Close the database, on the thread that opened it."""
        self._table.close()


def _digest(key: bytes, payload: bytes) -> bytes:
    return sha256(key + payload).digest()[:_DIGEST_BYTES]


def _split(payload: bytes) -> tuple[str, bytes]:
    """The codec's name and the sealed entry."""
    if not payload:
        raise BadRow("empty")
    end = 1 + payload[0]
    return payload[1:end].decode("utf-8", "replace"), payload[end:]

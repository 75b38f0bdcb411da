"""Looking after a cache directory from outside: how full it is, throwing out what expired, emptying it.

Other processes may use it meanwhile. The same checks as before any other opening: what is not plainly ours is left
alone. Nothing is made where nothing is.
"""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from llmmw.env import ambient_clock
from llmmw.errors import LLMMWError
from llmmw.stores.logs import Mapping, opening
from llmmw.stores.place import DATABASE, Refused, check, quarantine, quarantined
from llmmw.stores.schema import Corrupt, connect, inspect, is_broken

if TYPE_CHECKING:
    import os
    from collections.abc import Generator

_PATIENCE_S = 5.0
_BATCH = 200
"""Rows deleted per transaction, so that a running program's writes get in between."""


class Unusable(LLMMWError):
    """A cache directory that cannot be looked after; the message says why and what to do."""


class DiskUsage(msgspec.Struct, frozen=True):
    """How full a cache directory is; all zero where there is none."""

    entries: int = 0
    """Stored answers, expired ones included."""
    expired: int = 0
    bytes: int = 0
    """Size of the database and its log."""
    limit_bytes: int = 0
    """Size above which the oldest answers go; 0: not known yet."""
    wal_bytes: int = 0
    """The log's part of `bytes`."""
    oldest_s: float | None = None
    """Age of the oldest answer in seconds; None where there is none."""
    newest_s: float | None = None
    """Age of the latest one."""
    expires_last_s: float | None = None
    """Seconds until the last answer's time is over."""
    quarantined: int = 0
    """Files put aside because the database in them was broken."""
    quarantined_bytes: int = 0


def usage(directory: str | os.PathLike[str], *, network: bool = False) -> DiskUsage:
    """How full it is.

    Args:
        directory: as given to `TTLCache(directory=)`.
        network: also on a network file system.

    Raises:
        Unusable: not ours, not private, locked for 5 s, or no cache database of ours.
    """
    place = _place(directory)
    now = ambient_clock().wall()
    entries = expired = limit = 0
    first = latest = end = None
    with _opened(place, network=network) as database:
        if database is not None:
            entries = _number(database, "SELECT count(*) FROM Cache")
            expired = _number(database, "SELECT count(*) FROM Cache WHERE expire_time < ?", now)
            first, latest = (_time(database, f"SELECT {which}(store_time) FROM Cache") for which in ("min", "max"))  # noqa: S608 — these two texts
            end = _time(database, "SELECT max(expire_time) FROM Cache")
            limit = _number(database, "SELECT value FROM Settings WHERE key = 'size_limit'")
    aside = quarantined(place)
    return DiskUsage(
        entries=entries,
        expired=expired,
        bytes=_size(place / DATABASE) + _size(place / f"{DATABASE}-wal"),
        limit_bytes=limit,
        wal_bytes=_size(place / f"{DATABASE}-wal"),
        oldest_s=None if first is None else now - first,
        newest_s=None if latest is None else now - latest,
        expires_last_s=None if end is None else end - now,
        quarantined=len(aside),
        quarantined_bytes=sum(map(_size, aside)),
    )


def prune(directory: str | os.PathLike[str], *, network: bool = False) -> int:
    """Delete the answers whose time is over; returns how many. Arguments and errors as for `usage`."""
    with _opened(_place(directory), network=network) as database:
        return 0 if database is None else _delete(database, "expire_time < ?", ambient_clock().wall())


def clear(directory: str | os.PathLike[str], *, network: bool = False) -> int:
    """Delete every answer, a broken database, and what was put aside; returns how many answers went.

    Answers in the memory of running programs stay there. Arguments and errors as for `usage`, except that a broken
    database is no error here.
    """
    place, gone = _place(directory), 0
    try:
        with _opened(place, network=network) as database:
            if database is not None:
                gone = _delete(database, "1")
    except _Broken:
        with _explained(place):
            quarantine(place, ambient_clock().wall())
    with _explained(place):
        for path in quarantined(place):
            path.unlink()
    return gone


class _Broken(Unusable):
    """Not a database of ours."""


def _place(directory: str | os.PathLike[str]) -> Path:
    return Path(directory).expanduser().absolute()


@contextlib.contextmanager
def _explained(place: Path) -> Generator[None]:
    try:
        yield
    except Refused as error:
        raise Unusable(str(error)) from None
    except (sqlite3.Error, Corrupt, OSError) as error:
        if is_broken(error):
            raise _Broken(f"the cache in {place} is broken ({error}); `clear` removes it") from error
        is_locked = isinstance(error, BlockingIOError) or "locked" in str(error)
        reason = "another program holds it locked" if is_locked else str(error)
        raise Unusable(f"the cache in {place} cannot be used: {reason}") from error


@contextlib.contextmanager
def _opened(place: Path, *, network: bool) -> Generator[sqlite3.Connection | None]:
    """The database, or None where there is none or it is still empty."""
    with _explained(place), contextlib.ExitStack() as stack:
        try:
            check(place, network=network)
            (place / DATABASE).lstat()
        except FileNotFoundError:
            yield None
            return
        with opening(place):
            database = stack.enter_context(contextlib.closing(connect(place, _PATIENCE_S)))
            is_filled = inspect(database)
            stack.enter_context(contextlib.closing(Mapping(place)))
            stack.callback(database.close)  # before the mapping is forgotten
        yield database if is_filled else None


def _delete(database: sqlite3.Connection, which: str, *values: float) -> int:
    # `which` is one of the two texts above.
    rows = f"DELETE FROM Cache WHERE rowid IN (SELECT rowid FROM Cache WHERE {which} LIMIT {_BATCH})"  # noqa: S608 — `which` is one of our own texts
    gone = 0
    while True:
        count = database.execute(rows, values).rowcount
        gone += count
        if count < _BATCH:
            break
    database.execute("PRAGMA busy_timeout = 0")  # a checkpoint that waits for readers keeps writers waiting meanwhile
    database.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    return gone


def _number(database: sqlite3.Connection, query: str, *values: float) -> int:
    row = database.execute(query, values).fetchone()
    return row[0] if row is not None and type(row[0]) is int else 0


def _time(database: sqlite3.Connection, query: str) -> float | None:
    row = database.execute(query).fetchone()
    return row[0] if row is not None and type(row[0]) is float else None


def _size(path: Path) -> int:
    try:
        return path.lstat().st_size
    except FileNotFoundError:
        return 0

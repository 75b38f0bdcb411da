"""The database file as SQLite sees it: opened without making or following anything, believed only where it is ours."""

from __future__ import annotations

import re
import sqlite3
from typing import TYPE_CHECKING, Any

from llmmw.stores.place import DATABASE, Refused

if TYPE_CHECKING:
    from pathlib import Path

VERSION = 0
"""Of the tables (`PRAGMA user_version`); a later one is neither read nor put aside."""
_MAX_OBJECTS = 50
"""diskcache makes a dozen tables, indexes and triggers."""
SETTINGS: dict[str, Any] = {
    "statistics": 0,
    "tag_index": 0,
    "eviction_policy": "least-recently-stored",
    "cull_limit": 10,
    "sqlite_auto_vacuum": 1,
    "sqlite_cache_size": 2**13,
    "sqlite_journal_mode": "wal",
    "sqlite_mmap_size": 0,  # a file cut short under a mapping kills the process (SIGBUS)
    "sqlite_synchronous": 1,
    "disk_min_file_size": 2**15,
    "disk_pickle_protocol": 0,
}
_OWN_SETTINGS = frozenset({*SETTINGS, "size_limit", "count", "size", "hits", "misses"})
_COLUMNS = {
    "settings": {"key", "value"},
    "cache": {
        "rowid", "key", "raw", "store_time", "expire_time", "access_time", "access_count", "tag", "size", "mode",
        "filename", "value",
    },
}  # fmt: skip
_PLAIN_SCHEMA = re.compile(
    r"CREATE (?:TABLE|INDEX) \w+(?: ON Cache)? ?\([\w ,]+\)|CREATE UNIQUE INDEX Cache_key_raw ON Cache ?\(key, raw\)"
    r"|CREATE TRIGGER Settings_\w+ AFTER (?:INSERT|UPDATE|DELETE) ON Cache FOR EACH ROW BEGIN"
    r' UPDATE Settings SET value = value [+\-.\w ]+ WHERE key = "\w+"; END'
)
"""What diskcache creates. Anything else in a schema (views, functions in triggers) is somebody else's work."""


class Corrupt(Exception):
    """The database is not what we wrote."""


class BadRow(Exception):
    """One row is not what we wrote."""


class Unsealable(Exception):
    """The codec did not do its work; the message says no more than the kind of its error, which may hold anything."""


def is_busy(error: Exception) -> bool:
    """Whether another process holds the lock, so that trying again soon may help."""
    code = getattr(error, "sqlite_errorcode", 0)
    return code & 0xFF in {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}


def is_full(error: Exception) -> bool:
    """Whether there is no room on the disk."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_FULL


def is_broken(error: Exception) -> bool:
    """Whether the database is damaged, so that trying again cannot help.

    A short read is: a log shorter than its index says, because somebody deleted or cut it while others had it open.
    Those go on with what they have open, so whoever opens the database anew would fail for as long as they live.
    """
    if isinstance(error, sqlite3.OperationalError | sqlite3.ProgrammingError):
        return getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_IOERR_SHORT_READ
    return isinstance(error, Corrupt | sqlite3.DatabaseError)


def connect(directory: Path, timeout_s: float) -> sqlite3.Connection:
    """A connection to an existing database that runs nothing it finds there; busy is an error after `timeout_s`.

    Raises:
        sqlite3.OperationalError: there is no database, or it cannot be opened.
    """
    path = (directory / DATABASE).absolute().as_uri() + "?mode=rw"  # a plain path would make a file of any mode
    connection = sqlite3.connect(path, uri=True, timeout=timeout_s, isolation_level=None)
    connection.execute("PRAGMA trusted_schema = OFF")
    return connection


def inspect(connection: sqlite3.Connection) -> bool:
    """Look at a database before diskcache does, which believes every word of its Settings table and its schema.

    Returns whether its tables are there.

    Raises:
        Refused: a later version of llmmw made it.
        Corrupt: the database holds something that neither we nor diskcache put there.
        sqlite3.DatabaseError: it is no database.
    """
    ((version,),) = connection.execute("PRAGMA user_version").fetchall()
    if version > VERSION:
        raise Refused("the cache database was made by a later version of llmmw; it is left as it is")
    schema = connection.execute("SELECT type, name, sql FROM sqlite_master").fetchmany(_MAX_OBJECTS + 1)
    if len(schema) > _MAX_OBJECTS:
        raise Corrupt("too many tables and triggers")
    for kind, name, sql in schema:
        if sql is not None and not (isinstance(sql, str) and _PLAIN_SCHEMA.fullmatch(sql)):
            raise Corrupt(f"unknown {kind} {name!r} in the schema")
    names = {str(name).lower() for _, name, _ in schema}  # as SQLite sees them
    for table, columns in _COLUMNS.items():
        found = {row[1] for row in connection.execute(f"PRAGMA table_info({table})")}
        if table in names and found != columns:
            raise Corrupt(f"unknown columns in {table}")
    if "settings" in names:
        _inspect_settings(connection)
    return names >= set(_COLUMNS)


def _inspect_settings(connection: sqlite3.Connection) -> None:
    rows = connection.execute("SELECT key, value FROM Settings LIMIT 100").fetchall()
    for name, value in rows:
        if name not in _OWN_SETTINGS or not (
            type(value) is int or (type(value) is str and value.replace("-", "").isalpha())
        ):
            raise Corrupt("unknown settings")

"""Which logs this process has mapped: opening a database must not touch those of another one.

SQLite keeps an index of the write-ahead log in a mapped file (`-shm`), and whoever opens a database first empties it.
Who is first it finds out by file locks, which mean nothing within one process. So when somebody exchanges the database
under a log that another part of this process still uses, the next opening would cut the mapping short, and the next
access to it would kill the process (SIGBUS). A log of a former database is therefore removed first; who has it mapped
keeps it.
"""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING

from llmmw.stores.place import DATABASE, claimed, identity

if TYPE_CHECKING:
    from collections.abc import Generator
    from pathlib import Path

_lock = threading.Lock()
_mapped: dict[Mapping, tuple[int, int]] = {}
"""What each open database has mapped: its `-shm` file."""


class Mapping:
    """A database that is open."""

    def __init__(self, directory: Path, database: str = DATABASE) -> None:
        self.file = identity(directory, database)
        """Which file it is."""
        with _lock, contextlib.suppress(FileNotFoundError):
            _mapped[self] = identity(directory, f"{database}-shm")

    def close(self) -> None:
        """It is closed. Idempotent."""
        with _lock:
            _mapped.pop(self, None)


_opening = threading.Lock()


@contextlib.contextmanager
def opening(directory: Path, database: str = DATABASE) -> Generator[None]:
    """Around the opening of a database, which ends with making a `Mapping`.

    Raises:
        BlockingIOError: another process is putting the database aside.
        OSError: the directory or the database is gone.
    """
    with _opening, claimed(directory):
        _drop_log_of_another(directory, database)
        yield


def _drop_log_of_another(directory: Path, database: str) -> None:
    file = identity(directory, database)
    log = None
    with contextlib.suppress(FileNotFoundError):
        log = identity(directory, f"{database}-shm")
    with _lock:
        is_foreign = any(mapped == log and mapping.file != file for mapping, mapped in _mapped.items())
    if is_foreign:
        for companion in ("-wal", "-shm"):
            (directory / f"{database}{companion}").unlink(missing_ok=True)

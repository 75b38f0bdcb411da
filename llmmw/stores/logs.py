"""Which logs this process has mapped: opening a database must not touch those of another one.

SQLite keeps an index of the write-ahead log in a mapped file (`-shm`), and whoever opens a database first empties it.
Who is first it finds out by file locks, which mean nothing within one process. So when somebody exchanges the database
under a log that another part of this process still uses, the next opening would cut the mapping short, and the next
access to it would kill the process (SIGBUS). A log of a former database is therefore removed first; who has it mapped
keeps it.
"""

from __future__ import annotations

import contextlib
import os
import threading
from typing import TYPE_CHECKING

from llmmw.stores.iothread import taint
from llmmw.stores.place import DATABASE, claimed, identity

if TYPE_CHECKING:
    from collections.abc import Generator
    from pathlib import Path


class _Register:
    """Of this process."""

    def __init__(self) -> None:
        self.mapped: dict[Mapping, tuple[int, int]] = {}
        """What each open database has mapped: its `-shm` file."""
        self.lock = threading.Lock()
        self.opening = threading.Lock()

    def after_fork(self) -> None:
        """In the child. What is still open was open in another thread than those that stood still."""
        if self.mapped:
            taint()
        self.mapped = {}
        self.lock = threading.Lock()
        self.opening = threading.Lock()


_register = _Register()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_register.after_fork)


class Mapping:
    """A database that is open."""

    def __init__(self, directory: Path, database: str = DATABASE) -> None:
        self.file = identity(directory, database)
        """Which file it is."""
        with _register.lock, contextlib.suppress(FileNotFoundError):
            _register.mapped[self] = identity(directory, f"{database}-shm")

    def close(self) -> None:
        """It is closed. Idempotent."""
        with _register.lock:
            _register.mapped.pop(self, None)


@contextlib.contextmanager
def opening(directory: Path, database: str = DATABASE) -> Generator[None]:
    """Around the opening of a database, which ends with making a `Mapping`.

    Raises:
        BlockingIOError: another process is putting the database aside.
        OSError: the directory or the database is gone.
    """
    with _register.opening, claimed(directory):
        _drop_log_of_another(directory, database)
        yield


def _drop_log_of_another(directory: Path, database: str) -> None:
    file = identity(directory, database)
    log = None
    with contextlib.suppress(FileNotFoundError):
        log = identity(directory, f"{database}-shm")
    with _register.lock:
        is_foreign = any(mapped == log and mapping.file != file for mapping, mapped in _register.mapped.items())
    if is_foreign:
        for companion in ("-wal", "-shm"):
            (directory / f"{database}{companion}").unlink(missing_ok=True)

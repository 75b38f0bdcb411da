"""Whether a directory may hold the cache: ours, private, local, and nothing in it a link or a device.

Checked before anything is opened, because opening a FIFO blocks and following a link writes somewhere else.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from llmmw.stores.iothread import forked_badly

if sys.platform != "win32":
    import fcntl

if TYPE_CHECKING:
    from collections.abc import Generator

DATABASE = "cache.db"
_COMPANIONS = ("", "-wal", "-shm", "-journal")
_NETWORK = frozenset({
    "nfs", "nfs4", "cifs", "smb2", "smb3", "smbfs", "9p", "afs", "ceph", "coda", "glusterfs", "lustre", "gpfs",
    "beegfs", "ocfs2", "gfs2", "orangefs", "virtiofs", "vboxsf", "vmhgfs", "prl_fs",
})  # fmt: skip
_LOCAL_FUSE = frozenset({
    "fuse.bindfs", "fuse.encfs", "fuse.fuse-overlayfs", "fuse.gocryptfs", "fuse.mergerfs", "fuse.ntfs-3g", "fuse.zfs",
})  # fmt: skip
"""Any other file system in user space may be a bucket or a server somewhere, as most are."""
_ASIDE = ".corrupt-"
_KEPT_ASIDE = 3
"""Broken databases kept; a disk that breaks them again and again must not fill up with them."""
_CLAIM_TRIES, _CLAIM_PAUSE_S = 100, 0.002
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_PRIVATE_DIRECTORY, _PRIVATE_FILE = 0o700, 0o600


class Refused(Exception):
    """The place must not be used; the message says why and what to do."""


def prepare(directory: Path, *, network: bool = False, database: str = DATABASE) -> None:
    """Make the directory and an empty database file where they are missing, and check them where they are not.

    Raises:
        Refused: not ours, a link, a special file, writable by others, or on a network file system.
        OSError: it cannot be made (read-only, no space, no permission).
    """
    if forked_badly():
        raise Refused("this process was forked while its parent was using the database; fork while it rests")
    _make(directory)
    check(directory, network=network, database=database)
    # SQLite gives -wal and -shm the mode of the database file, so this one decides for all. An existing file is never
    # opened here: closing it would drop the locks of every other connection of this process (POSIX).
    with contextlib.suppress(FileExistsError):
        os.close(os.open(directory / database, os.O_CREAT | os.O_EXCL | os.O_RDWR, _PRIVATE_FILE))


def check(directory: Path, *, network: bool = False, database: str = DATABASE) -> None:
    """Look at a directory and the database in it; files of ours that others may read are made private.

    Raises:
        Refused: not ours, a link, a special file, writable by others, or on a network file system.
        FileNotFoundError: there is no such directory.
    """
    _check_directory(directory)
    if not network and (kind := network_file_system(directory)):
        raise Refused(f"{directory} is on a network file system ({kind}), where locks fail; network_directory=True")
    for companion in _COMPANIONS:
        _check_file(directory / f"{database}{companion}")


def private_directory(directory: Path) -> None:
    """Make a directory of ours where it is missing, and check it where it is not.

    Raises:
        Refused: not ours, a link, or writable by others.
        OSError: it cannot be made.
    """
    _make(directory)
    _check_directory(directory)


def _make(directory: Path) -> None:
    for ancestor in (*reversed(directory.parents), directory):
        if not os.path.lexists(ancestor):
            # Not makedirs: it gives intermediate directories whatever mode the umask allows.
            ancestor.mkdir(mode=_PRIVATE_DIRECTORY, exist_ok=True)


def _is_ours(found: os.stat_result) -> bool:
    return not hasattr(os, "getuid") or found.st_uid == os.getuid()


def _check_directory(directory: Path) -> None:
    found = directory.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise Refused(f"{directory} is a link or no directory")
    if not _is_ours(found):
        raise Refused(f"{directory} belongs to another user")
    if found.st_mode & _OTHERS_WRITE:
        raise Refused(f"{directory} is writable by others; chmod 700 it")
    for ancestor in directory.resolve().parents:
        mode = ancestor.stat().st_mode
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            raise Refused(f"{ancestor} is writable by everybody, who could exchange {directory}")


def _check_file(path: Path) -> None:
    try:
        found = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISREG(found.st_mode):
        raise Refused(f"{path} is a link, a directory or a special file")
    if found.st_nlink != 1 or not _is_ours(found):
        raise Refused(f"{path} belongs to another user or has a second name")
    if found.st_mode & 0o077:
        path.chmod(_PRIVATE_FILE)


def network_file_system(directory: Path, mounts: Path = Path("/proc/self/mountinfo")) -> str:
    """The type of the network file system that a directory is on; "" for a local one or where it cannot be told."""
    try:
        lines = mounts.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    path, best, kind = directory.resolve(), Path(), ""
    for line in lines:
        before, _, after = line.partition(" - ")
        fields = before.split()
        point = Path(re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), fields[4]))
        if path.is_relative_to(point) and len(point.parts) >= len(best.parts):
            best, kind = point, after.split()[0]
    is_network = kind in _NETWORK or (kind.startswith("fuse.") and kind not in _LOCAL_FUSE)
    return kind if is_network else ""


def identity(directory: Path, database: str = DATABASE) -> tuple[int, int]:
    """Device and number of the database file: another one in its place is another database.

    Raises:
        OSError: there is none.
    """
    found = (directory / database).lstat()
    return found.st_dev, found.st_ino


@contextlib.contextmanager
def claimed(directory: Path, *, alone: bool = False) -> Generator[None]:
    """Hold a directory together with others who open a database in it, or alone while one is put aside.

    Else a process could meet the new database beside the log of the old one. Advisory, among llmmw's processes.

    Raises:
        BlockingIOError: others hold it otherwise.
        OSError: the directory is gone.
    """
    if sys.platform == "win32":  # where nobody renames a file that is open
        yield
        return
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        for left in reversed(range(_CLAIM_TRIES)):
            try:
                fcntl.flock(handle, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not left:
                    raise
                threading.Event().wait(_CLAIM_PAUSE_S)
        yield
    finally:
        os.close(handle)


def quarantined(directory: Path, database: str = DATABASE) -> dict[Path, int]:
    """The plain files that `quarantine` left in a directory, with the numbers in their names, oldest first."""
    pattern = re.compile(rf"{re.escape(database)}(?:{'|'.join(_COMPANIONS)}){re.escape(_ASIDE)}(\d+)")
    found = {path: int(match[1]) for path in directory.glob(f"{database}*") if (match := pattern.fullmatch(path.name))}
    plain = [path for path in sorted(found, key=found.__getitem__) if stat.S_ISREG(path.lstat().st_mode)]
    return {path: found[path] for path in plain}


def quarantine(directory: Path, wall: float, *, database: str = DATABASE, only: tuple[int, int] | None = None) -> bool:
    """Put a broken database aside, for whoever wants to know why; the next opening makes a new one.

    Args:
        directory: where it is.
        wall: seconds since 1970, for the name.
        database: its name.
        only: the `identity` that was found broken. If the file is another by now, another process was quicker.

    Returns whether it was done.

    Raises:
        OSError: it cannot be renamed.
    """
    with claimed(directory, alone=True):
        if only is not None and identity(directory, database) != only:
            return False
        aside = quarantined(directory, database)
        numbers = sorted(set(aside.values()))
        number = max(int(wall), numbers[-1] + 1 if numbers else 0)
        for companion in _COMPANIONS:
            path = directory / f"{database}{companion}"
            if os.path.lexists(path):
                path.rename(directory / f"{path.name}{_ASIDE}{number}")
        too_many = numbers[: max(0, len(numbers) + 1 - _KEPT_ASIDE)]
        for path in (path for path, former in aside.items() if former in too_many):
            path.unlink()
    return True

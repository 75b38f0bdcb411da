"""Whether a directory may hold the cache: ours, private, local, and nothing in it a link or a device.

Checked before anything is opened, because opening a FIFO blocks and following a link writes somewhere else.
"""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

from llmmw.stores.iothread import forked_badly

DATABASE = "cache.db"
_COMPANIONS = ("", "-wal", "-shm", "-journal")
_NETWORK = frozenset({
    "nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "ceph", "glusterfs", "lustre", "fuse.sshfs", "fuse.glusterfs",
    "fuse.ceph", "fuse.s3fs", "gpfs", "beegfs",
})  # fmt: skip
_ASIDE = ".corrupt-"
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
        point = Path(fields[4].replace("\\040", " "))
        if path.is_relative_to(point) and len(point.parts) >= len(best.parts):
            best, kind = point, after.split()[0]
    return kind if kind in _NETWORK else ""


def quarantined(directory: Path) -> list[Path]:
    """The plain files that `quarantine` left in a directory."""
    return [path for path in sorted(directory.glob(f"{DATABASE}*{_ASIDE}*")) if stat.S_ISREG(path.lstat().st_mode)]


def quarantine(directory: Path, wall: float, *, database: str = DATABASE) -> None:
    """Put a broken database aside, for whoever wants to know why; the next opening makes a new one."""
    suffix = f"{_ASIDE}{int(wall)}"
    for companion in _COMPANIONS:
        path = directory / f"{database}{companion}"
        if os.path.lexists(path):
            path.rename(directory / f"{path.name}{suffix}")

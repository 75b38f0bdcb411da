"""Where a cache may live."""

from __future__ import annotations

import os

import pytest

from llmmw.stores.place import (
    Refused,
    claimed,
    identity,
    network_file_system,
    prepare,
    quarantine,
    quarantined,
)


@pytest.fixture
def spot(tmp_path):
    tmp_path.chmod(0o700)
    return tmp_path / "a" / "cache"


@pytest.fixture
def open_umask():
    before = os.umask(0)
    yield
    os.umask(before)


def mode(path):
    return path.stat().st_mode & 0o777


def test_disk_09_directories_and_files_are_private_under_any_umask(spot, open_umask):
    prepare(spot)
    assert [mode(path) for path in (spot.parent, spot, spot / "cache.db")] == [0o700, 0o700, 0o600]
    (spot / "cache.db").chmod(0o644)
    prepare(spot)
    assert mode(spot / "cache.db") == 0o600


def make(kind, path):
    if kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "link":
        path.symlink_to("/etc/passwd")
    else:
        (path.parent / "other").write_bytes(b"")
        path.hardlink_to(path.parent / "other")


@pytest.mark.parametrize("kind", ["directory", "fifo", "link", "second name"])
@pytest.mark.parametrize("name", ["cache.db", "cache.db-wal", "cache.db-shm"])
def test_disk_03_special_files_are_refused_and_never_opened(spot, kind, name):
    spot.mkdir(parents=True, mode=0o700)
    make(kind, spot / name)
    with pytest.raises(Refused, match=name):
        prepare(spot)


def test_a_directory_that_is_a_link_or_a_file_is_refused(spot):
    spot.parent.mkdir()
    spot.symlink_to("/tmp")
    with pytest.raises(Refused, match="link"):
        prepare(spot)
    spot.unlink()
    spot.write_text("")
    with pytest.raises(Refused, match="no directory"):
        prepare(spot)


def test_a_directory_that_others_may_write_is_refused(spot):
    spot.mkdir(parents=True)
    spot.chmod(0o770)
    with pytest.raises(Refused, match="chmod 700"):
        prepare(spot)


def test_a_parent_that_everybody_may_write_is_refused_unless_sticky(spot):
    spot.parent.mkdir()
    spot.parent.chmod(0o777)
    with pytest.raises(Refused, match="everybody"):
        prepare(spot)
    spot.parent.chmod(0o1777)
    prepare(spot)


def test_security_07_another_users_directory_and_files_are_refused(spot, monkeypatch):
    prepare(spot)
    uid = os.getuid()
    monkeypatch.setattr("os.getuid", lambda: uid + 1)
    with pytest.raises(Refused, match="another user"):
        prepare(spot)
    monkeypatch.undo()
    if uid == 0:
        os.chown(spot / "cache.db", 12345, -1)
        with pytest.raises(Refused, match=r"cache\.db belongs"):
            prepare(spot)


def test_network_file_systems_are_refused_unless_allowed(spot, tmp_path, monkeypatch):
    mounts = tmp_path / "mountinfo"
    mounts.write_text(
        "22 1 0:20 / / rw - ext4 /dev/sda rw\n"
        f"23 22 0:21 / {tmp_path} rw shared:1 - nfs4 server:/x rw\n"
        f"24 23 0:22 / {tmp_path}/local rw - ext4 /dev/sdb rw\n"
    )
    assert network_file_system(spot, mounts) == "nfs4"
    assert network_file_system(tmp_path / "local" / "x", mounts) == ""
    assert network_file_system(spot, tmp_path / "missing") == ""
    monkeypatch.setattr("llmmw.stores.place.network_file_system", lambda _: "nfs4")
    with pytest.raises(Refused, match="network_directory=True"):
        prepare(spot)
    prepare(spot, network=True)


def test_quarantine_puts_the_database_and_its_log_aside(spot):
    prepare(spot)
    (spot / "cache.db-wal").write_bytes(b"x")
    quarantine(spot, 17.9)
    assert {path.name for path in spot.iterdir()} == {"cache.db.corrupt-17", "cache.db-wal.corrupt-17"}


def test_the_last_broken_databases_are_kept_and_no_more(spot):
    for number in range(6):
        prepare(spot)
        (spot / "cache.db").write_bytes(b"%d" % number)
        assert quarantine(spot, 100.0)  # the clock stands, and the names still differ
    assert [(path.name, number) for path, number in quarantined(spot).items()] == [
        ("cache.db.corrupt-103", 103), ("cache.db.corrupt-104", 104), ("cache.db.corrupt-105", 105),
    ]  # fmt: skip
    assert (spot / "cache.db.corrupt-105").read_bytes() == b"5"


def test_what_another_process_put_aside_already_is_not_put_aside_again(spot):
    prepare(spot)
    broken = identity(spot)
    (spot / "new").write_bytes(b"")
    (spot / "new").rename(spot / "cache.db")
    assert not quarantine(spot, 17.0, only=broken)
    assert quarantine(spot, 17.0, only=identity(spot))


def test_a_database_is_not_put_aside_while_another_is_opened(spot, monkeypatch):
    monkeypatch.setattr("llmmw.stores.place._CLAIM_TRIES", 2)
    prepare(spot)
    with claimed(spot), claimed(spot), pytest.raises(BlockingIOError):
        quarantine(spot, 17.0)
    with claimed(spot, alone=True), pytest.raises(BlockingIOError), claimed(spot):
        pass
    assert quarantine(spot, 17.0)


def test_a_directory_that_became_a_link_is_not_claimed(spot):
    prepare(spot)
    spot.rename(spot.parent / "moved")
    spot.symlink_to(spot.parent / "moved")
    with pytest.raises(OSError), claimed(spot):
        pass


@pytest.mark.parametrize(
    ("kind", "is_network"),
    [("ext4", False), ("tmpfs", False), ("fuseblk", False), ("fuse.gocryptfs", False), ("fuse.rclone", True),
     ("fuse.sshfs", True), ("virtiofs", True), ("cifs", True)],
)  # fmt: skip
def test_file_systems_in_user_space_count_as_network_unless_known(tmp_path, kind, is_network):
    mounts = tmp_path / "mountinfo"
    mounts.write_text(f"22 1 0:20 / / rw - {kind} x rw\n")
    assert network_file_system(tmp_path, mounts) == (kind if is_network else "")


def test_mount_points_with_odd_characters_are_understood(tmp_path):
    odd = tmp_path / "a b\tc\\d"
    odd.mkdir()
    mounts = tmp_path / "mountinfo"
    escaped = str(odd).replace("\\", "\\134").replace(" ", "\\040").replace("\t", "\\011")
    mounts.write_text(f"22 1 0:20 / / rw - ext4 x rw\n23 22 0:21 / {escaped} rw - nfs server:/x rw\n")
    assert network_file_system(odd / "cache", mounts) == "nfs"

"""Looking after a cache directory from outside."""

from __future__ import annotations

import os
import sqlite3
import threading
import time

import pytest

from llmmw.stores import upkeep
from llmmw.stores.entry import Entry, Header
from llmmw.stores.place import claimed, prepare, quarantine
from llmmw.stores.rows import Rows
from llmmw.stores.upkeep import DiskUsage, Unusable, clear, prune, usage


@pytest.fixture
def place(tmp_path):
    tmp_path.chmod(0o700)
    return tmp_path / "cache"


def fill(place, fresh=3, expired=0):
    prepare(place)
    rows = Rows(place, 2**26)
    for index in range(fresh + expired):
        rows.set(index.to_bytes(2), Entry(Header(time.time(), 9.0), b"x"), 60)
    rows._table._sql("UPDATE Cache SET expire_time = 1 WHERE rowid <= ?", (expired,))
    return rows


def test_a_directory_that_is_not_there_is_empty_and_stays_away(place):
    assert usage(place) == DiskUsage()
    assert prune(place) == clear(place) == 0
    assert not place.exists()
    place.mkdir(mode=0o700)
    assert usage(str(place)) == DiskUsage()
    assert clear(place) == 0
    assert list(place.iterdir()) == []


def test_a_database_without_tables_is_empty(place):
    prepare(place)
    assert usage(place).entries == prune(place) == clear(place) == 0


def test_usage_counts_rows_bytes_and_what_was_put_aside(place):
    fill(place, 3, 2).close()
    (place / "cache.db.corrupt-17").write_bytes(b"12345")
    found = usage(place)
    assert (found.entries, found.expired, found.limit_bytes) == (3 + 2, 2, 2**26)
    assert found.bytes == (place / "cache.db").stat().st_size
    assert (found.quarantined, found.quarantined_bytes) == (1, 5)


def test_pruning_takes_what_expired_and_clearing_everything_while_a_program_uses_it(place):
    rows = fill(place, 300, 450)
    assert usage(place).wal_bytes > 0
    assert prune(place) == 450
    assert (usage(place).entries, usage(place).wal_bytes) == (300, 0)
    assert rows.find(b"\x02\x00")[0] is not None
    (place / "cache.db.corrupt-17").write_bytes(b"")
    assert clear(place) == 300
    assert rows.find(b"\x02\x00")[0] is None
    assert usage(place).quarantined == 0
    rows.set(b"k", Entry(Header(time.time(), 9.0), b"x"), 60)
    assert usage(place).entries == 1
    rows.close()


def test_the_home_directory_may_be_meant(place, monkeypatch):
    fill(place).close()
    monkeypatch.setenv("HOME", str(place.parent))
    assert usage("~/cache").entries == 3


@pytest.mark.parametrize("work", [usage, prune, clear])
def test_what_is_not_plainly_ours_is_left_alone(place, work):
    outside = place.parent / "outside"
    fill(outside).close()
    before = (outside / "cache.db").read_bytes()
    place.symlink_to(outside)
    with pytest.raises(Unusable, match="link"):
        work(place)
    place.unlink()
    place.mkdir(mode=0o700)
    (place / "cache.db").symlink_to(outside / "cache.db")
    with pytest.raises(Unusable, match="link"):
        work(place)
    assert (outside / "cache.db").read_bytes() == before


@pytest.mark.parametrize("work", [usage, prune, clear])
def test_a_network_file_system_is_refused_unless_allowed(place, work, monkeypatch):
    fill(place).close()
    monkeypatch.setattr("llmmw.stores.place.network_file_system", lambda _: "nfs4")
    with pytest.raises(Unusable, match="nfs4"):
        work(place)
    work(place, network=True)


def test_clearing_leaves_what_only_looks_put_aside(place):
    fill(place).close()
    outside = place.parent / "outside"
    outside.write_bytes(b"precious")
    (place / "cache.db.corrupt-1").symlink_to(outside)
    (place / "cache.db.corrupt-2").mkdir()
    (place / "notes").write_bytes(b"mine")
    clear(place)
    assert outside.read_bytes() == b"precious"
    assert {path.name for path in place.iterdir()} == {"cache.db", "cache.db.corrupt-1", "cache.db.corrupt-2", "notes"}


def spoil_bytes(place):
    (place / "cache.db").write_bytes(os.urandom(9_000))


def spoil_schema(place):
    with sqlite3.connect(place / "cache.db") as connection:
        connection.execute("CREATE VIEW v AS SELECT 1")
    connection.close()


@pytest.mark.parametrize("spoil", [spoil_bytes, spoil_schema])
def test_a_broken_database_is_named_and_clearing_removes_it(place, spoil):
    fill(place).close()
    spoil(place)
    for work in (usage, prune):
        with pytest.raises(Unusable, match="`clear` removes it"):
            work(place)
    assert clear(place) == 0
    assert list(place.iterdir()) == []
    assert usage(place) == DiskUsage()


def test_a_log_gone_under_a_program_that_has_it_open_is_a_broken_database(place):
    rows = fill(place)
    (place / "cache.db-wal").unlink()
    with pytest.raises(Unusable, match="`clear` removes it"):
        usage(place)
    assert clear(place) == 0
    assert list(place.iterdir()) == []
    rows.close()


def test_a_lock_held_for_too_long_is_named(place, monkeypatch):
    monkeypatch.setattr(upkeep, "_PATIENCE_S", 0.01)
    fill(place).close()
    holder = sqlite3.connect(place / "cache.db", isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    assert usage(place).entries == 3
    for work in (prune, clear):
        with pytest.raises(Unusable, match="another program"):
            work(place)
    holder.close()
    assert clear(place) == 3


def test_a_directory_that_cannot_be_read_is_named(place, monkeypatch):
    def denied(*_args, **_options):
        raise PermissionError("denied")

    fill(place).close()
    monkeypatch.setattr(upkeep, "check", denied)
    with pytest.raises(Unusable, match="denied"):
        usage(place)


def test_two_who_clear_at_once_remove_every_row_once(place):
    fill(place, 1_000).close()
    gone = []
    threads = [threading.Thread(target=lambda: gone.append(clear(place))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(gone) == 1_000
    assert usage(place).entries == 0


def test_what_was_put_aside_is_found(place):
    fill(place).close()
    quarantine(place, 17.0)
    assert usage(place).quarantined == 1


def test_a_database_of_a_later_version_is_left_alone(place):
    rows = fill(place)
    rows._table._connection.execute("PRAGMA user_version = 1")
    rows.close()
    before = (place / "cache.db").read_bytes()
    for work in (usage, prune, clear):
        with pytest.raises(Unusable, match="later version"):
            work(place)
    assert (place / "cache.db").read_bytes() == before


def test_a_directory_that_is_being_repaired_is_named(place, monkeypatch):
    monkeypatch.setattr("llmmw.stores.place._CLAIM_TRIES", 1)
    fill(place).close()
    with claimed(place, alone=True), pytest.raises(Unusable, match="another program"):
        usage(place)

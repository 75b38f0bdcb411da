"""Our `Disk` knows raw bytes and nothing else."""

from __future__ import annotations

import pickle

import pytest

from llmmw.stores.entry import Entry, Header
from llmmw.stores.place import prepare
from llmmw.stores.rows import BadRow, Rows, _split
from llmmw.stores.table import BytesDisk


@pytest.fixture
def disk(tmp_path):
    return BytesDisk(str(tmp_path))


def test_disk_04_keys_and_values_are_bytes_or_refused(disk):
    assert disk.put(b"k") == (b"k", True)
    assert disk.store(b"v", False) == (0, 1, None, b"v")
    for value in ("text", 1, (1,), None):
        with pytest.raises(TypeError):
            disk.put(value)
        with pytest.raises(TypeError):
            disk.store(value, False)


@pytest.mark.parametrize(("key", "raw"), [(pickle.dumps("k"), 0), ("text", 1), (3, 1), (None, 1)])
def test_disk_04_other_keys_read_as_nothing(disk, key, raw):
    assert disk.get(key, raw) == b""


def test_disk_04_other_rows_read_as_nothing(disk, tmp_path):
    (tmp_path / "f").write_bytes(pickle.dumps(1))
    for mode, filename, value in ((0, None, b"x"), (2, "f", None), (3, "f", None), (4, "f", None), (4, None, b"x"),
                                  (1, "f", b"x"), (1, None, "x"), ("1", None, b"x")):  # fmt: skip
        assert disk.fetch(mode, filename, value, False) == b""
    assert disk.fetch(1, None, b"x", False) == b"x"


def test_disk_05_files_are_neither_named_nor_removed(disk, tmp_path):
    (tmp_path / "f").write_bytes(b"x")
    disk.remove("f")
    assert (tmp_path / "f").exists()
    with pytest.raises(TypeError):
        disk.filename()


def test_a_row_without_payload_is_bad():
    with pytest.raises(BadRow):
        _split(b"")


def test_a_broken_row_does_not_stop_a_scan(tmp_path):
    tmp_path.chmod(0o700)
    place = tmp_path / "c"
    prepare(place)
    rows = Rows(place, 2**26)
    rows._table.set(b"bad", b"rubbish")
    rows.set(b"good", Entry(Header(0.0, 9.0, tags=("t",)), b"x"), 60)
    from llmmw.stores.base import Match

    rows.discard(Match("tag", "t"))
    assert [key for _, key, _ in rows._table.rows()] == [b"bad"]
    rows.close()


def test_a_database_in_use_by_two_is_one_database(tmp_path):
    tmp_path.chmod(0o700)
    place = tmp_path / "c"
    prepare(place)
    one, two = Rows(place, 2**26), Rows(place, 2**26)
    one.set(b"k", Entry(Header(0.0, 9.0), b"x"), 60)
    assert two.get(b"k").data == b"x"
    two.delete(b"k")
    assert one.get(b"k") is None
    one.close()
    two.close()

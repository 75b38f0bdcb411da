"""Our `Disk` knows raw bytes and nothing else."""

from __future__ import annotations

import os
import pickle
import time

import pytest

from llmmw.stores import table
from llmmw.stores.base import Match
from llmmw.stores.entry import Entry, Header
from llmmw.stores.place import Refused, prepare
from llmmw.stores.rows import Rows, _split
from llmmw.stores.schema import BadRow, Unsealable
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
    rows.discard(Match("tag", "t"))
    assert [key for _, key, _ in rows._table.rows()] == [b"bad"]
    rows.close()


def test_a_database_in_use_by_two_is_one_database(tmp_path):
    tmp_path.chmod(0o700)
    place = tmp_path / "c"
    prepare(place)
    one, two = Rows(place, 2**26), Rows(place, 2**26)
    one.set(b"k", Entry(Header(0.0, 9.0), b"x"), 60)
    assert two.find(b"k")[0].data == b"x"
    two.delete(b"k")
    assert one.find(b"k")[0] is None
    one.close()
    two.close()


# ── the byte limit ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def place(tmp_path):
    tmp_path.chmod(0o700)
    prepare(tmp_path / "c")
    return tmp_path / "c"


def entry(data=b"x", **fields):
    return Entry(Header(time.time(), 60.0, **fields), data)


def size(place):
    return (place / "cache.db").stat().st_size + (place / "cache.db-wal").stat().st_size


def test_a_write_removes_no_more_of_the_oldest_than_it_needs(place):
    rows = Rows(place, 2**20)
    for number in range(40):
        assert rows.set(bytes([number]), entry(os.urandom(100_000)), 60) is None
    left = [key[0] for _, key, _ in rows._table.rows()]
    assert left == list(range(40 - len(left), 40))
    assert len(left) >= 9
    rows.close()
    assert (place / "cache.db").stat().st_size < 1.15 * 2**20


def test_large_answers_after_many_small_ones_do_not_let_the_database_grow(place):
    rows = Rows(place, 2**20)
    for number in range(3_000):
        rows.set(number.to_bytes(4), entry(), 60)
    told = [rows.set(b"large%d" % number, entry(os.urandom(100_000)), 60) for number in range(60)]
    assert set(told) == {None, "too full"}
    assert told[-5:] == [None] * 5
    rows.close()
    assert (place / "cache.db").stat().st_size < 1.4 * 2**20


def test_a_limit_that_shrank_is_reached_step_by_step(place):
    rows = Rows(place, 2**26)
    for number in range(300):
        rows.set(number.to_bytes(4), entry(os.urandom(20_000)), 60)
    rows.close()
    rows = Rows(place, 2**20)
    told = [rows.set(b"k%d" % number, entry(os.urandom(1_000)), 60) for number in range(10)]
    assert told[-1] is None
    rows.close()
    assert (place / "cache.db").stat().st_size < 1.3 * 2**20


# ── rows that others made ────────────────────────────────────────────────────────────────────────────────────────


def test_disk_04_rows_with_strange_keys_stop_no_scan_and_are_not_touched(place):
    rows = Rows(place, 2**26)
    rows.set(b"b", entry(tags=("t",)), 60)
    rows.set(b"a", entry(), 60)
    sql = rows._table._connection.execute
    ((value,),) = sql("SELECT value FROM Cache WHERE key = ?", (b"b",)).fetchall()
    for number, (key, raw) in enumerate([(None, 1), ("text", 1), (3, 1), (pickle.dumps("b"), 0), (b"c", "x")]):
        sql("INSERT INTO Cache (rowid, key, raw, mode, value) VALUES (?, ?, ?, 1, ?)", (-number - 1, key, raw, value))
    rows.discard(Match("tag", "t"))
    assert rows.find(b"b")[0] is None
    assert rows.find(b"a")[0] is not None
    assert sql("SELECT count(*) FROM Cache").fetchone() == (6,)
    rows.close()


def test_a_value_longer_than_any_of_ours_is_not_even_read(place, monkeypatch):
    monkeypatch.setattr("llmmw.stores.table._SELECT", table._SELECT.replace(str(table.MAX_VALUE_BYTES), "1000"))
    rows = Rows(place, 2**26)
    rows.set(b"k", entry(bytes(2_000)), 60)
    with pytest.raises(BadRow, match="type"):
        rows.find(b"k")
    rows.close()


def test_disk_06_a_broken_row_is_deleted_though_its_time_is_over(place):
    rows = Rows(place, 2**26)
    rows.set(b"k", entry(), 60)
    rows._table._connection.execute("UPDATE Cache SET expire_time = 1, value = x'00'")
    with pytest.raises(BadRow):
        rows.find(b"k")
    rows.delete(b"k")
    assert rows.find(b"k")[0] is None
    rows.close()


def test_a_thousand_rows_are_discarded_in_a_few_transactions(place):
    rows = Rows(place, 2**26)
    for number in range(1_000):
        rows.set(number.to_bytes(4), entry(tags=("t",) if number % 2 else ()), 60)
    rows.discard(Match("tag", "t"))
    assert sum(1 for _ in rows._table.rows()) == 500
    rows.close()


def test_a_directory_whose_name_diskcache_would_change_is_refused(tmp_path, monkeypatch):
    tmp_path.chmod(0o700)
    monkeypatch.setenv("ELSEWHERE", "else")
    odd = tmp_path / "$ELSEWHERE"
    prepare(odd)
    with pytest.raises(Refused, match="environment variable"):
        Rows(odd, 2**26)
    assert not (tmp_path / "else").exists()
    prepare(tmp_path / "a?b%20#c d")
    rows = Rows(tmp_path / "a?b%20#c d", 2**26)
    rows.set(b"k", entry(), 60)
    rows.close()
    assert [path.name for path in (tmp_path / "a?b%20#c d").iterdir()] == ["cache.db"]


# ── codecs ───────────────────────────────────────────────────────────────────────────────────────────────────────


class Codec:
    """One that does what a test says."""

    def __init__(self, seal=bytes, open=bytes, name="c"):  # noqa: A002
        self.seal, self.open, self.name = seal, open, name


def fails(_):
    raise ValueError("sk-secret")


@pytest.mark.parametrize(
    "codec",
    [Codec(seal=fails), Codec(seal=lambda _: None), Codec(seal=lambda _: "text"), Codec(name="n" * 256),
     Codec(name=None), Codec(seal=lambda _: bytes(table.MAX_VALUE_BYTES))],
)  # fmt: skip
def test_a_codec_that_cannot_seal_costs_one_write_and_tells_nothing(place, codec):
    rows = Rows(place, 2**26, codec)
    with pytest.raises(Unsealable) as caught:
        rows.set(b"k", entry(), 60)
    assert "sk-secret" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert rows.find(b"k")[0] is None
    rows.close()


@pytest.mark.parametrize("opened", [fails, lambda _: None, lambda _: "text", lambda _: b"", lambda _: 7])
def test_a_codec_that_cannot_open_makes_a_bad_row(place, opened):
    rows = Rows(place, 2**26, Codec(open=opened))
    rows.set(b"k", entry(), 60)
    with pytest.raises(BadRow) as caught:
        rows.find(b"k")
    assert "sk-secret" not in str(caught.value)
    rows.close()

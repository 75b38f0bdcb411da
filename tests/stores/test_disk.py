"""The disk tier: bytes on disk are untrusted, and the worst they cause is a miss."""

from __future__ import annotations

import asyncio
import gc
import os
import pickle
import sqlite3
import subprocess
import sys
import threading
import time
import weakref
from functools import partial
from pathlib import Path

import patience
import pytest

from llmmw import events as ev
from llmmw.env import Env
from llmmw.stores import backlog as backlog_module
from llmmw.stores import disk as disk_module
from llmmw.stores import iothread as iothread_module
from llmmw.stores import keeper as keeper_module
from llmmw.stores.base import Match
from llmmw.stores.disk import DiskStore
from llmmw.stores.entry import Entry, Header
from llmmw.stores.place import prepare
from llmmw.stores.rows import Rows

KEY = b"k" * 32


class Rig:
    """A disk store with everything it told."""

    def __init__(self, directory, **options):
        self.told = []
        self.env = Env(sinks=(self.told.append,))
        self.store = DiskStore(directory, self.env, **{"max_bytes": 2**26} | options)

    def troubles(self):
        return [event.kind for event in self.told if isinstance(event, ev.CacheTrouble)]

    def warnings(self):
        return [event.kind for event in self.told if isinstance(event, ev.Warned)]


@pytest.fixture
def place(tmp_path):
    tmp_path.chmod(0o700)
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def one_try(monkeypatch):
    """The pause after a failure lasts until a test ends it, however slow the machine is."""
    monkeypatch.setattr(keeper_module, "_FIRST_RETRY_S", 3600.0)


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert not [thread for thread in threading.enumerate() if thread.name == "llmmw-disk"]


def entry(data=b"answer", **fields):
    return Entry(Header(created=time.time(), ttl_s=60.0, **fields), data)


async def stored(place, *pairs, **options):
    """A closed database that holds these entries."""
    rig = Rig(place, **options)
    for key, found in pairs or ((KEY, entry()),):
        rig.store.put(key, found, 60.0)
    await rig.store.aclose()


async def found_in(place, key=KEY, **options):
    rig = Rig(place, **options)
    found = await rig.store.get(key)
    await rig.store.aclose()
    return found, rig


def change(place, sql, *values):
    connection = sqlite3.connect(place / "cache.db")
    if values:
        connection.execute(sql, values)
    else:
        connection.executescript(sql)
    connection.commit()
    connection.close()


async def test_an_entry_outlives_the_process_that_wrote_it(place):
    written = entry(tags=("t",), base=b"b")
    await stored(place, (KEY, written))
    found, rig = await found_in(place)
    assert found == written
    assert rig.told == []
    assert (await found_in(place, b"other"))[0] is None


async def test_what_waits_to_be_written_is_read_and_closing_is_idempotent(place):
    rig = Rig(place)
    waiting = entry()
    rig.store.put(KEY, waiting, 60)
    assert await rig.store.get(KEY) is waiting
    rig.store.delete(KEY)
    assert await rig.store.get(KEY) is None
    await rig.store.aclose()
    await rig.store.aclose()
    assert (await found_in(place))[0] is None
    rig.store.put(KEY, waiting, 60)
    rig.store.delete(KEY)
    rig.store.discard(Match("tag", "t"))
    assert await rig.store.get(KEY) is None
    assert rig.store.gauges() == {"disk": "ok", "waiting writes": 0}


async def test_the_latest_of_several_writes_wins(place):
    rig = Rig(place)
    for number in range(5):
        rig.store.put(KEY, entry(str(number).encode()), 60)
    rig.store.delete(b"never there")
    rig.store.put(b"a", entry(), 60)
    rig.store.delete(b"a")
    rig.store.put(b"a", entry(b"again"), 60)
    await rig.store.aclose()
    assert (await found_in(place))[0].data == b"4"
    assert (await found_in(place, b"a"))[0].data == b"again"


async def test_entries_are_discarded_by_request_namespace_and_tag(place):
    pairs = ((b"1", entry(tags=("t",))), (b"2", entry(base=b"q")), (b"3", entry(namespace="n")), (b"4", entry()))
    await stored(place, *pairs)
    rig = Rig(place)
    rig.store.put(b"5", entry(tags=("t",)), 60)
    rig.store.put(b"6", entry(), 60)
    for match in (Match("tag", "t"), Match("base", b"q"), Match("namespace", "n")):
        rig.store.discard(match)
    assert await rig.store.get(b"4") is None
    await rig.store.aclose()
    left = [key for key in (b"1", b"2", b"3", b"4", b"5", b"6") if (await found_in(place, key))[0] is not None]
    assert left == [b"4", b"6"]


async def test_the_database_stays_below_its_size(place):
    rig = Rig(place, max_bytes=2**20)
    for index in range(60):
        rig.store.put(bytes([index]), entry(os.urandom(50_000)), 60)
    await rig.store.aclose()
    assert (place / "cache.db").stat().st_size < 2**20 + 200_000
    assert (await found_in(place, bytes([59])))[0] is not None


async def test_too_much_waiting_is_dropped_and_counted(place, monkeypatch):
    rig = Rig(place)
    monkeypatch.setattr(backlog_module, "MAX_WRITES", 2)
    free = threading.Event()
    rig.store._io().read(free.wait)
    for index in range(4):
        rig.store.put(bytes([index]), entry(), 60)
    assert rig.troubles() == ["write dropped"] * 2
    free.set()
    await rig.store.aclose()
    assert rig.store.max_item_bytes == 2**26 // 10


# ── time ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class Lock:
    """Another process that holds the write lock."""

    SOURCE = (
        "import sqlite3, sys; c = sqlite3.connect(sys.argv[1], isolation_level=None);"
        "c.execute('BEGIN IMMEDIATE'); print('held', flush=True); sys.stdin.read()"
    )

    def __init__(self, place):
        self._process = subprocess.Popen(
            [sys.executable, "-c", self.SOURCE, str(place / "cache.db")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._process.stdout.readline() == b"held\n"

    def release(self):
        self._process.communicate()


async def test_disk_02_a_lock_held_elsewhere_delays_neither_reads_nor_the_loop(place):
    await stored(place)
    rig = Rig(place)
    assert await rig.store.get(KEY) is not None
    lock = await asyncio.to_thread(Lock, place)
    rig.store.put(b"new", entry(), 60)
    while "busy" not in rig.troubles():
        await asyncio.sleep(0.01)
    assert await rig.store.get(KEY) is not None
    rig.store.put(b"newer", entry(), 60)
    await asyncio.to_thread(lock.release)
    while rig.store.gauges()["waiting writes"]:
        await asyncio.sleep(0.01)
    await rig.store.aclose()
    assert (await found_in(place, b"new"))[0] is not None
    assert (await found_in(place, b"newer"))[0] is not None


async def test_disk_02_opening_a_database_that_is_locked_needs_no_lock(place):
    await stored(place)
    lock = await asyncio.to_thread(Lock, place)
    assert (await found_in(place))[0] is not None
    await asyncio.to_thread(lock.release)


async def test_disk_02_a_database_locked_while_it_must_be_completed_is_a_miss_and_opened_later(place):
    await stored(place)
    change(place, "DELETE FROM Settings WHERE key = 'cull_limit'")
    rig = Rig(place)
    lock = await asyncio.to_thread(Lock, place)
    assert await rig.store.get(KEY) is None
    while rig.store.gauges()["disk"] != "down":  # the answer may come before the thread knows why
        await asyncio.sleep(0.01)
    assert rig.troubles()[0] == "busy"
    assert await rig.store.get(KEY) is None
    await asyncio.to_thread(lock.release)
    rig.store._keeper._retry.until = 0.0
    assert await rig.store.get(KEY) is not None
    await rig.store.aclose()


async def test_disk_02_a_lock_that_outlasts_the_close_costs_the_writes_and_no_more(place, monkeypatch):
    await stored(place)
    monkeypatch.setattr("llmmw.stores.iothread.FLUSH_S", 0.1)
    rig = Rig(place)
    await rig.store.get(KEY)
    lock = await asyncio.to_thread(Lock, place)
    rig.store.put(b"new", entry(), 60)
    rig.store.delete(KEY)
    await rig.store.aclose()
    await asyncio.to_thread(lock.release)
    assert rig.troubles()[-1] == "write dropped"


async def test_disk_02_a_stuck_disk_delays_one_call_by_the_budget_and_the_next_ones_not_at_all(place, monkeypatch):
    await stored(place)
    rig = Rig(place)
    await rig.store.get(KEY)
    patience_s = disk_module.READ_BUDGET_S
    monkeypatch.setattr(disk_module, "READ_BUDGET_S", 0.05)
    free = threading.Event()
    rig.store._io().read(free.wait)
    began = time.monotonic()
    async with asyncio.timeout(patience_s / 2):  # not what the first read had
        assert await asyncio.gather(*(rig.store.get(bytes([index])) for index in range(3))) == [None] * 3
    assert time.monotonic() - began > 0.04
    assert [await rig.store.get(KEY) for _ in range(3)] == [None] * 3
    assert rig.troubles() == ["slow"] * 3 + ["stalled"] * 3
    assert rig.warnings() == ["cache: slow"]
    free.set()
    monkeypatch.setattr(disk_module, "READ_BUDGET_S", patience_s)
    while rig.store._mailbox.late > rig.store._served:
        await asyncio.sleep(0.001)
    assert await rig.store.get(KEY) is not None
    await rig.store.aclose()


async def test_a_cancelled_read_is_not_done(place):
    await stored(place)
    rig = Rig(place)
    free = threading.Event()
    rig.store._io().read(free.wait)
    reading = asyncio.create_task(rig.store.get(KEY))
    await asyncio.sleep(0)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    free.set()
    assert await rig.store.get(KEY) is not None
    await rig.store.aclose()


async def test_many_reads_at_once_each_get_their_own(place):
    await stored(place, *((bytes([index]), entry(bytes([index]))) for index in range(100)))
    rig = Rig(place)
    found = await asyncio.gather(*(rig.store.get(bytes([index])) for index in range(100)))
    assert [one.data for one in found] == [bytes([index]) for index in range(100)]
    await rig.store.aclose()


async def test_a_close_cancelled_while_the_disk_is_stuck_holds_the_loop_up_no_longer_than_a_read(place, monkeypatch):
    ended = []
    monkeypatch.setattr(disk_module, "READ_BUDGET_S", 0.01)
    monkeypatch.setattr(disk_module, "_ending", ended)
    rig = Rig(place)
    free = threading.Event()
    rig.store._io().read(free.wait)
    rig.store.put(KEY, entry(), 60)
    closing = asyncio.create_task(rig.store.aclose())
    await asyncio.sleep(0)
    closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closing
    assert len(ended) == 1
    free.set()
    assert await asyncio.to_thread(ended[0].join, 120)
    assert (await found_in(place))[0] is not None


# ── what others put there ────────────────────────────────────────────────────────────────────────────────────────


def aside(place):
    return [path.name for path in place.iterdir() if path.name.startswith("cache.db.corrupt-")]


async def test_disk_03_random_bytes_are_put_aside_and_a_new_database_works(place):
    prepare(place)
    (place / "cache.db").write_bytes(os.urandom(10_000))
    rig = Rig(place)
    assert await rig.store.get(KEY) is None
    rig.store.put(KEY, entry(), 60)
    await rig.store.aclose()
    assert len(aside(place)) == 1
    assert rig.troubles() == ["corrupt"]
    assert rig.warnings() == ["cache: corrupt"]
    assert (await found_in(place))[0] is not None


@pytest.mark.parametrize("kind", ["directory", "link", "fifo"])
async def test_disk_03_what_is_no_plain_file_is_refused_and_memory_does_the_job(place, kind):
    place.mkdir(mode=0o700)
    database = place / "cache.db"
    outside = place.parent / "outside"
    outside.write_bytes(b"precious")
    {"directory": database.mkdir, "link": lambda: database.symlink_to(outside), "fifo": lambda: os.mkfifo(database)}[
        kind
    ]()
    rig = Rig(place)
    assert await rig.store.get(KEY) is None
    rig.store.put(KEY, entry(), 60)
    rig.store.delete(KEY)
    assert await rig.store.get(KEY) is None
    await rig.store.aclose()
    assert outside.read_bytes() == b"precious"
    assert rig.troubles() == ["refused"]
    assert rig.warnings() == ["cache: refused"]
    assert rig.store.gauges()["disk"] == "down"


class Bomb:
    def __reduce__(self):
        return (os.system, ("touch exploded",))


async def test_disk_04_pickles_in_rows_and_keys_run_no_code(place, monkeypatch):
    monkeypatch.chdir(place.parent)
    await stored(place, (KEY, entry(tags=("t",))), (b"other", entry()))
    bomb = pickle.dumps(Bomb())
    change(place, "UPDATE Cache SET mode = 4, value = ? WHERE key = ?", bomb, KEY)
    change(place, "UPDATE Cache SET raw = 0, key = ? WHERE key = ?", bomb, b"other")
    rig = Rig(place)
    assert await rig.store.get(KEY) is None
    rig.store.discard(Match("tag", "t"))
    await rig.store.aclose()
    assert rig.troubles() == ["bad row"]
    assert not (place.parent / "exploded").exists()


async def test_disk_05_file_names_in_rows_are_neither_read_nor_deleted(place):
    secret = place.parent / "secret"
    secret.write_bytes(b"precious")
    await stored(place, (KEY, entry()), (b"b", entry()), (b"c", entry()))
    for mode, key in ((2, KEY), (3, b"b"), (1, b"c")):
        change(place, "UPDATE Cache SET mode = ?, filename = '../secret' WHERE key = ?", mode, key)
    change(place, "UPDATE Cache SET expire_time = 1 WHERE key = ?", b"c")
    rig = Rig(place)
    assert [await rig.store.get(key) for key in (KEY, b"b")] == [None] * 2
    rig.store.put(b"d", entry(), 60)
    await rig.store.aclose()
    assert secret.read_bytes() == b"precious"
    assert rig.troubles() == ["bad row"] * 2


CHANGES = {
    "one bit": lambda value: value[:40] + bytes([value[40] ^ 1]) + value[41:],
    "digest": lambda value: bytes([value[0] ^ 1]) + value[1:],
    "cut": lambda value: value[:-1],
    "empty": lambda _: b"",
    "text": lambda _: "text",
    "number": lambda _: 7,
}


@pytest.mark.parametrize("what", CHANGES)
async def test_disk_06_a_changed_row_is_a_miss_counted_and_deleted(place, what):
    await stored(place)
    connection = sqlite3.connect(place / "cache.db")
    ((value,),) = connection.execute("SELECT value FROM Cache").fetchall()
    connection.close()
    change(place, "UPDATE Cache SET value = ?", CHANGES[what](value))
    found, rig = await found_in(place)
    assert found is None
    assert rig.troubles() == ["bad row"]
    rows = Rows(place, 2**26)
    assert list(rows._table.rows()) == []
    rows.close()


async def test_disk_06_a_row_copied_to_another_key_is_a_miss(place):
    await stored(place)
    change(place, "UPDATE Cache SET key = ?", b"other")
    found, rig = await found_in(place, b"other")
    assert (found, rig.troubles()) == (None, ["bad row"])


HOSTILE = {
    "setting that runs a pragma": "INSERT INTO Settings VALUES ('sqlite_writable_schema', 1)",
    "setting that replaces a method": "INSERT INTO Settings VALUES ('get', 1)",
    "setting of a wrong type": "UPDATE Settings SET value = x'00' WHERE key = 'cull_limit'",
    "setting with a pragma as value": "UPDATE Settings SET value = '1; x' WHERE key = 'sqlite_cache_size'",
    "view": "CREATE VIEW v AS SELECT 1",
    "trigger": "CREATE TRIGGER t AFTER INSERT ON Cache BEGIN DELETE FROM Cache; END",
    "function in a trigger": (
        "CREATE TRIGGER Settings_x AFTER INSERT ON Cache FOR EACH ROW BEGIN UPDATE Settings SET value = value +"
        ' randomblob(100000000) WHERE key = "size"; END'
    ),
    "more tables than anybody needs": "".join(f"CREATE TABLE t{number} (a);" for number in range(60)),
    "table of another shape": "DROP TABLE Cache; CREATE TABLE cache (key, value)",
    "index that no two rows fit": "CREATE UNIQUE INDEX i ON Cache(mode); CREATE UNIQUE INDEX j ON Cache(raw)",
    "index on an expression": "CREATE INDEX i ON Cache(abs(size))",
}


@pytest.mark.parametrize("what", HOSTILE)
async def test_a_hostile_database_is_put_aside(place, what):
    await stored(place)
    change(place, HOSTILE[what])
    found, rig = await found_in(place)
    assert found is None
    assert rig.troubles() == ["corrupt"]
    assert len(aside(place)) == 1


async def test_a_database_without_its_tables_or_settings_is_no_error_for_the_caller(place):
    await stored(place)
    change(place, "DELETE FROM Settings")
    assert (await found_in(place))[0] is not None
    change(place, "DROP TABLE Cache")
    assert (await found_in(place))[0] is None
    await stored(place)
    assert (await found_in(place))[0] is not None


async def test_a_database_that_breaks_while_it_is_open_is_put_aside(place):
    rig = Rig(place)
    rig.store.put(KEY, entry(b"x" * 100_000), 60)
    await rig.store.aclose()
    rig = Rig(place)
    assert await rig.store.get(KEY) is not None
    change(place, "UPDATE Cache SET access_count = 1")  # so that the open handle reads its pages again
    sqlite3.connect(place / "cache.db").execute("PRAGMA wal_checkpoint(TRUNCATE)").connection.close()
    with (place / "cache.db").open("r+b") as file:
        file.seek(4096)
        file.write(os.urandom(90_000))
    rig.store.put(b"new", entry(), 60)
    assert await rig.store.get(KEY) is None
    await rig.store.aclose()
    assert rig.troubles()
    assert (await found_in(place))[0] is None


async def test_a_disk_that_spoils_every_database_is_left_alone(place, monkeypatch):
    def spoilt(*_):
        raise sqlite3.DatabaseError("malformed")

    monkeypatch.setattr("llmmw.stores.table.inspect", spoilt)
    rig = Rig(place)
    for _ in range(5):
        assert await rig.store.get(KEY) is None
    await rig.store.aclose()
    assert rig.troubles() == ["corrupt"] * 3
    assert rig.store.gauges()["disk"] == "down"


async def test_what_cannot_be_put_aside_is_left_for_later(place, monkeypatch):
    def no(*_args, **_options):
        raise PermissionError("read-only")

    prepare(place)
    (place / "cache.db").write_bytes(os.urandom(10_000))
    monkeypatch.setattr("llmmw.stores.keeper.quarantine", no)
    found, rig = await found_in(place)
    assert found is None
    assert rig.troubles() == ["corrupt", "unavailable"]


async def served(rig):
    """The I/O thread has done what was asked of it so far."""
    done = threading.Event()
    rig.store._io().read(done.set)
    assert await asyncio.to_thread(done.wait, 10)


@pytest.mark.parametrize("error", [sqlite3.OperationalError("database or disk is full"), OSError("no handles")])
async def test_a_full_or_failing_disk_is_counted_warned_of_once_and_tried_again_later(place, monkeypatch, error):
    def fails(*_):
        raise error

    rig = Rig(place)
    await rig.store.get(KEY)
    with monkeypatch.context() as patch:
        patch.setattr(Rows, "set", fails)
        patch.setattr(Rows, "find", fails)
        patch.setattr(Rows, "delete", fails)
        patch.setattr(Rows, "discard", fails)
        rig.store.put(KEY, entry(), 60)
        while rig.store.gauges()["waiting writes"]:
            await asyncio.sleep(0.001)
        assert rig.store.gauges()["disk"] == "down"
        for job in (lambda: rig.store._keeper.get(KEY), lambda: rig.store._keeper.discard(Match("tag", "t"))):
            rig.store._keeper._retry.until = 0.0
            rig.store._io().read(job)
            await served(rig)
        rig.store.delete(KEY)
        rig.store._keeper._retry.until = 0.0
        await served(rig)
    rig.store._keeper._retry.until = 0.0
    while rig.store.gauges()["waiting writes"]:
        rig.store._keeper._retry.until = 0.0
        await asyncio.sleep(0.001)
    assert rig.warnings() == ["cache: unavailable"]
    rig.store.put(KEY, entry(), 60)
    await rig.store.aclose()
    assert (await found_in(place))[0] is not None


async def test_writes_are_dropped_while_the_disk_is_down(place):
    rig = Rig(place)
    rig.store._keeper._retry.until = float("inf")
    rig.store.put(KEY, entry(), 60)
    await rig.store.aclose()
    assert rig.troubles() == ["write dropped"]


async def test_a_log_that_cannot_be_emptied_stops_the_writes(place, monkeypatch):
    await stored(place)
    monkeypatch.setattr("llmmw.stores.rows.MAX_WAL_BYTES", 10_000)
    reader = sqlite3.connect(place / "cache.db", isolation_level=None)
    reader.execute("BEGIN")
    reader.execute("SELECT * FROM Cache").fetchall()
    rig = Rig(place)
    for index in range(20):
        rig.store.put(bytes([index]), entry(os.urandom(5_000)), 60)
    while rig.store.gauges()["waiting writes"]:
        await asyncio.sleep(0.005)
    assert (place / "cache.db-wal").stat().st_size < 200_000
    assert "log too long" in rig.troubles()
    reader.close()
    rig.store.put(KEY, entry(b"after"), 60)
    await rig.store.aclose()
    assert (await found_in(place))[0].data == b"after"


async def test_a_row_of_a_later_version_is_a_miss_and_stays(place, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("llmmw.stores.entry.ENTRY_SCHEMA", 2)
        await stored(place)
    found, rig = await found_in(place)
    assert (found, rig.told) == (None, [])
    monkeypatch.setattr("llmmw.stores.entry.ENTRY_SCHEMA", 2)
    assert (await found_in(place))[0] is not None


async def test_a_database_of_a_later_version_is_a_miss_and_left_as_it_is(place):
    await stored(place)
    change(place, "PRAGMA user_version = 1; CREATE TABLE Later (a INTEGER CHECK (a > 0));")
    before = (place / "cache.db").read_bytes()
    rig = Rig(place)
    assert await rig.store.get(KEY) is None
    rig.store.put(KEY, entry(), 60)
    await rig.store.aclose()
    assert rig.warnings() == ["cache: refused"]
    assert {path.name: path.read_bytes() for path in place.iterdir()} == {"cache.db": before}


async def test_disk_09_every_file_is_private_under_any_umask(place):
    before = os.umask(0)
    try:
        rig = Rig(place)
        rig.store.put(KEY, entry(), 60)
        while rig.store.gauges()["waiting writes"]:
            await asyncio.sleep(0.005)
        modes = {path.name: path.stat().st_mode & 0o777 for path in (place, *place.iterdir())}
        await rig.store.aclose()
    finally:
        os.umask(before)
    assert modes == {"cache": 0o700, "cache.db": 0o600, "cache.db-wal": 0o600, "cache.db-shm": 0o600}


class Xor:
    """A codec that is no encryption, but looks like one from outside."""

    def __init__(self, key):
        self._key = key
        self.name = "xor"

    def seal(self, data):
        return b"sealed" + bytes(byte ^ self._key for byte in data)

    def open(self, data):
        opened = bytes(byte ^ self._key for byte in data.removeprefix(b"sealed"))
        if not opened.startswith(b"LMW"):
            raise RuntimeError("wrong key")
        return opened


async def test_disk_01_a_codec_seals_what_is_on_disk(place):
    await stored(place, (KEY, entry(b"secret answer")), codec=Xor(7))
    assert b"secret answer" not in (place / "cache.db").read_bytes()
    assert (await found_in(place, codec=Xor(7)))[0].data == b"secret answer"
    assert (await found_in(place))[0] is None
    found, rig = await found_in(place, codec=Xor(8))
    assert (found, rig.troubles()) == (None, ["bad row"])


# ── processes and lifetimes ──────────────────────────────────────────────────────────────────────────────────────


async def test_a_forked_child_opens_the_database_anew_and_leaves_the_parents_alone(place):
    await stored(place)
    rig = Rig(place)
    assert await rig.store.get(KEY) is not None
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            rig.store.rehome()
            loop = asyncio.new_event_loop()
            asyncio._set_running_loop(None)
            code = 0 if loop.run_until_complete(child_works(rig.store)) else 2
        finally:
            os.write(write_end, b"x")
            os._exit(code)
    await asyncio.to_thread(os.read, read_end, 1)
    _, status = os.waitpid(child, 0)
    os.close(read_end)
    os.close(write_end)
    assert os.waitstatus_to_exitcode(status) == 0
    assert await rig.store.get(b"child") is not None
    rig.store.rehome()
    assert await rig.store.get(KEY) is not None
    await rig.store.aclose()


async def child_works(store):
    found = await store.get(KEY)
    store.put(b"child", entry(), 60)
    await store.aclose()
    return found is not None


def test_reads_of_a_dead_loop_disturb_nobody(place):
    rig = Rig(place)
    free = threading.Event()

    async def leave():
        rig.store._io().read(free.wait)
        task = asyncio.create_task(rig.store.get(KEY))
        await asyncio.sleep(0)
        return task

    asyncio.run(leave())
    free.set()

    async def come():
        rig.store.put(KEY, entry(), 60)
        assert await rig.store.get(KEY) is not None
        await rig.store.aclose()

    asyncio.run(come())
    assert rig.told == []


async def test_a_store_that_is_dropped_unclosed_ends_its_thread(place):
    rig = Rig(place)
    await rig.store.get(KEY)
    thread = rig.store._thread._thread
    dropped = weakref.ref(rig.store)
    del rig
    gc.collect()
    assert dropped() is None
    await asyncio.to_thread(thread.join, 120)
    assert not thread.is_alive()


async def test_a_store_that_is_dropped_while_nothing_can_be_written_ends_its_thread(place, monkeypatch):
    rig = Rig(place)
    await stored(place)
    monkeypatch.setattr(iothread_module, "FLUSH_S", 0.0)
    assert await rig.store.get(KEY) is not None
    rig.store._keeper._writes.until = float("inf")
    rig.store.delete(KEY)
    rig.store.discard(Match("tag", "t"))
    thread = rig.store._thread._thread
    dropped = weakref.ref(rig.store)
    del rig
    gc.collect()
    assert dropped() is None
    await asyncio.to_thread(thread.join, 120)
    assert not thread.is_alive()


async def test_a_write_under_a_lease_that_waits_for_ever_does_not_keep_the_store(place, monkeypatch):
    monkeypatch.setattr(iothread_module, "FLUSH_S", 0.0)
    rig = Rig(place)
    lease, found = await rig.store.leases.claim(KEY, 30.0, partial(rig.store.get, KEY))
    assert found is None
    lock = Lock(place)
    rig.store.put(KEY, entry(), 60, lease)
    lease.release()
    thread = rig.store._thread._thread
    dropped = weakref.ref(rig.store)
    del rig, lease
    gc.collect()
    assert dropped() is None
    await asyncio.to_thread(thread.join, 120)
    assert not thread.is_alive()
    lock.release()


async def test_deletions_that_can_never_be_done_are_bounded_and_what_they_meant_is_not_read(place, monkeypatch):
    monkeypatch.setattr(backlog_module, "MAX_DELETIONS", 100)
    pairs = [(b"%032d" % number, entry()) for number in range(3)]
    await stored(place, *pairs)
    rig = Rig(place)
    assert await rig.store.get(pairs[0][0]) is not None
    rig.store._keeper._writes.until = float("inf")
    for number in range(100):
        rig.store.delete(b"%032d" % (number % 50))
        rig.store.delete(b"%032d" % (number % 50))
    assert rig.store.gauges()["waiting writes"] == 50
    assert rig.troubles() == []
    for number in range(1_000):
        rig.store.delete(b"%032d" % number)
        rig.store.discard(Match("tag", "t"))
    assert rig.store.gauges()["disk"] == "down"
    assert rig.troubles() == ["refused"]
    assert rig.warnings() == ["cache: refused"]
    assert await rig.store.get(pairs[0][0]) is None
    await rig.store.aclose()
    assert rig.store.gauges()["waiting writes"] == 0


def test_what_is_queued_when_the_process_ends_is_written(place):
    source = (
        "import sys, time; from pathlib import Path; from llmmw.env import Env;"
        "from llmmw.stores.disk import DiskStore; from llmmw.stores.entry import Entry, Header\n"
        "store = DiskStore(Path(sys.argv[1]), Env(), max_bytes=2**26)\n"
        "for i in range(50): store.put(bytes([i]), Entry(Header(time.time(), 60.0), b'x'), 60.0)\n"
    )
    subprocess.run(
        [sys.executable, "-W", "error", "-c", patience.FOR_A_CHILD + source, str(place)], check=True, timeout=240
    )
    rows = Rows(Path(place), 2**26)
    assert len(list(rows._table.rows())) == 50
    rows.close()


async def test_processes_that_start_together_all_open_the_database(place):
    await stored(place)
    rigs = [Rig(place) for _ in range(8)]
    found = await asyncio.gather(*(rig.store.get(KEY) for rig in rigs))
    assert all(found)
    for index, rig in enumerate(rigs):
        rig.store.put(bytes([index]), entry(), 60)
    await asyncio.gather(*(rig.store.aclose() for rig in rigs))
    assert [(await found_in(place, bytes([index])))[0] is not None for index in range(8)] == [True] * 8


# ── what the user brings ─────────────────────────────────────────────────────────────────────────────────────────


class Broken:
    """A codec that cannot seal."""

    name = "broken"

    def seal(self, _):
        raise ValueError("sk-secret")

    def open(self, data):
        return data


async def test_a_codec_that_fails_costs_the_writes_and_one_warning_without_its_text(place):
    rig = Rig(place, codec=Broken())
    for number in range(3):
        rig.store.put(bytes([number]), entry(), 60)
    await rig.store.aclose()
    assert rig.troubles() == ["codec", "write dropped"] * 3
    assert rig.warnings() == ["cache: codec"]
    assert "sk-secret" not in repr(rig.told)
    assert rig.store.gauges() == {"disk": "ok", "waiting writes": 0}


async def test_a_thread_that_cannot_be_started_costs_misses(place, monkeypatch):
    def refuse(*_):
        raise RuntimeError("can't start new thread")

    rig = Rig(place)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        assert await rig.store.get(KEY) is None
        rig.store.put(KEY, entry(), 60)
        rig.store.delete(KEY)
        rig.store.discard(Match("tag", "t"))
        rig.store.soon(list)
        rig.store.later(list)
    assert rig.warnings() == ["cache: stuck"]
    assert rig.store.gauges()["waiting writes"] == 0
    rig.store.put(KEY, entry(), 60)
    await rig.store.aclose()
    assert (await found_in(place))[0] is not None


async def test_a_broken_row_that_is_being_replaced_is_left_to_the_write(place):
    await stored(place)
    change(place, "UPDATE Cache SET value = x'00'")
    rig = Rig(place)
    free = threading.Event()
    rig.store._io().read(free.wait)
    reading = asyncio.create_task(rig.store.get(KEY))
    await asyncio.sleep(0)
    rig.store.put(KEY, entry(b"new"), 60)
    free.set()
    await reading
    await rig.store.aclose()
    assert (await found_in(place))[0].data == b"new"


async def test_a_read_that_finds_the_database_locked_is_a_miss_and_closes_nothing(place, monkeypatch):
    def locked(*_):
        error = sqlite3.OperationalError("database is locked")
        error.sqlite_errorcode = sqlite3.SQLITE_BUSY_RECOVERY
        raise error

    await stored(place)
    rig = Rig(place)
    with monkeypatch.context() as patch:
        patch.setattr(Rows, "find", locked)
        assert await rig.store.get(KEY) is None
    assert rig.store.gauges()["disk"] == "ok"
    assert await rig.store.get(KEY) is not None
    assert rig.troubles() == ["busy"]
    await rig.store.aclose()


@pytest.mark.parametrize(
    ("code", "is_reopened"), [("SQLITE_IOERR", True), ("SQLITE_READONLY", True), ("SQLITE_FULL", False)]
)
async def test_a_database_that_takes_no_writes_twice_is_opened_anew_unless_the_disk_is_full(
    place, monkeypatch, code, is_reopened
):
    def fails(*_):
        error = sqlite3.OperationalError("no")
        error.sqlite_errorcode = getattr(sqlite3, code)
        raise error

    await stored(place)
    rig = Rig(place)
    await rig.store.get(KEY)
    first = rig.store._keeper._rows
    with monkeypatch.context() as patch:
        patch.setattr(Rows, "set", fails)
        for number in range(2):
            rig.store._keeper._writes.until = 0.0
            rig.store.put(bytes([number]), entry(), 60)
            await served(rig)
            while rig.store.gauges()["waiting writes"]:
                await asyncio.sleep(0.001)
            assert rig.store.gauges()["disk"] == "no writes"
    assert await rig.store.get(KEY) is not None
    assert (rig.store._keeper._rows is not first) is is_reopened
    rig.store._keeper._writes.until = 0.0
    rig.store.put(b"after", entry(), 60)
    await rig.store.aclose()
    assert (await found_in(place, b"after"))[0] is not None
    assert rig.troubles() == ["unavailable", "write dropped"] * 2


async def test_a_database_exchanged_while_it_is_opened_is_not_used(place, monkeypatch):
    await stored(place)
    other = place.parent / "other"
    await stored(other)
    real = keeper_module.check

    def exchanging(directory, **options):
        if (other / "cache.db").exists():
            (other / "cache.db").rename(directory / "cache.db")
        real(directory, **options)

    rig = Rig(place)
    monkeypatch.setattr(keeper_module, "check", exchanging)
    assert await rig.store.get(KEY) is None
    assert rig.troubles() == ["unavailable"]
    rig.store._keeper._retry.until = 0.0
    assert await rig.store.get(KEY) is not None
    await rig.store.aclose()


async def test_a_database_that_cannot_be_closed_is_a_counter(place, monkeypatch):
    def fails(_):
        raise sqlite3.OperationalError("disk I/O error")

    rig = Rig(place)
    await rig.store.get(KEY)
    rows = rig.store._keeper._rows
    with monkeypatch.context() as patch:
        patch.setattr(Rows, "close", fails)
        await rig.store.aclose()
    assert rig.troubles() == ["close"]
    rows._table._connection = None


async def test_an_invalidation_that_finds_the_database_locked_is_done_later(place):
    await stored(place, (KEY, entry(tags=("t",))))
    rig = Rig(place)
    await rig.store.get(KEY)
    lock = await asyncio.to_thread(Lock, place)
    rig.store.discard(Match("tag", "t"))
    while "busy" not in rig.troubles():
        await asyncio.sleep(0.001)
    assert await rig.store.get(KEY) is None
    await asyncio.to_thread(lock.release)
    await rig.store.aclose()
    assert (await found_in(place))[0] is None


async def test_a_database_far_above_its_size_says_so(place):
    rig = Rig(place)
    for number in range(400):
        rig.store.put(number.to_bytes(4), entry(os.urandom(10_000)), 60)
    await rig.store.aclose()
    rig = Rig(place, max_bytes=2**20)
    for number in range(3):
        rig.store.put(b"k%d" % number, entry(), 60)
    await rig.store.aclose()
    assert rig.warnings() == ["cache: too full"]
    assert set(rig.troubles()) == {"too full"}

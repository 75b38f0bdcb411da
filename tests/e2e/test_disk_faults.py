"""What may happen to a cache directory while it is used, and what it costs the caller: a miss at the most (SPEC 2)."""

from __future__ import annotations

import asyncio
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from contextlib import asynccontextmanager
from pathlib import Path

import patience
import pytest

import llmmw
from llmmw import events as ev
from llmmw.env import Env
from llmmw.stores import keeper as keeper_module
from llmmw.stores.disk import DiskStore
from llmmw.stores.entry import Entry, Header
from llmmw.stores.upkeep import usage

MIB = 2**20


@pytest.fixture
def place(tmp_path):
    tmp_path.chmod(0o700)
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def one_try(monkeypatch):
    """The pause after a failure lasts until a test ends it, however slow the machine is."""
    monkeypatch.setattr(keeper_module, "_FIRST_RETRY_S", 3600.0)


async def until(holds):
    async with asyncio.timeout(120):
        while not holds():
            await asyncio.sleep(0.001)


def entry(data=b"answer", **fields):
    return Entry(Header(time.time(), 300.0, **fields), data)


def key(number):
    return number.to_bytes(32)


class Rig:
    """A disk store with everything it told."""

    def __init__(self, place, **options):
        self.told = []
        self.store = DiskStore(place, Env(sinks=(self.told.append,)), **({"max_bytes": 2**30} | options))

    def troubles(self):
        return [event.kind for event in self.told if isinstance(event, ev.CacheTrouble)]

    def warnings(self):
        return [event.kind for event in self.told if isinstance(event, ev.Warned)]

    async def written(self):
        await until(lambda: not self.store._backlog)

    async def put(self, number, data=b"answer"):
        """Written, or dropped for good."""
        self.store.put(key(number), entry(data), 300)
        await self.written()

    async def recovered(self):
        """The pause after a failure is over."""
        self.store._keeper._retry.until = self.store._keeper._writes.until = 0.0
        await until(lambda: self.store.gauges()["disk"] == "ok")


@asynccontextmanager
async def opened(place, **options):
    rig = Rig(place, **options)
    try:
        yield rig
    finally:
        await rig.store.aclose()


def cached(place):
    """A function whose answers are kept in a directory, and how often it was really asked."""
    asked = []

    @llmmw.middleware(cache_ttl=300, cache_directory=place)
    async def ask(prompt):
        asked.append(prompt)
        return f"answer to {prompt}"

    return ask, asked


def of_cache(ask):
    return ask.get_performance_stats()["layers"]["cache"]


# ── locks ────────────────────────────────────────────────────────────────────────────────────────────────────────


class Foreign:
    """Another process that does something with the database until it is told to stop."""

    SOURCE = (
        "import sqlite3, sys; c = sqlite3.connect(sys.argv[1], isolation_level=None);"
        "[c.execute(s).fetchall() for s in sys.argv[2:]]; print('done', flush=True); sys.stdin.read()"
    )

    def __init__(self, place, *statements):
        self._process = subprocess.Popen(
            [sys.executable, "-c", self.SOURCE, str(place / "cache.db"), *statements],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._process.stdout.readline() == b"done\n"

    def stop(self):
        self._process.communicate()


async def test_disk_02_calls_are_served_and_the_loop_turns_while_another_process_holds_the_lock(place):
    ask, asked = cached(place)
    await ask("before")
    await until(lambda: of_cache(ask)["waiting writes"] == 0)
    lock = await asyncio.to_thread(Foreign, place, "BEGIN IMMEDIATE")
    turns = 0

    async def turn():
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0.001)

    turning = asyncio.create_task(turn())
    number = 0
    while turns < 50 or not of_cache(ask).get("trouble: busy"):
        assert await ask(f"question {number}") == f"answer to question {number}"
        assert await ask(f"question {number}") == f"answer to question {number}"
        number += 1
        await asyncio.sleep(0)
    assert len(asked) == number + 1
    reader, asked_by_reader = cached(place)
    assert await reader("before") == "answer to before"
    assert asked_by_reader == []  # reading needs no lock
    turning.cancel()
    await asyncio.to_thread(lock.stop)
    await until(lambda: of_cache(ask)["waiting writes"] == 0)
    assert await reader("question 0") == "answer to question 0"
    assert asked_by_reader == []
    await reader.aclose()
    await ask.aclose()


async def test_disk_08_the_log_is_bounded_while_a_reader_keeps_it_and_100_mb_are_written(place):
    data = os.urandom(MIB)
    longest = 0
    async with opened(place) as rig:
        await rig.put(0)
        reader = await asyncio.to_thread(Foreign, place, "BEGIN", "SELECT count(*) FROM Cache")
        for number in range(1, 101):
            await rig.put(number, data)
            longest = max(longest, (place / "cache.db-wal").stat().st_size)
        assert 64 * MIB < longest < 64 * MIB + 2 * len(data)
        assert "log too long" in rig.troubles()
        assert rig.warnings() == ["cache: log too long"]
        found = [number for number in range(101) if await rig.store.get(key(number)) is not None]
        assert found == list(range(len(found)))
        assert 50 < len(found) < 66
        await asyncio.to_thread(reader.stop)
        before = len(rig.troubles())
        await rig.put(200)
        assert (place / "cache.db-wal").stat().st_size < MIB
        assert await rig.store.get(key(200)) is not None
        assert len(rig.troubles()) == before


# ── no room, no permission, no handles ───────────────────────────────────────────────────────────────────────────


class Mounted:
    """A small file system in memory."""

    def __init__(self, point, size):
        point.mkdir(mode=0o700)
        self.point = point
        options = ["-t", "tmpfs", "-o", f"size={size},mode=0700", "tmpfs", str(point)]
        if os.getuid() != 0 or shutil.which("mount") is None or self._run("mount", *options):
            pytest.skip("mounting is not permitted here")

    def _run(self, *command):
        return subprocess.run(command, check=False, capture_output=True).returncode

    def remount(self, how):
        return self._run("mount", "-o", f"remount,{how}", str(self.point)) == 0

    def close(self):
        assert self._run("umount", str(self.point)) == 0


@pytest.fixture
def small(place):
    mounted = Mounted(place.parent / "small", 3 * MIB)
    yield mounted
    mounted.close()


async def test_a_full_disk_stops_writes_and_not_reads_until_there_is_room_again(small):
    ballast = small.point / "ballast"
    ballast.write_bytes(bytes(MIB))
    async with opened(small.point / "cache") as rig:
        number = 0
        while "unavailable" not in rig.troubles():
            await rig.put(number, os.urandom(50_000))
            number += 1
        assert rig.store.gauges()["disk"] == "no writes"
        assert await rig.store.get(key(0)) is not None
        await rig.put(1_000)
        assert await rig.store.get(key(1_000)) is None
        rig.store._keeper._writes.until = 0.0
        await rig.put(1_001, os.urandom(50_000))
        ballast.unlink()
        await rig.recovered()
        await rig.put(1_002)
        assert await rig.store.get(key(1_002)) is not None
        assert set(rig.troubles()) == {"unavailable", "write dropped"}
        assert rig.warnings() == ["cache: unavailable"]
    connection = sqlite3.connect(small.point / "cache" / "cache.db")
    assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    connection.close()


async def test_a_disk_without_room_for_the_database_is_a_miss_and_used_once_there_is(small):
    ballast = small.point / "ballast"
    with ballast.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass
    async with opened(small.point / "cache") as rig:
        assert await rig.store.get(key(1)) is None
        await rig.put(1)
        assert rig.store.gauges()["disk"] == "down"
        ballast.unlink()
        await rig.recovered()
        await rig.put(2)
        assert await rig.store.get(key(2)) is not None
        assert rig.warnings() == ["cache: unavailable"]
        assert not list((small.point / "cache").glob("*corrupt*"))


async def test_a_read_only_file_system_is_a_miss_and_used_once_it_can_be_written(small):
    place = small.point / "cache"
    async with opened(place) as rig:
        await rig.put(1)
    assert small.remount("ro")
    async with opened(place) as rig:
        assert await rig.store.get(key(1)) is None
        assert rig.store.gauges()["disk"] == "down"
        assert small.remount("rw")
        await rig.recovered()
        assert await rig.store.get(key(1)) is not None
        assert rig.troubles() == ["unavailable"]
        assert rig.warnings() == ["cache: unavailable"]


LIMITED = """
import asyncio, os, resource, sys, time
from pathlib import Path
import llmmw
from llmmw import events as ev

async def main(what, place):
    @llmmw.middleware(cache_ttl=300)
    async def warm(prompt):
        return prompt

    await warm("all that a call imports, but for the disk")
    await warm.aclose()
    if what in {"no handle", "two handles"}:
        before = resource.getrlimit(resource.RLIMIT_NOFILE)
        left = len(os.listdir("/proc/self/fd")) - 1 + (2 if what == "two handles" else 0)  # one is for the listing
        resource.setrlimit(resource.RLIMIT_NOFILE, (left, before[1]))
    else:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, before[1]))

    @llmmw.middleware(cache_ttl=300, cache_directory=place)
    async def ask(prompt):
        return prompt * 1000

    def cache():
        return ask.get_performance_stats()["layers"]["cache"]

    number = 0
    deadline = time.monotonic() + 120
    while not cache().get("trouble: unavailable"):
        assert await ask(f"{number}") == f"{number}" * 1000
        number += 1
        assert time.monotonic() < deadline, cache()
    assert cache()["disk"] in {"down", "no writes"}, cache()
    resource.setrlimit(resource.RLIMIT_FSIZE if what == "quota" else resource.RLIMIT_NOFILE, before)
    while cache()["disk"] != "ok":
        await asyncio.sleep(0.001)
        assert time.monotonic() < deadline, cache()
    await ask("after")
    while cache()["waiting writes"]:
        await asyncio.sleep(0.001)
        assert time.monotonic() < deadline, cache()
    await ask.aclose()

asyncio.run(main(*sys.argv[1:]))
"""


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
@pytest.mark.parametrize("what", ["no handle", "two handles", "quota"])
def test_no_file_handles_or_no_quota_costs_misses_until_there_are_some(place, what):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", patience.FOR_A_CHILD + LIMITED, what, str(place)],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    found = usage(place)
    assert found.entries >= 1
    assert found.quarantined == 0


# ── the directory changes under us ───────────────────────────────────────────────────────────────────────────────


def handles():
    """Open files of this process, deleted ones included."""
    links = Path("/proc/self/fd")
    found = [str(link.readlink()) for link in links.iterdir() if link.is_symlink()] if links.exists() else []
    return sorted(link for link in found if "cache" in link)


async def test_a_directory_that_is_deleted_while_it_is_open_is_made_anew(place):
    async with opened(place) as rig:
        await rig.put(1)
        for _ in range(20):
            shutil.rmtree(place)
            assert await rig.store.get(key(1)) is None
            await rig.put(1)
            assert await rig.store.get(key(1)) is not None
        assert len(handles()) <= 3
        assert set(rig.troubles()) == {"replaced"}
        assert rig.warnings() == []
        assert place.stat().st_mode & 0o777 == 0o700
    assert handles() == []


def replace(place, by, *, log_too=True):
    """What a user does who restores a copy."""
    if log_too:
        for path in place.glob("cache.db-*"):
            path.unlink()
    by.rename(place / "cache.db")


async def test_another_database_in_its_place_is_looked_at_and_used(place):
    other = place.parent / "other"
    async with opened(other) as rig:
        await rig.put(2)
    async with opened(place) as rig, opened(place) as second:
        await rig.put(1)
        assert await second.store.get(key(1)) is not None
        replace(place, other / "cache.db")
        for store in (rig.store, second.store):
            assert await store.get(key(2)) is not None
            assert await store.get(key(1)) is None
        await rig.put(3)
        assert await second.store.get(key(3)) is not None
        assert rig.troubles() == second.troubles() == ["replaced"]


async def test_another_database_beside_the_log_of_the_former_one_serves_nothing_wrong(place):
    other = place.parent / "other"
    async with opened(other) as rig:
        for number in range(100, 200):
            await rig.put(number, b"%d" % number * 500)
    async with opened(place) as rig:
        for number in range(100):
            await rig.put(number, b"%d" % number * 500)
        replace(place, other / "cache.db", log_too=False)
        for number in range(200):
            found = await rig.store.get(key(number))
            assert found is None or found.data == b"%d" % number * 500
        await rig.recovered()
        for number in range(200, 250):
            await rig.put(number)
        await rig.recovered()
        await rig.put(300)
        assert await rig.store.get(key(300)) is not None


async def test_what_is_no_database_any_more_is_put_aside_by_one_of_those_who_have_it_open(place):
    rigs = [Rig(place) for _ in range(4)]
    await rigs[0].put(1)
    assert all([await rig.store.get(key(1)) is not None for rig in rigs])
    junk = place / "junk"
    junk.write_bytes(os.urandom(20_000))
    replace(place, junk)
    await asyncio.gather(*(rig.store.get(key(1)) for rig in rigs))
    for number, rig in enumerate(rigs):
        await rig.recovered()
        await rig.put(10 + number)
    for rig in rigs:
        assert [await rig.store.get(key(10 + number)) is not None for number in range(4)] == [True] * 4
        await rig.store.aclose()
    assert len(list(place.glob("cache.db.corrupt-*"))) == 1


@pytest.mark.parametrize("spoil", [Path.unlink, lambda log: os.truncate(log, 0)], ids=["deleted", "emptied"])
async def test_a_log_gone_under_those_who_have_it_open_keeps_nobody_out_for_ever(place, spoil):
    # Its index still says what is in it, as long as anybody has it open: whoever comes would wait for that one's end.
    async with opened(place) as idle, opened(place) as newcomer:
        for number in range(20):
            await idle.put(number, b"%d" % number * 500)
        spoil(place / "cache.db-wal")
        await newcomer.store.get(key(1))
        await newcomer.recovered()
        await newcomer.put(100)
        assert await newcomer.store.get(key(100)) is not None
        assert await idle.store.get(key(100)) is not None
        assert newcomer.troubles() == ["corrupt"]
        assert idle.troubles() == ["replaced"]


async def test_a_link_put_in_its_place_is_not_followed(place):
    outside = place.parent / "outside"
    outside.write_bytes(b"precious")
    async with opened(place) as rig:
        await rig.put(1)
        (place / "cache.db").unlink()
        (place / "cache.db").symlink_to(outside)
        assert await rig.store.get(key(1)) is None
        await rig.put(1)
        assert rig.troubles() == ["replaced", "refused"]
    assert outside.read_bytes() == b"precious"


async def test_a_working_directory_that_changes_does_not_move_the_cache(place, monkeypatch):
    monkeypatch.chdir(place.parent)
    async with opened(Path("cache")) as rig:
        elsewhere = place.parent / "elsewhere"
        elsewhere.mkdir()
        monkeypatch.chdir(elsewhere)
        await rig.put(1)
        assert await rig.store.get(key(1)) is not None
    assert (place / "cache.db").exists()
    assert list(elsewhere.iterdir()) == []


# ── forks ────────────────────────────────────────────────────────────────────────────────────────────────────────


async def child_works(store, number):
    """In a child: what the parent wrote is found, and what the child writes is kept."""
    found = await store.get(key(0))
    store.put(key(1_000 + number), entry(), 300)
    await store.aclose()
    return found is not None


async def test_children_forked_in_the_middle_of_writes_work_and_leave_the_parent_alone(place):
    rig = Rig(place)
    await rig.put(0)
    for number in range(20):
        for written in range(50):
            rig.store.put(key(1 + written), entry(os.urandom(3_000)), 300)
        reads = [asyncio.create_task(rig.store.get(key(50 + index))) for index in range(3)]
        await asyncio.sleep(0)
        child = os.fork()
        if child == 0:
            status = 1
            try:
                asyncio._set_running_loop(None)
                rig.store.rehome()
                status = 0 if asyncio.new_event_loop().run_until_complete(child_works(rig.store, number)) else 2
            finally:
                os._exit(status)
        _, status = await asyncio.to_thread(os.waitpid, child, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        await asyncio.gather(*reads)
    await rig.written()
    assert [number for number in range(20) if await rig.store.get(key(1_000 + number)) is None] == []
    assert set(rig.troubles()) <= {"busy"}
    await rig.store.aclose()
    assert handles() == []


# ── time ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class Shifted:
    """The machine's clock, put forward or back."""

    def __init__(self, seconds):
        self._seconds = seconds
        self.monotonic = time.monotonic
        self.sleep = asyncio.sleep

    def wall(self):
        return time.time() + self._seconds


@pytest.mark.parametrize(("lead_s", "is_found"), [(-60, True), (0, True), (4, True), (6, False), (86_400, False)])
async def test_an_answer_from_the_future_is_a_miss(place, lead_s, is_found):
    from llmmw.layers.cache import TTLCache
    from llmmw.testing.fake import FakeUpstream, chat_call

    sources = []
    for clock in (Shifted(lead_s), Shifted(0)):
        cache = TTLCache(300, directory=place).bind(FakeUpstream(), Env(clock=clock))
        sources.append((await cache(chat_call())).source)
        await cache.aclose()
    assert sources == ["upstream", "cache" if is_found else "upstream"]

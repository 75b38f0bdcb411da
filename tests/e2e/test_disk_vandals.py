"""Somebody spoils a cache directory in every way while three stores use it: nothing wrong is served and
nothing dies. (SPEC 2: bytes on disk are untrusted; the worst they cause is a miss.)
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from chaos import seeds

from llmmw import events as ev
from llmmw.env import Env
from llmmw.stores import keeper as keeper_module
from llmmw.stores.base import Match
from llmmw.stores.disk import DiskStore
from llmmw.stores.entry import Entry, Header

DEEDS = {
    "delete the directory": "shutil.rmtree(place)",
    "delete the database": "os.unlink(db)",
    "delete the log": "os.unlink(db + '-wal')",
    "delete the log's index": "os.unlink(db + '-shm')",
    "scribble into the database": "scribble(db)",
    "scribble into the log": "scribble(db + '-wal')",
    "scribble into the log's index": "scribble(db + '-shm', 400)",
    "cut the database": "os.truncate(db, os.path.getsize(db) // 2)",
    "empty the database": "os.truncate(db, 0)",
    "lengthen the log": "open(db + '-wal', 'ab').write(os.urandom(2_000_000))",
    "put junk in its place": "open(db + '.j', 'wb').write(os.urandom(9_999)); os.rename(db + '.j', db)",
    "make it readable": "os.chmod(db, 0o644)",
    "lock it": "sql('BEGIN IMMEDIATE')",
    "lock it alone": "sql('PRAGMA locking_mode = EXCLUSIVE', 'BEGIN EXCLUSIVE')",
    "end the log": "sql('PRAGMA journal_mode = DELETE')",
    "drop the table": "sql('DROP TABLE Cache')",
    "empty the settings": "sql('DELETE FROM Settings')",
    "rewrite it": "sql('VACUUM')",
    "change values": "sql('UPDATE Cache SET value = randomblob(100) WHERE rowid % 3 = 0')",
    "exchange values": "sql('UPDATE Cache SET value = (SELECT value FROM Cache ORDER BY random() LIMIT 1)')",
    "name files": "sql('UPDATE Cache SET mode = abs(random() % 5), filename = \"../x\" WHERE rowid % 2 = 0')",
    "clear": "clear(place)",
    "prune": "prune(place)",
}

VANDAL = """
import os, shutil, sqlite3, sys
from llmmw.stores.upkeep import clear, prune
place = sys.argv[1]
db = place + "/cache.db"

def scribble(path, length=5_000):
    with open(path, "r+b") as file:
        file.seek(os.path.getsize(path) // 3)
        file.write(os.urandom(length))

def sql(*statements):
    connection = sqlite3.connect(db, timeout=1, isolation_level=None)
    try:
        for statement in statements:
            connection.execute(statement).fetchall()
    finally:
        connection.close()

for deed in sys.stdin:
    try:
        exec(deed)
    except Exception:
        pass  # it was spoilt already
    print("done", flush=True)
"""


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    monkeypatch.setattr(keeper_module, "_LAST_RETRY_S", 0.2)
    monkeypatch.setattr(keeper_module, "_MAX_QUARANTINES", 1_000)


def key(number):
    return hashlib.sha256(b"%d" % number).digest()


def data(number, size):
    return hashlib.sha256(b"data %d" % number).digest() * (size // 32)


def entry(number, size=64):
    return Entry(Header(time.time(), 300.0, tags=(f"t{number % 7}",)), data(number, size))


class Users:
    """Three stores that are used without end, and what they found."""

    def __init__(self, place):
        self.told = set()
        self.wrong = []
        self.hits = self.asked = 0
        self.stores = [DiskStore(place, Env(sinks=(self._note,)), max_bytes=2**22) for _ in range(3)]
        self._tasks = [asyncio.create_task(self._use(store, number)) for number, store in enumerate(self.stores)]

    def _note(self, event):
        if isinstance(event, ev.CacheTrouble):
            self.told.add(event.kind)

    async def _use(self, store, seed):
        rng = random.Random(seed)
        while True:
            number, lot = rng.randrange(150), rng.random()
            if lot < 0.6:
                found = await store.get(key(number))
                self.asked += 1
                if found is not None:
                    self.hits += 1
                    if found.data != data(number, len(found.data)) or len(found.data) < 32:
                        self.wrong.append(number)
            elif lot < 0.97:
                store.put(key(number), entry(number, rng.choice((64, 3_000, 40_000))), 300)
            elif lot < 0.99:
                store.delete(key(number))
            else:
                store.discard(Match("tag", f"t{number % 7}"))
            await asyncio.sleep(0.002 if len(store._backlog) > 100 else 0)

    async def some_use(self):
        """The stores work on for a while."""
        until = self.asked + 300
        while self.asked < until and not any(task.done() for task in self._tasks):
            await asyncio.sleep(0.001)
        self.check()

    def check(self):
        assert not self.wrong
        for task in self._tasks:
            assert not task.done(), task
        assert not any(store._keeper.given_up for store in self.stores)
        assert sum(thread.name == "llmmw-disk" for thread in threading.enumerate()) == len(self.stores)

    async def end(self):
        """The disk tier comes back: what each writes now, all read."""
        for task in self._tasks:
            task.cancel()
        written = range(1_000, 1_000 + len(self.stores))
        async with asyncio.timeout(120):  # a store that finds the damage only now begins with an empty database
            while not await self._all_read(written):
                for number, store in zip(written, self.stores, strict=True):
                    store.put(key(number), entry(number), 300)
                while any(store._backlog for store in self.stores):
                    await asyncio.sleep(0.001)

    async def _all_read(self, numbers):
        found = [(number, await store.get(key(number))) for number in numbers for store in self.stores]
        assert all(one is None or one.data == data(number, 64) for number, one in found)
        return all(one is not None for _, one in found)

    async def close(self):
        for task in self._tasks:
            task.cancel()
        for store in self.stores:
            await store.aclose()


@pytest.mark.parametrize("seed", seeds([1]))
async def test_the_disk_tier_outlives_every_vandal(tmp_path, seed):
    tmp_path.chmod(0o700)
    place = tmp_path / "cache"
    (tmp_path / "x").write_bytes(b"precious")
    vandal = await asyncio.create_subprocess_exec(
        sys.executable, "-c", VANDAL, str(place), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    users = Users(place)
    try:
        await users.some_use()
        deeds = list(DEEDS.values())
        random.Random(seed).shuffle(deeds)
        for deed in deeds:
            vandal.stdin.write(deed.encode() + b"\n")
            assert await vandal.stdout.readline() == b"done\n"
            await users.some_use()
        await users.end()
    finally:
        await users.close()
    assert users.hits
    assert users.told >= {"replaced", "corrupt"}
    assert (tmp_path / "x").read_bytes() == b"precious"
    links = Path("/proc/self/fd")
    open_files = [os.readlink(link) for link in links.iterdir() if link.is_symlink()] if links.exists() else []  # noqa: PTH115
    assert [name for name in open_files if str(place) in name] == []
    vandal.stdin.close()
    await vandal.wait()

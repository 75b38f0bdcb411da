"""Reading ahead: what is asked in the order in which it was stored is there before, and nothing stale is."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import sqlite3
import threading
import time

import pytest

from llmmw.env import Env
from llmmw.stores import ahead as ahead_module
from llmmw.stores.ahead import Ahead
from llmmw.stores.base import Match
from llmmw.stores.disk import DiskStore
from llmmw.stores.entry import Entry, Header


class Clock:
    """Time that goes on when told."""

    now = 0.0
    step = 0.0

    def monotonic(self):
        self.now += self.step
        return self.now


def entry(data=b"x", **fields):
    return Entry(Header(time.time(), 300.0, **fields), data)


def key(number):
    return b"%032d" % number


def test_more_is_taken_along_each_time_while_reads_go_on_in_order():
    ahead = Ahead(Clock())
    row, counts = 500, []
    for _ in range(8):
        counts.append(ahead.wanted(row, 0.0))
        ahead.fill((row + 1 + index, key(row), entry()) for index in range(counts[-1]))
        row += counts[-1] + 1
    assert counts == [0, 8, 16, 32, 64, 128, 128, 128]


def test_nothing_is_taken_along_out_of_order_or_from_a_slow_disk():
    ahead = Ahead(Clock())
    rng = random.Random(5)
    assert sum(ahead.wanted(rng.randrange(10**9), 0.0) for _ in range(1_000)) == 0
    ahead.wanted(1_000, 0.0)
    assert ahead.wanted(1_010, 0.0) == 8
    assert ahead.wanted(1_005, 0.0) == 0  # stored together with those, and read before
    assert ahead.wanted(1_020, 0.0) == 16
    assert ahead.wanted(1_021, 0.1) == 0
    assert ahead.wanted(1_022, 0.0) == 8


def test_what_is_taken_along_is_kept_for_a_second_and_given_once():
    clock = Clock()
    ahead = Ahead(clock)
    first, second = entry(), entry()
    ahead.fill([(1, b"1", first), (2, b"2", second), (3, b"3", entry())])
    assert ahead.take(b"1") is first
    assert ahead.take(b"1") is None
    ahead.forget(b"3")
    assert ahead.take(b"3") is None
    clock.now = 1.01
    assert ahead.take(b"2") is None


def test_a_disk_that_becomes_slow_is_left_after_five_milliseconds():
    clock = Clock()
    clock.step = 0.002
    ahead = Ahead(clock)
    asked = iter([(row, key(row), entry()) for row in range(100)])
    ahead.fill(asked)
    assert next(asked)[0] == 3


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setattr(ahead_module, "_QUICK_S", 20.0)
    monkeypatch.setattr(ahead_module, "_LONGEST_S", 20.0)
    monkeypatch.setattr(ahead_module, "_KEPT_S", 60.0)
    tmp_path.chmod(0o700)
    return tmp_path / "cache"


async def filled(place, count=100, data=b"answer", **options):
    """A store over a directory with so many rows."""
    writer = DiskStore(place, Env(), max_bytes=2**26, **options)
    for number in range(count):
        writer.put(key(number), entry(b"%d " % number + data, tags=(f"t{number % 3}",)), 300)
    await writer.aclose()
    return DiskStore(place, Env(), max_bytes=2**26, **options)


async def settled(store):
    async with asyncio.timeout(120):
        while store._backlog or store._backlog.discards:
            await asyncio.sleep(0.001)


async def test_a_program_that_runs_again_asks_the_thread_for_few_of_its_answers(place):
    store = await filled(place, 200)
    asked = 0
    for number in range(200):
        before = store._asked
        assert (await store.get(key(number))).data == b"%d answer" % number
        asked += store._asked - before
    assert asked <= 10
    await store.aclose()


async def test_what_was_read_ahead_is_answered_while_the_thread_is_stuck(place):
    store = await filled(place)
    for number in range(3):
        await store.get(key(number))
    free = threading.Event()
    store._io().read(free.wait)
    assert (await store.get(key(3))).data == b"3 answer"
    free.set()
    await store.aclose()


@pytest.mark.parametrize("wait", [False, True])
async def test_what_was_read_ahead_and_then_changed_is_not_served(place, wait):
    store = await filled(place)
    for number in range(15):
        assert await store.get(key(number)) is not None
    ahead = sorted(store._keeper.ahead._found)
    assert ahead[:3] == [key(15), key(16), key(17)]
    store.delete(key(15))
    newer = entry(b"newer")
    store.put(key(16), newer, 300)
    if wait:
        await settled(store)
    assert await store.get(key(15)) is None
    assert (await store.get(key(16))).data == b"newer"
    store.discard(Match("tag", "t2"))
    if wait:
        await settled(store)
    assert await store.get(key(17)) is None
    await settled(store)
    assert await store.get(key(18)) is not None
    await store.aclose()


async def test_what_was_read_ahead_goes_with_the_database(place):
    store = await filled(place)
    for number in range(12):
        assert await store.get(key(number)) is not None
    shutil.rmtree(place)
    assert await store.get(key(99)) is None  # the thread finds out
    assert await store.get(key(12)) is None
    await store.aclose()


async def test_broken_rows_and_long_ones_are_not_taken_along_and_are_dealt_with_when_asked_for(place):
    store = await filled(place)
    database = sqlite3.connect(place / "cache.db", isolation_level=None)
    database.execute("UPDATE Cache SET value = randomblob(80) WHERE key = ?", (key(5),))
    database.execute("UPDATE Cache SET key = 7 WHERE key = ?", (key(6),))
    database.execute("UPDATE Cache SET mode = 4, filename = 'x' WHERE key = ?", (key(7),))
    database.close()
    store.put(key(8), entry(b"l" * 20_000), 300)
    await settled(store)
    for number in range(20):
        found = await store.get(key(number))
        assert (found is None) is (number in {5, 6, 7}), number
    assert len((await store.get(key(8))).data) == 20_000
    await store.aclose()
    database = sqlite3.connect(place / "cache.db")
    assert database.execute("SELECT count(*) FROM Cache WHERE key = ?", (key(5),)).fetchone() == (0,)
    database.close()


async def test_of_many_long_rows_no_more_are_looked_at_than_are_taken_along(place):
    store = DiskStore(place, Env(), max_bytes=2**26)
    for number in range(60):
        store.put(key(number), entry(b"l" * (20_000 if 2 <= number < 50 else 20)), 300)
        await settled(store)
    for number in range(2):
        assert await store.get(key(number)) is not None
    assert store._keeper.ahead._found == {}  # not the short ones behind the long ones
    for number in range(2, 30):
        assert len((await store.get(key(number))).data) == 20_000
    assert store._keeper.ahead._window == 0
    await store.aclose()


async def test_damage_found_while_reading_ahead_is_nobodys_miss(place, monkeypatch):
    store = await filled(place)
    assert await store.get(key(0)) is not None

    def fail(*_):
        raise sqlite3.DatabaseError("malformed")

    monkeypatch.setattr(store._keeper._rows, "following", fail)
    for number in range(1, 20):
        assert await store.get(key(number)) is not None
    await store.aclose()


@pytest.mark.parametrize("seed", range(3))
async def test_whatever_is_done_in_whatever_order_the_latest_is_read(place, seed):
    rng = random.Random(seed)
    store = await filled(place, 60)
    model = {number: b"%d answer" % number for number in range(60)}
    at = 0
    for step in range(1_500):
        lot = rng.random()
        if lot < 0.75:
            at = (at + 1) % 80 if rng.random() < 0.95 else rng.randrange(80)
            found = await store.get(key(at))
            if found is None and store._backlog.discards:
                continue  # cannot be told yet
            assert (found and found.data) == model.get(at), (step, at)
        elif lot < 0.85:
            number = (at + rng.randrange(6)) % 80
            model[number] = os.urandom(8)
            store.put(key(number), entry(model[number], tags=(f"t{number % 3}",)), 300)
        elif lot < 0.95:
            number = (at + rng.randrange(6)) % 80
            model.pop(number, None)
            store.delete(key(number))
        elif lot < 0.96:
            tag = rng.randrange(3)
            store.discard(Match("tag", f"t{tag}"))
            model = {number: data for number, data in model.items() if number % 3 != tag}
        else:
            await settled(store)
    await store.aclose()

"""Leases: one of several processes asks, the others wait for its entry; losing a lease costs a call, no wrong data."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import sqlite3

import pytest

from llmmw.call import Reply
from llmmw.env import Env
from llmmw.errors import ConfigError
from llmmw.events import CacheTrouble, Warned
from llmmw.layers.cache import TTLCache
from llmmw.layers.coalesce import Coalescer
from llmmw.stores.leasetable import FOLDER, Table
from llmmw.testing.fake import FakeUpstream, chat_body, chat_call, chat_chunks


@pytest.fixture
def place(tmp_path):
    tmp_path.chmod(0o700)
    return tmp_path / "cache"


class Ahead:
    """A clock whose wall time is ahead: of the same machine, but seen later."""

    def __init__(self, ahead_s):
        self._env = Env().clock
        self._ahead_s = ahead_s
        self.monotonic, self.sleep = self._env.monotonic, self._env.sleep

    def wall(self):
        return self._env.wall() + self._ahead_s


class Process:
    """What another process would have: an engine of its own on the same directory."""

    def __init__(self, directory, *, lease="30s", ahead_s=0.0, finish_orphans=False, **options):
        self.told = []
        self.upstream = FakeUpstream()
        env = Env(clock=Ahead(ahead_s), sinks=(self.told.append,))
        self.coalescer = Coalescer(lease=lease, finish_orphans=finish_orphans).bind(self._answer, env)
        self.cache = TTLCache(options.pop("ttl", 300), directory=directory, **options).bind(self.coalescer, env)
        self.standings = []
        if self.cache._store.backing is not None:
            self._note_standings(self.cache._store.backing._table)
        self.asked = asyncio.Event()
        self.go = asyncio.Event()
        self.answers = []

    def _note_standings(self, table):
        take = table.take

        def noted(key, lease_s, *, followed):
            standing = take(key, lease_s, followed=followed)
            self.standings.append(standing and standing.how)
            return standing

        table.take = noted

    async def _answer(self, call):
        self.asked.set()
        await self.go.wait()
        if self.answers:
            raise self.answers.pop()
        return await self.upstream(call)

    def ask(self, **fields):
        return asyncio.create_task(self._ask(fields))

    async def _ask(self, fields):
        reply = await self.cache(chat_call(temperature=0, **fields))
        if reply.chunks is None:
            return reply.source, reply.text
        return reply.source, [chunk async for chunk in reply.chunks]

    async def aclose(self):
        await self.coalescer.aclose()
        await self.cache.aclose()

    def troubles(self):
        return [event.kind for event in self.told if isinstance(event, CacheTrouble)]

    def warnings(self):
        return [event.kind for event in self.told if isinstance(event, Warned)]

    @property
    def count(self):
        return len(self.upstream.calls)


def leases(place):
    connection = sqlite3.connect(place / FOLDER / "cache.db")
    try:
        return connection.execute("SELECT fence FROM Lease ORDER BY fence").fetchall()
    finally:
        connection.close()


async def seen(condition):
    async with asyncio.timeout(120):
        while not condition():
            await asyncio.sleep(0.001)


async def closed(*processes):
    for process in processes:
        await process.aclose()


def test_a_lease_has_a_length():
    assert Coalescer(lease="10s").lease == 10.0
    for wrong in (0, -1, "soon"):
        with pytest.raises(ConfigError, match="lease"):
            Coalescer(lease=wrong)


@pytest.mark.parametrize("stream", [False, True])
async def test_coalesce_12_of_several_processes_one_asks_and_all_have_its_answer(place, stream):
    processes = [Process(place) for _ in range(4)]
    first = processes[0].ask(stream=stream)
    await processes[0].asked.wait()
    others = [process.ask(stream=stream) for process in processes[1:] for _ in range(3)]
    for process in processes:
        process.go.set()
    (source, answer), *found = await asyncio.gather(first, *others)
    assert (source, answer) == ("upstream", chat_chunks("echo: hello") if stream else "echo: hello")
    assert [text for _, text in found] == [answer] * 9
    assert {source for source, _ in found} <= {"cache", "coalesced"}
    assert [process.count for process in processes] == [1, 0, 0, 0]
    await closed(*processes)
    assert leases(place) == []


async def test_a_lease_is_held_until_the_stream_is_stored(place):
    one, other = Process(place), Process(place)
    one.go.set()
    reply = await one.cache(chat_call(temperature=0, stream=True))
    assert len(leases(place)) == 1
    waiting = other.ask(stream=True)
    chunks = [chunk async for chunk in reply.chunks]
    assert await waiting == ("cache", chunks)
    await closed(one, other)


async def test_a_failed_call_gives_the_lease_back_and_who_waited_asks(place):
    one, other = Process(place), Process(place)
    one.answers = [ValueError("broke")]
    first = one.ask()
    await one.asked.wait()
    second = other.ask()
    await seen(lambda: "held" in other.standings)
    one.go.set()
    other.go.set()
    with pytest.raises(ValueError, match="broke"):
        await first
    assert await second == ("upstream", "echo: hello")
    await closed(one, other)
    assert leases(place) == []


async def test_an_answer_that_is_not_stored_makes_no_queue_of_processes(place):
    """Each would else wait for the one before it, and the last for all."""
    processes = [Process(place) for _ in range(4)]
    for process in processes:
        process.upstream._script = [Reply(data=chat_body("cut off", finish="length"))]
    first = processes[0].ask()
    await processes[0].asked.wait()
    others = [process.ask() for process in processes[1:]]
    await seen(lambda: all("held" in process.standings for process in processes[1:]))
    processes[0].go.set()
    assert await first == ("upstream", "cut off")
    for process in processes[1:]:
        await process.asked.wait()  # all at once: none of them has answered
        assert process.count == 0
    for process in processes[1:]:
        process.go.set()
    assert await asyncio.gather(*others) == [("upstream", "cut off")] * 3
    await closed(*processes)
    assert leases(place) == []


async def test_coalesce_12_who_lost_the_lease_answers_its_caller_and_stores_nothing(place):
    one, other = Process(place, lease="2s"), Process(place, lease="2s", ahead_s=4)
    one.upstream._script = [Reply(data=chat_body("late"))]
    first = one.ask()
    await one.asked.wait()
    second = other.ask()
    await other.asked.wait()  # for it, the lease of the first is over
    one.go.set()
    assert await first == ("upstream", "late")
    await seen(lambda: one.troubles() == ["write under a lost lease"])
    other.go.set()
    assert await second == ("upstream", "echo: hello")
    await closed(one, other)
    third = Process(place, ahead_s=4)
    assert await third.ask() == ("cache", "echo: hello")
    await closed(third)


async def test_a_running_call_renews_its_lease(place):
    one, other = Process(place, lease="0.3s"), Process(place, lease="0.3s")
    first = one.ask()
    await one.asked.wait()
    held = leases(place)
    connection = sqlite3.connect(place / FOLDER / "cache.db")
    ends = {connection.execute("SELECT until FROM Lease").fetchone()}

    def renewed_twice():
        ends.add(connection.execute("SELECT until FROM Lease").fetchone())
        return len(ends) == 3

    await seen(renewed_twice)
    connection.close()
    assert leases(place) == held
    one.go.set()
    assert (await first)[0] == "upstream"
    assert (await other.ask())[0] == "cache"
    await closed(one, other)


async def test_cancelled_while_it_asks_for_the_lease_it_leaves_none(place):
    rng = random.Random(1)
    one = Process(place)
    for lap in range(20):
        task = one.ask(prompt=str(lap))
        for _ in range(rng.randrange(5)):
            await asyncio.sleep(0)
        if rng.random() < 0.5:
            await asyncio.sleep(0.002)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    one.go.set()
    assert (await one.ask(prompt="last"))[0] == "upstream"
    await seen(lambda: not leases(place))
    await closed(one)


async def test_cancelled_while_it_waits_it_does_not_disturb_the_holder(place):
    one, other = Process(place), Process(place)
    first = one.ask()
    await one.asked.wait()
    second = other.ask()
    await seen(lambda: "held" in other.standings)
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second
    assert len(leases(place)) == 1
    one.go.set()
    assert (await first)[0] == "upstream"
    await closed(one, other)


async def test_a_close_gives_leases_back(place):
    one = Process(place, finish_orphans=True)
    task = one.ask()
    await one.asked.wait()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await one.cache.aclose()
    assert leases(place) == []
    await one.coalescer.aclose()


def delete_folder(place):
    shutil.rmtree(place / FOLDER)


def delete_log(place):
    (place / FOLDER / "cache.db-wal").unlink()


@pytest.mark.parametrize("spoil", [delete_folder, delete_log])
def test_a_lease_table_deleted_while_it_is_open_is_soon_shared_again(place, spoil):
    env = Env()
    one, two = (Table(place, env, network=False) for _ in range(2))
    (place / FOLDER).mkdir(parents=True, mode=0o700)
    for key in (b"1", b"2"):
        assert one.take(key, 30.0, followed=False).how == "taken"
    spoil(place)
    two.take(b"3", 30.0, followed=False)  # finds out
    two._retry_at = 0.0
    assert two.take(b"k", 30.0, followed=False).how == "taken"
    assert one.take(b"k", 30.0, followed=False).how == "held"
    one.close()
    assert two.take(b"k", 30.0, followed=False).how == "taken"
    two.close()


async def test_a_broken_lease_table_is_put_aside_and_costs_a_duplicate_at_most(place):
    (place / FOLDER).mkdir(parents=True)
    for folder in (place, place / FOLDER):
        folder.chmod(0o700)
    (place / FOLDER / "cache.db").write_bytes(b"garbage" * 1000)
    (place / FOLDER / "cache.db").chmod(0o600)
    one = Process(place)
    one.go.set()
    assert await one.ask() == ("upstream", "echo: hello")
    assert await one.ask() == ("cache", "echo: hello")
    assert one.warnings() == ["cache: lease"]
    await closed(one)
    assert [path.name for path in (place / FOLDER).iterdir() if "corrupt" in path.name]
    two = Process(place)
    two.go.set()
    assert await two.ask(prompt="new") == ("upstream", "echo: new")
    assert two.troubles() == []
    await closed(two)


async def test_a_lease_that_cannot_be_told_is_done_without(place):
    one = Process(place)
    one.go.set()
    await one.ask(prompt="open")
    await seen(lambda: not leases(place))
    lock = sqlite3.connect(place / FOLDER / "cache.db", isolation_level=None)
    lock.execute("BEGIN IMMEDIATE")
    assert await one.ask() == ("upstream", "echo: hello")
    lock.close()
    assert await one.ask() == ("cache", "echo: hello")
    await closed(one)


async def test_rows_of_another_clock_or_kind_count_as_over(place):
    one = Process(place)
    one.go.set()
    await one.ask(prompt="open")
    await seen(lambda: not leases(place))
    connection = sqlite3.connect(place / FOLDER / "cache.db")
    far = Env().clock.wall() + 10_000
    for until in (far, "text", None, b"blob"):
        two = Process(place)
        first = two.ask(prompt=str(until))
        await two.asked.wait()
        with connection:
            connection.execute("UPDATE Lease SET until = ?, owner = 'x'", (until,))
        three = Process(place)
        three.go.set()
        assert (await three.ask(prompt=str(until)))[0] == "upstream"
        two.go.set()
        assert (await first)[0] == "upstream"
        await closed(two, three)
    connection.close()
    await closed(one)


async def test_without_a_directory_the_user_is_told_once(place):
    one = Process(None)
    one.go.set()
    assert [(await one.ask(prompt=prompt))[0] for prompt in "ab"] == ["upstream"] * 2
    assert one.warnings() == ["coalesce: lease"]
    await closed(one)


@pytest.mark.parametrize("mode", ["read", "write", "off"])
async def test_who_does_not_both_look_and_store_takes_no_lease(place, mode):
    one = Process(place, mode=mode)
    task = one.ask()
    await one.asked.wait()
    assert not (place / FOLDER).exists()
    one.go.set()
    assert (await task)[0] == "upstream"
    await closed(one)


async def test_a_lease_is_shorter_than_the_life_of_what_it_is_for(place):
    one = Process(place, lease="1h", ttl=20)
    task = one.ask()
    await one.asked.wait()
    connection = sqlite3.connect(place / FOLDER / "cache.db")
    assert connection.execute("SELECT seconds FROM Lease").fetchall() == [(10.0,)]
    connection.close()
    one.go.set()
    assert (await task)[0] == "upstream"
    await closed(one)


async def test_a_fork_leaves_the_parents_leases_as_they_are(place):
    one = Process(place)
    task = one.ask()
    await one.asked.wait()
    held = leases(place)
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    assert leases(place) == held
    again = one.ask(stream=True)  # another flight of the same entry: the lease is our own, and it takes it over
    await seen(lambda: leases(place) not in (held, []))
    one.go.set()
    assert (await task)[0] == "upstream"
    assert (await again)[0] in {"upstream", "cache"}  # from memory, if the first has landed by then
    await closed(one)
    assert leases(place) == []
    assert one.troubles() in ([], ["write under a lost lease"])


async def test_what_goes_wrong_while_it_looks_once_more_gives_the_lease_back(place):
    one = Process(place)
    fetch = one.cache._store.fetch
    looks = []

    async def broken(key):
        looks.append(key)
        if len(looks) == 2:  # the first is the caller's own
            raise MemoryError
        return await fetch(key)

    one.cache._store.fetch = broken
    with pytest.raises(MemoryError):
        await one.ask()
    await seen(lambda: not leases(place))
    one.go.set()
    assert (await one.ask())[0] == "upstream"
    await closed(one)


async def test_a_lease_folder_that_must_not_be_used_costs_a_duplicate_at_most(place):
    (place / FOLDER).mkdir(parents=True)
    place.chmod(0o700)
    (place / FOLDER).chmod(0o777)  # anybody could exchange what is in it
    one = Process(place)
    one.go.set()
    assert [(await one.ask())[0] for _ in range(2)] == ["upstream", "cache"]
    assert one.warnings() == ["cache: lease"]
    assert not list((place / FOLDER).iterdir())
    await closed(one)


async def test_a_table_spoilt_while_it_is_used_is_put_aside_and_the_answer_given(place):
    one = Process(place)
    task = one.ask()
    await one.asked.wait()
    database = place / FOLDER / "cache.db"
    connection = sqlite3.connect(database)
    connection.execute("DROP TABLE Lease")
    connection.close()
    one.go.set()
    assert (await task)[0] == "upstream"
    await seen(lambda: "write under a lost lease" in one.troubles())  # what cannot be told is not written
    assert (await one.ask())[0] == "cache"
    await closed(one)

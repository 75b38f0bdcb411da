"""The shared counter's file: exact between real processes, and whatever happens to it, calls go on."""

import asyncio
import json
import os
import sqlite3
import subprocess
import sys
import threading

import pytest

from llmmw.call import Context
from llmmw.env import Env
from llmmw.errors import RateLimited
from llmmw.events import Warned
from llmmw.layers.limit import RateLimiter
from llmmw.layers.shared import SharedCounter
from llmmw.stores.counter import CounterStore, FileCounter
from llmmw.stores.place import Refused
from llmmw.testing.fake import FakeUpstream, chat_call

FILE = "limits.db"

WORKER = """
import asyncio, json, sys
from llmmw import RateLimiter, SharedCounter
from llmmw.call import Context
from llmmw.env import Env
from llmmw.errors import RateLimited
from llmmw.testing.fake import FakeUpstream, chat_call

async def main():
    clock = Env().clock
    upstream = FakeUpstream()
    layer = RateLimiter(rpm=60, window=3600, burst=60, shared=SharedCounter(sys.argv[1], patience=20))
    limiter = layer.bind(upstream, Env())

    async def ask():
        try:
            await limiter(chat_call(context=Context(deadline=clock.monotonic() + 60)))
        except RateLimited:
            pass

    for line in iter(sys.stdin.readline, ""):
        await asyncio.gather(*(ask() for _ in range(int(line))))
        print(json.dumps([len(upstream.calls), limiter.gauges()["shared_lost"]]), flush=True)
    await limiter.aclose()

asyncio.run(main())
"""


class Workers:
    """Real processes that make calls when told."""

    def __init__(self, directory, count):
        command = [sys.executable, "-c", WORKER, str(directory)]
        self.processes = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(count)
        ]

    def calls(self, count):
        for process in self.processes:
            process.stdin.write(f"{count}\n")
            process.stdin.flush()
        return [json.loads(process.stdout.readline()) for process in self.processes]

    def close(self):
        for process in self.processes:
            process.stdin.close()
        codes = [process.wait(120) for process in self.processes]
        for process in self.processes:
            process.stdout.close()
        return codes


def test_limit_11_four_real_processes_share_sixty_exactly_and_lose_the_file(tmp_path):
    workers = Workers(tmp_path / "limits", 4)
    first = workers.calls(5)
    assert first == [[5, 0]] * 4
    second = workers.calls(30)
    assert sum(count for count, _ in second) == 60
    (tmp_path / "limits" / FILE).write_bytes(b"not a database" * 1000)
    for companion in ("-wal", "-shm"):
        (tmp_path / "limits" / f"{FILE}{companion}").unlink()
    third = workers.calls(30)
    assert sum(count for count, _ in third) == 60
    assert workers.close() == [0] * 4


async def ask(limiter, seconds=30.0):
    deadline = Env().clock.monotonic() + seconds
    return await limiter(chat_call(context=Context(deadline=deadline)))


def limiter(directory, *, events=None, **options):
    sinks = () if events is None else (events.append,)
    shared = SharedCounter(directory, **{"patience": 20} | options)
    return RateLimiter(rpm=1000, burst=1000, window=3600, shared=shared).bind(FakeUpstream(), Env(sinks=sinks))


def add(old, now):
    return (old or b"") + b"x", (len(old or b"") + 1, now)


async def test_updates_are_atomic_and_the_clock_runs_forward(tmp_path):
    stores = [FileCounter(str(tmp_path / "d"), 5.0) for _ in range(3)]
    assert isinstance(stores[0], CounterStore)
    found = await asyncio.gather(*(store.update(b"b", add) for _ in range(20) for store in stores))
    assert sorted(number for number, _ in found) == list(range(1, 61))
    times = [now for _, now in sorted(found)]
    assert times == sorted(times)
    assert (await stores[0].update(b"other", add))[0] == 1
    for store in stores:
        await store.aclose()
        await store.aclose()
    assert "d" in repr(stores[0])


async def test_the_file_is_private(tmp_path):
    bound = limiter(tmp_path / "new" / "deep")
    assert (await ask(bound)).ok
    found = (tmp_path / "new" / "deep" / FILE).stat()
    assert found.st_mode & 0o777 == 0o600
    assert (tmp_path / "new").stat().st_mode & 0o077 == 0
    await bound.aclose()


async def test_a_place_that_is_not_ours_is_not_used_and_calls_go_on(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    store = FileCounter(str(tmp_path / "link"), 1.0)
    with pytest.raises(Refused):
        await store.update(b"b", add)
    await store.aclose()
    events = []
    bound = limiter(tmp_path / "link", events=events)
    assert (await ask(bound)).ok
    assert bound.gauges()["shared_lost"] == 1
    assert [event.kind for event in events if isinstance(event, Warned)] == ["shared-counter"]
    assert list((tmp_path / "real").iterdir()) == []
    await bound.aclose()


async def test_a_file_that_is_none_is_put_aside(tmp_path):
    tmp_path.chmod(0o700)
    (tmp_path / FILE).write_bytes(b"garbage" * 1000)
    store = FileCounter(str(tmp_path), 1.0)
    with pytest.raises(sqlite3.DatabaseError):
        await store.update(b"b", add)
    assert (await store.update(b"b", add))[0] == 1
    await store.aclose()
    assert [path for path in tmp_path.iterdir() if ".corrupt-" in path.name]


async def test_a_log_gone_under_those_who_have_it_open_keeps_nobody_out_for_ever(tmp_path):
    one, two = (FileCounter(str(tmp_path / "d"), 1.0) for _ in range(2))
    for _ in range(3):
        await one.update(b"b", add)
    (tmp_path / "d" / f"{FILE}-wal").unlink()
    with pytest.raises(sqlite3.OperationalError):
        await two.update(b"b", add)
    assert (await two.update(b"b", add))[0] == 1
    with pytest.raises(FileNotFoundError):
        await one.update(b"b", add)
    assert (await one.update(b"b", add))[0] == 2
    await one.aclose()
    await two.aclose()


async def test_a_file_that_was_exchanged_is_noticed(tmp_path):
    store = FileCounter(str(tmp_path / "d"), 1.0)
    await store.update(b"b", add)
    for path in (tmp_path / "d").iterdir():
        path.unlink()
    with pytest.raises(FileNotFoundError):
        await store.update(b"b", add)
    assert (await store.update(b"b", add))[0] == 1
    await store.aclose()


async def test_rows_of_a_foreign_hand_do_not_stop_calls(tmp_path):
    bound = limiter(tmp_path / "d")
    await ask(bound)
    spent = FileCounter(str(tmp_path / "d"), 5.0)
    with sqlite3.connect(tmp_path / "d" / FILE) as database:
        database.execute("UPDATE buckets SET state = 'text'")
    database.close()
    (bucket,) = {gate.allowance.leases._bucket for gate in bound._gates.values()}
    assert await spent.update(bucket, lambda old, now: (b"x", old)) == b""
    with pytest.raises(RateLimited):  # what cannot be read counts as a limit just spent
        await ask(bound)
    assert not bound.gauges()["shared_lost"]
    await spent.aclose()
    await bound.aclose()


async def test_a_lock_held_by_somebody_else_loses_the_counter_and_not_the_call(tmp_path):
    events = []
    bound = limiter(tmp_path / "d", events=events, processes=2)
    await ask(bound)
    (leases,) = (gate.allowance.leases for gate in bound._gates.values())
    patience_s, leases._patience_s = leases._patience_s, 0.2  # while nobody else makes it wait, a slow machine may
    holder = sqlite3.connect(tmp_path / "d" / FILE, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    with pytest.raises(RateLimited):  # what the counter may have granted has to leave the window first
        await ask(bound, seconds=0.5)
    assert bound.gauges()["shared_lost"] == 1
    holder.execute("ROLLBACK")
    holder.close()
    leases._patience_s = patience_s
    while bound.gauges()["shared_lost"]:
        await asyncio.gather(ask(bound, seconds=1.0), return_exceptions=True)
    assert (await ask(bound)).ok
    assert [event.kind for event in events if isinstance(event, Warned)] == ["shared-counter"]
    await bound.aclose()


def test_a_new_loop_and_a_forked_child_go_on(tmp_path):
    bound = limiter(tmp_path / "d")
    assert asyncio.run(ask(bound)).ok
    bound.rehome()
    assert asyncio.run(ask(bound)).ok
    bound.rehome()
    child = os.fork()
    if not child:  # pragma: no cover — coverage does not see the child
        bound.rehome()
        code = 1
        try:
            code = 0 if asyncio.run(ask(bound)).ok else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert asyncio.run(ask(bound)).ok
    asyncio.run(bound.aclose())
    for thread in threading.enumerate():
        if thread.name == "llmmw-counter":
            thread.join(120)
            assert not thread.is_alive()


async def test_a_file_that_was_replaced_is_noticed_and_the_new_one_is_used(tmp_path):
    store = FileCounter(str(tmp_path / "d"), 5.0)
    assert (await store.update(b"b", add))[0] == 1
    for path in (tmp_path / "d").iterdir():
        path.unlink()
    with pytest.raises(FileNotFoundError):
        await store.update(b"b", add)
    other = FileCounter(str(tmp_path / "d"), 5.0)
    assert (await other.update(b"b", add))[0] == 1
    assert (await store.update(b"b", add))[0] == 2
    await store.aclose()
    await other.aclose()


async def test_a_change_that_fails_leaves_the_state_as_it_was(tmp_path):
    store = FileCounter(str(tmp_path / "d"), 5.0)
    await store.update(b"b", add)
    with pytest.raises(ZeroDivisionError):
        await store.update(b"b", lambda old, now: 1 // 0)
    assert (await store.update(b"b", add))[0] == 2
    await store.aclose()


async def test_after_a_fork_thread_and_handle_are_the_child_s_own(tmp_path, monkeypatch):
    parent = FileCounter(str(tmp_path / "d"), 5.0)
    await parent.update(b"b", add)
    thread, database = parent._thread, parent._database
    monkeypatch.setattr("os.getpid", lambda: 4321)
    assert (await parent.update(b"b", add))[0] == 2
    assert parent._thread is not thread
    assert parent._database is not database
    await parent.aclose()
    thread.stop()
    database.close()


async def test_an_update_that_nobody_waits_for_any_more_is_harmless(tmp_path):
    store = FileCounter(str(tmp_path / "d"), 5.0)
    going_on = threading.Event()

    def slowly(old, now):
        going_on.wait(120)
        return add(old, now)

    waiting = asyncio.ensure_future(store.update(b"b", slowly))
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait([waiting])
    going_on.set()
    assert (await store.update(b"b", add))[0] == 2
    await store.aclose()

"""Whole processes: silent from start to exit in debug mode, forks of a warm client, uvloop, a hundred engines."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import multiprocessing
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import patience
import pytest
import uvloop

from llmmw import Client, SyncClient

MODEL = "llmmw-embedded"


def question(text) -> dict:
    return {"model": MODEL, "messages": [{"role": "user", "content": str(text)}], "temperature": 0}


def held() -> tuple[int, list[str]]:
    """Open descriptors, and llmmw's threads; without what an earlier test has left to the collector."""
    gc.collect()
    count = 0
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the listing's own
            entry.readlink()
            count += 1
    return count, [thread.name for thread in threading.enumerate() if thread.name.startswith("llmmw")]


def one_life(server, stack, number):
    async def main():
        async with Client(server.base_url, stack=stack) as client:
            await client.chat(**question(number))
            return [piece async for piece in client.stream(**question(f"stream {number}"))]

    assert asyncio.run(main())
    with SyncClient(server.base_url, stack=stack) as client:
        assert client.chat(**question(number)).source == "cache"  # from disk: this engine never asked
        assert client.chat(**question(f"sync {number}")).ok


def test_async_a_hundred_engines_leave_descriptors_and_threads_as_they_were(server, stack):
    one_life(server, stack, "first")
    before = held()
    for number in range(50):
        one_life(server, stack, number)
    gc.collect()
    assert held() == before
    server.wait(at_most={"connections.open": 1})


def test_async_one_run_per_step_keeps_what_is_held_as_it_was(server, stack):
    """As simulations do it; a thousand steps were tried by hand, with the same end."""
    client = Client(server.base_url, stack=stack)

    async def step(number):
        texts = [question(f"{number} {n % 3}") for n in range(6)]
        replies = await asyncio.gather(*(client.chat(**text) for text in texts))
        async for _ in client.stream(**question(f"stream {number}")):
            if number % 2:
                break
        assert all(reply.ok for reply in replies)

    for number in range(5):
        asyncio.run(step(number))
    before = held()
    for number in range(5, 105):
        asyncio.run(step(number))
    assert held() == before
    stats = client.get_performance_stats()
    assert (stats["request_count"], stats["in_flight"], stats["coalesced"]) == (105 * 7, 0, 105 * 3)
    asyncio.run(client.aclose())
    server.wait(at_most={"connections.open": 1})


# ── silence ────────────────────────────────────────────────────────────────────────────────────────────────────────

HEAD = """
import asyncio, logging, sys, threading, warnings
from concurrent.futures import ThreadPoolExecutor
import llmmw, openai
from llmmw import Client, Stack, SyncClient
logging.basicConfig()
logging.getLogger("asyncio").setLevel(logging.ERROR)  # a loaded machine's slow callbacks are no news
warnings.filterwarnings("ignore", "coroutine 'connect_tcp", RuntimeWarning)  # anyio's, of a connect cut off early
url, directory = sys.argv[1:]
stack = Stack.recommended(cache_ttl=300, cache_directory=directory)
asked = lambda text: {"model": "llmmw-embedded", "messages": [{"role": "user", "content": text}], "temperature": 0}
"""

WAYS_IN = """
inner = Client(url, stack=Stack())
@stack.wrap
async def function(text): return (await inner.chat(**asked(text))).text
@stack.wrap
def plain(text): return text.upper()
client, sync_client = Client(url, stack=stack), SyncClient(url, stack=stack)
http = llmmw.httpx2_client(stack)
sdk = llmmw.wrap_client(openai.AsyncOpenAI(base_url=url, api_key="k"), stack)

async def all_of_them(name):
    async for _ in client.stream(**asked(f"{name} left early")):
        break
    return await asyncio.gather(
        function(f"{name} 1"), client.chat(**asked(f"{name} 2")), sdk.chat.completions.create(**asked(f"{name} 3")),
        http.post(f"{url}/chat/completions", json=asked(f"{name} 4")),
        asyncio.to_thread(plain, name), asyncio.to_thread(lambda: sync_client.chat(**asked(f"{name} 5"))))

for run in range(5):
    asyncio.run(all_of_them(f"run {run}"))
with ThreadPoolExecutor(8) as pool:
    list(pool.map(lambda n: asyncio.run(all_of_them(f"thread {n % 4}")), range(8)))

async def notebook():
    print(plain("cell"), sync_client.chat(**asked("cell")).ok)
    await all_of_them("cell")
asyncio.run(notebook())

async def cancelled():
    try:
        async with asyncio.timeout(0.02):
            await all_of_them("late")
            await asyncio.Event().wait()
    except TimeoutError:
        pass
asyncio.run(cancelled())

async def close():
    for closing in (function.aclose, inner.aclose, client.aclose, http.aclose, sdk.close):
        await closing()
        await closing()
    plain.close()
    sync_client.close()
    assert asyncio.all_tasks() == {asyncio.current_task()}
asyncio.run(close())
assert threading.enumerate() == [threading.main_thread()], threading.enumerate()
"""

INTERRUPTED = """
async def main():
    async with Client(url, stack=stack) as client:
        async with asyncio.TaskGroup() as group:
            group.create_task(client.chat(**asked("in flight")))
            await client.chat(**asked("one"))
            raise KeyboardInterrupt
try:
    asyncio.run(main())
except KeyboardInterrupt:
    pass
with SyncClient(url, stack=stack) as client:
    try:
        for piece in client.stream(**asked("a stream")):
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
assert threading.enumerate() == [threading.main_thread()], threading.enumerate()
"""

DYING_HOME = """
from llmmw.testing.server import ServerProcess
server = ServerProcess()
server.url = url.removesuffix("/v1")
client = Client(url, stack=stack)
async def home(pool):
    await client.chat(**asked("home"))
    await asyncio.to_thread(server.configure, latency_s=3600)  # none is answered before the home dies
    asked_there = [pool.submit(lambda n=n: asyncio.run(client.chat(**asked(f"guest {n}")))) for n in range(8)]
    while client.get_performance_stats()["in_flight"] < 8:
        await asyncio.sleep(0)
    await asyncio.to_thread(server.configure, latency_s=0.005)
    return asked_there
with ThreadPoolExecutor(8) as pool:
    assert all(future.result(120).ok for future in asyncio.run(home(pool)))
client.engine.close()
assert client.get_performance_stats()["in_flight"] == 0
"""

NEVER_CLOSED = """
@stack.wrap
def plain(text): return text
plain("and then the script simply ends")
"""


@pytest.mark.parametrize(
    "body", [WAYS_IN, INTERRUPTED, DYING_HOME, NEVER_CLOSED], ids=["ways", "interrupted", "dying home", "never closed"]
)
def test_async_debug_mode_stays_silent(server, tmp_path, body):
    found = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", patience.FOR_A_CHILD + HEAD + body,
         server.base_url, str(tmp_path / "cache")],
        capture_output=True, text=True, timeout=240, check=False,
        env={"PYTHONASYNCIODEBUG": "1", "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert (found.stderr, found.returncode) == ("", 0)
    server.wait(at_most={"connections.open": 1, "in_flight": 0})


# ── forks, uvloop, the garbage collector ───────────────────────────────────────────────────────────────────────────


def _child(ask, answers):
    answers.put(ask())


@pytest.mark.parametrize("kind", [Client, SyncClient])
def test_async_a_fork_of_a_warm_client_works_in_both_processes(server, stack, kind):
    client = kind(server.base_url, stack=stack)

    def ask(text):
        answer = client.chat(**question(text))
        return (asyncio.run(answer) if kind is Client else answer).text

    ask("warm")
    if kind is Client:
        client.engine.__enter__()  # its home is a thread, with sockets that live
        ask("warmer")
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    children = [context.Process(target=_child, args=(lambda n=n: ask(f"child {n}"), answers)) for n in range(2)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # a fork with threads, which is the point
        for child in children:
            child.start()
    assert ask("parent meanwhile")
    for child in children:
        assert answers.get()
        child.join(120)
        assert child.exitcode == 0
    assert ask("parent afterwards")
    assert server.stats()["by_outcome"].get("aborted", 0) == 0
    client.engine.close()
    server.wait(at_most={"connections.open": 1})


def test_async_uvloop_home_runs_guests_and_close(server, stack):
    uvloop.new_event_loop().close()  # it opens two descriptors for itself, once
    before = held()
    client = Client(server.base_url, stack=stack)

    async def guest(name):
        return (await client.chat(**question(name))).text

    async def main(number):
        own, other = await asyncio.gather(guest(f"own {number}"), asyncio.to_thread(asyncio.run, guest(f"{number}")))
        pieces = [piece async for piece in client.stream(**question(f"stream {number}"))]
        assert pieces
        return own, other

    for number in range(3):
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            assert all(runner.run(main(number)))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(client.aclose())
    gc.collect()
    assert held() == before
    server.wait(at_most={"connections.open": 1})


def test_async_a_uvloop_home_that_dies_mid_call_serves_its_guest(server, stack, caplog):
    client = Client(server.base_url, stack=stack)
    found = []
    guest = threading.Thread(target=lambda: found.append(asyncio.run(client.chat(**question("guest")))))

    async def home():
        await client.chat(**question("home"))
        await asyncio.to_thread(server.configure, latency_s=3600)  # not answered before the home dies
        guest.start()
        await asyncio.to_thread(server.wait, at_least={"in_flight": 1})
        await asyncio.to_thread(server.configure, latency_s=0.005)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(home())
    guest.join(120)
    assert found[0].ok
    assert client.get_performance_stats()["upstream_requests"] == 3
    client.engine.close()
    gc.collect()
    assert caplog.records == []


def test_async_an_engine_that_is_dropped_unclosed_lets_go_of_everything(server, stack):
    before = held()
    client = SyncClient(server.base_url, stack=stack)
    assert client.chat(**question("one")).ok
    threads = sorted(
        (thread for thread in threading.enumerate() if thread.name.startswith("llmmw")),
        key=lambda thread: thread.name,
        reverse=True,
    )
    told = []
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        # Texts only: a recorded warning keeps its source alive, and with it what is to be dropped.
        warnings.showwarning = lambda message, *_args, **_options: told.append(str(message))
        del client
        ends = time.monotonic() + 120
        while any(thread.is_alive() for thread in threads) and time.monotonic() < ends:
            gc.collect()  # again and again: a thread at work holds what only the next collection can free
            threads[-1].join(0.05)
        gc.collect()
    assert any("was not closed" in text for text in told)
    assert held() == before
    server.wait(at_most={"connections.open": 1})

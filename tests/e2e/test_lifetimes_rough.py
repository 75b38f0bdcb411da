"""Rough endings: homes that die mid-call, races with close, parts that do not close."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
import traceback
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from pathlib import Path

import pytest

import llmmw
from llmmw import Client, Closed, Stack, SyncClient
from llmmw.layers.base import Bound
from llmmw.order import Role
from llmmw.testing import FakeUpstream, chat_call

MODEL = "llmmw-embedded"


def question(text) -> dict:
    return {"model": MODEL, "messages": [{"role": "user", "content": str(text)}], "temperature": 0}


def own_threads():
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("llmmw")]


def sockets() -> int:
    found = 0
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the listing's own
            found += str(entry.readlink()).startswith(("socket:", "anon_inode:[eventpoll]"))
    return found


# ── a home that ends under its guests ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("guests", ["with loops", "plain"])
def test_async_guests_of_a_home_that_dies_mid_call_get_answers(server, stack, guests, caplog):
    """Each is asked again once, on a thread that stays: never into the dying loop, never from home to home."""
    before = sockets()
    client = Client(server.base_url, stack=stack)
    plain = SyncClient.__new__(SyncClient)
    plain.engine, plain.requests = client.engine, client.requests

    def work(number):
        if guests == "plain":
            return plain.chat(**question(number)).text
        return asyncio.run(client.chat(**question(number))).text

    with ThreadPoolExecutor(8) as pool:

        async def home():
            await client.chat(**question("home"))
            await asyncio.to_thread(server.configure, latency_s=3600)  # none is answered before the home dies
            asked = [pool.submit(work, number) for number in range(8)]
            await asyncio.to_thread(server.wait, at_least={"in_flight": 8})
            await asyncio.to_thread(server.configure, latency_s=0.005)
            return asked

        texts = [future.result(120) for future in asyncio.run(home())]
    assert len(set(texts)) == 8
    stats = client.get_performance_stats()
    assert stats["in_flight"] == 0
    assert stats["upstream_requests"] == 1 + 2 * 8
    client.engine.close()
    gc.collect()
    assert (own_threads(), sockets()) == ([], before)
    assert caplog.records == []  # asyncio logs tasks that are destroyed and exceptions that nobody retrieves


def test_async_guests_of_a_loop_that_is_closed_without_any_clean_up_get_answers():
    """The idiom of old: run_until_complete and close, with threads still waiting."""
    upstream = FakeUpstream(latency_s=0.05)
    engine = Stack().bind(upstream)
    loop = asyncio.new_event_loop()

    async def first():
        await engine.call(chat_call("home"))

    async def until_begun():
        while not upstream.in_flight:
            await asyncio.sleep(0)

    with ThreadPoolExecutor(1) as pool:
        loop.run_until_complete(first())
        task = loop.create_task(until_begun())
        future = loop.run_until_complete(_submit(pool, engine))
        loop.run_until_complete(task)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the loop's own tasks are pending, as the user asked for
            loop.close()
        assert future.result(120).text == "echo: guest"
    engine.close()
    assert own_threads() == []


async def _submit(pool, engine):
    return pool.submit(engine.call_sync, chat_call("guest"))


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, asyncio.CancelledError, ValueError])
@pytest.mark.parametrize(
    "stack",
    [Stack(), Stack.recommended(), Stack.recommended(cache_ttl=300)],
    ids=["bare", "recommended", "with a cache"],
)
def test_async_what_a_function_raises_goes_to_its_caller_alone(stack, kind):
    error, ran, slow_began, go_on = kind(3), [], threading.Event(), threading.Event()

    @stack.wrap
    def ask(what):
        ran.append(what)
        if what == "slow":
            slow_began.set()
            go_on.wait(120)
            return what
        raise error

    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(ask, "slow")
        assert slow_began.wait(120)
        if kind is asyncio.CancelledError and Role.CACHE in stack:
            with pytest.raises(Exception, match="cancelled 3 times"):  # nobody knows who cancelled a shared call
                ask("bad")
        else:
            with pytest.raises(type(error)) as caught:
                ask("bad")
            assert caught.value is error
            assert any(frame.name == "ask" for frame in traceback.extract_tb(error.__traceback__))
        go_on.set()
        assert slow.result(120) == "slow"
    ask.close()
    assert ran.count("slow") == 1
    assert own_threads() == []


def test_async_errors_and_context_variables_cross_loops(server, stack):
    variable: ContextVar[str] = ContextVar("variable", default="unset")
    seen = []

    class Broken(Exception):
        pass

    @stack.wrap
    async def ask(prompt):
        seen.append(variable.get())
        if prompt == "bad":
            raise Broken(prompt)
        return prompt

    def guest(name):
        async def main():
            variable.set(name)
            with pytest.raises(Broken) as caught:
                await ask("bad")
            first = caught.value.__cause__ or caught.value  # who shared the call has an error of his own
            return (await ask(name), [frame.name for frame in traceback.extract_tb(first.__traceback__)])

        return asyncio.run(main())

    with ask.engine, ThreadPoolExecutor(4) as pool:
        found = list(pool.map(guest, "abcd"))
    assert [text for text, _ in found] == list("abcd")
    assert all("ask" in frames for _, frames in found)
    assert set(seen) == set("abcd")


# ── close ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_async_close_races_calls_from_other_threads(server, stack):
    """Each call is answered or refused, and no late one brings the engine back to life."""
    for lap in range(10):
        client = SyncClient(server.base_url, stack=stack)
        client.chat(**question(f"warm {lap}"))
        start = threading.Barrier(6)

        def work(number, client=client, start=start, lap=lap):
            start.wait()
            try:
                return client.chat(**question(f"{lap} {number}")).ok
            except Closed:
                return "closed"

        with ThreadPoolExecutor(5) as pool:
            asked = [pool.submit(work, number) for number in range(4)]
            asked.append(pool.submit(lambda start=start, client=client: (start.wait(), client.close())))
            start.wait()
            client.close()
            assert {future.result(120) for future in asked[:4]} <= {True, "closed"}
            asked[4].result(120)
        assert own_threads() == []


def test_async_a_call_that_was_let_in_before_close_does_not_start_a_thread_after_it():
    engine = Stack().bind(FakeUpstream())
    engine.close()
    engine._closed = False  # as a caller saw it who was overtaken between this look and the next step
    with pytest.raises(Closed):
        engine.call_sync(chat_call())
    with pytest.raises(Closed):
        asyncio.run(engine.call(chat_call()))
    assert own_threads() == []


class Stubborn:
    role = Role.CUSTOM

    def bind(self, inner, env):
        return StubbornBound(inner, env)


class StubbornBound(Bound):
    async def aclose(self):
        raise OSError("cannot close")


@pytest.mark.parametrize("enter", ["with", "async with"])
def test_async_a_part_that_cannot_close_hides_no_error_and_keeps_nothing_open(enter):
    async def body(engine):
        async with engine:
            await engine.call(chat_call())
            raise ValueError("the body's")

    def plain(engine):
        with engine:
            engine.call_sync(chat_call())
            raise ValueError("the body's")

    upstream = FakeUpstream()
    engine = Stack(Stubborn()).bind(upstream)
    with pytest.raises(ValueError, match="the body's") as caught:
        plain(engine) if enter == "with" else asyncio.run(body(engine))
    assert "cannot close" in caught.value.__notes__[0]
    assert upstream.closed
    engine.close()  # once is enough
    assert own_threads() == []
    with pytest.raises(OSError, match="cannot close"):
        Stack(Stubborn()).bind(FakeUpstream()).close()
    assert own_threads() == []


@pytest.mark.parametrize("make", [Client, SyncClient, llmmw.httpx_client, llmmw.httpx2_client, llmmw.httpx_sync_client])
def test_async_no_client_hides_the_bodys_error_behind_its_own(make, server):
    async def body(client):
        async with client:
            raise ValueError("the body's")

    def plain(client):
        with client:
            raise ValueError("the body's")

    stack = Stack(Stubborn())
    client = make(server.base_url, stack=stack) if make in {Client, SyncClient} else make(stack)
    with pytest.raises(ValueError, match="the body's") as caught:
        plain(client) if hasattr(client, "__enter__") else asyncio.run(body(client))
    assert "cannot close" in caught.value.__notes__[0]
    assert own_threads() == []


def test_async_a_thread_that_cannot_start_says_so_instead_of_hanging(monkeypatch):
    def no_loop():
        raise OSError(24, "Too many open files")

    engine = Stack().bind(FakeUpstream())
    monkeypatch.setattr(asyncio, "Runner", no_loop)
    with pytest.raises(OSError, match="Too many"):
        engine.call_sync(chat_call())
    monkeypatch.undo()
    assert engine.call_sync(chat_call("now")).text == "echo: now"
    engine.close()

"""Forks at bad moments: the child starts afresh, the parent goes on, and neither disturbs the other's calls."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import threading
import time
import types
import warnings

import pytest

from llmmw import (
    Batcher,
    CircuitBreaker,
    Coalescer,
    Deadline,
    ErrorRouter,
    RateLimiter,
    Retry,
    Stack,
    Timeout,
    TTLCache,
)
from llmmw.call import Context
from llmmw.testing import FakeUpstream, chat_call

LOCKS = (type(threading.Lock()), type(threading.RLock()))
NOT_OURS = (
    types.ModuleType, types.FunctionType, types.BuiltinFunctionType, type, types.FrameType, types.CodeType,
    asyncio.AbstractEventLoop, threading.Thread,
)  # fmt: skip


def locks_of(engine):
    """Every lock that can be reached from an engine."""
    found, seen, todo = [], {}, [engine]
    while todo:
        one = todo.pop()
        if id(one) in seen or isinstance(one, NOT_OURS):
            continue
        seen[id(one)] = one
        if isinstance(one, LOCKS):
            found.append(one)
        else:
            todo += gc.get_referents(one)
    return found


@contextlib.contextmanager
def held_by_another_thread(locks):
    held, go_on = threading.Event(), threading.Event()

    def hold():
        with contextlib.ExitStack() as stack:
            for lock in locks:
                stack.enter_context(lock)
            held.set()
            go_on.wait(120)

    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(120)
    try:
        yield
    finally:
        go_on.set()
        thread.join()


def in_child(work):
    """Fork, run `work` there, and report what went wrong, also if it hangs."""
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # a fork with threads, which is the point
        pid = os.fork()
    if pid == 0:
        told = b"done"
        try:
            work()
        except BaseException as error:
            told = repr(error).encode()
        os.write(writer, told)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        waiting = threading.Timer(120, lambda: os.kill(pid, signal.SIGKILL))
        waiting.start()
        told = pipe.read()
        waiting.cancel()
    os.waitpid(pid, 0)
    assert told == b"done", told or "the child hung"


def every_layer(place, sampling):
    return Stack(
        Deadline(600),
        TTLCache(300, directory=place, sampling=sampling),
        Coalescer(lease="10s"),
        ErrorRouter(fallbacks=[FakeUpstream(name="http://b.test/v1")]),
        Retry(),
        CircuitBreaker(),
        Batcher(),
        RateLimiter(rpm=1_000_000, tpm=10_000_000_000, concurrency="4-20-80"),
        Timeout(300),
    )


@pytest.mark.parametrize("sampling", ["share", "lanes"])
def test_async_01_fork_while_a_parents_thread_holds_every_lock(place, sampling):
    engine = every_layer(place, sampling).bind(FakeUpstream())
    old, new = (chat_call(text, context=Context(agent="a", sample=0)) for text in ("old", "new"))
    assert engine.call_sync(old).source == "upstream"

    def child():
        drawn = [engine.call_sync(chat_call("old", context=Context(agent="b"))).ok for _ in range(2)]
        assert drawn == [True, True]
        assert engine.call_sync(new).source == "upstream"
        assert engine.call_sync(old).source == "cache"
        assert engine.get_performance_stats()["request_count"] == 5
        assert engine.invalidate(old) >= 1
        engine.close()

    locks = locks_of(engine)
    assert len(locks) >= 4
    with held_by_another_thread(locks):
        in_child(child)
    assert engine.call_sync(old).source == "cache"
    engine.close()


def test_async_01_fork_inside_a_running_loop_with_calls_under_way(place):
    """As `multiprocessing` does under a notebook: the child has no part in the parent's calls, flights and leases."""
    upstream = FakeUpstream(latency_s=0.3)
    engine = every_layer(place, "share").bind(upstream)

    def child():
        upstream.latency_s = 0
        upstream.calls.clear()
        stats = engine.get_performance_stats()
        assert (stats["in_flight"], stats["layers"]["coalesce"]["flights"]) == (0, 0)
        assert engine.call_sync(chat_call("the child's", temperature=0)).source == "upstream"
        assert len(upstream.calls) == 1
        engine.close()

    def fork_on_a_thread():
        in_child(child)

    async def main():
        calls = [asyncio.create_task(engine.call(chat_call("shared", temperature=0))) for _ in range(5)]
        while not upstream.in_flight:
            await asyncio.sleep(0)
        fork_on_a_thread()  # on the loop's own thread, in the middle of everything
        replies = await asyncio.gather(*calls)
        assert [reply.source for reply in replies].count("coalesced") == 4
        assert len(upstream.calls) == 1
        await engine.aclose()

    asyncio.run(main())


def test_async_01_a_child_forks_again_and_the_parent_ends_first(place):
    engine = every_layer(place, "share").bind(FakeUpstream())
    assert engine.call_sync(chat_call("warm")).ok

    def child():
        assert engine.call_sync(chat_call("child")).ok
        in_child(grandchild)
        assert engine.call_sync(chat_call("child again")).ok
        engine.close()

    def grandchild():
        assert engine.call_sync(chat_call("grandchild")).ok
        assert engine.call_sync(chat_call("child")).source == "cache"
        engine.close()

    in_child(child)
    assert not engine.closed
    assert engine.call_sync(chat_call("warm")).source == "cache"
    engine.close()


def test_async_01_a_closed_engine_stays_closed_in_the_child():
    from llmmw import Closed

    engine = Stack().bind(FakeUpstream())
    engine.call_sync(chat_call())
    engine.close()

    def child():
        with pytest.raises(Closed):
            engine.call_sync(chat_call())
        engine.close()

    in_child(child)


def test_async_01_fork_from_many_threads_while_others_call(place):
    engine = every_layer(place, "lanes").bind(FakeUpstream())
    engine.call_sync(chat_call("warm"))
    over, problems = threading.Event(), []

    def call(name):
        number = 0
        while not over.is_set():
            number += 1
            with contextlib.suppress(AssertionError):
                assert engine.call_sync(chat_call(f"{name} {number % 50}", context=Context(agent=name))).ok
            time.sleep(0)

    def child():
        for number in range(5):
            assert engine.call_sync(chat_call(f"child {number}", context=Context(agent="c"))).ok
        engine.close()

    def fork():
        try:
            for _ in range(2):
                in_child(child)
        except BaseException as error:
            problems.append(error)

    callers = [threading.Thread(target=call, args=(name,)) for name in "ab"]
    forkers = [threading.Thread(target=fork) for _ in range(2)]
    for thread in (*callers, *forkers):
        thread.start()
    for thread in forkers:
        thread.join()
    over.set()
    for thread in callers:
        thread.join()
    assert problems == []
    ends = time.monotonic() + 120
    while engine.get_performance_stats()["layers"]["cache"]["waiting writes"]:
        assert time.monotonic() < ends, "a fork left the disk's thread standing: what waits is not written"
        time.sleep(0.01)
    engine.close()

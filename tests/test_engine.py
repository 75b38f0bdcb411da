"""One engine from many loops, threads and plain code; nothing left after close."""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from llmmw.call import Reply
from llmmw.errors import Closed, ConfigError
from llmmw.stack import Stack
from llmmw.testing import FakeUpstream, chat_call
from llmmw.testing.fake import ScriptedChunks, chat_chunks, error_reply


def make_engine(**options):
    upstream = FakeUpstream(**options)
    return Stack().bind(upstream), upstream


def own_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("llmmw")]


def balanced(stats):
    endings = ("cache_hits", "coalesced", "answered_upstream", "errors", "cancelled")
    return stats["request_count"] == sum(stats[name] for name in endings) and stats["in_flight"] == 0


async def test_a_call_reaches_the_endpoint_and_is_counted():
    engine, upstream = make_engine()
    async with engine:
        reply = await engine.call(chat_call("hi"))
    assert reply.text == "echo: hi"
    assert reply.endpoint == upstream.name
    stats = engine.get_performance_stats()
    assert (stats["request_count"], stats["upstream_requests"], stats["tokens_out"]) == (1, 1, 2)
    assert upstream.closed
    assert balanced(stats)


def test_every_statistics_key_exists_before_the_first_call():
    engine, _ = make_engine()
    stats = engine.get_performance_stats()
    always = (
        "request_count cache_hits cache_misses cache_hit_rate coalesced upstream_requests batch_count "
        "batched_requests retries fallbacks errors rate_limit_wait_s tokens_in tokens_out tokens_saved time_saved_s "
        "latency_p50_s latency_p95_s latency_p99_s connections_opened connections_reused"
    )
    for key in always.split():
        assert stats[key] == 0, key
    assert stats["layers"] == {}
    assert stats["by_agent"] == {}


def test_five_consecutive_asyncio_runs_share_one_engine():
    engine, upstream = make_engine()
    for number in range(5):
        assert asyncio.run(engine.call(chat_call(f"run {number}"))).text == f"echo: run {number}"
    asyncio.run(engine.aclose())
    assert len(upstream.calls) == 5
    assert balanced(engine.get_performance_stats())


def test_eight_threads_with_their_own_loops_share_one_engine():
    engine, _upstream = make_engine(latency_s=0.001)

    async def several(name):
        return [await engine.call(chat_call(f"{name}-{number}")) for number in range(5)]

    with engine, ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda name: asyncio.run(several(name)), range(8)))
    texts = sorted(reply.text for replies in found for reply in replies)
    assert texts == sorted(f"echo: {name}-{number}" for name in range(8) for number in range(5))
    assert balanced(engine.get_performance_stats())
    assert own_threads() == []


def test_threads_whose_loops_end_one_after_another_all_get_answers():
    engine, _ = make_engine(latency_s=0.002)
    barrier = threading.Barrier(8)

    async def some(name):
        barrier.wait()  # all loops run at once; the home dies as soon as its own thread is done
        return [(await engine.call(chat_call(f"{name}-{n}"))).text for n in range(1 + name)]

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda name: asyncio.run(some(name)), range(8)))
    assert [len(texts) for texts in found] == [1 + name for name in range(8)]
    engine.close()
    assert own_threads() == []


def test_plain_code_gets_a_background_thread_that_close_ends():
    engine, _ = make_engine()
    with engine:
        assert engine.call_sync(chat_call("plain")).text == "echo: plain"
        assert len(own_threads()) == 1
    assert own_threads() == []


def test_eight_plain_threads_share_one_background_loop():
    here, together = [], asyncio.Event()

    async def answer(call):
        here.append(call)
        if len(here) == 8:  # one of each thread, at the same time
            together.set()
        await together.wait()
        return await FakeUpstream()(call)

    with Stack().bind(answer) as engine, ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(lambda n: engine.call_sync(chat_call(str(n))).text, range(64)))
    assert texts == [f"echo: {n}" for n in range(64)]


async def test_a_sync_call_inside_a_running_loop_works_like_in_a_notebook():
    engine, _ = make_engine()
    assert engine.call_sync(chat_call("cell")).text == "echo: cell"
    assert (await engine.call(chat_call("next cell"))).text == "echo: next cell"
    await engine.aclose()
    assert own_threads() == []


async def test_a_sync_call_on_the_home_loops_own_thread_raises_at_once():
    engine, _ = make_engine()
    async with engine:
        with pytest.raises(ConfigError, match="async form"):
            engine.call_sync(chat_call())
        with pytest.raises(ConfigError):
            engine.close()


async def test_a_closed_engine_refuses_calls():
    engine, upstream = make_engine()
    await engine.aclose()
    with pytest.raises(Closed):
        await engine.call(chat_call())
    with pytest.raises(Closed):
        engine.call_sync(chat_call())
    assert upstream.calls == []


def test_close_is_idempotent_from_any_loop_and_from_plain_code():
    engine, _ = make_engine()
    asyncio.run(engine.call(chat_call()))
    asyncio.run(engine.aclose())
    asyncio.run(engine.aclose())
    engine.close()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: asyncio.run(engine.aclose()), range(2)))
    assert own_threads() == []


async def test_concurrent_closes_wait_for_the_same_end():
    engine, upstream = make_engine(latency_s=0.01)
    call = asyncio.create_task(engine.call(chat_call("last")))
    await asyncio.sleep(0)
    await asyncio.gather(*(engine.aclose() for _ in range(5)))
    assert (await call).text == "echo: last"
    assert upstream.closed


async def test_close_waits_for_calls_in_flight_then_cancels_what_hangs():
    engine, upstream = make_engine(latency_s=3600)
    call = asyncio.create_task(engine.call(chat_call()))
    await asyncio.sleep(0)
    await engine.aclose(drain_timeout=0.01)
    with pytest.raises(Closed):
        await call
    assert upstream.cancelled == 1
    assert balanced(engine.get_performance_stats())


@pytest.mark.parametrize("error", [ValueError("body"), asyncio.CancelledError(), KeyboardInterrupt()])
def test_async_with_keeps_the_bodys_exception_and_leaves_nothing(error):
    engine, upstream = make_engine()

    async def main():
        async with engine:
            await engine.call(chat_call())
            raise error

    with pytest.raises(type(error)):
        asyncio.run(main())
    assert upstream.closed
    assert engine.closed


async def test_cancelling_a_bridged_call_cancels_it_at_home():
    engine, upstream = make_engine(latency_s=3600)
    with ThreadPoolExecutor(1) as pool:
        engine.__enter__()
        started = threading.Event()

        async def elsewhere():
            task = asyncio.create_task(engine.call(chat_call()))
            await asyncio.sleep(0)
            started.set()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

        await asyncio.wrap_future(pool.submit(asyncio.run, elsewhere()))
    await engine.aclose()
    stats = engine.get_performance_stats()
    assert stats["in_flight"] == 0
    assert upstream.in_flight == 0


async def test_context_variables_reach_a_bridged_endpoint():
    from contextvars import ContextVar

    seen = []
    variable: ContextVar[str] = ContextVar("variable", default="nothing")

    async def endpoint(call):
        seen.append(variable.get())
        return Reply(data=b"{}")

    engine = Stack().bind(endpoint)
    engine.__enter__()
    variable.set("mine")
    await engine.call(chat_call())
    await engine.aclose()
    assert seen == ["mine"]


async def test_a_stream_is_counted_at_its_end():
    engine, _ = make_engine()
    async with engine:
        reply = await engine.call(chat_call("a b c", stream=True))
        assert engine.get_performance_stats()["in_flight"] == 1
        chunks = [chunk async for chunk in reply.chunks]
        assert chunks[-1] == b"data: [DONE]\n\n"
        stats = engine.get_performance_stats()
        assert stats["answered_upstream"] == 1
        assert stats["tokens_out"] > 0
        assert balanced(stats)


async def test_a_stream_closed_early_counts_as_cancelled_once():
    engine, _ = make_engine()
    async with engine:
        reply = await engine.call(chat_call("a b c", stream=True))
        await reply.chunks.__anext__()
        await reply.chunks.aclose()
        await reply.chunks.aclose()
        stats = engine.get_performance_stats()
    assert stats["cancelled"] == 1
    assert balanced(stats)


async def test_a_close_does_not_wait_for_a_stream_that_was_dropped_within_a_cycle():
    engine, _ = make_engine()
    cycle = [await engine.call(chat_call("a b c", stream=True))]
    cycle.append(cycle)
    gc.disable()
    try:
        del cycle
        async with asyncio.timeout(120):
            await engine.aclose(drain_timeout=3600)
    finally:
        gc.enable()
    stats = engine.get_performance_stats()
    assert (stats["in_flight"], stats["cancelled"]) == (0, 1)


async def test_an_abandoned_stream_is_released_by_the_garbage_collector():
    engine, _ = make_engine()
    async with engine:
        reply = await engine.call(chat_call("a b c", stream=True))
        del reply
        gc.collect()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert engine.get_performance_stats()["in_flight"] == 0


def test_a_stream_is_read_from_plain_code_and_from_another_loop():
    engine, _ = make_engine()
    with engine:
        reply = engine.call_sync(chat_call("a b", stream=True))
        chunks = []
        while (chunk := reply.chunks.next_sync()) is not None:
            chunks.append(chunk)
        assert chunks == chat_chunks("echo: a b")

        async def other():
            reply = await engine.call(chat_call("a b", stream=True))
            return [chunk async for chunk in reply.chunks]

        assert asyncio.run(other()) == chat_chunks("echo: a b")


async def test_a_stream_that_breaks_counts_as_failed():
    broken = Reply(chunks=ScriptedChunks([b"data: {}\n\n", OSError("gone")]))
    engine, _ = make_engine(script=[broken])
    async with engine:
        reply = await engine.call(chat_call(stream=True))
        with pytest.raises(OSError, match="gone"):
            async for _ in reply.chunks:
                pass
    stats = engine.get_performance_stats()
    assert stats["errors"] == 1
    assert stats["errors_by_type"] == {"OSError": 1}


async def test_a_refusal_by_the_server_counts_as_an_error():
    engine, _ = make_engine(script=[error_reply(400)])
    async with engine:
        assert not (await engine.call(chat_call())).ok
    assert engine.get_performance_stats()["errors_by_type"] == {"status 400": 1}


def _child(engine, queue):
    reply = asyncio.run(engine.call(chat_call("child")))
    queue.put(reply.text)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_async_01_a_forked_child_starts_afresh():
    engine, _ = make_engine()
    engine.__enter__()
    engine.call_sync(chat_call("parent"))
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=_child, args=(engine, queue))
    child.start()
    text = queue.get()
    child.join()
    assert (text, child.exitcode) == ("echo: child", 0)
    assert engine.call_sync(chat_call("parent again")).text == "echo: parent again"
    engine.close()


def test_an_engine_dropped_without_close_ends_its_thread():
    engine, _ = make_engine()
    engine.call_sync(chat_call())
    thread = own_threads()[0]
    del engine
    gc.collect()
    thread.join(120)
    assert not thread.is_alive()


def test_async_a_guest_leaves_nothing_to_the_garbage_collector():
    """Neither a call nor a stream whose closing is cancelled in the moment its reader's run ends."""
    engine = Stack().bind(FakeUpstream())

    async def main():
        await engine.call(chat_call("plain"))
        chunks = (await engine.call(chat_call("a b c", stream=True))).chunks
        await anext(chunks)
        closing = asyncio.create_task(chunks.aclose())
        await asyncio.sleep(0)
        closing.cancel()

    async def nothing():
        await asyncio.sleep(0)

    with engine:
        gc.disable()
        try:
            asyncio.run(main())
            for _ in range(3):
                engine.run_sync(nothing)
            assert engine.get_performance_stats()["in_flight"] == 0
        finally:
            gc.enable()


async def test_statistics_are_kept_per_agent():
    from llmmw.call import using

    engine, _ = make_engine()
    async with engine:
        with using(agent="alice"):
            from llmmw.call import current_context

            await engine.call(chat_call(context=current_context()))
        await engine.call(chat_call())
    assert engine.get_performance_stats()["by_agent"]["alice"]["request_count"] == 1


@pytest.mark.parametrize("stream", [False, True])
async def test_a_finished_call_leaves_nothing_for_the_garbage_collector(stream):
    from llmmw import Coalescer, TTLCache

    engine = Stack(TTLCache(60), Coalescer()).bind(FakeUpstream())
    async with engine:

        async def ask(number):
            reply = await engine.call(chat_call(f"p{number}", temperature=0, stream=stream))
            if reply.chunks is not None:
                async for _ in reply.chunks:
                    pass

        for number in range(3):  # what is made once
            await ask(number)
        gc.collect()
        gc.disable()
        try:
            for number in range(3, 23):
                await ask(number)
            assert gc.collect() < 20  # less than one object per call
        finally:
            gc.enable()


async def test_observers_are_told_of_start_and_end_of_every_call():
    from llmmw import Env
    from llmmw.events import CallEnded, CallStarted

    seen = []
    engine = Stack().bind(FakeUpstream(), env=Env(sinks=(seen.append,)))
    async with engine:
        await engine.call(chat_call())
    assert [type(event) for event in seen if isinstance(event, CallStarted | CallEnded)] == [CallStarted, CallEnded]
    assert engine.get_performance_stats()["request_count"] == 1

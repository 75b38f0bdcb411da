"""The rate limiter inside an engine: several loops and threads, and limits that change while it works."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from llmmw import ConnectionPool, RateLimiter, Retry, Stack
from llmmw.call import Context
from llmmw.endpoints.openai import HTTPEndpoint
from llmmw.env import Env
from llmmw.errors import ConfigError, RateLimited
from llmmw.testing.clock import manual_time
from llmmw.testing.fake import FakeUpstream, chat_call

HOUR = 3600


def timed(call_seconds=60.0):
    return chat_call(context=Context(deadline=Env().clock.monotonic() + call_seconds))


def test_limit_12_two_live_loops_and_plain_threads_share_one_limit():
    upstream = FakeUpstream(latency_s=0.001)
    stack = Stack(RateLimiter(rpm=40, window=HOUR, burst=40, concurrency=3, adaptive=False))
    problems = []

    async def ask(engine):
        try:
            return int((await engine.call(timed())).ok)
        except RateLimited:
            return 0
        except BaseException as error:
            problems.append(error)
            raise

    async def many(engine):
        return sum(await asyncio.gather(*(ask(engine) for _ in range(15))))

    def plainly(engine):
        answered = 0
        for _ in range(15):
            try:
                answered += engine.call_sync(timed()).ok
            except RateLimited:
                continue
        return answered

    with stack.bind(upstream) as engine, ThreadPoolExecutor(4) as threads:
        start = threading.Barrier(4)
        jobs = [lambda: asyncio.run(many(engine))] * 2 + [lambda: plainly(engine)] * 2
        found = [threads.submit(lambda job=job: (start.wait(120), job())[1]) for job in jobs]
        answered = [future.result(120) for future in found]
        assert problems == []
        assert sum(answered) == 40
        assert len(upstream.calls) == 40
        assert upstream.peak <= 3
        gauges = engine.get_performance_stats()["layers"]["limit"]
        assert (gauges["in_use"], gauges["waiting"], gauges["requests_in_window"]) == (0, 0, 40)


def test_limit_09_limits_change_through_the_engine_from_any_thread():
    upstream = FakeUpstream()
    with Stack(RateLimiter(rpm=1, window=HOUR)).bind(upstream) as engine, ThreadPoolExecutor(1) as threads:
        assert engine.call_sync(chat_call()).ok
        waiting = threads.submit(engine.call_sync, chat_call())
        while not engine.get_performance_stats()["layers"]["limit"]["waiting"]:
            threading.Event().wait(0.001)
        engine.reconfigure("limit", rpm=600)
        assert waiting.result(120).ok
        engine.reconfigure("limit", rpm=2)
        with pytest.raises(RateLimited):
            engine.call_sync(timed())


@manual_time
async def test_limit_09_a_lowered_limit_is_told_to_who_waits_in_vain(clock):
    upstream = FakeUpstream()
    engine = Stack(RateLimiter(rpm=60)).bind(upstream)
    async with engine:
        await asyncio.gather(*(engine.call(chat_call()) for _ in range(5)))
        context = Context(deadline=clock.monotonic() + 10)
        waiting = asyncio.ensure_future(engine.call(chat_call(context=context)))
        await asyncio.sleep(0.01)
        assert not waiting.done()
        engine.reconfigure("limit", rpm=3)
        await asyncio.sleep(1)
        with pytest.raises(RateLimited) as refused:
            await waiting
        assert refused.value.retry_after_s > 10


@manual_time
async def test_limit_09_what_cannot_change_says_so(clock):
    async with Stack(Retry(), RateLimiter(rpm=60)).bind(FakeUpstream()) as engine:
        with pytest.raises(ConfigError, match="no such layer; it has: retry, limit"):
            engine.reconfigure("cache", ttl=3)
        with pytest.raises(ConfigError, match="attempts cannot change"):
            engine.reconfigure("retry", attempts=3)
        with pytest.raises(ConfigError, match="rps"):
            engine.reconfigure("limit", rps=3)
        with pytest.raises(ConfigError, match="not added"):
            engine.reconfigure("limit", tpm=3)
        assert (await engine.call(chat_call())).ok


async def test_limit_05_a_call_cancelled_before_its_request_left_is_refunded_by_the_pool():
    asked = asyncio.Event()

    async def silent(reader, writer):
        await reader.readline()
        asked.set()
        await reader.read()
        writer.close()

    async with await asyncio.start_server(silent, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        pool = ConnectionPool(max_connections=1)
        endpoint = HTTPEndpoint(f"http://127.0.0.1:{port}/v1", pool=pool)
        stack = Stack(RateLimiter(rpm=60, tpm=100_000))
        async with stack.bind(endpoint) as engine:

            def spent():
                gauges = engine.get_performance_stats()["layers"]["limit"]
                return gauges.get("requests_in_window", 0), gauges.get("total_in_window", 0) > 0, gauges["in_use"]

            sent = asyncio.ensure_future(engine.call(chat_call()))
            await asyncio.wait_for(asked.wait(), 120)
            queued = asyncio.ensure_future(engine.call(chat_call()))
            while spent()[0] < 2:
                await asyncio.sleep(0)
            await asyncio.sleep(0)
            queued.cancel()
            await asyncio.wait([queued])
            assert spent() == (1, True, 1)
            sent.cancel()
            await asyncio.wait([sent])
            assert spent() == (1, True, 0)
        # A TLS handshake that is never answered: no connection, so nothing of the request has left.
        endpoint = HTTPEndpoint(f"https://127.0.0.1:{port}/v1", pool=ConnectionPool())
        async with stack.bind(endpoint) as engine:
            connecting = asyncio.ensure_future(engine.call(chat_call()))
            while not spent()[2]:
                await asyncio.sleep(0)
            await asyncio.sleep(0)
            connecting.cancel()
            await asyncio.wait([connecting])
            assert spent() == (0, False, 0)

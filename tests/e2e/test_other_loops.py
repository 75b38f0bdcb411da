"""uvloop and eager task factories: the promises of coalescer and limiter hold there too, in real time."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from llmmw import CircuitBreaker, Coalescer, Deadline, RateLimiter, Retry, Stack, Timeout, TTLCache
from llmmw.call import Context, Reply
from llmmw.env import Env
from llmmw.errors import DeadlineExceeded
from llmmw.testing.fake import FakeUpstream, ScriptedChunks, chat_call, chat_chunks, error_reply

ROOT = Path(__file__).parent.parent.parent


def eager_loop():
    loop = asyncio.new_event_loop()
    loop.set_task_factory(asyncio.eager_task_factory)
    return loop


def a_uvloop():
    return pytest.importorskip("uvloop").new_event_loop()


only_312 = pytest.mark.skipif(sys.version_info < (3, 12), reason="eager tasks came with Python 3.12")
LOOPS = [asyncio.new_event_loop, a_uvloop, pytest.param(eager_loop, marks=only_312)]


@pytest.fixture(params=LOOPS, ids=lambda loop: loop.__name__)
def run(request, caplog):
    """Runs a coroutine on such a loop; nothing may be left or logged."""

    def run(main):
        async def checked():
            await main()
            assert asyncio.all_tasks() == {asyncio.current_task()}

        with asyncio.Runner(loop_factory=request.param) as runner:
            runner.run(checked())
        gc.collect()
        assert [record for record in caplog.records if record.levelname == "ERROR"] == []

    return run


def same(**fields):
    return chat_call("same", temperature=0, **fields)


def test_async_03_one_flight_serves_all_and_each_has_its_own_end(run):
    async def main():
        upstream = FakeUpstream(latency_s=0.1, numbered=True)
        engine = Stack(TTLCache(300), Coalescer()).bind(upstream)
        soon = Context(deadline=Env().clock.monotonic() + 0.01)
        leader, hurried = (asyncio.create_task(engine.call(same(context=context))) for context in (Context(), soon))
        followers = [asyncio.create_task(engine.call(same())) for _ in range(50)]
        await asyncio.sleep(0.02)
        leader.cancel()
        with pytest.raises(DeadlineExceeded):
            await hurried
        replies = await asyncio.gather(*followers)
        assert {(reply.text, reply.source) for reply in replies} == {("echo: same #1", "coalesced")}
        assert (await engine.call(same())).source == "cache"
        assert len(upstream.calls) == 1
        await engine.aclose()

    run(main)


def test_async_03_a_shared_stream_reaches_late_and_leaving_readers(run):
    async def main():
        chunks = chat_chunks("one two three four")
        upstream = FakeUpstream([Reply(chunks=ScriptedChunks(chunks, gap_s=0.01))])
        engine = Stack(Coalescer()).bind(upstream)

        async def read(stop_after):
            reply = await engine.call(same(stream=True))
            got = []
            async for chunk in reply.chunks:
                got.append(chunk)
                if len(got) == stop_after:
                    await reply.chunks.aclose()
            return got

        found = await asyncio.gather(*(read(stop) for stop in (1, 99, 3, 99)))
        assert [len(got) for got in found] == [1, len(chunks), 3, len(chunks)]
        assert found[1] == found[3] == chunks
        assert len(upstream.calls) == 1
        await engine.aclose()

    run(main)


def test_async_03_the_limiter_loses_no_permit_under_cancellation(run):
    async def main():
        rng = random.Random(3)
        upstream = FakeUpstream(latency_s=0.005)
        engine = Stack(
            Deadline(300), Coalescer(), Retry(), CircuitBreaker(), RateLimiter(concurrency=3), Timeout(300)
        ).bind(upstream)
        tasks = [asyncio.create_task(engine.call(chat_call(str(n)))) for n in range(120)]
        for task in tasks:
            if rng.random() < 0.4:
                asyncio.get_running_loop().call_later(rng.random() * 0.1, task.cancel)
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(one, Reply | asyncio.CancelledError) for one in found)
        assert upstream.peak == 3
        limit = engine.get_performance_stats()["layers"]["limit"]
        assert (limit["in_use"], limit["waiting"]) == (0, 0)
        replies = await asyncio.gather(*(engine.call(chat_call(f"again {n}")) for n in range(9)))
        assert all(reply.ok for reply in replies)
        await engine.aclose()

    run(main)


def test_async_03_a_429_pauses_all_and_nobody_fails(run):
    async def main():
        refusal = error_reply(429, retry_after="0.05")
        upstream = FakeUpstream([refusal] * 3, latency_s=0.002)
        engine = Stack(Retry(attempts=3), RateLimiter(concurrency=8), Timeout(300)).bind(upstream)
        replies = await asyncio.gather(*(engine.call(chat_call(str(n))) for n in range(30)))
        assert all(reply.ok for reply in replies)
        assert len(upstream.calls) <= 30 + 8
        await engine.aclose()

    run(main)


@only_312
@pytest.mark.timeout(900)
def test_async_03_all_cases_of_coalescer_and_limiter_pass_with_eager_tasks():
    cases = ["tests/layers/test_coalesce.py", "tests/layers/test_limit.py", "tests/property/test_accounting.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "eager_tasks", "-p", "no:cacheprovider", *cases]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), str(ROOT)])}
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert found.returncode == 0, found.stdout[-3000:]

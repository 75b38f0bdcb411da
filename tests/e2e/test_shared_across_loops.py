"""One flight for callers on several loops and in plain code: one upstream call, an answer for each (coalesce-11)."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor

import pytest

from llmmw import Coalescer, RateLimiter, Stack, Timeout, TTLCache
from llmmw.call import Reply
from llmmw.testing.fake import FakeUpstream, ScriptedChunks, chat_body, chat_call, chat_chunks


class Gate:
    """An upstream that answers when the test says so, on whatever loop it was asked."""

    def __init__(self, answer):
        self.answer = answer
        self.loops = []
        self.go = threading.Event()
        self.upstream = FakeUpstream([self._answer] * 100)

    async def _answer(self, call):
        self.loops.append(asyncio.get_running_loop())
        while not self.go.is_set():
            await asyncio.sleep(0.001)
        return self.answer(call)


def whole(_):
    return Reply(data=chat_body("shared"))


def streamed(_):
    return Reply(chunks=ScriptedChunks(chat_chunks("one two three"), gap_s=0.001))


def broken(_):
    raise ValueError("broke")


def waits_for(condition):
    until = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.002)


def waiting(engine):
    return engine.get_performance_stats()["layers"]["coalesce"]["waiting"]


def same(**fields):
    return chat_call("same", temperature=0, **fields)


STACKS = [
    Stack(Coalescer()),
    Stack(TTLCache(300), Coalescer(), RateLimiter(concurrency=4), Timeout(60)),
]


@pytest.fixture(params=STACKS, ids=["coalescer", "with a cache"])
def stack(request):
    return request.param


@pytest.fixture(autouse=True)
def silence(caplog):
    yield
    gc.collect()
    assert [record.message for record in caplog.records] == []
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("llmmw")]


@pytest.mark.parametrize("home", ["a guest's loop", "a thread"])
def test_coalesce_11_two_threads_with_own_loops_share_one_call(stack, home):
    gate = Gate(whole)
    engine = stack.bind(gate.upstream)
    if home == "a thread":
        engine.__enter__()

    async def ask():
        reply = await engine.call(same())
        return reply.source, reply.text, asyncio.get_running_loop()

    with ThreadPoolExecutor(3) as pool:
        asked = [pool.submit(lambda: asyncio.run(ask())) for _ in range(2)]
        asked.append(pool.submit(lambda: ("", engine.call_sync(same()).text, None)))
        waits_for(lambda: waiting(engine) == 3)
        gate.go.set()
        found = [future.result(120) for future in asked]
    assert [text for _, text, _ in found] == ["shared"] * 3
    assert sorted(source for source, _, loop in found if loop) in (["coalesced"] * 2, ["coalesced", "upstream"])
    assert len({loop for _, _, loop in found}) == 3
    assert len(gate.loops) == 1
    assert waiting(engine) == 0
    engine.close()


def test_coalesce_11_each_thread_gets_an_error_of_its_own(stack):
    gate = Gate(broken)
    engine = stack.bind(gate.upstream)

    async def ask():
        with pytest.raises(ValueError, match="broke") as caught:
            await engine.call(same())
        return caught.value

    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(lambda: asyncio.run(ask())) for _ in range(8)]
        waits_for(lambda: waiting(engine) == 8)
        gate.go.set()
        errors = [future.result(120) for future in asked]
    assert len({id(error) for error in errors}) == 8
    assert sum(error.__cause__ is None for error in errors) == 1  # the leader's; it is everybody else's cause
    assert len({id(error.__cause__) for error in errors if error.__cause__}) == 1
    assert all(len(traceback.extract_tb(error.__traceback__)) < 40 for error in errors)
    assert len(gate.loops) == 1
    engine.close()


def test_coalesce_11_a_stream_is_shared_between_loops(stack):
    gate = Gate(streamed)
    engine = stack.bind(gate.upstream)

    async def ask(stop_after):
        reply = await engine.call(same(stream=True))
        got = []
        async for chunk in reply.chunks:
            got.append(chunk)
            if len(got) == stop_after:
                break
        await reply.chunks.aclose()
        return got

    with engine, ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(lambda stop=stop: asyncio.run(ask(stop))) for stop in (99, 1, 99, 2)]
        waits_for(lambda: waiting(engine) == 4)
        gate.go.set()
        found = [future.result(120) for future in asked]
    chunks = chat_chunks("one two three")
    assert found == [chunks, chunks[:1], chunks, chunks[:2]]
    assert len(gate.loops) == 1


def test_coalesce_11_a_caller_that_gives_up_on_its_own_loop_takes_nobody_along(stack):
    gate = Gate(whole)
    engine = stack.bind(gate.upstream)

    async def impatient():
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await engine.call(same())

    with engine, ThreadPoolExecutor(3) as pool:
        hurried = pool.submit(lambda: asyncio.run(impatient()))
        waits_for(lambda: waiting(engine) == 1 or hurried.done())
        patient = [pool.submit(lambda: asyncio.run(engine.call(same()))) for _ in range(2)]
        waits_for(lambda: hurried.done() and waiting(engine) == 2)
        gate.go.set()
        hurried.result(120)
        assert [future.result(120).text for future in patient] == ["shared"] * 2
    assert len(gate.loops) <= 2  # it may have given up before the others came


def test_coalesce_11_the_leaders_loop_ends_and_the_others_are_answered(stack):
    """The home was the first caller's loop; its program ends without waiting for the call."""
    gate = Gate(whole)
    engine = stack.bind(gate.upstream)
    left = threading.Event()

    async def leader():
        task = asyncio.create_task(engine.call(same()))
        while waiting(engine) < 3:
            await asyncio.sleep(0.001)
        left.set()
        del task  # cancelled by the end of the run

    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(lambda: asyncio.run(leader()))
        waits_for(lambda: waiting(engine) == 1)
        others = [pool.submit(lambda: asyncio.run(engine.call(same()))) for _ in range(2)]
        assert left.wait(120)
        first.result(120)
        waits_for(lambda: waiting(engine) == 2 and len(gate.loops) == 2)
        gate.go.set()
        assert [future.result(120).text for future in others] == ["shared"] * 2
    assert len(gate.loops) == 2  # the call died with its loop, and was made once more for all who still wanted it
    engine.close()

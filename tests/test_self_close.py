"""An engine closed from inside one of its own calls: nothing waits for itself, and what is closed is closed."""

from __future__ import annotations

import asyncio
import threading

import pytest

from llmmw import Coalescer, Stack
from llmmw.endpoints.running import runs_inside
from llmmw.errors import Closed
from llmmw.testing import FakeUpstream, chat_call, manual_time

STACKS = [Stack(), Stack(Coalescer()), Stack.recommended(cache_ttl=100)]
with_each_stack = pytest.mark.parametrize("stack", STACKS, ids=["bare", "coalescer", "recommended"])


def is_over(function):
    return function.engine._released and not [t for t in threading.enumerate() if t.name.startswith("llmmw")]


async def becomes_over(function):
    async with asyncio.timeout(120):
        while not is_over(function):
            await asyncio.sleep(0.002)


@with_each_stack
def test_a_plain_function_closes_its_own_engine(stack):
    @stack.wrap
    def ask(text):
        ask.close()
        return text

    assert ask("x") == "x"
    asyncio.run(becomes_over(ask))
    with pytest.raises(Closed):
        ask("y")


@with_each_stack
def test_a_coroutine_closes_its_own_engine(stack):
    @stack.wrap
    async def ask(text):
        await ask.aclose()
        return text

    async def main():
        assert await ask("x") == "x"
        await becomes_over(ask)

    asyncio.run(main())


@with_each_stack
def test_a_function_inside_another_engines_call_closes_the_outer_one(stack):
    @stack.wrap
    async def inner(text):
        await outer.aclose()
        return text

    @stack.wrap
    async def outer(text):
        return await inner(text)

    async def main():
        assert await outer("x") == "x"
        await becomes_over(outer)
        await inner.aclose()

    asyncio.run(main())


@with_each_stack
@manual_time
async def test_who_closes_another_engine_waits_for_it(clock, stack):
    """Also inside a shared call: that is no call of the engine that is closed."""
    other = Stack(Coalescer()).bind(FakeUpstream(latency_s=5))

    @stack.wrap
    async def ask(text):
        task = asyncio.create_task(other.call(chat_call(temperature=0)))
        await asyncio.sleep(1)
        await other.aclose()
        return task.done() and other._released

    assert await ask("x") is True
    await ask.aclose()


@with_each_stack
@manual_time
async def test_a_task_that_outlives_the_call_that_began_it_waits_as_anybody(clock, stack):
    began = asyncio.Event()
    found = []

    async def closer():
        await began.wait()
        await asyncio.sleep(1)
        await ask.aclose()
        found.append(ask.engine._released)

    @stack.wrap
    async def ask(text):
        if text == "first":
            found.append(asyncio.create_task(closer()))
        else:
            began.set()
            await asyncio.sleep(5)
        return text

    await ask("first")
    assert await ask("second") == "second"
    await found[0]
    assert found[1] is True


def test_nothing_is_inside_after_the_call():
    seen = []

    @Stack().wrap
    async def ask(text):
        seen.append(runs_inside(ask.engine._endpoints))

    async def main():
        await ask("x")
        seen.append(runs_inside(ask.engine._endpoints))
        await ask.aclose()

    asyncio.run(main())
    assert seen == [True, False]


def test_a_refusal_at_hand_counts_the_same_from_every_thread():
    from llmmw import TTLCache
    from llmmw.testing.fake import error_reply

    engine = Stack(TTLCache(300, negative_ttl=20)).bind(FakeUpstream([error_reply(404)]))
    found = [engine.call_sync(chat_call()) for _ in range(2)]  # the second without the home loop
    assert [reply.status for reply in found] == [404, 404]
    found.append(asyncio.run(engine.call(chat_call())))
    stats = engine.get_performance_stats()
    assert (stats["errors"], stats["request_count"]) == (3, 3)
    engine.close()

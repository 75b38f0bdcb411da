"""Limited work that makes calls of its own: they may use its slot, so nothing waits for itself."""

from __future__ import annotations

import asyncio
import random

import pytest

from llmmw import RateLimiter, Stack, Timeout


def wrapped(function, concurrency):
    return Stack(RateLimiter(concurrency=concurrency), Timeout(300)).wrap(function)


def slots(ask):
    gauges = ask.get_performance_stats()["layers"]["limit"]
    return gauges["in_use"], gauges["waiting"]


@pytest.mark.parametrize("concurrency", [1, 2, 3])
async def test_limit_05_a_call_inside_a_call_does_not_wait_for_its_slot(concurrency):
    async def depth(levels):
        return 0 if levels == 0 else 1 + await ask(levels - 1)

    ask = wrapped(depth, concurrency)
    async with asyncio.timeout(120):
        assert await asyncio.gather(*(ask(7) for _ in range(5))) == [7] * 5
    assert slots(ask) == (0, 0)
    await ask.aclose()


def test_limit_05_nor_does_one_inside_a_plain_function():
    def depth(levels):
        return 0 if levels == 0 else 1 + ask(levels - 1)

    ask = wrapped(depth, 1)
    assert ask(4) == 4
    assert slots(ask) == (0, 0)
    ask.close()


async def test_limit_05_nor_does_one_inside_a_generator():
    async def countdown(start):
        yield start
        if start:
            async for number in ask(start - 1):
                yield number

    ask = wrapped(countdown, 1)
    async with asyncio.timeout(120):
        assert [number async for number in ask(3)] == [3, 2, 1, 0]
    assert slots(ask) == (0, 0)
    await ask.aclose()


async def test_who_waits_for_calls_of_its_own_lends_one_slot_and_not_one_for_each():
    working = most = 0

    async def work(name):
        nonlocal working, most
        if name == "boss":
            await asyncio.gather(*(ask(f"part {n}") for n in range(10)))
            return name
        working += 1
        most = max(most, working)
        for _ in range(5):
            await asyncio.sleep(0)
        working -= 1
        return name

    ask = wrapped(work, 2)
    async with asyncio.timeout(120):
        await asyncio.gather(ask("boss"), ask("boss"))
        assert most == 2
        most = 0
        await asyncio.gather(*(ask(f"later {n}") for n in range(10)))
    assert most == 2  # what was lent is taken back
    await ask.aclose()


@pytest.mark.parametrize("seed", range(10))
async def test_no_tree_of_calls_waits_for_ever(seed):
    rng = random.Random(seed)

    async def grow(depth):
        await asyncio.sleep(0)
        if depth == 0 or rng.random() < 0.2:
            return 1
        if rng.random() < 0.5:
            return 1 + sum(await asyncio.gather(*(ask(depth - 1) for _ in range(rng.randrange(4)))))
        total = 1
        for _ in range(rng.randrange(4)):
            if rng.random() < 0.2:
                task = asyncio.create_task(ask(depth - 1))
                await asyncio.sleep(0)
                task.cancel()
            else:
                total += await ask(depth - 1)
        return total

    ask = wrapped(grow, rng.randrange(1, 4))
    async with asyncio.timeout(120):
        assert sum(await asyncio.gather(*(ask(5) for _ in range(6)))) >= 6
        while slots(ask) != (0, 0):
            await asyncio.sleep(0)
    await ask.aclose()

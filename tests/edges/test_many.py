"""Many items: one outcome each, in order, however many there are and whatever goes wrong."""

from __future__ import annotations

import asyncio
import tracemalloc
import weakref

import pytest

from llmmw import Client, ConfigError, Outcome, ProtocolError, RateLimiter, Stack, using
from llmmw.call import Reply
from llmmw.edges.many import MAX_TASKS, build_all, outcomes_of, what_failed
from llmmw.errors import AmbiguousOutcome
from llmmw.testing.clock import manual_time
from llmmw.testing.server import ServerConfig, running_server


def done(text):
    return Outcome(reply=Reply(data=b"{}", native=text))


@manual_time
async def test_order_is_kept_whoever_ends_first(clock):
    del clock

    async def work(number):
        await asyncio.sleep((number * 7919 % 13) / 10)
        return done(number)

    outcomes = await outcomes_of(range(3000), work)
    assert [outcome.reply.native for outcome in outcomes] == list(range(3000))


@manual_time
async def test_a_hundred_thousand_items_are_read_as_places_become_free(clock):
    del clock
    taken = ended = most = 0

    class Thing:
        pass

    alive = weakref.WeakSet()

    def things():
        nonlocal taken
        for _ in range(100_000):
            taken += 1
            thing = Thing()
            alive.add(thing)
            yield thing

    async def work(_):
        nonlocal ended, most
        most = max(most, len(alive), taken - ended)
        await asyncio.sleep(0)
        ended += 1
        return Outcome()

    outcomes = await outcomes_of(things(), work)
    assert len(outcomes) == 100_000
    assert most <= MAX_TASKS + 1


@manual_time
async def test_memory_does_not_grow_with_what_was_read(clock):
    del clock

    async def work(text):
        await asyncio.sleep(0)
        return Outcome(error=None if text else ValueError())

    tracemalloc.start()
    try:
        await outcomes_of(("x" * 10_000 + str(number) for number in range(5000)), work)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2 * MAX_TASKS * 13_000  # all of them would be 50 MB


@manual_time
async def test_what_fails_fails_alone(clock):
    del clock

    async def work(number):
        if number == 1:
            raise ValueError("mine")
        if number == 2:
            raise asyncio.CancelledError
        await asyncio.sleep(0)
        return done(number)

    outcomes = await outcomes_of(range(4), work)
    assert [outcome.ok for outcome in outcomes] == [True, False, False, True]
    assert isinstance(outcomes[1].error, ValueError)
    assert isinstance(outcomes[2].error, AmbiguousOutcome)


@manual_time
async def test_what_the_callers_own_code_raises_comes_out_as_it_is(clock):
    del clock
    running = 0

    async def work(number):
        nonlocal running
        running += 1
        try:
            await asyncio.sleep(number)
        finally:
            running -= 1
        return done(number)

    def items():
        yield from range(3)
        raise KeyError("the source broke")

    with pytest.raises(KeyError, match="the source broke"):
        await outcomes_of(items(), work)
    assert running == 0

    def progress(count, _):
        if count == 2:
            raise LookupError("the bar broke")

    with pytest.raises(LookupError, match="the bar broke"):
        await outcomes_of(range(10), work, progress)
    assert running == 0


@manual_time
async def test_a_source_that_breaks_late_comes_out_as_it_is(clock):
    del clock

    async def work(number):
        await asyncio.sleep(0)
        return done(number)

    def items():
        yield from range(MAX_TASKS + 500)
        raise KeyError("the source broke")

    with pytest.raises(KeyError, match="the source broke"):
        await outcomes_of(items(), work)


@manual_time
async def test_a_cancelled_caller_leaves_nothing_running(clock):
    del clock
    running = 0

    async def work(number):
        nonlocal running
        running += 1
        try:
            await asyncio.sleep(10)
        finally:
            running -= 1
        return done(number)

    task = asyncio.ensure_future(outcomes_of(range(50), work))
    await asyncio.sleep(1)
    assert running == 50
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert running == 0


@manual_time
async def test_progress_is_told_after_each_item(clock):
    del clock

    async def work(number):
        await asyncio.sleep(number)
        return done(number)

    told = []
    await outcomes_of([1, 2, 3], work, lambda *found: told.append(found))
    assert told == [(1, 3), (2, 3), (3, 3)]
    told.clear()
    await outcomes_of(iter([1, 2]), work, lambda *found: told.append(found))
    assert told == [(1, 2), (2, 2)]
    assert await outcomes_of([], work) == []


def test_what_failed_is_what_has_no_answer():
    outcomes = [done(0), Outcome(error=ValueError()), done(2)]
    assert what_failed("abc", outcomes) == ["b"]
    with pytest.raises(ConfigError, match="3 outcomes for 2 requests"):
        what_failed("ab", outcomes)
    with pytest.raises(ConfigError, match="outcomes of an earlier map"):
        what_failed("ab", ["a", "b"])


@manual_time
async def test_a_malformed_item_is_named_before_anything_is_done(clock):
    del clock

    def build(item):
        if item == 700:
            raise ConfigError("no good")

    with pytest.raises(ConfigError, match="item 700: no good"):
        await build_all(range(2000), build, keep=True)


@pytest.fixture
async def client():
    async with (
        running_server(ServerConfig()) as server,
        Client(server.base_url, stack=Stack(RateLimiter(concurrency=64)), model="llmmw-embedded") as found,
    ):
        found.server = server
        yield found


async def test_generators_are_read_lazily_and_fail_item_by_item(client):
    read = []

    def requests():
        for number in range(20):
            read.append(number)
            yield {"prompt": str(number)} if number != 5 else {"nonsense": 1}

    told = []
    outcomes = await client.map(requests(), max_tokens=3, temperature=0, on_progress=lambda *found: told.append(found))
    assert [outcome.ok for outcome in outcomes] == [number != 5 for number in range(20)]
    assert isinstance(outcomes[5].error, ConfigError)
    assert told[-1] == (20, 20)
    prompts = await client.generate_batch(prompts=(str(number) for number in range(20)), max_tokens=3, temperature=0)
    assert [outcome.text for outcome in prompts[:5]] == [outcome.text for outcome in outcomes[:5]]
    with pytest.raises(ConfigError, match="list of conversations"):
        await client.generate_batch(messages="text")
    assert client.server.stats()["received"] == 39


async def test_using_reaches_every_item(client):
    with using(agent="alice"):
        await client.map(({"prompt": str(number)} for number in range(5)), max_tokens=1)
    assert client.get_performance_stats()["by_agent"]["alice"]["request_count"] == 5


async def test_previous_outcomes_count_as_done(client):
    first = await client.map([{"prompt": "a"}, {"prompt": "b"}], max_tokens=2, temperature=0)
    previous = [first[0], Outcome(error=ProtocolError("no"))]
    told = []
    second = await client.map(
        iter([{"prompt": "a"}, {"prompt": "b"}]),
        previous=previous,
        max_tokens=2,
        temperature=0,
        on_progress=lambda *found: told.append(found),
    )
    assert second[0] is first[0]
    assert second[1].text == first[1].text
    assert told == [(2, 2)]
    assert client.server.stats()["received"] == 3

"""Interrupting a wait: at the right moment, only what waits, and never a real cancellation."""

from __future__ import annotations

import asyncio
import math
import random

import pytest

from llmmw.answer import Usage
from llmmw.interrupt import Alarms, TimedChunks, Until, until_deadline
from llmmw.testing.clock import manual_time
from llmmw.testing.fake import ScriptedChunks, chat_chunks


class Late(Exception):
    pass


def until(work, clock, at):
    due = at if callable(at) else lambda: at
    return Until(work, clock, due, Late)


async def value(result, delay=None):
    if delay is not None:
        await asyncio.sleep(delay)
    return result


def timers():
    return len(asyncio.get_running_loop()._scheduled)


@manual_time
async def test_an_answer_at_hand_arms_no_timer(clock):
    before = timers()
    assert await until(value(1), clock, clock.monotonic() - 5) == 1
    assert timers() == before


@manual_time
async def test_work_in_time_keeps_its_result(clock):
    assert await until(value(1, 2), clock, clock.monotonic() + 3) == 1
    assert await until(value(2, 2), clock, math.inf) == 2


@manual_time
async def test_work_beyond_the_moment_is_cancelled_at_it(clock):
    began = clock.monotonic()
    cleaned = []

    async def work():
        try:
            await asyncio.sleep(10)
        finally:
            cleaned.append(clock.monotonic() - began)
            await asyncio.sleep(1)

    with pytest.raises(Late) as caught:
        await until(work(), clock, began + 3)
    assert cleaned == [3]
    assert clock.monotonic() - began == 4
    assert caught.value.__cause__ is None
    assert asyncio.current_task().cancelling() == 0


@manual_time
async def test_an_error_of_the_work_comes_through(clock):
    async def work():
        await asyncio.sleep(1)
        raise KeyError("own")

    with pytest.raises(KeyError):
        await until(work(), clock, clock.monotonic() + 3)

    async def converts():
        try:
            await asyncio.sleep(10)
        except asyncio.CancelledError:
            raise KeyError("own") from None

    with pytest.raises(KeyError):
        await until(converts(), clock, clock.monotonic() + 3)


@manual_time
async def test_work_that_survives_the_interruption_keeps_its_result(clock):
    async def stubborn():
        try:
            await asyncio.sleep(10)
        except asyncio.CancelledError:
            await asyncio.sleep(10)
            return "done"

    assert await until(stubborn(), clock, clock.monotonic() + 3) == "done"


@manual_time
async def test_a_moment_that_moves_later_is_waited_for(clock):
    began = clock.monotonic()
    moments = [began + 2, began + 5]

    def due():
        return moments.pop(0) if len(moments) > 1 else moments[0]

    with pytest.raises(Late):
        await until(value(1, 10), clock, due)
    assert clock.monotonic() - began == 5
    moments = [clock.monotonic() + 2, math.inf]
    assert await until(value(1, 10), clock, due) == 1


@manual_time
async def test_work_done_in_the_moment_of_the_interruption_keeps_its_result(clock):
    loop = asyncio.get_running_loop()
    future = loop.create_future()
    at = clock.monotonic() + 1
    loop.call_later(1, future.set_result, "just")
    waiting = asyncio.create_task(value_of(future, clock, at))
    assert await waiting == "just"


async def value_of(future, clock, at):
    async def work():
        return await future

    return await until(work(), clock, at)


@manual_time
async def test_work_that_goes_on_after_the_moment_is_interrupted_at_its_next_wait(clock):
    loop = asyncio.get_running_loop()
    future = loop.create_future()
    began = clock.monotonic()
    loop.call_later(1, future.set_result, None)

    async def work():
        await future
        await asyncio.sleep(10)

    with pytest.raises(Late):
        await until(work(), clock, began + 1)
    assert clock.monotonic() - began == 1


@manual_time
async def test_work_that_only_yields_is_interrupted_too(clock):
    count = 0

    async def spin():
        nonlocal count
        while True:
            count += 1
            clock.advance(0.4)
            await asyncio.sleep(0)

    with pytest.raises(Late):
        await until(spin(), clock, clock.monotonic() + 2)
    assert count < 10


@manual_time
async def test_a_real_cancellation_stays_one(clock):
    task = asyncio.create_task(value_of(asyncio.get_running_loop().create_future(), clock, clock.monotonic() + 5))
    await asyncio.sleep(1)
    task.cancel("mine")
    with pytest.raises(asyncio.CancelledError):
        await task
    assert task.cancelled()


@manual_time
async def test_async_04_racing_timeouts_and_cancellations_keep_the_count_exact(clock):
    rng = random.Random(4)

    async def victim(kind_log):
        task = asyncio.current_task()
        try:
            async with asyncio.timeout_at(asyncio.get_running_loop().time() + rng.choice([1, 2, 3])):
                try:
                    await until(value(1, rng.choice([1, 2, 3])), clock, clock.monotonic() + rng.choice([1, 2, 3]))
                    kind_log.append("done")
                except Late:
                    kind_log.append("late")
        except TimeoutError:
            kind_log.append("timeout")
        assert task.cancelling() == 0
        await asyncio.sleep(0)  # a cancellation left over would surface here

    log = []
    for _ in range(200):
        task = asyncio.create_task(victim(log))
        killer = asyncio.get_running_loop().call_later(rng.choice([1, 2, 3, 99]), task.cancel)
        try:
            await task
        except asyncio.CancelledError:
            log.append("cancelled")
            assert asyncio.current_task().cancelling() == 0
            assert task.cancelling() == 1
        killer.cancel()
    assert {"done", "late", "cancelled", "timeout"} <= set(log)


@manual_time
async def test_nested_guards_for_one_moment_both_end(clock):
    at = clock.monotonic() + 1

    async def inner():
        return await until(value(1, 9), clock, at)

    with pytest.raises(Late):
        await until(inner(), clock, at)
    assert asyncio.current_task().cancelling() == 0


@manual_time
async def test_a_stream_is_interrupted_while_waiting_and_then_closed(clock):
    source = ScriptedChunks([b"1", b"2", b"3"], gap_s=2)
    at = clock.monotonic() + 5
    stream = TimedChunks(source, clock, lambda: at, Late)
    got = []
    with pytest.raises(Late):
        async for chunk in stream:
            got.append(chunk)
    assert got == [b"1", b"2"]
    assert source.closed


@manual_time
async def test_a_stream_in_time_passes_through(clock):
    script = chat_chunks("a b")
    stream = until_deadline(ScriptedChunks(script), clock, clock.monotonic() + 5, Late)
    assert [chunk async for chunk in stream] == script
    assert stream.usage == Usage(3, 2, reported=True)
    await stream.aclose()
    assert until_deadline(stream, clock, stream.until, Late) is stream
    assert until_deadline(stream, clock, stream.until + 1, Late) is not stream


class AtHand(ScriptedChunks):
    """A stream whose reader never waits."""

    async def __anext__(self):
        if self.closed:
            raise StopAsyncIteration
        return next(self._chunks)


@manual_time
async def test_a_stream_that_never_makes_its_reader_wait_ends_at_the_moment_too(clock):
    inner = AtHand([b"a", b"b", b"c", b"d"])
    seen = []
    with pytest.raises(Late):
        async for chunk in until_deadline(inner, clock, clock.monotonic() + 1.5, Late):
            seen.append(chunk)
            clock.advance(1)
    assert seen == [b"a", b"b"]
    assert inner.closed


@manual_time
async def test_the_first_chunk_may_wait_for_a_late_reader(clock):
    stream = until_deadline(AtHand([b"a", b"b"]), clock, clock.monotonic() + 1.5, Late)
    clock.advance(2)
    assert await anext(stream) == b"a"
    with pytest.raises(Late):
        await anext(stream)


def test_closing_a_suspended_guard_reaches_the_work():
    from llmmw.testing.clock import ManualClock

    clock = ManualClock()
    cleaned = []

    async def main():
        async def work():
            try:
                await asyncio.get_running_loop().create_future()
            finally:
                cleaned.append(True)

        async def outer():
            await until(work(), clock, clock.monotonic() + 5)

        coroutine = outer()
        coroutine.send(None)
        coroutine.close()

    clock.run(main())
    assert cleaned == [True]


@pytest.mark.parametrize("seed", range(20))
@manual_time
async def test_waits_that_share_a_timer_end_at_their_own_moments(clock, seed):
    rng, alarms, ended = random.Random(seed), Alarms(clock), {}

    async def wait(number, length, work):
        at = clock.monotonic() + length
        try:
            await Until(value(1, work), clock, lambda: at, Late, alarms=alarms)
        except Late:
            ended[number] = clock.monotonic() - at
            assert length < work
        else:
            ended[number] = 0
            assert work <= length

    waits = []
    for number in range(60):
        length = rng.choice([5, 5, 5, 5, rng.uniform(0, 20), math.inf])
        work = rng.choice([0.1, 0.1, 1, 30])
        waits.append(asyncio.ensure_future(wait(number, length, work)))
        await asyncio.sleep(rng.choice([0, 0, 0.3, 7]))
    await asyncio.gather(*waits)
    assert len(ended) == 60
    assert all(abs(late) <= 0.002 for late in ended.values())


@manual_time
async def test_a_thousand_waits_of_one_length_need_one_timer_and_end_together(clock):
    alarms, moment = Alarms(clock), clock.monotonic() + 5
    never = asyncio.get_running_loop().create_future()
    before = timers()
    waits = [asyncio.ensure_future(until_shared(asyncio.shield(never), clock, moment, alarms)) for _ in range(1000)]
    await asyncio.sleep(0)
    assert timers() - before == 1
    outcomes = await asyncio.gather(*waits, return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} == {Late}
    assert clock.monotonic() == pytest.approx(moment)


async def until_shared(work, clock, at, alarms):
    return await Until(work, clock, lambda: at, Late, alarms=alarms)


@manual_time
async def test_a_shared_timer_of_waits_that_are_over_does_not_hold_up_a_shorter_one(clock):
    alarms = Alarms(clock)
    assert await until_shared(value(1, 1), clock, clock.monotonic() + 500, alarms) == 1
    moment = clock.monotonic() + 2
    with pytest.raises(Late):
        await until_shared(value(1, 50), clock, moment, alarms)
    assert clock.monotonic() == pytest.approx(moment)

"""Sharing a stream: everybody gets all of it, nobody waits for a slow one, and it is released when all have gone."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random

import pytest

from llmmw.answer import Usage
from llmmw.call import Item
from llmmw.errors import Closed, StreamInterrupted
from llmmw.stream.tee import Tee
from llmmw.testing.clock import manual_time
from llmmw.testing.fake import ScriptedChunks, chat_chunks

BIG = 1 << 20


class Shared:
    """A tee with its pump running, cancelled when abandoned."""

    def __init__(self, chunks, *, gap_s=0.0, max_bytes=BIG, orphans=False):
        self.source = ScriptedChunks(chunks, gap_s=gap_s)
        self.orphans = orphans
        self.abandoned = 0
        self.tee = Tee(self.source, max_bytes=max_bytes, on_abandoned=self._abandon)
        self.task = None

    def start(self):
        self.task = asyncio.create_task(self.tee.pump())
        return self

    def _abandon(self):
        self.abandoned += 1
        if not self.orphans:
            self.task.cancel()
        return not self.orphans


async def drain(reader, gap_s=0.0):
    got = []
    async for chunk in reader:
        got.append(chunk)
        if gap_s:
            await asyncio.sleep(gap_s)
    return got


async def settle():
    for _ in range(5):
        await asyncio.sleep(0)


@manual_time
async def test_coalesce_09_a_reader_that_joins_late_gets_the_stream_from_the_beginning(clock):
    script = chat_chunks("one two three")
    shared = Shared(script, gap_s=1).start()
    first = asyncio.create_task(drain(shared.tee.reader(own=False)))
    await asyncio.sleep(2.5)
    assert shared.tee.joinable
    second = asyncio.create_task(drain(shared.tee.reader(own=True)))
    assert await first == script
    assert await second == script
    assert shared.tee.usage == Usage(3, 3, reported=True)
    assert not shared.tee.joinable
    await shared.task


@manual_time
async def test_a_chunk_is_handed_on_when_it_arrives(clock):
    shared = Shared([b"1", b"2"], gap_s=1).start()
    reader = shared.tee.reader(own=False)
    began = clock.monotonic()
    assert await reader.__anext__() == b"1"
    assert clock.monotonic() - began == 1
    await reader.aclose()
    assert shared.source.closed


@manual_time
async def test_coalesce_10_others_go_on_when_one_closes_early(clock):
    shared = Shared([b"1", b"2", b"3"], gap_s=1).start()
    leader, follower = shared.tee.reader(own=False), shared.tee.reader(own=True)
    assert await leader.__anext__() == b"1"
    await leader.aclose()
    await leader.aclose()
    with pytest.raises(StopAsyncIteration):
        await leader.__anext__()
    assert await drain(follower) == [b"1", b"2", b"3"]
    assert shared.abandoned == 0
    await shared.task


@manual_time
async def test_the_source_is_closed_when_all_readers_have_gone(clock):
    shared = Shared([b"1", b"2", b"3"], gap_s=1).start()
    readers = [shared.tee.reader(own=False), shared.tee.reader(own=True)]
    await readers[1].__anext__()
    for reader in readers:
        await reader.aclose()
    assert (shared.abandoned, shared.source.closed) == (1, True)
    with pytest.raises(asyncio.CancelledError):
        await shared.task


@manual_time
async def test_a_dropped_reader_counts_as_gone(clock):
    shared = Shared([b"1", b"2", b"3"], gap_s=1).start()
    reader = shared.tee.reader(own=False)
    await reader.__anext__()
    del reader
    gc.collect()
    await settle()
    assert shared.source.closed
    assert shared.task.cancelled()


@manual_time
async def test_a_stream_may_be_read_to_its_end_for_nobody(clock):
    shared = Shared([b"x" * 50_000] * 5, orphans=True).start()
    reader = shared.tee.reader(own=False)
    await reader.__anext__()
    await settle()
    assert not shared.task.done()  # it reads ahead a little, and no further
    await reader.aclose()
    with pytest.raises(StopAsyncIteration):
        await reader.__anext__()
    await shared.task
    assert shared.abandoned == 1
    assert not shared.source.closed  # it ended by itself


@manual_time
async def test_a_slow_reader_delays_nobody(clock):
    script = [b"%d" % n for n in range(10)]
    shared = Shared(script, gap_s=1).start()
    slow = asyncio.create_task(drain(shared.tee.reader(own=True), gap_s=30))
    began = clock.monotonic()
    assert await drain(shared.tee.reader(own=False)) == script
    assert clock.monotonic() - began == 11  # ten chunks and the end
    assert await slow == script


@manual_time
async def test_a_reader_too_far_behind_overflows_alone(clock):
    script = [b"x" * 1000] * 20
    shared = Shared(script, gap_s=1, max_bytes=5000).start()
    slow = asyncio.create_task(drain(shared.tee.reader(own=True), gap_s=15))
    assert await drain(shared.tee.reader(own=False)) == script
    with pytest.raises(StreamInterrupted, match="5000 bytes behind"):
        await slow
    assert shared.abandoned == 0


@manual_time
async def test_a_stream_longer_than_the_buffer_takes_no_newcomers(clock):
    shared = Shared([b"x" * 1000] * 20, gap_s=1, max_bytes=5000).start()
    reader = shared.tee.reader(own=False)
    for _ in range(3):
        await reader.__anext__()
    assert shared.tee.joinable
    for _ in range(5):
        await reader.__anext__()
    assert not shared.tee.joinable
    await reader.aclose()


@manual_time
async def test_a_lone_slow_reader_gets_everything_and_holds_the_source_back(clock):
    script = [b"x" * 30_000] * 20
    shared = Shared(script, max_bytes=10).start()
    reader = shared.tee.reader(own=False)
    got = [await reader.__anext__()]
    await settle()
    assert shared.tee._ahead < 100_000
    async for chunk in reader:
        got.append(chunk)
        await asyncio.sleep(1)
    assert got == script


@manual_time
async def test_closing_a_reader_ends_its_own_wait(clock):
    shared = Shared([b"1", b"2"], gap_s=5).start()
    first, second = shared.tee.reader(own=False), shared.tee.reader(own=True)
    waiting = asyncio.create_task(drain(first))
    await asyncio.sleep(1)
    await first.aclose()
    assert await waiting == []
    assert await drain(second) == [b"1", b"2"]


def test_a_loop_dropped_with_a_shared_stream_pending_is_silent(caplog):
    loop = asyncio.new_event_loop()

    async def begin():
        shared = Shared([b"1", b"2"], gap_s=100).start()
        reader = shared.tee.reader(own=False)
        return shared, reader, asyncio.ensure_future(drain(reader))

    shared, reader, waiting = loop.run_until_complete(begin())
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    pump = shared.task.get_coro()
    pump.close()
    waiting.get_coro().close()
    for task in (shared.task, waiting):
        task._log_destroy_pending = False
    del reader, waiting, shared, pump, task
    gc.collect()
    assert caplog.records == []


@manual_time
async def test_each_reader_gets_the_error_of_its_own(clock):
    error = ValueError("broke")
    shared = Shared([b"1", error], gap_s=1).start()
    leader, follower = shared.tee.reader(own=False), shared.tee.reader(own=True)
    with pytest.raises(ValueError) as first:
        await drain(leader)
    with pytest.raises(ValueError) as second:
        await drain(follower)
    assert first.value is error
    assert second.value is not error
    assert second.value.__cause__ is error
    assert await drain(leader) == await drain(follower) == []
    await shared.task
    assert shared.source.closed


@manual_time
async def test_a_cancelled_pump_is_no_bare_cancellation_for_its_readers(clock):
    shared = Shared([b"1", b"2"], gap_s=1).start()
    reader = shared.tee.reader(own=False)
    await reader.__anext__()
    shared.task.cancel()
    with pytest.raises(StreamInterrupted):
        await reader.__anext__()


@manual_time
async def test_a_stream_can_be_failed_from_outside(clock):
    shared = Shared([b"1", b"2"], gap_s=1).start()
    reader = shared.tee.reader(own=False)
    shared.tee.fail(Closed("closed"))
    shared.task.cancel()
    with pytest.raises(Closed):
        await reader.__anext__()


@manual_time
async def test_values_are_copied_for_followers(clock):
    value = [1]
    shared = Shared([Item(value), Item(value, b"[1]")]).start()
    leader, follower = shared.tee.reader(own=False), shared.tee.reader(own=True)
    assert [item.value is value for item in await drain(leader)] == [True, True]
    first, second = await drain(follower)
    assert first.value == value
    assert first.value is not value
    assert second == Item(None, b"[1]")


@manual_time
async def test_a_source_that_fails_to_close_concerns_nobody(clock):
    shared = Shared([b"1", ValueError("broke")])

    async def aclose():
        raise OSError("again")

    shared.source.aclose = aclose
    shared.start()
    with pytest.raises(ValueError, match="broke"):
        await drain(shared.tee.reader(own=False))
    await shared.task
    await shared.tee.pump()  # over: nothing more to read


@manual_time
async def test_readers_cancelled_at_random_lose_and_repeat_nothing(clock):
    rng = random.Random(9)
    for _ in range(60):
        script = [b"%d" % n for n in range(8)]
        shared = Shared(script, gap_s=1).start()
        tasks = []
        for index in range(5):
            reader = shared.tee.reader(own=index > 0)
            task = asyncio.create_task(closing(reader, rng.choice([0.0, 0.0, 2.0])))
            if rng.random() < 0.6:
                asyncio.get_running_loop().call_later(rng.uniform(0, 10), task.cancel)
            tasks.append(task)
        done = await asyncio.gather(*tasks, return_exceptions=True)
        for found in done:
            assert isinstance(found, asyncio.CancelledError) or found == script
        with contextlib.suppress(asyncio.CancelledError):
            await shared.task
        assert shared.source.closed == all(isinstance(found, asyncio.CancelledError) for found in done)
        assert shared.tee.readers == 0


async def closing(reader, gap_s):
    try:
        return await drain(reader, gap_s)
    finally:
        await reader.aclose()

"""Streams: an end is told once however it comes; a replay is the recording."""

from __future__ import annotations

import asyncio

import pytest

from llmmw.answer import Usage
from llmmw.call import Item, Reply
from llmmw.stream import End, Replay, Tap, at_end
from llmmw.testing.clock import manual_time
from llmmw.testing.fake import ScriptedChunks, chat_chunks


async def drain(chunks):
    return [chunk async for chunk in chunks]


@manual_time
async def test_tap_passes_chunks_unchanged_and_tells_the_end_once(clock):
    ends: list[End] = []
    seen = []
    script = chat_chunks("a b")
    tap = Tap(ScriptedChunks(script), ends.append, seen.append)
    assert await drain(tap) == script == seen
    await tap.aclose()
    assert [end.how for end in ends] == ["finished"]
    assert ends[0].usage == tap.usage == Usage(3, 2, reported=True)


@manual_time
async def test_tap_tells_a_failure(clock):
    ends: list[End] = []
    error = ValueError("x")
    tap = Tap(ScriptedChunks([b"1", error]), ends.append)
    with pytest.raises(ValueError):
        await drain(tap)
    assert (ends[0].how, ends[0].error) == ("failed", error)


@manual_time
async def test_tap_tells_an_early_close_and_closes_the_source(clock):
    ends: list[End] = []
    source = ScriptedChunks([b"1", b"2"])
    tap = Tap(source, ends.append)
    await tap.__anext__()
    await tap.aclose()
    await tap.aclose()
    assert [end.how for end in ends] == ["closed"]
    assert source.closed


@manual_time
async def test_tap_tells_a_cancellation_and_closes_the_source(clock):
    ends: list[End] = []
    source = ScriptedChunks([b"1"], gap_s=10)
    task = asyncio.create_task(drain(Tap(source, ends.append)))
    await asyncio.sleep(1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert [end.how for end in ends] == ["cancelled"]
    assert source.closed


@manual_time
async def test_at_end_treats_a_whole_reply_and_a_stream_alike(clock):
    ends: list[End] = []
    whole = Reply(data=b"{}", usage=Usage(1, 1, reported=True))
    assert at_end(whole, ends.append) is whole
    assert ends == [End("finished", whole.usage)]
    streamed = at_end(Reply(chunks=ScriptedChunks([b"1"])), ends.append)
    assert len(ends) == 1
    assert streamed.chunks is not None
    await drain(streamed.chunks)
    assert [end.how for end in ends] == ["finished", "finished"]


@manual_time
async def test_replay_keeps_chunk_boundaries_and_usage(clock):
    recorded = [b"a", Item("v", b"v"), b""]
    replay = Replay(recorded, Usage(1, 2, reported=True))
    assert replay.usage.total_tokens == 3
    assert await drain(replay) == recorded
    assert await drain(replay) == []


@manual_time
async def test_replay_stops_when_closed(clock):
    replay = Replay([b"a", b"b"])
    assert await replay.__anext__() == b"a"
    await replay.aclose()
    await replay.aclose()
    assert await drain(replay) == []


@manual_time
async def test_closing_a_stream_that_somebody_waits_for_is_no_finish(clock):
    class Waits(ScriptedChunks):
        def __init__(self):
            super().__init__([])
            self.left = asyncio.Event()

        async def __anext__(self):
            await self.left.wait()
            raise StopAsyncIteration

        async def aclose(self):
            self.left.set()
            await clock.sleep(1)

    ends = []
    tap = Tap(Waits(), ends.append)
    reading = asyncio.ensure_future(anext(tap, None))
    await clock.sleep(0)
    await tap.aclose()
    assert await reading is None
    assert [end.how for end in ends] == ["closed"]

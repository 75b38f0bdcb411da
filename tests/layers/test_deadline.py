"""Deadline: one absolute moment for a whole call; no timer where nobody waits; cancellations stay exact."""

from __future__ import annotations

import asyncio
import math
import random

import pytest

from llmmw.call import Context, Reply
from llmmw.env import Env
from llmmw.errors import ConfigError, DeadlineExceeded
from llmmw.events import CacheHit, RefusedEarly
from llmmw.layers.base import Bound
from llmmw.layers.deadline import Deadline
from llmmw.order import Role
from llmmw.testing.clock import manual_time
from llmmw.testing.fake import FakeUpstream, ScriptedChunks, chat_call, chat_chunks

HIT = Reply(data=b"{}", source="cache")


class Hits(Bound):
    def peek(self, call):
        return HIT

    async def __call__(self, call):
        return HIT


def bind(clock, inner, seconds=10, events=None):
    return Deadline(seconds).bind(inner, Env(clock=clock, sinks=() if events is None else (events.append,)))


@pytest.mark.parametrize("value", [0, -1, math.inf, "soon", None, True])
def test_a_deadline_that_cannot_work_is_refused_when_built(value):
    with pytest.raises(ConfigError, match=r"Deadline\(seconds="):
        Deadline(value)


def test_settings_are_comparable_and_take_text():
    assert Deadline("1m") == Deadline(60)
    assert Deadline.role is Role.DEADLINE


@manual_time
async def test_the_moment_travels_in_the_context_and_is_the_nearer_one(clock):
    upstream = FakeUpstream()
    deadline = bind(clock, upstream, 10)
    now = clock.monotonic()
    await deadline(chat_call())
    await deadline(chat_call(context=Context(deadline=now + 5)))
    await deadline(chat_call(context=Context(deadline=now + 50)))
    assert [call.context.deadline for call in upstream.calls] == [now + 10, now + 5, now + 10]


@manual_time
async def test_an_answer_at_hand_pays_for_no_timer(clock):
    deadline = bind(clock, Hits(FakeUpstream(), Env(clock=clock)))
    assert await deadline(chat_call()) is HIT
    assert asyncio.get_running_loop()._scheduled == []
    assert deadline.peek(chat_call()) is HIT


@manual_time
async def test_a_call_beyond_the_deadline_is_cancelled_and_reported(clock):
    upstream = FakeUpstream(latency_s=30)
    deadline = bind(clock, upstream, 10)
    began = clock.monotonic()
    with pytest.raises(DeadlineExceeded):
        await deadline(chat_call())
    assert clock.monotonic() - began == 10
    assert upstream.cancelled == 1
    assert asyncio.current_task().cancelling() == 0


@manual_time
async def test_after_the_deadline_only_a_hit_at_hand_is_given(clock):
    late = chat_call(context=Context(deadline=clock.monotonic()))
    events = []
    upstream = FakeUpstream()
    with pytest.raises(DeadlineExceeded, match="had passed before"):
        await bind(clock, upstream, events=events)(late)
    assert upstream.calls == []
    assert [type(event) for event in events] == [RefusedEarly]
    assert await bind(clock, Hits(upstream, Env(clock=clock)), events=events)(late) is HIT
    assert [type(event) for event in events] == [RefusedEarly, CacheHit]


@manual_time
async def test_the_deadline_covers_the_body_of_a_stream(clock):
    source = ScriptedChunks(chat_chunks("one two three four"), gap_s=3)
    deadline = bind(clock, FakeUpstream([Reply(chunks=source)], latency_s=2), 10)
    began = clock.monotonic()
    reply = await deadline(chat_call(stream=True))
    got = []
    with pytest.raises(DeadlineExceeded):
        async for chunk in reply.chunks:
            got.append(chunk)
    assert len(got) == 2
    assert clock.monotonic() - began == 10
    assert source.closed


@manual_time
async def test_async_04_a_cancellation_is_never_taken_for_the_deadline(clock):
    rng = random.Random(1)
    kinds = set()
    for _ in range(100):
        deadline = bind(clock, FakeUpstream(latency_s=rng.choice([1, 2, 3])), 2)
        task = asyncio.create_task(deadline(chat_call()))
        killer = asyncio.get_running_loop().call_later(rng.choice([1, 2, 3]), task.cancel)
        done = await asyncio.gather(task, return_exceptions=True)
        kinds.add(type(done[0]))
        assert task.cancelling() == (1 if task.cancelled() else 0)
        killer.cancel()
    assert kinds == {Reply, DeadlineExceeded, asyncio.CancelledError}
    assert asyncio.current_task().cancelling() == 0

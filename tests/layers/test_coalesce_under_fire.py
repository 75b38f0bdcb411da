"""Coalescer between deadline, cache, limiter and time-out, under random failures and cancellations.

Whatever happens: every caller gets an outcome that is theirs, nobody who was not cancelled sees a cancellation, and
nothing is left: no task, no flight, no permit, no unretrieved exception.
"""

from __future__ import annotations

import asyncio
import gc
import random
from collections import Counter

from llmmw.call import Context, Reply
from llmmw.env import Env
from llmmw.layers.cache import TTLCache
from llmmw.layers.coalesce import Coalescer
from llmmw.layers.deadline import Deadline
from llmmw.layers.limit import RateLimiter
from llmmw.layers.timeout import Timeout
from llmmw.testing.clock import ManualClock
from llmmw.testing.fake import FakeUpstream, ScriptedChunks, chat_body, chat_call, chat_chunks, error_reply

STREAM = chat_chunks("one two three")
WHOLE = chat_body("echo")
TEXTS = {"echo", "one two three"}
STOPPED = b"stopped early"


def answer(call, rng):
    luck = rng.random()
    if luck < 0.15:
        raise ValueError("broke")
    if luck < 0.25:
        return error_reply(503)
    if luck < 0.3:
        raise asyncio.CancelledError
    if not call.stream:
        return Reply(data=WHOLE)
    chunks = list(STREAM)
    if luck < 0.5:
        chunks[2] = rng.choice([ValueError("broke"), asyncio.CancelledError()])
    return Reply(chunks=ScriptedChunks(chunks, gap_s=rng.choice([0, 0, 1])))


async def consume(handler, call, rng):
    reply = await handler(call)
    if reply.chunks is None:
        return reply.data
    stop_after = rng.randrange(1, 8) if rng.random() < 0.3 else 99
    pause = rng.choice([0, 0, 0, 2])
    got = []
    try:
        async for chunk in reply.chunks:
            got.append(chunk)
            await asyncio.sleep(pause)
            if len(got) == stop_after:
                return STOPPED
        return b"".join(got)
    finally:
        await reply.chunks.aclose()


def is_whole(outcome):
    """One of the answers, complete; the cache may have made a stream of a whole answer or the reverse."""
    return outcome in {STOPPED, error_reply(503).data} or (
        outcome.endswith(b"data: [DONE]\n\n") if outcome.startswith(b"data:") else Reply(data=outcome).text in TEXTS
    )


def build(env, rng, upstream):
    timeout = Timeout(rng.choice([2, 50]), between_chunks=rng.choice([None, 2])).bind(upstream, env)
    limiter = RateLimiter(concurrency=rng.choice([1, 2, 50])).bind(timeout, env)
    options = {"finish_orphans": rng.random() < 0.3, "buffer_bytes": rng.choice([100, 1 << 20])}
    coalescer = Coalescer(**options).bind(limiter, env)
    outermost = coalescer
    if rng.random() < 0.5:
        outermost = TTLCache(300).bind(outermost, env)
    if rng.random() < 0.7:
        outermost = Deadline(rng.choice([3, 30])).bind(outermost, env)
    return outermost, coalescer, limiter


async def one_round(clock, seed):
    rng, loop, trouble = random.Random(seed), asyncio.get_running_loop(), []
    loop.set_exception_handler(lambda _, context: trouble.append(context))
    env = Env(clock=clock, seed=seed)
    upstream = FakeUpstream([lambda call: answer(call, rng)] * 100, latency_s=rng.choice([0, 1, 3]))
    outermost, coalescer, limiter = build(env, rng, upstream)
    tasks = []
    for _ in range(15):
        deadline = clock.monotonic() + rng.choice([0.5, 1, 2, 4]) if rng.random() < 0.3 else None
        context = Context(deadline=deadline, priority=rng.randrange(3))
        call = chat_call(str(rng.randrange(2)), temperature=0, context=context, stream=rng.random() < 0.5)
        tasks.append(asyncio.create_task(consume(outermost, call, rng)))
        if rng.random() < 0.4:
            loop.call_later(rng.choice([0, 0, 1, 2, 3, 3.5]), tasks[-1].cancel)
        if rng.random() < 0.3:
            await asyncio.sleep(rng.choice([0, 0, 1]))
        if rng.random() < 0.05 and coalescer._tasks:
            next(iter(coalescer._tasks)).cancel()
    async with asyncio.timeout(1000):
        found = await asyncio.gather(*tasks, return_exceptions=True)
    for task, outcome in zip(tasks, found, strict=True):
        if isinstance(outcome, asyncio.CancelledError):
            assert task.cancelling() == 1, "cancelled although nobody asked for it"
        elif isinstance(outcome, bytes):
            assert is_whole(outcome)
    await asyncio.sleep(100)
    assert coalescer.gauges() == {"flights": 0, "waiting": 0}
    assert (coalescer._tasks, upstream.in_flight) == ({}, 0)
    assert (limiter.gauges()["in_use"], limiter.gauges()["waiting"]) == (0, 0)
    await coalescer.aclose()
    await limiter.aclose()
    assert asyncio.all_tasks() == {asyncio.current_task()}
    gc.collect(0)
    assert trouble == []
    return Counter(type(outcome).__name__ for outcome in found)


def test_whatever_happens_everybody_gets_their_own_outcome_and_nothing_is_left():
    kinds = Counter()
    for seed in range(150):
        clock = ManualClock()
        try:
            kinds += clock.run(one_round(clock, seed))
        except BaseException as error:
            error.add_note(f"seed {seed}")
            raise
    assert {"bytes", "CancelledError", "DeadlineExceeded", "UpstreamTimeout", "ValueError", "StreamInterrupted"} <= set(
        kinds
    )

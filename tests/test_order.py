"""What the order of the layers is for: how they act together."""

from __future__ import annotations

import asyncio
import contextlib
import math

import pytest

import llmmw
from llmmw import (
    Coalescer,
    Deadline,
    ErrorRouter,
    RateLimiter,
    Retry,
    Stack,
    Timeout,
    TTLCache,
)
from llmmw.call import Context, Reply
from llmmw.env import Env
from llmmw.errors import AllEndpointsFailed, DeadlineExceeded, OrderError, UpstreamTimeout
from llmmw.events import CacheStored
from llmmw.layers.batch import Batcher
from llmmw.testing.clock import manual_time
from llmmw.testing.fake import FakeUpstream, ScriptedChunks, chat_body, chat_call, chat_chunks, error_reply


def bind(clock, upstream, *layers, told=None):
    return Stack(*layers).bind(upstream, env=Env(clock=clock, seed=1, sinks=() if told is None else (told.append,)))


async def read(reply):
    return [chunk async for chunk in reply.chunks]


# ── queueing is not service ────────────────────────────────────────────────────────────────────────────────────────


@manual_time
async def test_order_02_time_in_the_limiters_queue_is_not_the_attempts(clock):
    """Ten calls of 0.9 s through one permit: the last waits 8.1 s, and nobody times out after 1 s."""
    upstream = FakeUpstream(latency_s=0.9)
    engine = bind(clock, upstream, RateLimiter(concurrency=1), Timeout(1))
    replies = await asyncio.gather(*(engine.call(chat_call(str(n))) for n in range(10)))
    assert all(reply.ok for reply in replies)
    assert clock.monotonic() == pytest.approx(1009, abs=0.1)
    await engine.aclose()


@pytest.mark.parametrize("by", ["layer", "using"])
@manual_time
async def test_order_02_in_the_queue_only_the_deadline_counts(clock, by):
    upstream = FakeUpstream(latency_s=0.9)
    layers = (RateLimiter(concurrency=1), Timeout(1))
    engine = bind(clock, upstream, *([Deadline(2)] if by == "layer" else []), *layers)
    deadline = clock.monotonic() + 2 if by == "using" else None
    began = clock.monotonic()
    calls = (engine.call(chat_call(str(n), context=Context(deadline=deadline))) for n in range(10))
    found = await asyncio.gather(*calls, return_exceptions=True)
    late = [error for error in found if isinstance(error, DeadlineExceeded)]
    assert (sum(isinstance(one, Reply) for one in found), len(late)) == (2, 8)
    assert not [error for error in late if isinstance(error, UpstreamTimeout)]
    assert clock.monotonic() - began <= 2.001
    assert len(upstream.calls) <= 3  # what waited was never sent
    await engine.aclose()


@pytest.mark.parametrize(
    "layers",
    [(), (TTLCache(300),), (Coalescer(),), (Retry(),), (TTLCache(300), Coalescer(), Retry()), (Batcher(),)],
    ids=lambda layers: "+".join(layer.role for layer in layers) or "none",
)
@pytest.mark.parametrize("stream", [False, True])
@manual_time
async def test_the_deadline_of_using_is_kept_by_every_stack(clock, layers, stream):
    hanging = Reply(chunks=ScriptedChunks(chat_chunks("one two three"), gap_s=100))
    upstream = FakeUpstream([hanging] if stream else [], latency_s=0 if stream else 100)
    engine = bind(clock, upstream, *layers)
    with llmmw.using(deadline=3), pytest.raises(DeadlineExceeded):
        call = chat_call(stream=stream, temperature=0, context=llmmw.call.current_context())
        await read(await engine.call(call))
    assert clock.monotonic() == pytest.approx(1003, abs=0.01)
    await asyncio.sleep(1)
    assert engine.get_performance_stats()["errors"] == 1
    assert upstream.in_flight == 0
    await engine.aclose()


@manual_time
async def test_a_deadline_that_has_passed_lets_only_a_hit_through(clock):
    engine = bind(clock, FakeUpstream(), TTLCache(300), Coalescer())
    await engine.call(chat_call())
    late = Context(deadline=clock.monotonic() - 1)
    assert (await engine.call(chat_call(context=late))).source == "cache"
    with pytest.raises(DeadlineExceeded):
        await engine.call(chat_call("new", context=late))
    await engine.aclose()


@manual_time
async def test_switched_off_there_is_no_deadline_either(clock):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMMW_DISABLE", "1")
        engine = bind(clock, FakeUpstream(latency_s=5), Deadline(1))
    assert (await engine.call(chat_call(context=Context(deadline=clock.monotonic() + 1)))).ok
    await engine.aclose()


# ── impossible orders ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("layers", "rule"),
    [
        ((Retry(), TTLCache(300)), "cache-outside-retry"),
        ((RateLimiter(), TTLCache(300)), "cache-outside-limit"),
        ((Batcher(), Coalescer()), "coalesce-outside-batch"),
        ((Timeout(1), RateLimiter()), "limit-outside-timeout"),
        ((RateLimiter(), Retry()), "retry-outside-limit"),
        ((Retry(), ErrorRouter()), "route-outside-retry"),
        ((TTLCache(300), Deadline(1)), "deadline-outside-cache"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_order_03_impossible_orders_are_refused_by_name(layers, rule):
    with pytest.raises(OrderError, match=rule) as caught:
        Stack(*layers)
    assert caught.value.rule == rule
    assert Stack(*layers, allow=(rule,)).check()[0].rule == rule


# ── another endpoint's answer is not the primary's ─────────────────────────────────────────────────────────────────


def routed(clock, primary, other, told, **cache):
    options = {"negative_ttl": 30, "stale_if_error": 0} | cache
    return bind(
        clock, primary, TTLCache(300, jitter=0, **options), Coalescer(), ErrorRouter(fallbacks=[other]), told=told
    )


def stored(told):
    return sum(isinstance(event, CacheStored) for event in told)


@pytest.mark.parametrize("stream", [False, True])
@manual_time
async def test_order_04_a_fallbacks_answer_is_given_to_all_and_stored_for_nobody(clock, stream):
    down = FakeUpstream([error_reply(503)], latency_s=1)
    other = FakeUpstream(
        [Reply(chunks=ScriptedChunks(chat_chunks("other")))] if stream else [], name="http://b.test/v1"
    )
    told = []
    engine = routed(clock, down, other, told)

    async def ask():
        reply = await engine.call(chat_call(temperature=0, stream=stream))
        if stream:
            await read(reply)
        return reply.fallback

    assert await asyncio.gather(*(ask() for _ in range(5))) == [True] * 5
    assert (len(down.calls), len(other.calls), stored(told)) == (1, 1, 0)
    assert await ask() is False  # the primary is back, and asked
    assert (len(down.calls), len(other.calls), stored(told)) == (2, 1, 1)
    await engine.aclose()


@pytest.mark.parametrize("status", [400, 404, 413, 422, 500])
@manual_time
async def test_order_04_a_fallbacks_error_is_not_the_primarys(clock, status):
    """Not even where refusals are kept: the primary has not refused."""
    down = FakeUpstream([error_reply(503)])
    other = FakeUpstream([error_reply(status)], name="http://b.test/v1")
    told = []
    engine = routed(clock, down, other, told)
    with contextlib.suppress(AllEndpointsFailed):
        assert not (await engine.call(chat_call(temperature=0))).ok
    assert stored(told) == 0
    reply = await engine.call(chat_call(temperature=0))
    assert (reply.ok, reply.source, len(down.calls)) == (True, "upstream", 2)
    await engine.aclose()


@manual_time
async def test_order_04_the_primarys_entry_survives_what_the_fallback_says(clock):
    """Stale while it is renewed: the fallback's answer does not take its place."""
    first = Reply(data=chat_body("the primary's"))
    down = FakeUpstream([first, error_reply(503), error_reply(503)])
    other = FakeUpstream([Reply(data=chat_body("other"))] * 2, name="http://b.test/v1")
    told = []
    engine = routed(clock, down, other, told, stale_while_revalidate=1000)
    call = chat_call(temperature=0)
    assert (await engine.call(call)).text == "the primary's"
    await asyncio.sleep(301)
    for _ in range(2):
        reply = await engine.call(call)
        assert (reply.text, reply.stale) == ("the primary's", True)
        await asyncio.sleep(1)
    assert (len(other.calls), stored(told)) == (2, 1)
    assert (await engine.call(call)).stale
    await asyncio.sleep(1)
    assert stored(told) == 2  # the primary answered the third renewal
    assert not (await engine.call(call)).stale
    await engine.aclose()


@manual_time
async def test_order_04_a_call_that_shares_with_nobody_leaves_the_shared_entry_alone(clock):
    """Under "deterministic" a warm call is neither answered by the cold one's entry nor stored over it."""
    upstream = FakeUpstream(numbered=True)
    engine = bind(clock, upstream, TTLCache(300, sampling="deterministic"), Coalescer())
    cold, warm = chat_call(temperature=0), chat_call(temperature=1)
    texts = [(await engine.call(call)).text for call in (cold, warm, cold, warm)]
    assert texts == ["echo: hello #1", "echo: hello #2", "echo: hello #1", "echo: hello #3"]
    await engine.aclose()


def test_an_engine_without_deadlines_of_its_own_says_nothing_of_one():
    """What keeps `using(deadline=)` is no layer: it is in no list and no statistics."""
    engine = Stack(TTLCache(300)).bind(FakeUpstream())
    assert "deadline" not in repr(engine)
    assert engine._timely._seconds == math.inf
    engine.close()

"""Timeout: limits of one attempt, the nearest of which ends it, with an error that says which it was."""

from __future__ import annotations

import asyncio
import socket

import pytest

from llmmw.algo.service import MAX_AGE_S, MIN_SAMPLES
from llmmw.call import Context, Reply, Urgency
from llmmw.env import Env
from llmmw.errors import AmbiguousOutcome, ConfigError, DeadlineExceeded, UpstreamTimeout
from llmmw.interrupt import mark_unsent
from llmmw.layers.retry import Retry
from llmmw.layers.timeout import Timeout
from llmmw.stack import Stack
from llmmw.testing.clock import ManualClock, manual_time
from llmmw.testing.fake import FakeUpstream, ScriptedChunks, chat_call, error_reply


def bind(clock, inner, *args, **options):
    return Timeout(*args, **options).bind(inner, Env(clock=clock))


def until(clock, seconds):
    return Context(deadline=clock.monotonic() + seconds)


@pytest.mark.parametrize("name", ["total", "connect", "first_byte", "between_chunks"])
def test_a_limit_that_cannot_work_is_refused_when_built(name):
    with pytest.raises(ConfigError, match=name):
        Timeout(**{"total": 5, name: 0})


def test_total_is_needed():
    with pytest.raises(ConfigError, match="total"):
        Timeout(None)
    assert Timeout("1m") == Timeout(60)


@manual_time
async def test_an_attempt_in_time_is_untouched(clock):
    upstream = FakeUpstream(latency_s=5)
    assert (await bind(clock, upstream, 6)(chat_call())).ok
    assert upstream.calls[0].connect_s is None


@manual_time
async def test_an_attempt_beyond_the_total_times_out_as_sent(clock):
    upstream = FakeUpstream(latency_s=50)
    began = clock.monotonic()
    with pytest.raises(UpstreamTimeout, match="total") as caught:
        await bind(clock, upstream, 6)(chat_call(context=until(clock, 20)))
    assert (clock.monotonic() - began, upstream.cancelled) == (6, 1)
    assert (caught.value.sent, caught.value.endpoint) == (True, "http://fake.test/v1")


class Upstream:
    """Answers after as many seconds as the prompt says."""

    def __init__(self, clock):
        self.clock = clock

    async def __call__(self, call):
        await self.clock.sleep(float(call.payload["messages"][0]["content"]))
        return Reply(data=b"{}")


@manual_time
async def test_each_of_many_attempts_ends_at_its_own_moment_under_one_timer(clock):
    bound = bind(clock, Upstream(clock), 6)
    began, loop = clock.monotonic(), asyncio.get_running_loop()

    async def attempt(starts_s, takes_s):
        await clock.sleep(starts_s)
        try:
            await bound(chat_call(str(takes_s)))
        except UpstreamTimeout:
            return -(clock.monotonic() - began)
        return clock.monotonic() - began

    plan = [(0, 50), (1, 2), (2, 50), (2, 50), (3, 5.5), (4, 50), (20, 50)]
    tasks = [asyncio.ensure_future(attempt(*each)) for each in plan]
    await clock.sleep(4.5)
    assert sum(not timer.cancelled() and timer.when() == pytest.approx(began + 6) for timer in loop._scheduled) == 1
    assert await asyncio.gather(*tasks) == pytest.approx([-6, 3, -8, -8, 8.5, -10, -26])


@manual_time
async def test_a_cancelled_attempt_is_forgotten(clock):
    bound = bind(clock, Upstream(clock), 6)
    task = asyncio.ensure_future(bound(chat_call("50")))
    await clock.sleep(1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert task.cancelling() == 1
    began = clock.monotonic()
    with pytest.raises(UpstreamTimeout):
        await bound(chat_call("50"))
    assert clock.monotonic() - began == pytest.approx(6)


def test_async_attempts_of_a_dead_loop_do_not_keep_those_of_the_next_from_ending():
    clock = ManualClock()
    bound = bind(clock, Upstream(clock), 6)

    async def leave_one():
        asyncio.ensure_future(bound(chat_call("50")))
        await clock.sleep(1)

    async def wait():
        began = clock.monotonic()
        with pytest.raises(UpstreamTimeout):
            await bound(chat_call("50"))
        return clock.monotonic() - began

    clock.run(leave_one())
    bound.rehome()  # as the engine tells every layer
    assert clock.run(wait()) == pytest.approx(6)


@manual_time
async def test_where_the_deadline_is_nearer_it_is_the_deadline(clock):
    upstream = FakeUpstream(latency_s=50)
    began = clock.monotonic()
    with pytest.raises(DeadlineExceeded):
        await bind(clock, upstream, 6)(chat_call(context=until(clock, 4)))
    assert clock.monotonic() - began == 4


@manual_time
async def test_without_time_left_the_endpoint_is_not_asked(clock):
    upstream = FakeUpstream()
    with pytest.raises(DeadlineExceeded):
        await bind(clock, upstream, 6)(chat_call(context=until(clock, 0)))
    assert upstream.calls == []


@manual_time
async def test_with_less_time_than_service_takes_the_endpoint_is_not_asked(clock):
    upstream = FakeUpstream(latency_s=3)
    timeout = bind(clock, upstream, 6)
    for _ in range(MIN_SAMPLES):
        await timeout(chat_call())
    asked = len(upstream.calls)
    with pytest.raises(DeadlineExceeded, match="nine of ten"):
        await timeout(chat_call(context=until(clock, 2)))
    assert len(upstream.calls) == asked
    assert (await timeout(chat_call(context=until(clock, 4)))).ok
    upstream.latency_s = 1
    clock.advance(MAX_AGE_S + 10)
    assert (await timeout(chat_call(context=until(clock, 2)))).ok


@manual_time
async def test_refusals_and_failures_teach_no_service_time(clock):
    upstream = FakeUpstream([error_reply(503)] * MIN_SAMPLES, latency_s=3)
    timeout = bind(clock, upstream, 6)
    for _ in range(MIN_SAMPLES):
        await timeout(chat_call())
    upstream.latency_s = 1
    assert (await timeout(chat_call(context=until(clock, 2)))).ok


@manual_time
async def test_a_shared_call_s_deadline_moves_with_its_followers(clock):
    upstream = FakeUpstream(latency_s=5)
    call = chat_call(context=until(clock, 2))
    urgency = Urgency(0, call.context.deadline)
    urgency.join(until(clock, 9))
    assert (await bind(clock, upstream, 30)(call.replace(urgency=urgency))).ok
    urgency = Urgency(0, clock.monotonic() + 2)
    with pytest.raises(DeadlineExceeded):
        await bind(clock, upstream, 30)(call.replace(urgency=urgency))


@manual_time
async def test_connect_is_handed_to_the_endpoint(clock):
    upstream = FakeUpstream()
    await bind(clock, upstream, 6, connect="2s")(chat_call())
    assert upstream.calls[0].connect_s == 2


def stream_of(gap_s, count=3):
    return ScriptedChunks([b"%d" % n for n in range(count)], gap_s=gap_s)


async def read(reply, pause=None):
    got = []
    async for chunk in reply.chunks:
        got.append(chunk)
        if pause is not None:
            pause()
    return got


@manual_time
async def test_the_total_covers_the_body_and_closes_it(clock):
    source = stream_of(3)
    began = clock.monotonic()
    reply = await bind(clock, FakeUpstream([Reply(chunks=source)], latency_s=1), 6)(chat_call(stream=True))
    with pytest.raises(UpstreamTimeout, match="total"):
        await read(reply)
    assert (clock.monotonic() - began, source.closed) == (6, True)


@manual_time
async def test_the_deadline_covers_the_body_too(clock):
    reply = await bind(clock, FakeUpstream([Reply(chunks=stream_of(3))]), 60)(
        chat_call(stream=True, context=until(clock, 4))
    )
    with pytest.raises(DeadlineExceeded):
        await read(reply)


@manual_time
async def test_the_first_byte_has_a_limit_of_its_own(clock):
    began = clock.monotonic()
    slow_head = bind(clock, FakeUpstream(latency_s=9), 60, first_byte=4)
    with pytest.raises(UpstreamTimeout, match="first_byte"):
        await slow_head(chat_call(stream=True))
    assert clock.monotonic() - began == 4
    slow_body = bind(clock, FakeUpstream([Reply(chunks=stream_of(3))], latency_s=2), 60, first_byte=4)
    reply = await slow_body(chat_call(stream=True))
    with pytest.raises(UpstreamTimeout, match="first_byte"):
        await read(reply)
    in_time = bind(clock, FakeUpstream([Reply(chunks=stream_of(3))]), 60, first_byte=4)
    assert len(await read(await in_time(chat_call(stream=True)))) == 3


@manual_time
async def test_first_byte_leaves_whole_replies_alone(clock):
    assert (await bind(clock, FakeUpstream(latency_s=9), 60, first_byte=4)(chat_call())).ok


@manual_time
async def test_silence_between_chunks_is_limited_while_somebody_reads(clock):
    upstream = FakeUpstream([Reply(chunks=stream_of(3)), Reply(chunks=stream_of(1))])
    timeout = bind(clock, upstream, 600, first_byte=10, between_chunks=2)
    with pytest.raises(UpstreamTimeout, match="between_chunks"):
        await read(await timeout(chat_call(stream=True)))
    reply = await timeout(chat_call(stream=True))
    assert len(await read(reply, lambda: clock.advance(50))) == 3
    assert reply.chunks.usage.total_tokens == 0
    await reply.chunks.aclose()


class Connecting:
    """An endpoint that takes so long to connect, and then so long to answer; tells a cancellation which it was."""

    def __init__(self, connect_s, answer_s):
        self.connect_s, self.answer_s = connect_s, answer_s
        self.asked = 0

    async def __call__(self, call):
        self.asked += 1
        try:
            await asyncio.sleep(self.connect_s)
        except asyncio.CancelledError as cancelled:
            mark_unsent(cancelled)
            raise
        await asyncio.sleep(self.answer_s)
        return Reply(data=b"{}")


@pytest.mark.parametrize(("deadline_s", "error"), [(None, UpstreamTimeout), (2, DeadlineExceeded)])
@manual_time
async def test_a_limit_that_passes_while_connecting_says_that_nothing_was_sent(clock, deadline_s, error):
    context = Context() if deadline_s is None else until(clock, deadline_s)
    for upstream, sent in ((Connecting(50, 0), False), (Connecting(1, 50), True)):
        with pytest.raises(error) as caught:
            await bind(clock, upstream, 6)(chat_call(context=context))
        assert caught.value.sent is sent
        context = Context() if deadline_s is None else until(clock, deadline_s)


@manual_time
async def test_an_attempt_that_never_connected_is_repeated_at_a_paid_endpoint(clock):
    env = Env(clock=clock, seed=1)
    for upstream, asked in ((Connecting(50, 0), 3), (Connecting(0, 50), 1)):
        with pytest.raises((UpstreamTimeout, AmbiguousOutcome)):
            await Retry().bind(Timeout(6).bind(upstream, env), env)(chat_call())
        assert upstream.asked == asked


async def test_a_limit_that_passes_in_the_tls_handshake_says_that_nothing_was_sent():
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts connections, and nothing more
        url = f"https://127.0.0.1:{silent.getsockname()[1]}/v1"
        engine = Stack(Timeout(0.2)).bind(url)
        try:
            with pytest.raises(UpstreamTimeout, match="total") as caught:
                await engine.call(chat_call())
        finally:
            await engine.aclose()
        assert caught.value.sent is False

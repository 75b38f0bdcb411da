from __future__ import annotations

import asyncio
import pickle
import random
from typing import TYPE_CHECKING

import pytest

from llmmw import errors
from llmmw.call import Call, Context, Item, Reply
from llmmw.env import Env
from llmmw.events import Event, RetryScheduled
from llmmw.layers.base import Bound
from llmmw.layers.retry import BoundRetry, Retry
from llmmw.stack import Stack
from llmmw.testing.clock import ManualClock, manual_time
from llmmw.testing.fake import FakeUpstream, ScriptedChunks, chat_body, chat_call, chat_chunks, error_reply

if TYPE_CHECKING:
    from llmmw.call import Chunk, Handler


def bound(
    upstream: Handler,
    clock: ManualClock,
    *,
    events: list[Event] | None = None,
    caps: frozenset[str] = frozenset(),
    **options: object,
) -> BoundRetry:
    env = Env(clock=clock, seed=1, sinks=() if events is None else (events.append,)).endowed(caps)
    if isinstance(upstream, FakeUpstream):
        upstream.start(env)
    return Retry(**options).bind(upstream, env)  # type: ignore[arg-type]


async def read(reply: Reply) -> list[Chunk]:
    assert reply.chunks is not None
    return [chunk async for chunk in reply.chunks]


class Limiter(Bound):
    paces = True


# ── repeating ───────────────────────────────────────────────────────────────────────────────────────────────────────


@manual_time
async def test_passing_trouble_is_repeated(clock: ManualClock) -> None:
    events: list[Event] = []
    upstream = FakeUpstream([error_reply(503), errors.ConnectionFailed("refused")])
    reply = await bound(upstream, clock, events=events)(chat_call("a"))
    assert reply.text == "echo: a"
    assert [(a.fault, a.status, a.error) for a in reply.attempts] == [
        ("server", 503, ""),
        ("not_sent", None, "ConnectionFailed"),
    ]
    scheduled = [event for event in events if isinstance(event, RetryScheduled)]
    assert [event.fault for event in scheduled] == ["server", "not_sent"]
    assert [event.wait_s for event in scheduled] == [attempt.wait_s for attempt in reply.attempts]
    assert sum(event.wait_s for event in scheduled) == pytest.approx(clock.monotonic() - 1000.0)


@manual_time
async def test_last_refusal_is_returned_with_its_history(clock: ManualClock) -> None:
    upstream = FakeUpstream([error_reply(500)] * 9)
    reply = await bound(upstream, clock)(chat_call())
    assert reply.status == 500
    assert [attempt.status for attempt in reply.attempts] == [500, 500, 500]
    assert reply.attempts[-1].wait_s == 0
    assert len(upstream.calls) == 3


@manual_time
async def test_route_17_final_error_lists_attempts_and_pickles(clock: ManualClock) -> None:
    upstream = FakeUpstream([error_reply(503), errors.ProtocolError("html"), errors.ConnectionFailed("x")])
    with pytest.raises(errors.ConnectionFailed) as caught:
        await bound(upstream, clock)(chat_call())
    again = pickle.loads(pickle.dumps(caught.value))
    assert [(a.endpoint, a.fault, a.status, a.error) for a in again.attempts] == [
        ("http://fake.test/v1", "server", 503, ""),
        ("http://fake.test/v1", "malformed", None, "ProtocolError"),
        ("http://fake.test/v1", "not_sent", None, "ConnectionFailed"),
    ]
    assert again.attempts[0].wait_s > 0


@manual_time
async def test_users_own_exception_comes_back_unchanged_with_a_note(clock: ManualClock) -> None:
    class APIConnectionError(Exception):
        pass

    def fresh(_: Call) -> Reply:
        raise APIConnectionError("gone") from ConnectionRefusedError()

    with pytest.raises(APIConnectionError) as caught:
        await bound(FakeUpstream([fresh] * 5), clock)(chat_call())
    assert str(caught.value) == "gone"
    (note,) = caught.value.__notes__
    assert note.count("not_sent: APIConnectionError") == 3
    assert "waited" in note


@manual_time
async def test_users_bug_is_not_repeated_and_gets_no_note(clock: ManualClock) -> None:
    upstream = FakeUpstream([ValueError("bug")])
    with pytest.raises(ValueError, match="bug") as caught:
        await bound(upstream, clock)(chat_call())
    assert len(upstream.calls) == 1
    assert not hasattr(caught.value, "__notes__")


@manual_time
async def test_route_01_spent_account_costs_one_request(clock: ManualClock) -> None:
    upstream = FakeUpstream([error_reply(429, code="insufficient_quota")] * 5)
    reply = await bound(upstream, clock)(chat_call())
    assert reply.status == 429
    assert len(upstream.calls) == 1


@manual_time
async def test_route_10_wish_on_bad_request_and_quota_is_not_obeyed(clock: ManualClock) -> None:
    for refused in (
        error_reply(400, x_should_retry="true"),
        error_reply(429, code="insufficient_quota", x_should_retry="true"),
    ):
        upstream = FakeUpstream([refused] * 5)
        await bound(upstream, clock)(chat_call())
        assert len(upstream.calls) == 1


@manual_time
async def test_route_08_answers_that_are_none_are_repeated(clock: ManualClock) -> None:
    upstream = FakeUpstream([errors.ProtocolError("HTML"), errors.ProtocolError("choices is empty")])
    reply = await bound(upstream, clock)(chat_call("x"))
    assert reply.text == "echo: x"
    assert len(upstream.calls) == 3


@manual_time
async def test_circuit_open_ends_the_loop(clock: ManualClock) -> None:
    upstream = FakeUpstream([error_reply(503), errors.CircuitOpen("open", retry_after_s=3.0)])
    with pytest.raises(errors.CircuitOpen) as caught:
        await bound(upstream, clock)(chat_call())
    assert [attempt.fault for attempt in caught.value.attempts] == ["server", "refused"]


@manual_time
async def test_filtered_answer_is_an_answer(clock: ManualClock) -> None:
    upstream = FakeUpstream([error_reply(500), Reply(data=chat_body("I", finish="content_filter"))])
    reply = await bound(upstream, clock)(chat_call())
    assert reply.text == "I"
    assert [attempt.fault for attempt in reply.attempts] == ["server"]
    assert len(upstream.calls) == 2


# ── lost calls ──────────────────────────────────────────────────────────────────────────────────────────────────────


@manual_time
async def test_route_03_lost_call_is_not_repeated(clock: ManualClock) -> None:
    upstream = FakeUpstream([errors.UpstreamTimeout("no answer in 30 s", endpoint="e")] * 2)
    with pytest.raises(errors.AmbiguousOutcome, match="no answer in 30 s; not repeated") as caught:
        await bound(upstream, clock)(chat_call())
    assert len(upstream.calls) == 1
    assert isinstance(caught.value, errors.UpstreamTimeout)
    assert isinstance(caught.value.__cause__, errors.UpstreamTimeout)
    assert [attempt.fault for attempt in caught.value.attempts] == ["ambiguous"]
    assert pickle.loads(pickle.dumps(caught.value)).endpoint == "e"


@manual_time
async def test_lost_call_keeps_a_more_exact_type(clock: ManualClock) -> None:
    with pytest.raises(errors.StaleConnection):
        await bound(FakeUpstream([errors.StaleConnection("x")]), clock)(chat_call())
    with pytest.raises(TimeoutError):
        await bound(FakeUpstream([TimeoutError()]), clock)(chat_call())


@manual_time
async def test_lost_call_is_repeated_where_allowed(clock: ManualClock) -> None:
    upstream = FakeUpstream([errors.UpstreamTimeout("x")] * 2)
    reply = await bound(upstream, clock, duplicate_ok=True)(chat_call())
    assert reply.ok
    upstream = FakeUpstream([errors.UpstreamTimeout("x")] * 3)
    with pytest.raises(errors.UpstreamTimeout) as caught:
        await bound(upstream, clock, caps=frozenset({"idempotent"}))(chat_call())
    assert not isinstance(caught.value, errors.AmbiguousOutcome)
    assert len(upstream.calls) == 2


@manual_time
async def test_timeout_before_sending_is_repeated(clock: ManualClock) -> None:
    upstream = FakeUpstream([errors.UpstreamTimeout("x", sent=False)])
    assert (await bound(upstream, clock)(chat_call())).ok


# ── waiting ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@manual_time
async def test_retry_after_is_a_lower_bound(clock: ManualClock) -> None:
    upstream = FakeUpstream([error_reply(503, retry_after="7")])
    await bound(upstream, clock)(chat_call())
    assert 1007.0 <= clock.monotonic() <= 1007.5


@manual_time
async def test_route_20_wait_in_the_past_means_own_backoff(clock: ManualClock) -> None:
    from email.utils import formatdate

    past = formatdate(clock.wall() - 1, usegmt=True)
    upstream = FakeUpstream([error_reply(503, retry_after=past)] * 2)
    await bound(upstream, clock)(chat_call())
    assert 1000.0 < clock.monotonic() < 1002.0


@manual_time
async def test_wait_beyond_the_deadline_fails_now(clock: ManualClock) -> None:
    upstream = FakeUpstream([error_reply(429, retry_after="38")] * 2)
    call = chat_call(context=Context(deadline=clock.monotonic() + 10))
    reply = await bound(upstream, clock)(call)
    assert (reply.status, clock.monotonic()) == (429, 1000.0)
    assert reply.header("retry-after") == "38"


@manual_time
async def test_route_02_rate_limit_is_waited_for_when_the_deadline_allows(clock: ManualClock) -> None:
    upstream = FakeUpstream([error_reply(429, retry_after="38")])
    call = chat_call(context=Context(deadline=clock.monotonic() + 60))
    reply = await bound(upstream, clock)(call)
    assert reply.ok
    assert 1038.0 <= clock.monotonic() <= 1038.5


@manual_time
async def test_limiter_inside_waits_instead(clock: ManualClock) -> None:
    events: list[Event] = []
    env = Env(clock=clock, seed=1, sinks=(events.append,))
    upstream = FakeUpstream([error_reply(429, retry_after="38")] * 5)
    inner = Bound(Limiter(Bound(upstream, env), env), env)
    reply = await Retry().bind(inner, env)(chat_call())
    assert reply.ok or reply.status == 429
    assert clock.monotonic() == 1000.0
    assert {event.wait_s for event in events if isinstance(event, RetryScheduled)} == {0.0}


@manual_time
async def test_route_16_cancelled_in_the_backoff_ends_at_once(clock: ManualClock) -> None:
    upstream = FakeUpstream([error_reply(503, retry_after="8")] * 2)
    task = asyncio.ensure_future(bound(upstream, clock)(chat_call()))
    await asyncio.sleep(1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert clock.monotonic() == 1001.0
    assert (len(upstream.calls), upstream.in_flight) == (1, 0)


@manual_time
async def test_route_15_wrapped_cancellation_is_not_repeated(clock: ManualClock) -> None:
    def wrapped(_: Call) -> Reply:
        raise RuntimeError("wrapped") from asyncio.CancelledError()

    upstream = FakeUpstream([wrapped] * 3)
    with pytest.raises(RuntimeError, match="wrapped"):
        await bound(upstream, clock)(chat_call())
    assert len(upstream.calls) == 1


@manual_time
async def test_429_storm_ends_without_failure(clock: ManualClock) -> None:
    """Thirty calls at a server that takes ten a second and says when to come back."""
    served: list[float] = []

    def answer(_: Call) -> Reply:
        now = clock.monotonic()
        if sum(now - at < 1.0 for at in served) >= 10:
            return error_reply(429, retry_after="1")
        served.append(now)
        return Reply(data=b"{}")

    class Server(FakeUpstream):
        async def _answer(self, call: Call, number: int) -> Reply:
            del number
            return answer(call)

    upstream = Server()
    retry = bound(upstream, clock)
    replies = await asyncio.gather(*(retry(chat_call(str(i))) for i in range(30)))
    assert all(reply.ok for reply in replies)
    assert clock.monotonic() < 1010.0


@pytest.mark.parametrize("wait", ["1", None])
def test_429_storm_behind_a_limiter_ends_without_failure(wait: str | None) -> None:
    from llmmw.layers.breaker import CircuitBreaker
    from llmmw.layers.limit import RateLimiter

    clock = ManualClock()
    served: list[float] = []

    def answer(_: Call) -> Reply:
        now = clock.monotonic()
        if sum(now - at < 1.0 for at in served) >= 10:
            return error_reply(429, **({} if wait is None else {"retry_after": wait}))
        served.append(now)
        return Reply(data=chat_body("x"))

    async def run() -> None:
        upstream = FakeUpstream([answer] * 500, latency_s=0.1)
        stack = Stack(Retry(), CircuitBreaker(), RateLimiter(concurrency=64))
        async with stack.bind(upstream, env=Env(clock=clock, seed=1)) as engine:
            replies = await asyncio.gather(*(engine.call(chat_call(str(i))) for i in range(100)))
            assert all(reply.ok for reply in replies)

    clock.run(run())


# ── budget ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@manual_time
async def test_route_05_fifth_of_errors(clock: ManualClock) -> None:
    chance = random.Random(5)

    class Flaky(FakeUpstream):
        async def _answer(self, call: Call, number: int) -> Reply:
            del call, number
            return error_reply(500) if chance.random() < 0.2 else Reply(data=b"{}")

    upstream = Flaky()
    retry = bound(upstream, clock)
    ok = 0
    for number in range(2000):
        ok += (await retry(chat_call(str(number)))).ok
    assert ok / 2000 >= 0.99
    assert len(upstream.calls) / 2000 <= 1.25


@manual_time
async def test_empty_budget_fails_instead_of_waiting(clock: ManualClock) -> None:
    upstream = FakeUpstream([error_reply(500)] * 100)
    retry = bound(upstream, clock, budget=0, attempts=9, backoff=0.001)
    reply = await retry(chat_call())
    assert reply.status == 500
    assert len(upstream.calls) == 2
    assert retry.gauges() == {"budget": 0.0, "budget_refusals": 1}


@manual_time
async def test_failed_exchange_is_charged_once(clock: ManualClock) -> None:
    failed = error_reply(500).replace(exchange=4)
    retry = bound(FakeUpstream([failed] * 8), clock)
    await asyncio.gather(*(retry(chat_call(str(i))) for i in range(8)))
    assert retry.gauges()["budget"] == 500


@manual_time
async def test_router_bounds_the_tries(clock: ManualClock) -> None:
    upstream = FakeUpstream([error_reply(500)] * 9)
    reply = await bound(upstream, clock)(chat_call().replace(tries_left=2))
    assert (reply.status, len(upstream.calls)) == (500, 2)


# ── streams ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def stream_of(*chunks: Chunk | BaseException) -> Reply:
    return Reply(chunks=ScriptedChunks(chunks))


ROLE = b'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""}}]}\n\n'


@manual_time
async def test_route_09_stream_broken_before_its_first_token_is_repeated(clock: ManualClock) -> None:
    upstream = FakeUpstream([stream_of(ROLE, b": ping\n\n", errors.StatusError("overloaded", status=503))])
    reply = await bound(upstream, clock)(chat_call("a", stream=True))
    assert await read(reply) == chat_chunks("echo: a")
    chunks = [ROLE, *chat_chunks("b")]
    reply = await bound(FakeUpstream([stream_of(*chunks)]), clock)(chat_call(stream=True))
    assert await read(reply) == chunks


@manual_time
async def test_stream_that_says_nothing_is_handed_over_in_time(clock: ManualClock) -> None:
    pings = [b": ping\n\n"] * 40
    source = ScriptedChunks([*pings, b"x"], gap_s=1)
    reply = await bound(FakeUpstream([Reply(chunks=source)]), clock)(chat_call(stream=True))
    assert clock.monotonic() == 1016.0
    assert await read(reply) == [*pings, b"x"]
    source = ScriptedChunks([b"x", b"y"], gap_s=1)
    reply = await bound(FakeUpstream([Reply(chunks=source)]), clock)(chat_call(stream=True).replace(op="/v1/other"))
    assert clock.monotonic() == 1016.0 + 26 + 1


@manual_time
async def test_route_09_stream_broken_before_its_first_chunk_is_repeated(clock: ManualClock) -> None:
    broken = stream_of(errors.StatusError("overloaded", status=503))
    upstream = FakeUpstream([broken])
    reply = await bound(upstream, clock)(chat_call("a b", stream=True))
    assert await read(reply) == chat_chunks("echo: a b")
    assert [attempt.fault for attempt in reply.attempts] == ["server"]
    assert reply.chunks is not None
    assert reply.chunks.usage.output_tokens == 3


@manual_time
async def test_route_09_stream_broken_later_is_interrupted_with_its_part(clock: ManualClock) -> None:
    chunks = chat_chunks("one two three")
    upstream = FakeUpstream([stream_of(*chunks[:2], errors.StatusError("boom", status=500))])
    reply = await bound(upstream, clock)(chat_call(stream=True))
    got: list[Chunk] = []
    with pytest.raises(errors.StreamInterrupted, match="boom") as caught:
        async for chunk in reply.chunks or ():
            got.append(chunk)
    assert got == chunks[:2]
    assert caught.value.partial == "one two"
    assert caught.value.endpoint == "http://fake.test/v1"
    assert len(upstream.calls) == 1


@pytest.mark.parametrize(
    "error",
    [errors.TruncatedStream("cut"), errors.StreamInterrupted("x", partial="p"), ValueError("the user's own")],
    ids=lambda error: type(error).__name__,
)
def test_more_exact_errors_of_a_stream_pass_unchanged(error: Exception) -> None:
    @manual_time
    async def run(clock: ManualClock) -> None:
        reply = await bound(FakeUpstream([stream_of(chat_chunks("x")[0], error)]), clock)(chat_call(stream=True))
        with pytest.raises(type(error)) as caught:
            await read(reply)
        assert caught.value is error

    run()


@manual_time
async def test_partial_of_a_function_stream_is_its_text(clock: ManualClock) -> None:
    chunks = (Item("one "), Item(2), Item("three"), errors.ConnectionFailed("gone"))
    reply = await bound(FakeUpstream([stream_of(*chunks)]), clock)(chat_call(stream=True))
    with pytest.raises(errors.StreamInterrupted) as caught:
        await read(reply)
    assert caught.value.partial == "one three"


@manual_time
async def test_stream_is_closed_when_its_reader_leaves(clock: ManualClock) -> None:
    source = ScriptedChunks(chat_chunks("a b c"))
    reply = await bound(FakeUpstream([Reply(chunks=source)]), clock)(chat_call(stream=True))
    assert reply.chunks is not None
    await reply.chunks.aclose()
    assert source.closed
    assert await read(reply) == []


@manual_time
async def test_cancelled_while_waiting_for_the_first_token_closes_the_stream(clock: ManualClock) -> None:
    source = ScriptedChunks([b"x"], gap_s=5)
    task = asyncio.ensure_future(bound(FakeUpstream([Reply(chunks=source)]), clock)(chat_call(stream=True)))
    await asyncio.sleep(1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert source.closed


@manual_time
async def test_empty_stream_and_refused_stream_pass(clock: ManualClock) -> None:
    retry = bound(FakeUpstream([stream_of(), error_reply(400)]), clock)
    assert await read(await retry(chat_call(stream=True))) == []
    assert (await retry(chat_call(stream=True))).status == 400


# ── settings ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "options", [{"attempts": 0}, {"backoff": 0}, {"max_backoff": "soon"}, {"budget": -1}, {"rate_patience": -1}]
)
def test_impossible_settings_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(errors.ConfigError, match=next(iter(options))):
        Retry(**options)  # type: ignore[arg-type]


def test_settings_compare_and_read_text() -> None:
    assert Retry(backoff="500ms", max_backoff="20s", rate_patience="1m") == Retry()
    assert "attempts=3" in repr(Retry())

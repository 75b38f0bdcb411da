"""Hedging: few second requests, only where they help and do no harm, and everybody leaves in order."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING

import pytest

from llmmw import errors
from llmmw.call import Call, Context, Reply
from llmmw.env import Env
from llmmw.layers.batch import Batcher
from llmmw.layers.breaker import CircuitBreaker
from llmmw.layers.deadline import Deadline
from llmmw.layers.limit import RateLimiter
from llmmw.layers.retry import Retry
from llmmw.layers.route import ErrorRouter
from llmmw.layers.timeout import Timeout
from llmmw.stack import Stack
from llmmw.testing.clock import ManualClock, manual_time
from llmmw.testing.fake import FakeUpstream, ScriptedChunks, chat_body, chat_call, chat_chunks, error_reply

if TYPE_CHECKING:
    from collections.abc import Callable

    from llmmw.engine import Engine
    from llmmw.layers.base import Layer

HEDGED = Retry(hedge=True, backoff=0.001)
USUAL = 30
"""Requests after which one second request is allowed and p95 is known to be a second."""


class Slow(FakeUpstream):
    """Takes nearly a second, or what the script of latencies says."""

    def __init__(self, *latencies: float, outcome: Callable[[int], Reply | Exception] | None = None) -> None:
        super().__init__()
        self.latencies = [1.0, 1.0, *[0.9] * (USUAL - 2), *latencies]
        self.outcome = outcome

    async def _answer(self, call: Call, number: int) -> Reply:
        await asyncio.sleep(self.latencies[number - 1] if number <= len(self.latencies) else 0.9)
        found = self.outcome(number) if self.outcome is not None and number > USUAL else None
        if isinstance(found, Exception):
            raise found
        if found is not None:
            return found
        if call.stream:
            return Reply(chunks=ScriptedChunks(chat_chunks(f"answer {number}")))
        return Reply(data=chat_body(f"answer {number}"))


def asking(clock: ManualClock, upstream: FakeUpstream, *layers: Layer) -> Engine:
    return Stack(*(layers or (HEDGED,))).bind(upstream, env=Env(clock=clock, seed=1))


def greedy(number: int = 0, **options: object) -> Call:
    return chat_call(f"q{number}", temperature=0, **options)  # type: ignore[arg-type]


async def usual(engine: Engine, **options: object) -> None:
    for number in range(USUAL):
        reply = await engine.call(greedy(number, **options))
        if reply.chunks is not None:
            await reply.chunks.aclose()


def hedges(engine: Engine) -> tuple[object, object]:
    layer = engine.get_performance_stats()["layers"]["retry"]
    return layer["hedges"], layer["hedges_won"]


@manual_time
async def test_slow_request_gets_a_second_one_and_the_first_answer_counts(clock: ManualClock) -> None:
    upstream = Slow(100.0, 1.0)
    engine = asking(clock, upstream)
    await usual(engine)
    began = clock.monotonic()
    reply = await engine.call(greedy())
    assert reply.text == f"answer {USUAL + 2}"
    assert clock.monotonic() - began == pytest.approx(2.0)
    await asyncio.sleep(0.001)
    assert (upstream.in_flight, upstream.cancelled) == (0, 1)
    assert hedges(engine) == (1, 1)
    assert engine.get_performance_stats()["upstream_requests"] == USUAL + 2
    assert [(attempt.fault, attempt.error) for attempt in reply.attempts] == [("cancelled", "hedged")]


@manual_time
async def test_first_request_may_still_win(clock: ManualClock) -> None:
    upstream = Slow(1.5, 100.0)
    engine = asking(clock, upstream)
    await usual(engine)
    assert (await engine.call(greedy())).text == f"answer {USUAL + 1}"
    await asyncio.sleep(0.001)
    assert (upstream.in_flight, upstream.cancelled) == (0, 1)
    assert hedges(engine) == (1, 0)


@manual_time
async def test_stream_that_does_not_begin_gets_a_second_one(clock: ManualClock) -> None:
    upstream = Slow(100.0, 1.0)
    engine = asking(clock, upstream)
    await usual(engine, stream=True)
    reply = await engine.call(greedy(stream=True))
    assert reply.chunks is not None
    chunks = [chunk async for chunk in reply.chunks]
    assert chunks == chat_chunks(f"answer {USUAL + 2}")
    assert (upstream.in_flight, upstream.cancelled) == (0, 1)


@manual_time
async def test_stream_under_way_is_not_doubled_however_slow(clock: ManualClock) -> None:
    upstream = Slow(outcome=lambda _: Reply(chunks=ScriptedChunks(chat_chunks("a b c"), gap_s=0.9)))
    upstream.latencies[USUAL:] = [0.05]
    engine = asking(clock, upstream)
    await usual(engine, stream=True)
    reply = await engine.call(greedy(stream=True))
    assert reply.chunks is not None
    assert len([chunk async for chunk in reply.chunks]) == 6
    assert hedges(engine) == (0, 0)


@manual_time
async def test_two_streams_that_begin_together_leave_one_open(clock: ManualClock) -> None:
    streams: list[ScriptedChunks] = []

    def stream(_: int) -> Reply:
        streams.append(ScriptedChunks(chat_chunks("a b")))
        return Reply(chunks=streams[-1])

    upstream = Slow(2.0, 1.0, outcome=stream)
    engine = asking(clock, upstream)
    await usual(engine, stream=True)
    reply = await engine.call(greedy(stream=True))
    await asyncio.sleep(0)
    await asyncio.sleep(0.001)
    assert reply.chunks is not None
    assert [chunk async for chunk in reply.chunks] == chat_chunks("a b")
    assert [stream.closed for stream in streams] in ([False, True], [True, False])


@pytest.mark.parametrize(
    ("retry", "call", "doubled"),
    [
        (HEDGED, chat_call(), 0),
        (HEDGED, chat_call(temperature=0.7), 0),
        (HEDGED, chat_call(seed=1), 1),
        (HEDGED, chat_call(seed=1, n=2), 0),
        (Retry(hedge=True, duplicate_ok=True), chat_call(), 1),
        (HEDGED, greedy().replace(tries_left=1), 0),
        (Retry(), greedy(), None),
    ],
    ids=["no temperature", "sampled", "seeded", "two samples", "duplicate_ok", "last try", "off by default"],
)
def test_only_what_may_run_twice_is_doubled(retry: Retry, call: Call, doubled: int | None) -> None:
    @manual_time
    async def run(clock: ManualClock) -> None:
        engine = asking(clock, Slow(5.0, 1.0), retry)
        await usual(engine)
        assert (await engine.call(call)).ok
        layer = engine.get_performance_stats()["layers"]["retry"]
        assert layer.get("hedges") == doubled

    run()


@manual_time
async def test_nothing_is_doubled_while_the_server_limits_the_rate(clock: ManualClock) -> None:
    refused = error_reply(429, retry_after="20")
    upstream = Slow(0.1, 5.0, 1.0, 5.0, 1.0, outcome=lambda number: refused if number == USUAL + 1 else None)  # type: ignore[arg-type,return-value]
    engine = asking(clock, upstream)
    await usual(engine)
    waiting, slow = (asyncio.ensure_future(engine.call(greedy(number))) for number in range(2))
    await slow
    assert hedges(engine) == (0, 0)
    await waiting
    assert (await engine.call(greedy())).ok
    assert hedges(engine) == (1, 1)


@manual_time
async def test_second_request_goes_at_once_or_not_at_all(clock: ManualClock) -> None:
    upstream = Slow(9.0, 9.0)
    engine = asking(clock, upstream, HEDGED, RateLimiter(concurrency=1))
    await usual(engine)
    reply = await engine.call(greedy())
    assert reply.text == f"answer {USUAL + 1}"
    assert len(upstream.calls) == USUAL + 1
    assert hedges(engine) == (0, 0)
    layer = engine.get_performance_stats()["layers"]["limit"]
    assert (layer["in_use"], layer["waiting"]) == (0, 0)


@manual_time
async def test_time_in_the_limiters_queue_is_no_slowness(clock: ManualClock) -> None:
    upstream = Slow()
    engine = asking(clock, upstream, HEDGED, RateLimiter(concurrency=2), Timeout(60))
    await usual(engine)
    await asyncio.gather(*(engine.call(greedy(number)) for number in range(40)))
    assert len(upstream.calls) == USUAL + 40
    assert hedges(engine) == (0, 0)


@manual_time
async def test_batched_calls_are_not_doubled(clock: ManualClock) -> None:
    engine = asking(clock, Slow(9.0), HEDGED, Batcher(max_size=2, flush_interval=0.01))
    await usual(engine)
    assert (await engine.call(greedy())).ok
    assert hedges(engine) == (0, 0)


@pytest.mark.parametrize("slow_fails", [True, False], ids=["first fails", "second fails"])
def test_one_that_fails_leaves_it_to_the_other(slow_fails: bool) -> None:
    @manual_time
    async def run(clock: ManualClock) -> None:
        failing = USUAL + (1 if slow_fails else 2)
        upstream = Slow(2.0, 2.0, outcome=lambda number: error_reply(503) if number == failing else None)  # type: ignore[return-value]
        if not slow_fails:
            upstream.latencies[-1] = 0.5
        engine = asking(clock, upstream)
        await usual(engine)
        reply = await engine.call(greedy())
        assert reply.text == f"answer {USUAL + (2 if slow_fails else 1)}"
        assert [(attempt.fault, attempt.status) for attempt in reply.attempts] == [("server", 503)]
        assert len(upstream.calls) == USUAL + 2

    run()


@manual_time
async def test_both_failing_are_two_attempts(clock: ManualClock) -> None:
    upstream = Slow(2.0, 2.0, outcome=lambda _: error_reply(503))
    engine = asking(clock, upstream)
    await usual(engine)
    reply = await engine.call(greedy())
    assert (reply.status, len(reply.attempts)) == (503, 3)
    assert len(upstream.calls) == USUAL + 3
    other = FakeUpstream(name="http://other.test/v1")
    upstream = Slow(2.0, 2.0, outcome=lambda _: error_reply(503))
    engine = asking(clock, upstream, ErrorRouter(fallbacks=[other], max_total_attempts=2), HEDGED)
    await usual(engine)
    assert (await engine.call(greedy())).status == 503
    assert len(upstream.calls) == USUAL + 2
    assert not other.calls


@manual_time
async def test_cancelled_caller_cancels_both_and_gives_every_permit_back(clock: ManualClock) -> None:
    upstream = Slow(50.0, 50.0)
    engine = asking(clock, upstream, HEDGED, CircuitBreaker(), RateLimiter(concurrency=2), Timeout(60))
    await usual(engine)
    for moment in (0.5, 1.0, 1.5):  # before, in the moment of and after the second request
        upstream.latencies[len(upstream.calls) :] = [50.0, 50.0]
        task = asyncio.ensure_future(engine.call(greedy()))
        await asyncio.sleep(moment)
        cancelled_at = clock.monotonic()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert clock.monotonic() == cancelled_at
        assert upstream.in_flight == 0
        assert engine.get_performance_stats()["layers"]["limit"]["in_use"] == 0
        assert len(asyncio.all_tasks()) == 1


@manual_time
async def test_caller_who_is_cancelled_twice_leaves_nothing_under_way(clock: ManualClock) -> None:
    upstream = Slow(100.0)
    engine = asking(clock, upstream, HEDGED, RateLimiter(concurrency=4))
    await usual(engine)
    for again in range(6):
        upstream.latencies.append(100.0)
        task = asyncio.ensure_future(engine.call(greedy(again)))
        await asyncio.sleep(0.5)
        task.cancel()
        for _ in range(again):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.sleep(0.01)
        assert upstream.in_flight == 0
        assert engine.get_performance_stats()["layers"]["limit"]["in_use"] == 0
    await engine.aclose()


@manual_time
async def test_deadline_ends_both_with_the_history(clock: ManualClock) -> None:
    upstream = Slow(50.0, 50.0)
    engine = asking(clock, upstream, Deadline(5), HEDGED)
    await usual(engine)
    with pytest.raises(errors.DeadlineExceeded) as caught:
        await engine.call(greedy())
    assert upstream.in_flight == 0
    assert caught.value.attempts[-1].error == "DeadlineExceeded"
    assert hedges(engine)[0] == 1


@manual_time
async def test_loser_that_does_not_want_to_go_keeps_nobody_waiting(clock: ManualClock) -> None:
    calls = 0
    ended: list[int] = []

    async def ask(temperature: int = 0) -> int:
        nonlocal calls
        calls += 1
        number = calls
        try:
            await asyncio.sleep(100 if number == USUAL + 1 else 1.0 if number < 3 else 0.9)
        except asyncio.CancelledError:
            await asyncio.sleep(30)
            ended.append(number)
            raise
        return number + temperature

    wrapped = Stack(HEDGED).wrap(ask, env=Env(clock=clock))
    for _ in range(USUAL):
        await wrapped()
    began = clock.monotonic()
    assert await wrapped() == USUAL + 2
    assert clock.monotonic() - began == pytest.approx(1.9)
    await wrapped.aclose()
    assert ended == [USUAL + 1]


@manual_time
async def test_functions_own_exceptions_and_cancellations_come_through(clock: ManualClock) -> None:
    raising: list[BaseException] = [ValueError("own"), asyncio.CancelledError()]
    calls = 0

    async def ask(temperature: int = 0) -> int:
        nonlocal calls
        calls += 1
        await asyncio.sleep(1)
        if calls > USUAL:
            raise raising[calls - USUAL - 1]
        return temperature

    wrapped = Stack(HEDGED).wrap(ask, env=Env(clock=clock))
    for _ in range(USUAL):
        await wrapped()
    with pytest.raises(ValueError, match="own") as caught:
        await wrapped()
    assert caught.value is raising[0]
    with pytest.raises(asyncio.CancelledError):
        await wrapped()
    assert calls == USUAL + 2


@pytest.mark.parametrize("wish", [KeyboardInterrupt, SystemExit], ids=lambda kind: kind.__name__)
def test_interrupt_inside_a_function_ends_its_call_and_not_the_loop(wish: type[BaseException]) -> None:
    calls = 0

    async def ask(temperature: int = 0) -> int:
        nonlocal calls
        calls += 1
        await asyncio.sleep(1.0 if calls < 3 else 0.9)
        if calls == USUAL + 1:
            raise wish
        return temperature

    async def run() -> None:
        wrapped = Stack(HEDGED).wrap(ask, env=Env(clock=clock))
        for _ in range(USUAL):
            await wrapped()
        with pytest.raises(wish):
            await wrapped()
        assert await wrapped() == 0

    clock = ManualClock()
    clock.run(run())


@manual_time
async def test_never_more_than_a_twentieth_under_random_load(clock: ManualClock) -> None:
    chance = random.Random(3)

    class Server(FakeUpstream):
        async def _answer(self, call: Call, number: int) -> Reply:
            del call
            await asyncio.sleep(chance.expovariate(1.0) if chance.random() < 0.97 else 20.0)
            return error_reply(503) if chance.random() < 0.05 else Reply(data=chat_body(str(number)))

    upstream = Server()
    layers = Deadline(60), HEDGED, RateLimiter(concurrency=64)
    engine = asking(clock, upstream, *layers)
    for wave in range(40):
        await asyncio.gather(
            *(engine.call(greedy(number, context=Context(agent=str(number)))) for number in range(50)),
            return_exceptions=True,
        )
        sent = hedges(engine)[0]
        assert isinstance(sent, int)
        assert sent <= 0.05 * 50 * (wave + 1)
    assert hedges(engine)[0] > 20  # type: ignore[operator]
    await engine.aclose()
    stats = engine.get_performance_stats()
    assert upstream.in_flight == 0
    assert stats["layers"]["limit"]["in_use"] == 0
    assert stats["upstream_requests"] == len(upstream.calls)

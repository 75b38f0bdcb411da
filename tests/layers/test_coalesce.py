"""Coalescer: one upstream call for all who ask the same; what befalls one caller touches only that one."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import pickle
import random
import traceback

import pytest

from llmmw.answer import Usage
from llmmw.call import Context, Item, Reply
from llmmw.env import Env
from llmmw.errors import (
    AmbiguousOutcome,
    Closed,
    ConfigError,
    DeadlineExceeded,
    RateLimited,
    StatusError,
    StreamInterrupted,
)
from llmmw.events import CacheStored, Coalesced
from llmmw.layers.cache import TTLCache
from llmmw.layers.coalesce import Coalescer
from llmmw.layers.flight import current_flight
from llmmw.layers.limit import RateLimiter
from llmmw.layers.timeout import Timeout
from llmmw.order import Role
from llmmw.stack import Stack
from llmmw.testing.clock import manual_time
from llmmw.testing.fake import FakeUpstream, ScriptedChunks, chat_body, chat_call, chat_chunks, error_reply

who = contextvars.ContextVar("who", default="nobody")


def bind(clock, inner, events=None, **options):
    return Coalescer(**options).bind(inner, Env(clock=clock, sinks=() if events is None else (events.append,)))


class Fill:
    """A cache's half of a call, of which a test only wants to see the store."""

    def __init__(self, answered):
        self.answered = answered

    def look(self):
        return None

    def failed(self):
        pass


def same(prompt="hello", **fields):
    """A call that may be shared."""
    return chat_call(prompt, temperature=0, **fields)


def within(clock, seconds, **fields):
    return Context(deadline=clock.monotonic() + seconds, **fields)


async def settle(turns=6):
    for _ in range(turns):
        await asyncio.sleep(0)


def others():
    return asyncio.all_tasks() - {asyncio.current_task()}


async def assert_empty(coalescer):
    await settle()
    assert coalescer.gauges() == {"flights": 0, "waiting": 0}
    assert coalescer._tasks == {}
    assert others() == set()


async def outcomes(tasks):
    return await asyncio.gather(*tasks, return_exceptions=True)


def start(coalescer, *calls):
    return [asyncio.create_task(coalescer(call)) for call in calls]


def test_settings_are_checked_and_comparable():
    with pytest.raises(ConfigError, match="buffer_bytes"):
        Coalescer(buffer_bytes=0)
    assert Coalescer() == Coalescer()
    assert Coalescer.role is Role.COALESCE


# ── who shares ──────────────────────────────────────────────────────────────────────────────────────────────────────


@manual_time
async def test_coalesce_01_a_hundred_identical_calls_are_one_upstream_call(clock):
    upstream, events = FakeUpstream(latency_s=1), []
    coalescer = bind(clock, upstream, events)
    replies = await asyncio.gather(*(coalescer(same()) for _ in range(100)))
    assert len(upstream.calls) == 1
    assert [reply.source for reply in replies] == ["upstream"] + ["coalesced"] * 99
    assert {reply.text for reply in replies} == {"echo: hello"}
    assert events.count(Coalesced(None)) == 99
    await assert_empty(coalescer)


@manual_time
async def test_coalesce_07_without_a_cache_only_deterministic_calls_share(clock):
    upstream = FakeUpstream(latency_s=1, numbered=True)
    coalescer = bind(clock, upstream)
    replies = await asyncio.gather(*(coalescer(chat_call(temperature=1)) for _ in range(20)))
    assert len({reply.text for reply in replies}) == len(upstream.calls) == 20
    await asyncio.gather(*(coalescer(chat_call(temperature=1, seed=3)) for _ in range(20)))
    assert len(upstream.calls) == 21


@manual_time
async def test_coalesce_07_the_cache_s_key_decides_where_there_is_one(clock):
    upstream = FakeUpstream(latency_s=1)
    coalescer = bind(clock, upstream)
    share = [chat_call(temperature=1).replace(key=b"k") for _ in range(20)]
    await asyncio.gather(*map(coalescer, share))
    assert len(upstream.calls) == 1
    lanes = [chat_call(temperature=1).replace(key=b"lane%d" % n) for n in range(20)]
    await asyncio.gather(*map(coalescer, lanes))
    assert len(upstream.calls) == 21


@manual_time
async def test_calls_that_have_no_key_do_not_share(clock):
    upstream = FakeUpstream(latency_s=1)
    coalescer = bind(clock, upstream)
    await asyncio.gather(*(coalescer(same(odd=float("nan"))) for _ in range(3)))
    assert len(upstream.calls) == 3
    assert coalescer.invalidate(same(odd=float("nan"))) == 0


@manual_time
async def test_namespaces_and_tenants_do_not_share(clock):
    upstream = FakeUpstream(latency_s=1)
    coalescer = bind(clock, upstream)
    calls = [same().replace(namespace="a"), same().replace(namespace="b"), same(context=Context(tenant="t"))]
    await asyncio.gather(*map(coalescer, calls))
    assert len(upstream.calls) == 3


@manual_time
async def test_a_stream_and_a_whole_answer_do_not_share_a_flight(clock):
    upstream = FakeUpstream(latency_s=1)
    coalescer = bind(clock, upstream)
    whole, streamed = await asyncio.gather(coalescer(same()), coalescer(same(stream=True)))
    assert whole.chunks is None
    await read(streamed)
    assert len(upstream.calls) == 2
    await assert_empty(coalescer)


@manual_time
async def test_newcomers_after_an_invalidation_start_afresh(clock):
    upstream = FakeUpstream(latency_s=2, numbered=True)
    coalescer = bind(clock, upstream)
    old = start(coalescer, same())
    await asyncio.sleep(1)
    assert coalescer.invalidate(same()) == 0
    new = await coalescer(same())
    assert ((await old[0]).text, new.text) == ("echo: hello #1", "echo: hello #2")
    await assert_empty(coalescer)


# ── cancellation and deadlines ──────────────────────────────────────────────────────────────────────────────────────


@manual_time
async def test_coalesce_02_followers_are_answered_when_the_leader_is_cancelled(clock):
    upstream = FakeUpstream(latency_s=5)
    coalescer = bind(clock, upstream)
    leader, *followers = start(coalescer, *[same()] * 5)
    await asyncio.sleep(1)
    leader.cancel()
    replies = await asyncio.gather(*followers)
    assert leader.cancelled()
    assert [reply.source for reply in replies] == ["coalesced"] * 4
    assert (len(upstream.calls), upstream.cancelled) == (1, 0)
    await assert_empty(coalescer)


@manual_time
async def test_coalesce_03_each_caller_has_its_own_deadline(clock):
    upstream = FakeUpstream(latency_s=5)
    coalescer = bind(clock, upstream)
    began = clock.monotonic()
    leader, follower = start(coalescer, same(context=within(clock, 0.02)), same(context=within(clock, 10)))
    with pytest.raises(DeadlineExceeded):
        await leader
    assert clock.monotonic() - began == pytest.approx(0.02)
    assert (await follower).ok
    assert len(upstream.calls) == 1
    assert upstream.calls[0].deadline == began + 10
    await assert_empty(coalescer)


@manual_time
async def test_the_upstream_is_cancelled_when_nobody_waits_any_more(clock):
    upstream = FakeUpstream(latency_s=5)
    coalescer = bind(clock, upstream)
    tasks = start(coalescer, same(), same(context=within(clock, 2)), same())
    await asyncio.sleep(1)
    tasks[0].cancel()
    tasks[2].cancel()
    await settle()
    assert upstream.cancelled == 0
    await outcomes(tasks)
    await settle()
    assert upstream.cancelled == 1
    await assert_empty(coalescer)


@manual_time
async def test_a_newcomer_after_the_last_waiter_left_starts_afresh(clock):
    upstream = FakeUpstream(latency_s=5, numbered=True)
    coalescer = bind(clock, upstream)
    (gone,) = start(coalescer, same())
    await asyncio.sleep(1)
    gone.cancel()
    await asyncio.sleep(0)
    assert (await coalescer(same())).text == "echo: hello #2"
    await assert_empty(coalescer)


@manual_time
async def test_orphans_are_finished_and_stored_where_that_is_wanted(clock):
    upstream = FakeUpstream(latency_s=5)
    coalescer = bind(clock, upstream, finish_orphans=True)
    stored = []
    (gone,) = start(coalescer, same().replace(fill=Fill(lambda reply: stored.append(reply) or reply)))
    await asyncio.sleep(1)
    gone.cancel()
    await asyncio.sleep(1)
    assert (await coalescer(same())).source == "coalesced"
    assert (len(upstream.calls), upstream.cancelled, len(stored)) == (1, 0, 1)
    (gone,) = start(coalescer, same().replace(fill=Fill(lambda reply: stored.append(reply) or reply)))
    await asyncio.sleep(1)
    gone.cancel()
    await asyncio.sleep(10)
    assert len(stored) == 2
    await assert_empty(coalescer)


@pytest.mark.parametrize("stream", [False, True])
@manual_time
async def test_an_orphan_is_finished_although_every_deadline_has_passed(clock, stream):
    upstream = FakeUpstream([streaming()] if stream else [], latency_s=5)
    env = Env(clock=clock)
    coalescer = Coalescer(finish_orphans=True).bind(Timeout(60).bind(upstream, env), env)
    cache = TTLCache(300).bind(coalescer, env)
    calls = [same(stream=stream, context=within(clock, seconds)) for seconds in (1, 2)]
    assert {type(error) for error in await outcomes(start(cache, *calls))} == {DeadlineExceeded}
    await asyncio.sleep(30)
    assert (await cache(same(stream=stream))).source == "cache"
    assert (len(upstream.calls), upstream.cancelled) == (1, 0)
    await assert_empty(coalescer)


@manual_time
async def test_a_failed_orphan_leaves_no_exception_behind(clock):
    upstream = FakeUpstream([ValueError("x")], latency_s=5)
    coalescer = bind(clock, upstream, finish_orphans=True)
    trouble = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: trouble.append(context))
    (gone,) = start(coalescer, same())
    await asyncio.sleep(1)
    gone.cancel()
    await asyncio.sleep(10)
    gc.collect()
    assert trouble == []
    await assert_empty(coalescer)


@manual_time
async def test_a_flight_that_somebody_else_cancels_is_made_anew(clock):
    upstream = FakeUpstream(latency_s=5, numbered=True)
    coalescer = bind(clock, upstream)
    tasks = start(coalescer, *[same()] * 3)
    await asyncio.sleep(1)
    next(iter(coalescer._tasks)).cancel()
    assert [reply.text for reply in await asyncio.gather(*tasks)] == ["echo: hello #2"] * 3
    await assert_empty(coalescer)


@manual_time
async def test_a_flight_cancelled_before_it_began_is_made_anew(clock):
    upstream = FakeUpstream(latency_s=5)
    coalescer = bind(clock, upstream)
    stores = []
    leader, follower = (
        asyncio.create_task(coalescer(same().replace(fill=Fill(lambda reply, n=n: stores.append(n) or reply))))
        for n in range(2)
    )
    await asyncio.sleep(0)
    leader.cancel()
    next(iter(coalescer._tasks)).cancel()
    assert (await follower).source == "upstream"
    assert stores == [1]
    await assert_empty(coalescer)


@manual_time
async def test_after_two_elections_waiters_get_a_typed_error_and_no_bare_cancellation(clock):
    upstream = FakeUpstream([asyncio.CancelledError() for _ in range(3)], latency_s=1)
    coalescer = bind(clock, upstream)
    found = await outcomes(start(coalescer, *[same()] * 3))
    assert [type(error) for error in found] == [AmbiguousOutcome] * 3
    assert len(upstream.calls) == 3
    assert len({id(error) for error in found}) == 3
    await assert_empty(coalescer)


@manual_time
async def test_random_cancellations_answer_everybody_else_and_leave_nothing(clock):
    rng = random.Random(7)
    loop = asyncio.get_running_loop()
    trouble = []
    loop.set_exception_handler(lambda _, context: trouble.append(context))
    for round_number in range(60):
        latency = rng.choice([0, 1, 3])
        script = [ValueError("x")] if rng.random() < 0.2 else []
        upstream = FakeUpstream(script, latency_s=latency)
        coalescer = bind(clock, upstream, finish_orphans=rng.random() < 0.3)
        tasks = []
        for _ in range(12):
            deadline = clock.monotonic() + rng.choice([1, 2, 4]) if rng.random() < 0.3 else None
            call = same(str(rng.randrange(2)), context=Context(deadline=deadline), stream=rng.random() < 0.3)
            tasks.append(asyncio.create_task(whole(coalescer, call)))
            if rng.random() < 0.5:
                loop.call_later(rng.choice([0, 0, 1, 2, 3, 3.5]), tasks[-1].cancel)
            if rng.random() < 0.3:
                await asyncio.sleep(rng.choice([0, 0, 1]))
            if rng.random() < 0.05 and coalescer._tasks:
                next(iter(coalescer._tasks)).cancel()
        for found in await outcomes(tasks):
            assert isinstance(
                found, bytes | asyncio.CancelledError | DeadlineExceeded | ValueError | StreamInterrupted
            ), f"round {round_number}: {found!r}"
        await asyncio.sleep(10)
        await assert_empty(coalescer)
        assert upstream.in_flight == 0
    gc.collect()
    assert trouble == []


async def whole(coalescer, call):
    reply = await coalescer(call)
    if reply.chunks is None:
        return reply.data
    try:
        return b"".join([chunk async for chunk in reply.chunks])
    finally:
        await reply.chunks.aclose()


# ── outcomes ────────────────────────────────────────────────────────────────────────────────────────────────────────


def frames(error):
    return len(traceback.extract_tb(error.__traceback__))


@manual_time
async def test_coalesce_04_fifty_followers_get_fifty_exceptions(clock):
    original = StatusError("too much", endpoint="e", status=429, retry_after_s=2)
    coalescer = bind(clock, FakeUpstream([original], latency_s=1))
    found = await outcomes(start(coalescer, *[same()] * 51))
    assert found[0] is original
    followers = found[1:]
    assert len({id(error) for error in followers}) == 50
    assert {(type(e), str(e), e.status, e.retry_after_s) for e in followers} == {(StatusError, "too much", 429, 2)}
    assert all(error.__cause__ is original for error in followers)
    followers[0].add_note("mine")
    assert not any(hasattr(error, "__notes__") for error in found if error is not followers[0])
    assert {frames(error) for error in followers} == {frames(followers[0])}
    assert frames(followers[0]) < 6
    assert pickle.loads(pickle.dumps(followers[0])).status == 429
    await assert_empty(coalescer)


@manual_time
async def test_coalesce_04_an_error_that_cannot_be_copied_gathers_no_traceback(clock):
    class Odd(Exception):
        def __str__(self):
            raise RuntimeError

    coalescer = bind(clock, FakeUpstream([Odd()], latency_s=1))
    found = await outcomes(start(coalescer, *[same()] * 30))
    assert len({id(error) for error in found}) == 1
    assert frames(found[0]) < 8


@manual_time
async def test_any_base_exception_ends_the_flight_and_frees_all(clock):
    class Odd(BaseException):
        pass

    coalescer = bind(clock, FakeUpstream([Odd("x")], latency_s=1))

    async def catching(call):
        try:
            await coalescer(call)
        except Odd as error:
            return error

    found = await asyncio.gather(*(catching(same()) for _ in range(3)))
    assert len({id(error) for error in found}) == 3
    await assert_empty(coalescer)


@manual_time
async def test_a_base_exception_that_nobody_waits_for_is_not_swallowed(clock):
    class Odd(BaseException):
        pass

    coalescer = bind(clock, FakeUpstream([Odd("x")], latency_s=1), finish_orphans=True)
    (gone,) = start(coalescer, same())
    await asyncio.sleep(0.5)
    (flight,) = coalescer._tasks
    gone.cancel()
    with pytest.raises(Odd):
        await flight
    await assert_empty(coalescer)


@manual_time
async def test_a_refusal_by_the_server_reaches_followers_as_a_reply(clock):
    coalescer = bind(clock, FakeUpstream([error_reply(400)], latency_s=1))
    replies = await asyncio.gather(*(coalescer(same()) for _ in range(3)))
    assert [(reply.status, reply.source) for reply in replies] == [(400, "upstream"), *[(400, "coalesced")] * 2]


@manual_time
async def test_coalesce_05_a_follower_s_changes_reach_nobody(clock):
    upstream = FakeUpstream([Reply(data=chat_body("x"), native={"a": [1]}), Reply(native={"a": [1]})], latency_s=1)
    coalescer = bind(clock, upstream)
    replies = await asyncio.gather(*(coalescer(same()) for _ in range(3)))
    assert [reply.native for reply in replies] == [{"a": [1]}, None, None]
    replies[1].body["choices"].clear()
    assert replies[2].text == "x"
    leader, *followers = await asyncio.gather(*(coalescer(same()) for _ in range(3)))
    leader.native["a"].append("leader")
    followers[0].native["a"].append("follower")
    assert followers[1].native == {"a": [1]}


@manual_time
async def test_an_answer_that_exists_only_once_is_not_shared(clock):
    upstream = FakeUpstream([lambda _: Reply(native=(n for n in [1])) for _ in range(3)], latency_s=1)
    coalescer = bind(clock, upstream)
    replies = await asyncio.gather(*(coalescer(same()) for _ in range(3)))
    assert [list(reply.native) for reply in replies] == [[1], [1], [1]]
    assert [reply.source for reply in replies] == ["upstream"] * 3


@manual_time
async def test_the_answer_is_passed_through_the_cache_once_before_anybody_wakes(clock):
    coalescer = bind(clock, FakeUpstream(latency_s=1))
    log = []

    def store(reply):
        log.append("stored")
        assert coalescer.gauges()["flights"] == 1
        return reply.replace(endpoint="seen")

    async def caller():
        reply = await coalescer(same().replace(key=b"k", fill=Fill(store)))
        log.append(reply.endpoint)

    await asyncio.gather(*(caller() for _ in range(3)))
    assert log == ["stored", "seen", "seen", "seen"]
    assert coalescer.inner.calls[0].fill is None


# ── contexts, urgency, re-entrancy ──────────────────────────────────────────────────────────────────────────────────


@manual_time
async def test_coalesce_06_an_endpoint_sees_no_caller_s_context_variables(clock):
    seen = []

    def answer(call):
        seen.append(who.get())
        return Reply(data=b"{}")

    coalescer = bind(clock, FakeUpstream([answer, answer]))

    async def caller(name, call):
        who.set(name)
        await coalescer(call)
        assert who.get() == name

    await asyncio.gather(caller("A", same()), caller("B", same()))
    await asyncio.gather(*(caller(name, same().replace(inherits_context=True)) for name in "AB"))
    assert seen == ["nobody", "A"]


@manual_time
async def test_coalesce_06_a_followers_hooks_and_traces_see_the_follower(clock):
    """Tenants of one shared namespace: what is told of B's call is told in B's context and names B, never A."""
    told = []
    env = Env(clock=clock, sinks=(lambda event: told.append((type(event).__name__, who.get(), event)),))
    engine = Stack(TTLCache(300), Coalescer()).bind(FakeUpstream(latency_s=1), env=env)

    async def caller(name):
        who.set(name)
        reply = await engine.call(same(context=Context(agent=name)))
        return who.get(), reply.source

    found = await asyncio.gather(caller("A"), caller("B"))
    assert found == [("A", "upstream"), ("B", "coalesced")]
    for kind in ("CallStarted", "CallEnded"):
        assert [(trace, event.agent) for name, trace, event in told if name == kind] == [("A", "A"), ("B", "B")]
    assert [(trace, event.agent) for name, trace, event in told if name == "Coalesced"] == [("B", "B")]
    assert {trace for name, trace, _ in told if name.startswith("Upstream")} == {"nobody"}
    agents = engine.get_performance_stats()["by_agent"]
    assert (agents["A"]["upstream_requests"], agents["B"]["upstream_requests"], agents["B"]["coalesced"]) == (1, 0, 1)
    await engine.aclose()


@manual_time
async def test_contexts_that_outlive_a_flight_keep_nothing_of_it(clock):
    """A connection opened during a flight, and a timer set there, hold its context for as long as they live."""
    kept = []

    def answer(call):
        assert current_flight() is not None
        kept.append(contextvars.copy_context())
        return Reply(data=b"{}")

    await bind(clock, FakeUpstream([answer]))(same())
    await settle()
    gc.collect()
    assert kept[0].run(current_flight) is None


@manual_time
async def test_coalesce_08_a_more_urgent_follower_raises_the_flight(clock):
    upstream = FakeUpstream(latency_s=5)
    coalescer = bind(clock, upstream)
    tasks = start(coalescer, same(context=Context(priority=5)))
    await asyncio.sleep(1)
    call, changes = upstream.calls[0], []
    unsubscribe = call.urgency.subscribe(lambda: changes.append((call.priority, call.deadline)))
    assert (call.priority, call.deadline) == (5, None)
    tasks += start(coalescer, same(context=Context(priority=9)), same(context=Context(priority=1)))
    await asyncio.sleep(1)
    assert changes == [(1, None)]
    unsubscribe()
    unsubscribe()
    tasks += start(coalescer, same(context=Context(priority=0)))
    await asyncio.gather(*tasks)
    assert changes == [(1, None)]
    assert repr(call.urgency) == "Urgency(priority=0, deadline=None)"


@manual_time
async def test_coalesce_08_a_flight_moves_up_in_the_limiter_with_a_more_urgent_follower(clock):
    upstream = FakeUpstream(latency_s=5)
    env = Env(clock=clock)
    coalescer = Coalescer().bind(RateLimiter(concurrency=1).bind(upstream, env), env)
    tasks = start(coalescer, same("running"))
    await asyncio.sleep(1)
    tasks += start(coalescer, same("patient", context=Context(priority=3)), same("shared", context=Context(priority=5)))
    await asyncio.sleep(1)
    tasks += start(coalescer, same("shared", context=Context(priority=1)))
    await asyncio.gather(*tasks)
    assert [call.payload["messages"][0]["content"] for call in upstream.calls] == ["running", "shared", "patient"]
    await coalescer.inner.aclose()


@manual_time
async def test_coalesce_03_the_limiter_judges_a_flight_by_its_latest_deadline(clock):
    upstream = FakeUpstream()
    env = Env(clock=clock)
    coalescer = Coalescer().bind(RateLimiter(rpm=60, burst=1).bind(upstream, env), env)
    await coalescer(same("first"))
    hurried, patient = start(
        coalescer, same("second", context=within(clock, 0.1)), same("second", context=within(clock, 30))
    )
    with pytest.raises((DeadlineExceeded, RateLimited)):  # eager tasks: refused before the other one joins
        await hurried
    assert (await patient).ok
    await coalescer.inner.aclose()


@manual_time
async def test_a_flight_has_the_latest_deadline_of_its_waiters(clock):
    upstream = FakeUpstream(latency_s=1)
    coalescer = bind(clock, upstream)
    now = clock.monotonic()
    tasks = start(coalescer, *(same(context=within(clock, seconds)) for seconds in (5, 9, 7)))
    await asyncio.sleep(0.5)
    assert upstream.calls[0].deadline == now + 9
    tasks += start(coalescer, same())
    await asyncio.gather(*tasks)
    assert upstream.calls[0].deadline is None


@manual_time
async def test_a_call_from_inside_its_own_flight_bypasses_it(clock):
    async def recursive(call):
        if len(upstream.calls) < 3:
            return await coalescer(call.replace(urgency=None))
        return Reply(data=b"{}")

    upstream = FakeUpstream([recursive] * 3)
    coalescer = bind(clock, upstream)
    replies = await asyncio.gather(coalescer(same()), coalescer(same()))
    assert len(upstream.calls) == 3
    assert all(reply.ok for reply in replies)
    await assert_empty(coalescer)


@manual_time
async def test_flights_that_would_wait_for_each_other_do_not(clock):
    async def ask_the_other(call):
        if len(upstream.calls) > 6:
            return Reply(data=b"{}")
        await asyncio.sleep(1)
        other = "b" if call.payload["messages"][-1]["content"] == "a" else "a"
        reply = await coalescer(same(other))
        return reply.replace(data=b"{}", source="upstream")

    upstream = FakeUpstream([ask_the_other] * 10)
    coalescer = bind(clock, upstream)
    async with asyncio.timeout(60):
        await asyncio.gather(coalescer(same("a")), coalescer(same("b")))
    await assert_empty(coalescer)


@manual_time
async def test_a_flight_inside_a_flight_is_shared_as_any_other(clock):
    async def outer(call):
        return await coalescer(same("inner"))

    answered = []

    async def inner(call):
        await asyncio.sleep(3)
        answered.append(1)
        return Reply(data=b"{}")

    scripts = {"outer1": outer, "outer2": outer, "inner": inner}
    upstream = FakeUpstream([lambda call: scripts[call.payload["messages"][0]["content"]](call)] * 5)
    coalescer = bind(clock, upstream)
    await asyncio.gather(coalescer(same("outer1")), coalescer(same("outer2")))
    assert answered == [1]
    await assert_empty(coalescer)


# ── streams ─────────────────────────────────────────────────────────────────────────────────────────────────────────


async def read(reply):
    try:
        return [chunk async for chunk in reply.chunks]
    finally:
        await reply.chunks.aclose()


def streaming(words="one two three", gap_s=1.0):
    return Reply(chunks=ScriptedChunks(chat_chunks(words), gap_s=gap_s), native=object())


@manual_time
async def test_coalesce_09_a_stream_joined_later_is_complete_and_identical(clock):
    upstream = FakeUpstream([streaming()], latency_s=1)
    coalescer = bind(clock, upstream)
    early = start(coalescer, same(stream=True), same(stream=True))
    leader, follower = await asyncio.gather(*early)
    first = await leader.chunks.__anext__()
    await asyncio.sleep(2)
    late = await coalescer(same(stream=True))
    assert [leader.source, follower.source, late.source] == ["upstream", "coalesced", "coalesced"]
    assert [leader.native is None, follower.native, late.native] == [False, None, None]
    got = await asyncio.gather(read(leader), read(follower), read(late))
    assert [first, *got[0]] == got[1] == got[2] == chat_chunks("one two three")
    assert len(upstream.calls) == 1
    assert {reply.chunks.usage for reply in (leader, follower, late)} == {Usage(3, 3, reported=True)}
    await assert_empty(coalescer)


@manual_time
async def test_coalesce_10_a_leader_that_closes_early_leaves_the_others_alone(clock):
    upstream = FakeUpstream([streaming()])
    coalescer = bind(clock, upstream)
    leader, follower = await asyncio.gather(*start(coalescer, same(stream=True), same(stream=True)))
    await leader.chunks.__anext__()
    await leader.chunks.aclose()
    assert await read(follower) == chat_chunks("one two three")
    await assert_empty(coalescer)


@manual_time
async def test_a_stream_is_cancelled_when_all_readers_have_gone(clock):
    reply = streaming()
    coalescer = bind(clock, FakeUpstream([reply, streaming()]))
    leader, follower = await asyncio.gather(*start(coalescer, same(stream=True), same(stream=True)))
    await leader.chunks.aclose()
    await follower.chunks.__anext__()
    await follower.chunks.aclose()
    assert reply.chunks.closed
    assert await read(await coalescer(same(stream=True))) == chat_chunks("one two three")
    await assert_empty(coalescer)


@manual_time
async def test_an_orphaned_stream_is_read_to_its_end_where_that_is_wanted(clock):
    reply = streaming()
    coalescer = bind(clock, FakeUpstream([reply]), finish_orphans=True)
    leader = await coalescer(same(stream=True))
    await leader.chunks.aclose()
    late = await coalescer(same(stream=True))
    assert await read(late) == chat_chunks("one two three")
    assert late.source == "coalesced"
    await assert_empty(coalescer)


@manual_time
async def test_a_reader_cancelled_as_its_stream_arrives_gives_it_back(clock):
    reply = streaming()
    coalescer = bind(clock, FakeUpstream([reply]))
    (task,) = start(coalescer, same(stream=True))
    while not reply.chunks.usage.reported and not any(f.tee for f in coalescer._table.values()):
        await asyncio.sleep(0)
    task.cancel()
    await outcomes([task])
    await settle()
    assert task.cancelled()
    assert reply.chunks.closed
    await assert_empty(coalescer)


@manual_time
async def test_a_whole_answer_for_a_cancelled_caller_is_dropped(clock):
    gate = asyncio.get_running_loop().create_future()

    async def upstream(_):
        return await gate

    coalescer = bind(clock, upstream)
    (task,) = start(coalescer, same())
    await asyncio.sleep(0)
    (flight,) = coalescer._table.values()
    gate.set_result(Reply(data=b"{}"))
    while not flight.over:
        await asyncio.sleep(0)
    task.cancel()
    await outcomes([task])
    assert task.cancelled()
    await assert_empty(coalescer)


@manual_time
async def test_each_reader_of_a_stream_has_its_own_deadline(clock):
    coalescer = bind(clock, FakeUpstream([streaming()]))
    hurried, patient = await asyncio.gather(
        *start(coalescer, same(stream=True, context=within(clock, 2)), same(stream=True, context=within(clock, 60)))
    )
    with pytest.raises(DeadlineExceeded):
        await read(hurried)
    assert await read(patient) == chat_chunks("one two three")


@manual_time
async def test_a_stream_that_breaks_gives_each_reader_an_error_of_its_own(clock):
    error = ValueError("broke")
    coalescer = bind(clock, FakeUpstream([Reply(chunks=ScriptedChunks([b"1", error], gap_s=1))]))
    replies = await asyncio.gather(*start(coalescer, same(stream=True), same(stream=True)))
    found = await outcomes([read(reply) for reply in replies])
    assert found[0] is error
    assert found[1].__cause__ is error
    await assert_empty(coalescer)


@manual_time
async def test_a_stream_longer_than_the_buffer_is_not_joined(clock):
    def long(_):
        return Reply(chunks=ScriptedChunks([b"x" * 100] * 9, gap_s=1))

    upstream = FakeUpstream([long, long])
    coalescer = bind(clock, upstream, buffer_bytes=250)
    first = await coalescer(same(stream=True))
    for _ in range(5):
        await first.chunks.__anext__()
    second = await coalescer(same(stream=True))
    assert second.source == "upstream"
    assert [len(await read(reply)) for reply in (first, second)] == [4, 9]
    await assert_empty(coalescer)


@manual_time
async def test_a_stream_cancelled_from_outside_is_a_typed_error(clock):
    coalescer = bind(clock, FakeUpstream([streaming()]))
    reply = await coalescer(same(stream=True))
    await reply.chunks.__anext__()
    next(iter(coalescer._tasks)).cancel()
    with pytest.raises(StreamInterrupted):
        await read(reply)
    await assert_empty(coalescer)


@manual_time
async def test_streams_that_would_wait_for_each_other_do_not(clock):
    class Asking:
        """A stream whose second chunk needs the other stream's end."""

        usage = Usage()

        def __init__(self, other):
            self.other, self.count = other, 0

        def __aiter__(self):
            return self

        async def __anext__(self):
            self.count += 1
            if self.count == 1:
                await asyncio.sleep(1)
                if len(upstream.calls) < 6:
                    reply = await coalescer(same(self.other, stream=True))
                    await asyncio.sleep(1)
                    return b"".join(await read(reply))
                return b"."
            raise StopAsyncIteration

        async def aclose(self):
            self.count = 9

    def answer(call):
        return Reply(chunks=Asking("b" if call.payload["messages"][-1]["content"] == "a" else "a"))

    upstream = FakeUpstream([answer] * 10)
    coalescer = bind(clock, upstream)

    async def caller(prompt):
        return await read(await coalescer(same(prompt, stream=True)))

    async with asyncio.timeout(100):
        assert await asyncio.gather(caller("a"), caller("b")) == [[b"."], [b"."]]
    await assert_empty(coalescer)


@manual_time
async def test_a_function_s_values_are_private(clock):
    value = [1]
    coalescer = bind(clock, FakeUpstream([Reply(chunks=ScriptedChunks([Item(value), Item(value, b"j[1]")]))]))
    replies = await asyncio.gather(*start(coalescer, same(stream=True), same(stream=True)))
    mine, theirs = [await read(reply) for reply in replies]
    assert [item.value is value for item in mine] == [True, True]
    assert theirs[0].value == value
    assert theirs[0].value is not value
    assert theirs[1] == Item(None, b"j[1]")


# ── with the cache outside ──────────────────────────────────────────────────────────────────────────────────────────


def cached(clock, inner, events, *, sampling="share", **options):
    """Cache over coalescer over `inner`, and the coalescer."""
    env = Env(clock=clock, sinks=(events.append,))
    coalescer = Coalescer(**options).bind(inner, env)
    return TTLCache(300, sampling=sampling).bind(coalescer, env), coalescer


def stores(events):
    return sum(isinstance(event, CacheStored) for event in events)


@manual_time
async def test_coalesce_07_share_joins_twenty_agents_and_lanes_keep_them_apart(clock):
    calls = [chat_call(temperature=1, context=Context(agent=f"a{n}")) for n in range(20)]
    for sampling, expected in (("share", 1), ("lanes", 20), ("deterministic", 20)):
        upstream, events = FakeUpstream(latency_s=1, numbered=True), []
        cache, coalescer = cached(clock, upstream, events, sampling=sampling)
        replies = await asyncio.gather(*map(cache, calls))
        assert len({reply.text for reply in replies}) == len(upstream.calls) == expected, sampling
        await assert_empty(coalescer)


@manual_time
async def test_a_flight_is_stored_once_and_before_it_leaves_the_table(clock):
    upstream, events = FakeUpstream(latency_s=1), []
    cache, coalescer = cached(clock, upstream, events)

    async def caller(delay):
        await asyncio.sleep(delay)
        return (await cache(same())).source

    tasks = [asyncio.create_task(caller(n / 100)) for n in range(200)]
    await asyncio.sleep(0.5)
    tasks[0].cancel()
    found = (await outcomes(tasks))[1:]
    assert len(upstream.calls) == stores(events) == 1
    assert set(found) == {"coalesced", "cache"}
    await assert_empty(coalescer)


@pytest.mark.parametrize("stream", [False, True])
@manual_time
async def test_a_caller_overtaken_on_its_way_from_the_cache_finds_the_answer_there(clock, stream):
    """Between the look into the cache and the flight may lie a slow disk, or a layer of somebody's own."""
    upstream, events, delays = FakeUpstream(latency_s=1), [], [0, 5]

    async def slow(call):
        await asyncio.sleep(delays.pop(0))
        return await coalescer(call)

    coalescer = bind(clock, upstream)
    cache = TTLCache(300).bind(slow, Env(clock=clock, sinks=(events.append,)))

    async def ask():
        reply = await cache(same(stream=stream))
        return reply.source, b"".join(await read(reply)) if stream else reply.data

    (one, first), (other, second) = await asyncio.gather(ask(), ask())
    assert (one, other) == ("upstream", "cache")
    assert first == second
    assert len(upstream.calls) == stores(events) == 1
    await assert_empty(coalescer)


@manual_time
async def test_a_shared_stream_is_stored_once_also_when_its_leader_left(clock):
    upstream, events = FakeUpstream([streaming()]), []
    cache, coalescer = cached(clock, upstream, events)
    leader, follower = await asyncio.gather(*start(cache, same(stream=True), same(stream=True)))
    await leader.chunks.aclose()
    assert await read(follower) == chat_chunks("one two three")
    assert stores(events) == 1
    again = await cache(same(stream=True))
    assert (again.source, await read(again)) == ("cache", chat_chunks("one two three"))
    await assert_empty(coalescer)


class EndsLate(ScriptedChunks):
    """After the terminator the connection stays open for a while, as behind some proxies."""

    async def __anext__(self):
        try:
            return await super().__anext__()
        except StopAsyncIteration:
            await asyncio.sleep(100)
            raise


@manual_time
async def test_an_answer_that_arrived_is_stored_although_all_readers_leave_at_its_terminator(clock):
    upstream, events = FakeUpstream([Reply(chunks=EndsLate(chat_chunks("one two")))]), []
    cache, coalescer = cached(clock, upstream, events)
    replies = await asyncio.gather(*(cache(same(stream=True)) for _ in range(3)))
    for reply in replies:
        async for chunk in reply.chunks:
            if chunk == b"data: [DONE]\n\n":
                break
        await reply.chunks.aclose()
    await assert_empty(coalescer)
    assert (stores(events), (await cache(same(stream=True))).source) == (1, "cache")


@manual_time
async def test_after_an_invalidation_a_shared_sample_is_asked_for_anew(clock):
    upstream, events = FakeUpstream(latency_s=2, numbered=True), []
    cache, coalescer = cached(clock, upstream, events)
    call = chat_call(temperature=1)
    (old,) = start(cache, call)
    await asyncio.sleep(1)
    cache.invalidate(call)
    coalescer.invalidate(call)
    assert ((await cache(call)).text, (await old).text) == ("echo: hello #2", "echo: hello #1")
    assert (await cache(call)).text == "echo: hello #2"
    await assert_empty(coalescer)


# ── closing, moving ─────────────────────────────────────────────────────────────────────────────────────────────────


@manual_time
async def test_closing_cancels_flights_and_tells_their_waiters(clock):
    upstream = FakeUpstream(latency_s=50)
    coalescer = bind(clock, upstream)
    tasks = start(coalescer, *[same()] * 3)
    await asyncio.sleep(1)
    await asyncio.gather(coalescer.aclose(), coalescer.aclose())
    found = await outcomes(tasks)
    assert [type(error) for error in found] == [Closed] * 3
    assert upstream.cancelled == 1
    with pytest.raises(Closed):
        await coalescer(same())
    await assert_empty(coalescer)


@manual_time
async def test_closing_ends_shared_streams_and_orphans(clock):
    upstream = FakeUpstream([streaming()])
    coalescer = bind(clock, upstream, finish_orphans=True)
    reply = await coalescer(same(stream=True))
    (gone,) = start(coalescer, same("other"))
    await asyncio.sleep(0.5)
    gone.cancel()
    await coalescer.aclose()
    with pytest.raises(Closed):
        await read(reply)
    await assert_empty(coalescer)


@manual_time
async def test_a_flight_may_close_the_engine_it_belongs_to(clock):
    async def closing(_):
        await coalescer.aclose()
        return Reply(data=b"{}")

    coalescer = bind(clock, FakeUpstream([closing]))
    assert (await coalescer(same())).ok
    await assert_empty(coalescer)


def test_a_new_home_knows_nothing_of_the_old_one_s_flights(caplog):
    from llmmw.testing.clock import ManualClock

    clock = ManualClock()
    upstream = FakeUpstream(latency_s=5)
    coalescer = bind(clock, upstream)
    loop = asyncio.new_event_loop()
    task = loop.create_task(coalescer(same()))
    loop.run_until_complete(asyncio.sleep(0))
    loop.run_until_complete(asyncio.sleep(0))
    coalescer.rehome()
    coalescer.rehome()
    upstream.latency_s = 0

    async def main():
        assert (await coalescer(same())).ok
        await assert_empty(coalescer)

    clock.run(main())
    gc.collect()
    assert caplog.records == []
    task.cancel()
    for left in coalescer._forsaken[0]:
        left.cancel()
    loop.run_until_complete(asyncio.sleep(0))
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()


@manual_time
async def test_coalesce_13_many_keys_leave_the_table_empty(clock):
    coalescer = bind(clock, FakeUpstream())
    coalescer.inner.calls = Nothing()

    async def some(first):
        for n in range(first, first + 500):
            await coalescer(same().replace(key=n.to_bytes(8, "big")))

    await some(0)
    gc.collect()
    before = len(gc.get_objects())
    await some(500)
    await some(1000)
    await settle()
    gc.collect()
    assert len(gc.get_objects()) - before < 200
    await assert_empty(coalescer)


class Nothing(list):
    def append(self, value):
        pass

"""One limit for several processes: never more than the limit, whatever becomes of the counter."""

import asyncio
import random

import pytest

from llmmw.answer import Usage
from llmmw.call import Context, Reply
from llmmw.env import Env
from llmmw.errors import ConfigError, ConnectionFailed, RateLimited
from llmmw.events import Warned
from llmmw.layers.limit import RateLimiter
from llmmw.layers.shared import SharedCounter
from llmmw.testing.clock import manual_time
from llmmw.testing.fake import chat_call, error_reply


class Counter:
    """A store in this process, with its own clock; it can be slow, dead, or start anew."""

    def __init__(self, clock, latency_s=0.001):
        self.clock = clock
        self.latency_s = latency_s
        self.states = {}
        self.dead = False
        self.asked = 0
        self.closed = 0

    async def update(self, bucket, change):
        self.asked += 1
        await asyncio.sleep(self.latency_s)
        if self.dead:
            raise ConnectionError("the counter is gone")
        self.states[bucket], found = change(self.states.get(bucket), self.clock.monotonic() + 12345.0)
        await asyncio.sleep(self.latency_s)
        return found

    async def aclose(self):
        self.closed += 1


class World:
    """Some processes with one limit, and what their upstream saw."""

    def __init__(self, clock, *, processes=4, events=None, answer=None, counter=None, **options):
        self.clock = clock
        self.counter = counter or Counter(clock)
        self.sent = []
        self.answer = answer or (lambda call: Reply(data=b"{}", usage=Usage(3, 2, reported=True)))
        options.setdefault("rpm", 60)
        sinks = () if events is None else (events.append,)
        shared = SharedCounter(store=self.counter)
        self.limiters = [
            RateLimiter(shared=shared, **options).bind(self.upstream_of(number), Env(clock=clock, seed=1, sinks=sinks))
            for number in range(processes)
        ]
        self.tasks = []

    def upstream_of(self, number):
        async def upstream(call):
            self.sent.append((self.clock.monotonic(), number))
            return self.answer(call)

        return upstream

    def crowd(self, calls, who=None, **context):
        for limiter in self.limiters if who is None else who:
            self.tasks += [
                asyncio.ensure_future(limiter(chat_call(max_tokens=5, context=Context(**context))))
                for _ in range(calls)
            ]

    def most(self, window=60.0):
        times = sorted(at for at, _ in self.sent)
        return max((sum(1 for at in times if began <= at < began + window - 1e-9) for began in times), default=0)

    def by(self, number, since=-1e9):
        return sum(1 for at, who in self.sent if who == number and at >= since)

    async def close(self):
        for limiter in self.limiters:
            await limiter.aclose()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        assert asyncio.all_tasks() == {asyncio.current_task()}


@manual_time
async def test_limit_11_four_processes_share_sixty_a_minute(clock):
    world = World(clock)
    world.crowd(40)
    began = clock.monotonic()
    await asyncio.gather(*world.tasks)
    assert len(world.sent) == 160
    assert world.most() <= 60
    assert clock.monotonic() - began < 160 / 60 * 60 / 0.88
    assert all(limiter.gauges()["shared_by"] == 4 for limiter in world.limiters)
    await world.close()
    assert world.counter.closed == 4


@manual_time
async def test_limit_11_one_busy_process_may_use_what_the_others_leave(clock):
    world = World(clock)
    world.crowd(1)
    await asyncio.sleep(70)
    world.crowd(60, world.limiters[:1])
    await asyncio.sleep(61)
    assert world.by(0) >= 55
    assert world.most() <= 60
    await world.close()


@pytest.mark.parametrize(("busy", "killed_after"), [(1, 0.5), (4, 0.5), (2, 7.0), (1, 45.0), (4, 45.0), (4, 130.0)])
@manual_time
async def test_limit_11_the_counter_is_killed(clock, busy, killed_after):
    events = []
    world = World(clock, events=events)
    world.crowd(1)
    await asyncio.sleep(0.1)
    world.crowd(200, world.limiters[:busy])
    await asyncio.sleep(killed_after)
    world.counter.dead = True
    killed = clock.monotonic()
    await asyncio.sleep(5)
    world.crowd(200, world.limiters[busy:])
    await asyncio.sleep(300)
    assert world.most() <= 60
    parts = [world.by(number, since=killed + 150) for number in range(4)]
    assert all(35 <= part <= 40 for part in parts)  # 15 a minute each for 155 s
    assert [event.kind for event in events if isinstance(event, Warned)] == ["shared-counter"] * 4
    assert all(limiter.gauges()["shared_lost"] for limiter in world.limiters)
    await world.close()


@pytest.mark.parametrize(("gone_for", "forgetful"), [(3.0, True), (40.0, True), (200.0, False)])
@manual_time
async def test_limit_11_the_counter_comes_back(clock, gone_for, forgetful):
    world = World(clock)
    world.crowd(150)
    await asyncio.sleep(100)
    world.counter.dead = True
    await asyncio.sleep(gone_for)
    world.counter.dead = False
    if forgetful:
        world.counter.states.clear()
    await asyncio.sleep(200)
    assert not any(limiter.gauges()["shared_lost"] for limiter in world.limiters)
    assert world.most() <= 60
    before = len(world.sent)
    await asyncio.sleep(60)
    assert len(world.sent) - before >= 52
    await world.close()


@manual_time
async def test_limit_11_a_counter_that_never_answers_is_assumed_to_have_four_users(clock):
    events = []
    counter = Counter(clock)
    counter.dead = True
    world = World(clock, events=events, counter=counter, processes=1)
    world.crowd(100)
    await asyncio.sleep(240)
    assert world.most() <= 15
    assert len(world.sent) >= 55
    assert len([event for event in events if isinstance(event, Warned)]) == 1
    assert counter.asked < 30
    await world.close()


@manual_time
async def test_limit_11_a_counter_that_hangs_delays_a_call_by_its_patience_only(clock):
    world = World(clock, processes=1, counter=Counter(clock, latency_s=1e6))
    began = clock.monotonic()
    await world.limiters[0](chat_call())
    assert clock.monotonic() - began == pytest.approx(1.0, abs=0.1)
    await world.close()


@manual_time
async def test_limit_11_tokens_are_shared_and_settled(clock):
    def answer(call):
        return Reply(data=b"{}", usage=Usage(100, 0, reported=True))

    world = World(clock, processes=2, rpm=None, tpm=1000, answer=answer)
    world.crowd(30)
    await asyncio.sleep(59)
    spent = len(world.sent) * 100
    assert 800 <= spent <= 1100  # each costs more than was reserved: the last ones were under way when that was told
    await asyncio.sleep(400)
    assert world.most() <= 11
    await world.close()


@manual_time
async def test_limit_11_refused_and_unsent_calls_give_their_tokens_back_to_all(clock):
    replies = [ConnectionFailed("no connection"), error_reply(429, retry_after_ms="1")]

    def answer(call):
        if not replies:
            return Reply(data=b"{}", usage=Usage(1, 0, reported=True))
        found = replies.pop(0)
        if isinstance(found, Exception):
            raise found
        return found

    world = World(clock, processes=2, rpm=None, tpm=1000, answer=answer)
    first, second = world.limiters
    large = chat_call("x" * 3000, max_tokens=200)
    with pytest.raises(ConnectionFailed):
        await first(large)
    assert (await first(large)).status == 429
    await asyncio.sleep(1)
    began = clock.monotonic()
    await second(large)
    assert clock.monotonic() - began < 1
    await world.close()


@manual_time
async def test_limit_11_cancelled_callers_lose_nothing_of_the_shared_limit(clock):
    world = World(clock, processes=2, rpm=12, counter=Counter(clock, latency_s=0.3))
    rng = random.Random(4)
    for _ in range(60):
        world.crowd(2)
        await asyncio.sleep(rng.choice([0.0, 0.1, 0.4, 1.0]))
        for task in world.tasks[-3:]:
            task.cancel()
    await asyncio.gather(*world.tasks, return_exceptions=True)
    assert world.most() <= 12
    assert all(limiter.gauges()["in_use"] == 0 for limiter in world.limiters)
    await asyncio.sleep(120)
    began = clock.monotonic()
    await asyncio.gather(*(limiter(chat_call()) for limiter in world.limiters for _ in range(3)))
    assert clock.monotonic() - began < 32  # six of twelve a minute, one at once
    await world.close()


@manual_time
async def test_limit_11_deadlines_hold_while_the_counter_is_asked(clock):
    world = World(clock, processes=2, rpm=2)
    world.crowd(1)
    await asyncio.sleep(31)
    world.crowd(1)
    await asyncio.sleep(0.1)
    began = clock.monotonic()
    with pytest.raises(RateLimited) as refused:
        await world.limiters[0](chat_call(context=Context(deadline=began + 5)))
    assert clock.monotonic() - began < 0.1
    assert refused.value.retry_after_s > 5
    await world.close()


@manual_time
async def test_limit_11_a_process_that_joins_takes_nothing_that_others_count_on(clock):
    world = World(clock)
    world.crowd(30, world.limiters[:1])
    await asyncio.sleep(90)
    world.crowd(1, world.limiters[1:])
    await asyncio.sleep(0.01)
    world.counter.dead = True  # before the first one has looked in again
    world.crowd(40)
    await asyncio.sleep(300)
    assert world.most() <= 60
    await world.close()


@manual_time
async def test_limit_11_who_is_idle_for_long_leaves_and_who_comes_back_joins(clock):
    world = World(clock, processes=2)
    world.crowd(1)
    await asyncio.sleep(3600)
    assert world.counter.asked < 60
    await world.limiters[0](chat_call())
    assert world.limiters[0].gauges()["shared_by"] == 1
    await world.close()


@manual_time
async def test_limit_11_a_new_loop_gives_back_what_was_not_used(clock):
    world = World(clock, processes=1, rpm=3)
    (limiter,) = world.limiters
    await limiter(chat_call())
    limiter.rehome()
    began = clock.monotonic()
    await limiter(chat_call())
    assert clock.monotonic() - began < 31
    await world.close()


def test_limit_11_settings_are_checked(tmp_path):
    for options in ({}, {"directory": ""}, {"directory": "x", "store": object()}, {"store": object()},
                    {"directory": "x", "processes": 0}, {"directory": "x", "patience": "soon"}):  # fmt: skip
        with pytest.raises(ConfigError, match="SharedCounter"):
            SharedCounter(**options)
    with pytest.raises(ConfigError, match="shared"):
        RateLimiter(concurrency=4, shared=SharedCounter(str(tmp_path)))
    with pytest.raises(ConfigError, match="shared"):
        RateLimiter(rpm=4, shared=str(tmp_path))
    assert SharedCounter(tmp_path) == SharedCounter(str(tmp_path))
    assert hash(RateLimiter(rpm=4, shared=SharedCounter(tmp_path)))


@manual_time
async def test_limit_11_buckets_that_are_forgotten_ask_no_more(clock):
    world = World(clock, processes=1, window=1.0)
    (limiter,) = world.limiters
    for n in range(1000):
        await limiter(chat_call().replace(namespace=f"tenant {n}"))
    await asyncio.sleep(2)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("llmmw.layers.limiter._LOOKED_AT", 1000)
        await limiter(chat_call().replace(namespace="tenant 1000"))
    assert limiter.gauges()["buckets"] == 1
    asked = world.counter.asked
    await asyncio.sleep(30)
    assert world.counter.asked - asked < 20
    await world.close()


@manual_time
async def test_limit_11_a_forked_child_is_another_member_and_owes_nothing(clock, monkeypatch):
    world = World(clock, processes=2, rpm=None, tpm=1000)
    world.crowd(3)
    await asyncio.sleep(0.01)
    leases = next(iter(world.limiters[0]._gates.values())).allowance.leases
    assert leases.members == 2
    leases.report(1.0, (-5,))
    monkeypatch.setattr("os.getpid", lambda: 4321)
    world.limiters[0].rehome()
    assert leases.members == 4
    assert not leases._changes
    await world.limiters[0](chat_call())
    assert leases.members == 3
    monkeypatch.undo()
    await world.close()


def leases_of(limiter):
    (gate,) = limiter._gates.values()
    return gate.allowance.leases


@pytest.mark.parametrize("cost", [10, 900])
@manual_time
async def test_limit_11_without_the_counter_what_a_call_really_cost_counts_too(clock, cost):
    world = World(
        clock,
        processes=1,
        rpm=None,
        tpm=1000,
        answer=lambda call: Reply(data=b"{}", usage=Usage(cost, 0, reported=True)),
    )
    (limiter,) = world.limiters
    world.counter.dead = True
    large = chat_call("x" * 800, max_tokens=5)
    await limiter(large)  # about 200 of this process's part, a quarter of 1000
    began = clock.monotonic()
    await limiter(large)
    assert (clock.monotonic() - began < 2) is (cost == 10)
    await world.close()


@manual_time
async def test_limit_11_a_lease_that_is_too_small_or_too_old_is_given_back(clock):
    world = World(clock, processes=1, rpm=None, tpm=1000)
    leases = None

    async def lease(amount):
        while leases.opens_at((amount,), clock.monotonic()) > clock.monotonic():
            await asyncio.sleep(0.01)

    (limiter,) = world.limiters
    await limiter(chat_call(max_tokens=5))
    leases = leases_of(limiter)
    await asyncio.sleep(70)
    await lease(300)
    await lease(700)  # 300 and 700 would be the whole; the small one comes back first
    assert leases._lease.amounts == (700,)
    await asyncio.sleep(5)  # nobody came for it
    await lease(900)
    assert leases._lease.amounts == (900,)
    await world.close()
    assert not leases._changes


@manual_time
async def test_limit_11_what_comes_back_in_the_moment_of_leaving_is_told_all_the_same(clock):
    world = World(clock, processes=1, rpm=None, tpm=1000, counter=Counter(clock, latency_s=0.2))
    (limiter,) = world.limiters
    await limiter(chat_call(max_tokens=5))
    leases = leases_of(limiter)
    await asyncio.sleep(5)
    leases._begin(None, leaving=True)
    await asyncio.sleep(0.1)
    leases.report(clock.monotonic(), (-3,))
    await asyncio.sleep(10)
    assert not leases._changes
    await world.close()


@manual_time
async def test_limit_11_lowering_the_limit_asks_the_counter_at_once(clock):
    world = World(clock, processes=1, rpm=6)
    (limiter,) = world.limiters
    await limiter(chat_call())
    world.crowd(1)
    await asyncio.sleep(0.1)
    assert not world.tasks[0].done()
    limiter.reconfigure(rpm=600)
    await asyncio.sleep(1)
    assert world.tasks[0].done()
    leases_of(limiter).configure((600,), 50, 60.0)  # the same again changes nothing
    await limiter(chat_call())
    await world.close()

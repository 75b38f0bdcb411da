"""The limiter beside a server that tells how long its queue is: its places are filled, and little more waits there."""

from __future__ import annotations

import asyncio
import random

import pytest

from llmmw.algo.load import LOAD_HEADER
from llmmw.call import Reply
from llmmw.env import Env
from llmmw.layers.limit import RateLimiter
from llmmw.testing.clock import manual_time
from llmmw.testing.fake import chat_body, chat_call


class Server:
    """A server with so many places and a queue before them, as long as it takes; each answer tells of the queue."""

    def __init__(self, places, service_s, *, spread=0.3, tells=True):
        self._places = asyncio.Semaphore(places)
        self.service_s = service_s
        self._spread = spread
        self._rng = random.Random(1)
        self.tells = tells
        self.refuses = False
        self.waiting = self.busy = 0

    async def __call__(self, call):
        self.waiting += 1
        async with self._places:
            self.waiting -= 1
            self.busy += 1
            await asyncio.sleep(self.service_s * self._rng.uniform(1 - self._spread, 1 + self._spread))
            self.busy -= 1
        told = ((LOAD_HEADER, f"TEXT num_requests_waiting={float(self.waiting)}"),) if self.tells else ()
        if self.refuses:
            return Reply(data=b"{}", status=503, headers=told)
        return Reply(data=chat_body("ok"), headers=told)


def limited(clock, server, concurrency, **options):
    return RateLimiter(concurrency=concurrency, **options).bind(server, Env(clock=clock, seed=1))


async def crowd(limiter, calls):
    await asyncio.gather(*(limiter(chat_call(str(n))) for n in range(calls)))


def limit_of(limiter):
    return limiter.gauges()["concurrency"]


@pytest.mark.parametrize("spread", [0.0, 0.3])
@pytest.mark.parametrize("service_s", [0.5, 60.0])
@pytest.mark.parametrize(("places", "concurrency"), [(8, "4-64-256"), (90, "4-64-256"), (20, 64)])
@manual_time
async def test_limit_13_it_settles_at_the_servers_places_and_a_small_queue(
    clock, places, concurrency, service_s, spread
):
    server = Server(places, service_s, spread=spread)
    limiter = limited(clock, server, concurrency)
    began = clock.monotonic()
    await crowd(limiter, 30 * places)
    assert places <= limit_of(limiter) <= places + max(2, places // 4)
    assert clock.monotonic() - began <= 1.1 * 30 * service_s, "the places were never empty while calls waited"
    await crowd(limiter, 5 * places)
    assert places <= limit_of(limiter) <= places + max(2, places // 4)


@manual_time
async def test_limit_13_longer_outputs_alone_change_nothing(clock):
    server = Server(16, 1.0)
    limiter = limited(clock, server, "4-64-256")
    await crowd(limiter, 1000)
    before = limit_of(limiter)
    server.service_s = 100.0
    await crowd(limiter, 500)
    assert limit_of(limiter) == before


@manual_time
async def test_it_grows_again_when_the_server_has_more_places(clock):
    server = Server(4, 1.0)
    limiter = limited(clock, server, "4-64-256")
    await crowd(limiter, 500)
    assert limit_of(limiter) <= 10
    server._places._value += 96
    await crowd(limiter, 3000)
    assert 95 <= limit_of(limiter) <= 125


@manual_time
async def test_a_queue_never_leads_below_the_floor_nor_far_below_the_start(clock):
    for concurrency, least in (("30-64-256", 30), (64, 8)):
        limiter = limited(clock, Server(1, 0.1), concurrency)
        await crowd(limiter, 1000)
        assert limit_of(limiter) == least


@manual_time
async def test_a_server_that_says_nothing_is_judged_by_its_refusals_alone(clock):
    limiter = limited(clock, Server(2, 1.0, tells=False), 64)
    await crowd(limiter, 300)
    assert limit_of(limiter) == 64


@pytest.mark.parametrize("options", [{"adaptive": False}, {"headers": False}])
@manual_time
async def test_what_is_switched_off_is_not_heard(clock, options):
    limiter = limited(clock, Server(2, 1.0), 64, **options)
    await crowd(limiter, 300)
    assert limiter.gauges().get("concurrency", 64) == 64


@manual_time
async def test_a_refusal_is_overload_and_its_queue_no_reason_for_less(clock):
    server = Server(64, 1.0)
    server.refuses = True
    limiter = limited(clock, server, 64)
    await crowd(limiter, 1)
    assert limit_of(limiter) == 44


@manual_time
async def test_without_concurrency_there_is_nothing_to_move(clock):
    limiter = RateLimiter(rpm=1000).bind(Server(2, 1.0), Env(clock=clock, seed=1))
    await crowd(limiter, 5)
    assert "concurrency" not in limiter.gauges()

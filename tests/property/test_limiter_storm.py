"""429 storms: what a crowd costs at a server that refuses, with the limit told or not.

The server is simulated exactly (leaky bucket, sliding or fixed window); Retry and RateLimiter are the real ones, in
virtual time. Costs are upstream requests per success, and wall time over that of a client that knows everything.
"""

import asyncio
import random
from collections import deque
from math import ceil

import pytest

from llmmw.answer import Usage
from llmmw.call import Context, Reply
from llmmw.env import Env
from llmmw.layers.limit import RateLimiter
from llmmw.layers.retry import Retry
from llmmw.testing.clock import ManualClock
from llmmw.testing.fake import chat_body, chat_call, error_reply


class Server:
    """Admits `n` per `window` seconds; refusals take 10 ms and say when to come back as `told`."""

    def __init__(self, clock, kind, n, window, burst, latency_s, told, spread_s=0.0):
        self.spread_s, self.rng = spread_s, random.Random(3)
        self.now = clock.monotonic
        self.kind, self.n, self.window, self.burst = kind, n, window, burst
        self.latency_s, self.told = latency_s, told
        self.level, self.at = float(burst), self.now()
        self.taken = deque()
        self.asked = 0
        self.served = []
        self.early = 0
        self.closed_until = 0.0

    def wait(self):
        now = self.now()
        if self.kind == "bucket":
            self.level = min(self.burst, self.level + (now - self.at) * self.n / self.window)
            self.at = now
            if self.level >= 1:
                self.level -= 1
                return 0.0
            return (1 - self.level) * self.window / self.n
        if self.kind == "fixed" and self.taken and now >= self.taken[0] + self.window:
            self.taken.clear()
        while self.taken and self.taken[0] <= now - self.window:
            self.taken.popleft()
        if len(self.taken) < self.n:
            self.taken.append(now if self.kind == "sliding" or not self.taken else self.taken[0])
            return 0.0
        return self.taken[0] + self.window - now

    async def __call__(self, call):
        self.asked += 1
        if self.spread_s:
            await asyncio.sleep(self.rng.random() * self.spread_s)
        self.early += self.now() < self.closed_until
        wait = self.wait()
        if wait:
            await asyncio.sleep(0.01)
            told = {"seconds": {"retry_after": str(ceil(wait))}, "exact": {"retry_after_ms": str(ceil(wait * 1000))}}
            if self.told == "seconds":
                self.closed_until = max(self.closed_until, self.now() + ceil(wait))
            return error_reply(429, code="rate_limit_exceeded", **told.get(self.told, {}))
        self.served.append(call.payload["messages"][0]["content"])
        await asyncio.sleep(self.latency_s)
        return Reply(data=chat_body("ok"), usage=Usage(3, 2, reported=True))


def storm(calls, server, **options):
    """Upstream requests per success, seconds, failures."""
    clock = ManualClock()

    async def main():
        upstream = Server(clock, **server)
        env = Env(clock=clock, seed=7)
        handler = Retry().bind(RateLimiter(**options).bind(upstream, env), env)
        began = clock.monotonic()
        asked = (handler(chat_call(str(n), context=Context(agent=str(n)))) for n in range(calls))
        replies = await asyncio.gather(*asked)
        failed = sum(not reply.ok for reply in replies)
        return upstream.asked / calls, clock.monotonic() - began, failed, upstream

    return clock.run(main())


@pytest.mark.parametrize("options", [{}, {"concurrency": 64}])
@pytest.mark.parametrize("told", ["seconds", "exact", "nothing"])
@pytest.mark.parametrize("kind", ["bucket", "sliding", "fixed"])
def test_route_13_thirty_calls_where_five_per_three_seconds_are_admitted(kind, told, options):
    server = {"kind": kind, "n": 5, "window": 3.0, "burst": 5, "latency_s": 0.05, "told": told}
    cost, wall, failed, _ = storm(30, server, **options)
    assert failed == 0
    assert cost <= 1.5
    assert wall <= 1.2 * 15.0


@pytest.mark.parametrize("options", [{}, {"concurrency": 64}])
@pytest.mark.parametrize(("told", "most"), [("seconds", 1.55), ("exact", 1.3), ("nothing", 1.4)])
def test_route_13_thousand_calls_where_200_per_second_are_admitted(told, most, options):
    server = {"kind": "bucket", "n": 200, "window": 1.0, "burst": 50, "latency_s": 0.05, "told": told}
    cost, wall, failed, upstream = storm(1000, server, **options)
    assert failed == 0
    assert cost <= 1.2
    assert wall <= most * 4.75
    assert upstream.early <= 16  # while the server had asked to wait, only what was under way already came


@pytest.mark.parametrize("latency_s", [0.05, 1.0])
def test_a_limit_that_was_told_is_never_exceeded(latency_s):
    server = {"kind": "bucket", "n": 200, "window": 1.0, "burst": 50, "latency_s": latency_s, "told": "seconds"}
    cost, wall, failed, _ = storm(1000, server, rpm=12_000)
    assert (cost, failed) == (1.0, 0)
    assert wall <= 1.1 * 4.75 + latency_s


@pytest.mark.parametrize("kind", ["bucket", "sliding"])
@pytest.mark.parametrize(("n", "window"), [(50, 0.25), (30, 60.0), (5, 3.0)])
def test_a_limit_that_was_told_is_used_nearly_whole(kind, n, window):
    server = {"kind": kind, "n": n, "window": window, "burst": n, "latency_s": 0.05, "told": "seconds"}
    calls = 20 * n
    cost, wall, failed, _ = storm(calls, server, rpm=n, window=window)
    assert (cost, failed) == (1.0, 0)
    assert wall <= 1.1 * (calls - n) * window / n + 0.05


@pytest.mark.parametrize("spread_s", [0.005, 0.02])
def test_a_limit_that_was_told_is_kept_though_some_requests_take_longer_to_the_server(spread_s):
    server = {"kind": "bucket", "n": 50, "window": 0.25, "burst": 50, "latency_s": 0.05, "told": "seconds"}
    cost, wall, failed, _ = storm(1000, server | {"spread_s": spread_s}, rpm=50, window=0.25)
    assert (cost, failed) == (1.0, 0)
    assert wall <= 1.1 * 4.8


@pytest.mark.parametrize(
    ("n", "window", "burst"),
    [(10, 60.0, 1), (50, 60.0, 12), (3, 1.0, 1), (50, 3.0, 1), (10, 10.0, 10)],
)
@pytest.mark.parametrize("told", ["seconds", "nothing"])
def test_other_buckets_are_found_without_failures(n, window, burst, told):
    server = {"kind": "bucket", "n": n, "window": window, "burst": burst, "latency_s": 0.2, "told": told}
    cost, wall, failed, _ = storm(40, server)
    assert failed == 0
    assert cost <= 2.2
    assert wall <= 1.3 * (40 - burst) * window / n + 14


def test_a_raised_limit_is_found_again():
    clock = ManualClock()

    async def main():
        upstream = Server(clock, "bucket", 5, 1.0, 5, 0.05, "seconds")
        env = Env(clock=clock, seed=7)
        limiter = RateLimiter().bind(upstream, env)
        handler = Retry().bind(limiter, env)

        async def agent():
            while clock.monotonic() < stop:
                await handler(chat_call())

        stop = clock.monotonic() + 900
        agents = [asyncio.ensure_future(agent()) for _ in range(10)]
        await asyncio.sleep(100)
        before = len(upstream.served)
        upstream.n = upstream.burst = 20
        await asyncio.sleep(700)
        middle = len(upstream.served)
        await asyncio.sleep(100)
        await asyncio.gather(*agents)
        return before / 100, (len(upstream.served) - middle) / 100, upstream.asked / len(upstream.served)

    before, after, cost = clock.run(main())
    assert 4.0 <= before <= 5.1
    assert after >= 10
    assert cost <= 1.1

"""`VLLMEndpoint` below a rate limiter, at the embedded server's engine: the calls under way follow its queue."""

from __future__ import annotations

import asyncio

import pytest

from llmmw import Client, RateLimiter, Stack, SyncClient, Timeout, VLLMEndpoint, using
from llmmw.testing.server import FaultRule, Match, ServerConfig, running_server

MODEL = "llmmw-embedded"
PATIENCE_S = 120.0


def engine(**options):
    """Slow on purpose: it must be the server, and not a busy machine, that the calls wait for."""
    return ServerConfig(latency="engine", step_s=0.03, reply_tokens=8, reply_spread=0.5, **options)


class Crowd:
    """Callers who ask one question after the other, as long as the block lasts."""

    def __init__(self, client, callers, **fields):
        self._client = client
        self._callers = callers
        self._fields = fields
        self._tasks = []
        self.answers = 0
        self.failed = []

    async def __aenter__(self):
        self._tasks = [asyncio.create_task(self._ask(n)) for n in range(self._callers)]
        return self

    async def __aexit__(self, *_):
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _ask(self, n):
        try:
            while True:
                await self._client.chat(f"question {n}", **self._fields)
                self.answers += 1
        except Exception as error:
            self.failed.append(error)
            raise

    async def until(self, holds):
        async with asyncio.timeout(PATIENCE_S):
            while not holds():
                await asyncio.sleep(0.01)
                assert not self.failed


def limit_of(client):
    return client.get_performance_stats()["layers"]["limit"].get("concurrency", 1000)


def client_of(server, concurrency):
    stack = Stack(RateLimiter(concurrency=concurrency), Timeout(60))
    return Client(VLLMEndpoint(server.url), stack=stack, model=MODEL)


@pytest.mark.parametrize(("concurrency", "places"), [("2-16-64", 4), ("2-2-64", 6)])
async def test_limit_13_it_comes_to_the_places_of_the_server_and_a_small_queue(concurrency, places):
    async with running_server(engine(max_num_seqs=places)) as server, client_of(server, concurrency) as client:
        async with Crowd(client, 40) as crowd:
            await crowd.until(lambda: places <= limit_of(client) <= places + 3)
            answers = crowd.answers
            await crowd.until(lambda: crowd.answers >= answers + 10)
            await crowd.until(lambda: places <= limit_of(client) <= places + 3)
        assert client.get_performance_stats()["errors"] == 0


async def test_limit_13_longer_answers_alone_do_not_lower_it():
    async with running_server(engine(max_num_seqs=4)) as server, client_of(server, "2-16-64") as client:
        async with Crowd(client, 20, max_tokens=4) as crowd:
            await crowd.until(lambda: limit_of(client) <= 10)  # answers of one length come in waves, one of them waits
        lowest = [limit_of(client)]
        async with Crowd(client, 20, max_tokens=16, ignore_eos=True) as crowd:

            def answered():
                lowest.append(limit_of(client))
                return crowd.answers >= 12

            await crowd.until(answered)
        assert min(lowest) >= 4


async def test_a_full_queue_is_waited_out_and_opens_no_circuit():
    config = ServerConfig(latency="engine", step_s=0.01, reply_tokens=4, max_num_seqs=4, max_queued=4, paused=True)
    async with running_server(config) as server:
        stack = Stack.recommended(concurrency="2-64-64", attempts=20)
        async with Client(VLLMEndpoint(server.url), stack=stack, model=MODEL) as client:
            calls = asyncio.gather(*(client.chat(str(n), seed=n) for n in range(40)))
            async with asyncio.timeout(PATIENCE_S):
                while client.get_performance_stats()["retries"] < 20:
                    await asyncio.sleep(0.01)
            server.configure(paused=False)
            replies = await calls
        assert all(reply.ok for reply in replies)


async def test_a_client_without_a_stack_starts_where_vllm_does_and_follows_the_queue():
    async with running_server(engine(max_num_seqs=8)) as server:
        async with Client(VLLMEndpoint(server.url), model=MODEL) as client:
            assert (await client.chat("hello")).text
            assert limit_of(client) == 256
            async with Crowd(client, 280) as crowd:
                await crowd.until(lambda: limit_of(client) < 256)
        with SyncClient(VLLMEndpoint(server.url), model=MODEL) as plain:
            assert await asyncio.to_thread(lambda: plain.chat("hello").text)
            assert "8-256-512" in repr(plain.stack)


async def test_priorities_decide_in_the_servers_queue():
    async with (
        running_server(engine(max_num_seqs=1, paused=True)) as server,
        Client(VLLMEndpoint(server.url), stack=Stack(), model=MODEL) as client,
    ):
        order = []

        async def ask(priority):
            with using(priority=priority):
                await client.chat(f"at {priority}")
            order.append(priority)

        tasks = []
        for priority in (5, 3, 1, 4, 2):
            tasks.append(asyncio.create_task(ask(priority)))
            await server.wait(at_least={"engine.waiting": len(tasks)})
        server.configure(paused=False)
        await asyncio.gather(*tasks)
        assert order == [1, 2, 3, 4, 5]


async def test_a_server_that_refuses_priorities_costs_one_request_once():
    async with running_server() as server:
        body = '{"error": {"message": "Got priority 3 but Priority scheduling is not enabled.", "code": 400}}'
        server.add_fault(FaultRule(kind="status", status=400, body=body, match=Match(contains='"priority"')))
        async with Client(VLLMEndpoint(server.url), model=MODEL) as client:
            with using(priority=3):
                replies = [await client.chat(str(n)) for n in range(5)]
            told = client.get_performance_stats()
        assert all(reply.ok for reply in replies)
        assert (told["upstream_requests"], told["retries"], told["errors"]) == (6, 0, 0)

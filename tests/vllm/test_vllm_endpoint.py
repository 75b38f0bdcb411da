"""`VLLMEndpoint` at a real vLLM: what it finds out, what it sends, and how the calls under way follow the queue."""

from __future__ import annotations

import asyncio

import pytest

from llmmw import (
    Client,
    ConnectionPool,
    RateLimiter,
    Retry,
    Stack,
    StatusError,
    SyncClient,
    Timeout,
    VLLMEndpoint,
    using,
)

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1800)]
PREFIX = "every agent begins with the same long story about a village by the sea " * 12


def plain(vllm, **fields):
    """A short question without a grammar, which this model answers to the full length."""
    return {
        "model": vllm.model,
        "messages": [{"role": "user", "content": "hello"}],
        "temperature": 0,
        "max_tokens": 8,
        **fields,
    }


async def test_what_the_server_says_about_itself(vllm):
    async with Client(VLLMEndpoint(vllm.url.removesuffix("/v1")), stack=Stack()) as client:
        endpoint = client.endpoint
        about = await endpoint.discover()
        assert [model.id for model in about.models] == [vllm.model]
        assert about.model(vllm.model).max_model_len == 4096
        assert int(about.version.split(".")[1]) >= 19
        assert about.has_batch_chat
        assert {"batch:chat", "batch:complete", "idempotent", "n"} <= endpoint.capabilities
        assert await endpoint.health()
        load = await endpoint.read_load()
        assert (load.running, load.waiting) == (0, 0)
        assert 0 <= load.kv_cache_usage < 1
        assert load.prefix_queries >= load.prefix_hits >= 0


async def test_a_call_begins_the_inquiry_and_brings_a_reading(vllm):
    before = await vllm.idle()
    async with Client(VLLMEndpoint(vllm.url), stack=Stack()) as client:
        assert (await client.chat(**vllm.question("first"))).text
        assert client.endpoint.load.waiting == 0
        async with asyncio.timeout(600):
            while client.endpoint.about is None:
                await asyncio.sleep(0.01)
        assert client.get_performance_stats()["layers"]["pool"]["server_waiting"] == 0
    await vllm.grown(before, posts=1, answers=1)


async def test_every_field_reaches_the_server(vllm):
    async with Client(VLLMEndpoint(vllm.url, cache_salt="a long and secret text"), stack=Stack()) as client:
        with using(priority=-3, tenant="a"):
            first = await client.chat(**plain(vllm, temperature=1.0, seed=5, return_token_ids=True))
            again = await client.chat(**plain(vllm, temperature=1.0, seed=5))
            formed = await client.chat(**vllm.question("formed", structured_outputs={"choice": ["yes"]}, max_tokens=4))
            listed = await client.complete(["one", "two"], model=vllm.model, max_tokens=2)
        assert first.text == again.text
        assert first.body["choices"][0]["token_ids"]
        assert formed.text == "yes"
        assert len(listed.body["choices"]) == 2
        assert client.endpoint.takes_priority
        assert client.get_performance_stats()["upstream_requests"] == 4


async def cached_tokens(client, vllm, tenant):
    with using(tenant=tenant):
        body = plain(vllm, messages=[{"role": "user", "content": PREFIX}])
        return [(await client.chat(**body)).usage.cached_tokens for _ in range(2)]


async def test_a_salt_keeps_tenants_out_of_each_others_prefixes(vllm):
    async with Client(VLLMEndpoint(vllm.url, cache_salt=True), stack=Stack()) as client:
        found = [await cached_tokens(client, vllm, tenant) for tenant in ("a", "b", "a")]
    (first, warm), (other, _), (back, _) = found
    assert (first, other) == (0, 0), "what one tenant has asked does not speed up another"
    assert warm == back > 0


async def test_a_bad_priority_stays_the_callers_mistake(vllm):
    async with Client(VLLMEndpoint(vllm.url), stack=Stack()) as client:
        for wrong in ("high", 2**70):
            with pytest.raises(StatusError, match="priority") as caught:
                await client.chat(**plain(vllm, priority=wrong))
            assert caught.value.status == 400
        assert client.get_performance_stats()["upstream_requests"] == 2
        with using(priority=2**40):
            assert (await client.chat(**plain(vllm))).ok
        assert client.endpoint.takes_priority


async def test_a_cancelled_call_frees_its_place(vllm):
    before = await vllm.idle()
    async with Client(VLLMEndpoint(vllm.url), stack=Stack()) as client:

        async def read() -> None:
            async for _ in client.stream(**vllm.long_question("left")):
                pass

        for ask in (client.chat(**vllm.long_question("cancelled")), read()):
            task = asyncio.create_task(ask)
            await vllm.busy()
            task.cancel()
            await asyncio.wait([task])
            await vllm.freed(before)


async def test_idle_connections_are_given_up_before_the_server_does(vllm):
    async with Client(VLLMEndpoint(vllm.url), stack=Stack()) as client:
        for _ in range(3):
            assert (await client.chat(**plain(vllm))).ok
            await asyncio.sleep(4.95)  # the server's own limit is 5 s; a call in that moment used to be lost
        told = client.get_performance_stats()
        assert (told["errors"], told["connections_opened"], told["connections_reused"]) == (0, 3, 0)


async def test_an_older_habit_of_keeping_connections_costs_a_free_retry_at_most(vllm):
    pool = ConnectionPool(keepalive_expiry=30)
    async with Client(VLLMEndpoint(vllm.url, pool=pool), stack=Stack()) as client:
        for pause_s in (4.99, 5.0, 5.05):
            await asyncio.gather(*(client.chat(**plain(vllm, seed=n)) for n in range(8)))
            await asyncio.sleep(pause_s)
        await client.chat(**plain(vllm))
        assert client.get_performance_stats()["errors"] == 0


async def test_the_calls_under_way_follow_the_queue_of_the_server(small):
    """4 places, and no more than 4 requests are taken at all: what is refused is waited out."""
    stack = Stack(Retry(attempts=100, backoff=0.2, max_backoff=1), RateLimiter(concurrency="1-16-64"), Timeout(600))
    async with Client(VLLMEndpoint(small.url, small.api_key), stack=stack) as client:
        bodies = [
            small.question(f"crowd {n}", max_tokens=100, structured_outputs=None, ignore_eos=True) for n in range(48)
        ]
        outcomes = await client.map(bodies)
        told = client.get_performance_stats()
    assert all(outcome.ok for outcome in outcomes)
    assert told["layers"]["limit"]["concurrency"] < 16


async def test_at_a_large_server_nothing_holds_the_calls_back(vllm):
    async with Client(VLLMEndpoint(vllm.url)) as client:
        replies = await asyncio.gather(*(client.chat(**vllm.question(f"many {n}")) for n in range(64)))
        told = client.get_performance_stats()
    assert all(reply.ok for reply in replies)
    assert (told["errors"], told["retries"], told["upstream_requests"]) == (0, 0, 64)
    assert told["layers"]["limit"]["concurrency"] >= 128


def test_plain_code_uses_it_too(vllm):
    with SyncClient(VLLMEndpoint(vllm.url)) as client:
        assert client.chat(**vllm.question("plain")).text
        assert asyncio.run(client.endpoint.health())
        assert asyncio.run(client.endpoint.discover()).models[0].id == vllm.model

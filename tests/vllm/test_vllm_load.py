"""Many calls at once, one client on many loops, and statistics beside vLLM's own counters."""

from __future__ import annotations

import asyncio
import threading

import openai
import pytest

import llmmw
from llmmw import Client, Coalescer, Stack, StatusError, SyncClient, TTLCache, using

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1800)]


async def test_a_hundred_identical_calls_are_one(vllm, stack):
    body = vllm.question("a hundred")
    truth = (await vllm.raw(body)).json()["choices"][0]["message"]["content"]
    before = await vllm.idle()
    async with Client(vllm.url, stack=stack) as client:
        replies = await asyncio.gather(*(client.chat(**body) for _ in range(100)))
        stats = client.get_performance_stats()
        later = await client.chat(**body)
    assert {reply.text for reply in replies} == {truth}
    assert sorted({reply.source for reply in replies}) == ["coalesced", "upstream"]
    assert (stats["upstream_requests"], stats["coalesced"], stats["request_count"]) == (1, 99, 100)
    assert later.source == "cache"
    await vllm.grown(before, posts=1, answers=1)


async def test_a_hundred_identical_calls_of_the_sdk_are_one(vllm, stack):
    body = vllm.for_sdk(vllm.question("a hundred by sdk"))
    before = await vllm.idle()
    async with openai.AsyncOpenAI(
        base_url=vllm.url, api_key="none", max_retries=0, http_client=llmmw.httpx2_client(stack)
    ) as sdk:
        answers = await asyncio.gather(*(sdk.chat.completions.create(**body) for _ in range(100)))
        stats = sdk._client.get_performance_stats()
    assert len({answer.model_dump_json() for answer in answers}) == 1
    assert (stats["upstream_requests"], stats["coalesced"]) == (1, 99)
    await vllm.grown(before, posts=1, answers=1)


async def test_a_hundred_identical_streams_are_one(vllm, stack):
    body = vllm.question("a hundred streams")
    before = await vllm.idle()

    async def read(client):
        return [piece.body async for piece in client.stream(**body)]

    async with Client(vllm.url, stack=stack) as client:
        streams = await asyncio.gather(*(read(client) for _ in range(100)))
        assert client.get_performance_stats()["upstream_requests"] == 1
    assert all(stream == streams[0] for stream in streams)
    await vllm.grown(before, posts=1, answers=1)


async def test_sixty_four_different_calls_are_all_answered(vllm, stack):
    before = await vllm.idle()
    async with Client(vllm.url, stack=stack) as client:
        replies = await asyncio.gather(*(client.chat(**vllm.question(f"different {n}")) for n in range(64)))
        again = await asyncio.gather(*(client.chat(**vllm.question(f"different {n}")) for n in range(64)))
        stats = client.get_performance_stats()
    assert all(len(reply.text) == 40 for reply in replies)
    assert [reply.data for reply in again] == [reply.data for reply in replies]
    assert {reply.source for reply in again} == {"cache"}
    assert (stats["upstream_requests"], stats["cache_hits"], stats["errors"], stats["retries"]) == (64, 64, 0, 0)
    await vllm.grown(before, posts=64, answers=64)


async def test_concurrency_is_what_the_server_sees(vllm):
    stack = Stack.recommended(concurrency=3, timeout=600)
    async with Client(vllm.url, stack=stack) as client:
        calls = asyncio.gather(*(client.chat(**vllm.question(f"three {n}", max_tokens=64)) for n in range(24)))
        seen = []
        while not calls.done():
            seen.append((await asyncio.to_thread(vllm.figures))["running"])
        replies = await calls
    assert all(reply.text for reply in replies)
    assert max(seen) <= 3


def test_one_client_lives_through_five_loops(vllm, stack):
    before = vllm.wait_idle()
    client = Client(vllm.url, stack=stack)

    async def step(n):
        return await asyncio.gather(
            client.chat(**vllm.question("every step")), client.chat(**vllm.question(f"only in step {n}"))
        )

    steps = [asyncio.run(step(n)) for n in range(5)]
    stats = client.get_performance_stats()
    asyncio.run(client.aclose())
    assert len({common.data for common, _ in steps}) == 1
    assert [common.source for common, _ in steps] == ["upstream", "cache", "cache", "cache", "cache"]
    assert [own.source for _, own in steps] == ["upstream"] * 5
    assert (stats["request_count"], stats["cache_hits"], stats["upstream_requests"]) == (10, 4, 6)
    vllm.wait_grown(before, posts=6, answers=6)


def test_one_sync_client_serves_eight_threads(vllm, stack):
    before = vllm.wait_idle()
    texts: dict[int, list[str]] = {}
    with SyncClient(vllm.url, stack=stack) as client:

        def work(k):
            with using(agent=f"thread {k}"):
                texts[k] = [client.chat(**vllm.question(f"shared {n}")).text for n in range(4)]

        threads = [threading.Thread(target=work, args=(k,)) for k in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        stats = client.get_performance_stats()
    assert len({tuple(found) for found in texts.values()}) == 1
    assert stats["upstream_requests"] == 4
    assert stats["cache_hits"] + stats["coalesced"] == 28
    assert len(stats["by_agent"]) == 8
    vllm.wait_grown(before, posts=4, answers=4)


async def test_the_figures_are_the_servers_own(vllm):
    before = await vllm.idle()
    async with Client(vllm.url, stack=Stack(TTLCache(300), Coalescer())) as client:
        await asyncio.gather(*(client.chat(**vllm.question(f"figures {n % 5}")) for n in range(15)))
        for _ in range(2):
            async for _piece in client.stream(**vllm.question("figures streamed")):
                pass
        await client.complete(["one", "two two", "three three three"], model=vllm.model, max_tokens=7, temperature=0)
        await client.chat(**vllm.question("figures sampled", temperature=1.0, seed=1))
        await client.chat(**vllm.question("figures cut", max_tokens=3))
        await client.chat(**vllm.question("a prefix that the server has already " * 30))
        await client.chat(**vllm.question("a prefix that the server has already " * 30 + "or nearly"))
        with pytest.raises(StatusError):
            await client.chat(**vllm.question("figures refused", model="nobody"))
        stats = client.get_performance_stats()
    now = await vllm.idle()
    grown = {name: now[name] - before[name] for name in ("posts", "answers", "prompt_tokens", "generation_tokens")}
    assert stats["upstream_requests"] == grown["posts"]
    assert (stats["tokens_in"], stats["tokens_out"]) == (grown["prompt_tokens"], grown["generation_tokens"])
    # At the server each prompt of the list is a request of its own; the refusal is none.
    assert stats["upstream_requests"] - stats["upstream_failures"] == grown["answers"] - 2
    assert stats["request_count"] == stats["cache_hits"] + stats["coalesced"] + stats["answered_upstream"] + 1
    assert stats["connections_opened"] < stats["upstream_requests"]
    assert 0 < stats["latency_p50_s"] <= stats["latency_p95_s"] <= stats["latency_p99_s"]


async def test_what_the_sdk_streams_without_usage_is_not_invented(vllm, stack):
    before = await vllm.idle()
    async with llmmw.httpx2_client(stack, base_url=vllm.url) as client:
        body = vllm.question("usage unknown") | {"stream": True}
        await client.post("/chat/completions", json=body)
        stats = client.get_performance_stats()
    assert (stats["tokens_in"], stats["tokens_out"]) == (0, 0)
    await vllm.grown(before, posts=1, answers=1)


async def test_saved_tokens_and_seconds_are_those_of_the_first_call(vllm, stack):
    async with Client(vllm.url, stack=stack) as client:
        first = await client.chat(**vllm.question("saved"))
        for _ in range(3):
            await client.chat(**vllm.question("saved"))
        stats = client.get_performance_stats()
    assert stats["tokens_saved"] == 3 * first.usage.total_tokens
    assert stats["time_saved_s"] == pytest.approx(3 * first.service_s)
    assert (stats["tokens_in"], stats["tokens_out"]) == (first.usage.input_tokens, first.usage.output_tokens)

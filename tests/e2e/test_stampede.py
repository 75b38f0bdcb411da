"""Identical calls cost one upstream call, whichever way they come in (real sockets, a real server process)."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

import anthropic
import openai
import pytest

import llmmw
from llmmw import Client, Coalescer, Stack, SyncClient, TTLCache
from llmmw.testing.server import ServerConfig, server_process

MODEL = "llmmw-embedded"
HELLO = [{"role": "user", "content": "hello"}]
ASKED = {"model": MODEL, "messages": HELLO, "temperature": 0}
STAMPEDE, AFTERWARDS = 100, 1000


@pytest.fixture(scope="module")
def process():
    with server_process(ServerConfig(latency="fixed", latency_s=0.05)) as server:
        yield server


@pytest.fixture
def server(process):
    process.reset()
    return process


def stack() -> Stack:
    return Stack(TTLCache(300), Coalescer())


def completions(server) -> int:
    return sum(
        count for route, count in server.stats()["by_route"].items() if "completions" in route or "messages" in route
    )


async def check(server, ask, stats, close):
    """`ask` answers with the text; `stats` and `close` belong to whoever made it."""
    texts = await asyncio.gather(*(ask() for _ in range(STAMPEDE)))
    assert len(set(texts)) == 1
    assert texts[0]
    assert completions(server) == 1
    for _ in range(AFTERWARDS // STAMPEDE):
        assert set(await asyncio.gather(*(ask() for _ in range(STAMPEDE)))) == set(texts)
    assert completions(server) == 1
    found = stats()
    assert found["request_count"] == STAMPEDE + AFTERWARDS
    assert found["upstream_requests"] == 1
    assert found["cache_hits"] + found["coalesced"] + found["answered_upstream"] == STAMPEDE + AFTERWARDS
    assert found["cache_hits"] >= AFTERWARDS
    await close()


async def test_coalesce_01_way_1_a_decorated_async_function(server):
    sdk = openai.AsyncOpenAI(base_url=server.base_url, api_key="k", max_retries=0)

    @stack().wrap
    async def ask(prompt: str) -> str:
        answer = await sdk.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": prompt}])
        return answer.choices[0].message.content

    async def close():
        await ask.aclose()
        await sdk.close()

    # A function says nothing about its sampling, so sharing is the cache's policy ("share").
    await check(server, lambda: ask("hello"), ask.get_performance_stats, close)


def test_coalesce_01_way_1_a_decorated_sync_function_in_threads(server):
    sdk = openai.OpenAI(base_url=server.base_url, api_key="k", max_retries=0)

    @stack().wrap
    def ask(prompt: str) -> str:
        return sdk.chat.completions.create(**ASKED).choices[0].message.content

    with ThreadPoolExecutor(STAMPEDE) as pool:
        texts = set(pool.map(ask, ["hello"] * STAMPEDE))
        assert len(texts) == 1
        assert completions(server) == 1
        assert set(pool.map(ask, ["hello"] * AFTERWARDS)) == texts
    assert completions(server) == 1
    ask.close()
    sdk.close()


async def test_coalesce_01_way_2_the_client(server):
    client = Client(server.base_url, stack=stack(), model=MODEL)

    async def ask():
        return (await client.chat(HELLO, temperature=0)).text

    await check(server, ask, client.get_performance_stats, client.aclose)


def test_coalesce_01_way_2_the_sync_client_in_threads(server):
    with SyncClient(server.base_url, stack=stack(), model=MODEL) as client, ThreadPoolExecutor(STAMPEDE) as pool:
        ask = lambda _: client.chat(HELLO, temperature=0).text  # noqa: E731
        texts = set(pool.map(ask, range(STAMPEDE)))
        assert len(texts) == 1
        assert set(pool.map(ask, range(AFTERWARDS))) == texts
        assert client.get_performance_stats()["upstream_requests"] == 1
    assert completions(server) == 1


async def test_coalesce_01_way_2_streams_of_the_client(server):
    client = Client(server.base_url, stack=stack(), model=MODEL)

    async def ask():
        return "".join([piece async for piece in client.stream(messages=HELLO, temperature=0)])

    await check(server, ask, client.get_performance_stats, client.aclose)


@pytest.mark.parametrize("make", [llmmw.httpx2_client, llmmw.httpx_client])
async def test_coalesce_01_way_3_a_transport_under_the_sdk(server, make):
    http_client = make(stack())
    if make is llmmw.httpx2_client:
        sdk = openai.AsyncOpenAI(base_url=server.base_url, api_key="k", http_client=http_client, max_retries=0)

        async def ask():
            return (await sdk.chat.completions.create(**ASKED)).choices[0].message.content
    else:

        async def ask():
            answer = await http_client.post(f"{server.base_url}/chat/completions", json=ASKED)
            return answer.json()["choices"][0]["message"]["content"]

    await check(server, ask, http_client.get_performance_stats, http_client.aclose)


async def test_coalesce_01_way_3_a_transport_under_anthropic(server):
    http_client = llmmw.httpx2_client(stack())
    sdk = anthropic.AsyncAnthropic(base_url=server.url, api_key="k", http_client=http_client, max_retries=0)

    async def ask():
        answer = await sdk.messages.create(model=MODEL, max_tokens=8, messages=HELLO, extra_body={"temperature": 0})
        return answer.content[0].text

    # max_tokens may cut the answer, and a cut answer is not stored: ask for few enough words.
    server.configure(reply_tokens=4, reply_spread=0)
    try:
        await check(server, ask, http_client.get_performance_stats, http_client.aclose)
    finally:
        server.configure(reply_tokens=32, reply_spread=0.25)


async def test_coalesce_01_way_4_above_create(server):
    sdk = llmmw.wrap_client(openai.AsyncOpenAI(base_url=server.base_url, api_key="k"), stack())

    async def ask():
        return (await sdk.chat.completions.create(**ASKED)).choices[0].message.content

    await check(server, ask, sdk.get_performance_stats, sdk.close)


async def test_coalesce_07_way_5_lanes_keep_agents_apart(server):
    lanes = Stack(TTLCache(300, sampling="lanes"), Coalescer())
    async with Client(server.base_url, stack=lanes, model=MODEL) as client:

        async def ask(agent):
            with llmmw.using(agent=agent):
                return (await client.chat(HELLO, temperature=1)).text

        texts = await asyncio.gather(*(ask(f"agent-{n}") for n in range(20)))
        assert completions(server) == 20
        assert len(set(texts)) == 20

        async def again(agent):
            with llmmw.using(agent=agent, sample=0):
                return (await client.chat(HELLO, temperature=1)).text

        assert await asyncio.gather(*(again(f"agent-{n}") for n in range(20))) == texts
        assert completions(server) == 20

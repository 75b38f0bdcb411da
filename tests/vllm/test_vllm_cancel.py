"""Whoever stops waiting frees the server: vLLM's own gauge of running requests returns to zero."""

from __future__ import annotations

import asyncio

import httpx2
import openai
import pytest

import llmmw
from llmmw import Client, Coalescer, Stack, SyncClient, Timeout, TTLCache, UpstreamTimeout

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1800)]


async def cancel(task):
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_cancelled_call_is_aborted(vllm, stack):
    before = await vllm.idle()
    async with Client(vllm.url, stack=stack) as client:
        task = asyncio.create_task(client.chat(**vllm.long_question("cancelled")))
        await vllm.busy()
        await cancel(task)
        await vllm.freed(before)
        assert client.get_performance_stats()["cancelled"] == 1
        assert (await client.chat(**vllm.question("and goes on"))).text


async def test_a_cancelled_list_of_prompts_is_aborted(vllm, stack):
    body = vllm.long_question("list")
    del body["messages"]
    before = await vllm.idle()
    async with Client(vllm.url, stack=stack) as client:
        task = asyncio.create_task(client.complete(["one", "two", "three"], **body))
        await vllm.busy()
        await cancel(task)
        await vllm.freed(before)


async def test_a_cancelled_batch_is_aborted(vllm, stack):
    before = await vllm.idle()
    bodies = [vllm.long_question(f"batch {n}") for n in range(4)]
    async with Client(vllm.url, stack=stack) as client:
        task = asyncio.create_task(client.map(bodies))
        await vllm.busy(4)
        await cancel(task)
        await vllm.freed(before)


async def test_a_cancelled_call_of_the_sdk_is_aborted(vllm, stack):
    before = await vllm.idle()
    async with openai.AsyncOpenAI(
        base_url=vllm.url, api_key="none", max_retries=0, http_client=llmmw.httpx2_client(stack)
    ) as sdk:
        task = asyncio.create_task(sdk.chat.completions.create(**vllm.for_sdk(vllm.long_question("sdk cancelled"))))
        await vllm.busy()
        await cancel(task)
        await vllm.freed(before)


async def test_a_closed_stream_is_aborted(vllm, stack):
    before = await vllm.idle()
    async with Client(vllm.url, stack=stack) as client:
        stream = client.stream(**vllm.long_question("closed stream"))
        assert (await anext(stream)).body["choices"]
        await stream.aclose()
        await vllm.freed(before)


def test_a_closed_sync_stream_is_aborted(vllm, stack):
    before = vllm.wait_idle()
    with SyncClient(vllm.url, stack=stack) as client:
        stream = client.stream(**vllm.long_question("closed sync stream"))
        next(stream)
        stream.close()
        asyncio.run(vllm.freed(before))


async def test_a_closed_stream_of_the_transport_is_aborted(vllm, stack):
    before = await vllm.idle()
    body = vllm.streamed(vllm.long_question("closed transport stream"))
    async with llmmw.httpx2_client(stack, base_url=vllm.url) as client:
        async with client.stream("POST", "/chat/completions", json=body) as response:
            chunks = response.aiter_raw()
            assert await anext(chunks)
        await vllm.freed(before)


async def test_a_closed_stream_of_the_sdk_is_aborted(vllm, stack):
    before = await vllm.idle()
    body = vllm.for_sdk(vllm.streamed(vllm.long_question("closed sdk stream")))
    async with openai.AsyncOpenAI(
        base_url=vllm.url, api_key="none", max_retries=0, http_client=llmmw.httpx2_client(stack)
    ) as sdk:
        stream = await sdk.chat.completions.create(**body)
        await anext(aiter(stream))
        await stream.close()
        await vllm.freed(before)


async def test_a_cancelled_reader_of_a_stream_frees_the_server(vllm, stack):
    before = await vllm.idle()
    reading = asyncio.Event()

    async with Client(vllm.url, stack=stack) as client:

        async def read():
            async for _ in client.stream(**vllm.long_question("cancelled reader")):
                reading.set()

        task = asyncio.create_task(read())
        await reading.wait()
        await cancel(task)
        await vllm.freed(before)


async def test_the_timeout_layer_aborts_and_says_so(vllm):
    before = await vllm.idle()
    for seconds in (1.5, 5, 15):
        async with Client(vllm.url, stack=Stack(Timeout(seconds))) as client:
            with pytest.raises(UpstreamTimeout, match="total") as caught:
                await client.chat(**vllm.long_question("timed out"))
            await vllm.freed(before)
        if caught.value.sent:
            break  # else the machine was too busy to get as far as that
    assert caught.value.sent


async def test_the_timeout_layer_ends_a_stream_that_has_begun(vllm):
    before = await vllm.idle()
    pieces = []
    for seconds in (2, 5, 15, 45):
        async with Client(vllm.url, stack=Stack(Timeout(seconds))) as client:
            with pytest.raises(llmmw.UpstreamError):
                async for piece in client.stream(**vllm.long_question("timed out stream")):
                    pieces.append(piece)
            await vllm.freed(before)
        if pieces:
            break  # else the machine was too busy for a first one
    assert pieces


async def test_the_sdks_own_time_out_aborts(vllm, stack):
    before = await vllm.idle()
    async with openai.AsyncOpenAI(
        base_url=vllm.url,
        api_key="none",
        max_retries=0,
        http_client=llmmw.httpx2_client(stack),
        timeout=httpx2.Timeout(600, read=1.5),
    ) as sdk:
        with pytest.raises(openai.APITimeoutError):
            await sdk.chat.completions.create(**vllm.for_sdk(vllm.long_question("sdk time-out")))
        await vllm.freed(before)


async def test_a_bare_clients_own_time_out_aborts(vllm, stack):
    before = await vllm.idle()
    async with llmmw.httpx2_client(stack, base_url=vllm.url, timeout=httpx2.Timeout(600, read=1.5)) as client:
        with pytest.raises(httpx2.ReadTimeout):
            await client.post("/chat/completions", json=vllm.long_question("bare time-out"))
        await vllm.freed(before)


async def test_a_follower_outlives_its_leader_and_the_last_one_frees_the_server(vllm):
    body = vllm.long_question("leader leaves")
    before = await vllm.idle()
    async with Client(vllm.url, stack=Stack(TTLCache(300), Coalescer())) as client:
        leader, follower = (asyncio.create_task(client.chat(**body)) for _ in range(2))
        await vllm.busy()
        await cancel(leader)
        assert client.engine.get_performance_stats()["layers"]["coalesce"]["flights"] == 1
        await cancel(follower)
        await vllm.freed(before)
        assert client.get_performance_stats()["upstream_requests"] == 1


async def test_an_abandoned_wrapped_call_is_aborted(vllm, stack):
    before = await vllm.idle()
    async with openai.AsyncOpenAI(base_url=vllm.url, api_key="none", max_retries=0) as sdk:

        @stack.wrap
        async def ask(text: str):
            return await sdk.chat.completions.create(**vllm.for_sdk(vllm.long_question(text)))

        task = asyncio.create_task(ask("abandoned"))
        await vllm.busy()
        await cancel(task)
        await vllm.freed(before)
        await ask.aclose()

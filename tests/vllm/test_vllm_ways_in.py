"""Five ways in, one real vLLM: each gets the server's own answer, and the second time nothing is sent."""

from __future__ import annotations

import asyncio

import anthropic
import httpx
import httpx2
import openai
import pytest

import llmmw
from llmmw import Client, RateLimiter, Stack, SyncClient, using

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1800)]


def sdk_for(vllm, kind=openai.AsyncOpenAI, **options):
    return kind(base_url=vllm.url, api_key="none", max_retries=0, **options)


async def test_a_decorated_async_function_over_the_sdk(vllm):
    body = vllm.question("decorated async")
    truth = (await vllm.raw(body)).json()
    before = await vllm.idle()
    async with sdk_for(vllm) as sdk:

        @llmmw.middleware(cache_ttl=300, concurrency=8)
        async def ask(text: str):
            return await sdk.chat.completions.create(**vllm.for_sdk(vllm.question(text)))

        first, second = await ask("decorated async"), await ask("decorated async")
        assert type(first) is type(second) is openai.types.chat.ChatCompletion
        assert first.model_dump() == second.model_dump()
        assert first is not second
        assert first.choices[0].message.content == truth["choices"][0]["message"]["content"]
        stats = ask.get_performance_stats()
        await ask.aclose()
    assert (stats["request_count"], stats["cache_hits"], stats["upstream_requests"]) == (2, 1, 1)
    await vllm.grown(before, answers=1, posts=1)


def test_a_decorated_sync_function_over_the_sdk(vllm):
    truth = vllm.post("/chat/completions", vllm.question("decorated sync")).json()
    before = vllm.wait_idle()
    with sdk_for(vllm, openai.OpenAI) as sdk:

        @llmmw.middleware(cache_ttl=300)
        def ask(text: str) -> str:
            answer = sdk.chat.completions.create(**vllm.for_sdk(vllm.question(text)))
            return answer.choices[0].message.content

        assert ask("decorated sync") == ask("decorated sync") == truth["choices"][0]["message"]["content"]
        assert ask.get_performance_stats()["cache_hits"] == 1
        ask.close()
    vllm.wait_grown(before, answers=1, posts=1)


async def test_the_client(vllm, stack):
    body = vllm.question("client")
    truth = (await vllm.raw(body)).json()
    before = await vllm.idle()
    async with Client(vllm.url, stack=stack, model=vllm.model) as client:
        first = await client.chat(**body)
        second = await client.chat(**body)
    assert (first.source, second.source) == ("upstream", "cache")
    assert first.data == second.data
    assert vllm.plain(first.body) == vllm.plain(truth)
    assert first.usage == second.usage
    assert first.usage.input_tokens == truth["usage"]["prompt_tokens"]
    assert first.usage.output_tokens == truth["usage"]["completion_tokens"]
    await vllm.grown(before, answers=1, posts=1)


def test_the_sync_client(vllm, stack):
    body = vllm.question("sync client")
    truth = vllm.post("/chat/completions", body).json()
    before = vllm.wait_idle()
    with SyncClient(vllm.url, stack=stack) as client:
        first, second = client.chat(**body), client.chat(**body)
        assert vllm.plain(first.body) == vllm.plain(truth)
        assert (second.source, second.data) == ("cache", first.data)
    vllm.wait_grown(before, answers=1, posts=1)


async def test_the_transport_under_the_openai_sdk(vllm, stack):
    body = vllm.question("transport async")
    truth = (await vllm.raw(body)).json()
    before = await vllm.idle()
    async with sdk_for(vllm, http_client=llmmw.httpx2_client(stack)) as sdk:
        raw = await sdk.chat.completions.with_raw_response.create(**vllm.for_sdk(body))
        again = await sdk.chat.completions.with_raw_response.create(**vllm.for_sdk(body))
    assert (raw.headers["x-llmmw-source"], again.headers["x-llmmw-source"]) == ("upstream", "cache")
    assert raw.http_response.content == again.http_response.content
    assert vllm.plain(raw.http_response.json()) == vllm.plain(truth)
    assert raw.parse() == again.parse()
    await vllm.grown(before, answers=1, posts=1)


def test_the_sync_transport_under_the_openai_sdk(vllm, stack):
    body = vllm.question("transport sync")
    truth = vllm.post("/chat/completions", body).json()
    before = vllm.wait_idle()
    with sdk_for(vllm, openai.OpenAI, http_client=llmmw.httpx2_sync_client(stack)) as sdk:
        answers = [sdk.chat.completions.create(**vllm.for_sdk(body)) for _ in range(2)]
        assert [name.id for name in sdk.models.list()] == [vllm.model]
    assert answers[0] == answers[1]
    assert answers[0].choices[0].message.content == truth["choices"][0]["message"]["content"]
    vllm.wait_grown(before, answers=1, posts=1)


async def test_the_transport_under_the_anthropic_sdk(vllm, stack):
    before = await vllm.idle()
    base_url = vllm.url.removesuffix("/v1")
    async with anthropic.AsyncAnthropic(
        base_url=base_url, api_key="none", max_retries=0, http_client=llmmw.httpx2_client(stack)
    ) as sdk:
        answer = await sdk.messages.create(
            model=vllm.model,
            max_tokens=8,
            messages=[{"role": "user", "content": "hello"}],
            extra_body={"temperature": 0},
        )
        stats = sdk._client.get_performance_stats()
    assert answer.content[0].text
    assert answer.usage.output_tokens == 8
    assert (stats["tokens_in"], stats["tokens_out"]) == (answer.usage.input_tokens, 8)
    await vllm.grown(before, answers=1, posts=1)


@pytest.mark.parametrize("library", [httpx, httpx2], ids=lambda library: library.__name__)
async def test_the_transport_bare(vllm, stack, library):
    make = {httpx: llmmw.httpx_client, httpx2: llmmw.httpx2_client}[library]
    body = vllm.question(f"bare {library.__name__}")
    truth = await vllm.raw(body)
    before = await vllm.idle()
    async with make(stack, base_url=vllm.url) as client:
        assert isinstance(client, library.AsyncClient)
        first = await client.post("/chat/completions", json=body)
        second = await client.post("/chat/completions", json=body)
        models = await client.get("/models")
    assert first.status_code == second.status_code == 200
    assert first.content == second.content
    assert vllm.plain(first.json()) == vllm.plain(truth.json())
    assert first.headers["content-type"] == second.headers["content-type"] == truth.headers["content-type"]
    assert second.headers["x-llmmw-source"] == "cache"
    assert models.json()["data"][0]["id"] == vllm.model
    await vllm.grown(before, answers=1, posts=1)


@pytest.mark.parametrize("library", [httpx, httpx2], ids=lambda library: library.__name__)
def test_the_sync_transport_bare(vllm, stack, library):
    make = {httpx: llmmw.httpx_sync_client, httpx2: llmmw.httpx2_sync_client}[library]
    body = vllm.question(f"bare sync {library.__name__}")
    before = vllm.wait_idle()
    with make(stack, base_url=vllm.url) as client:
        first, second = (client.post("/chat/completions", json=body) for _ in range(2))
    assert first.content == second.content
    assert vllm.plain(first.json()) == vllm.plain(vllm.post("/chat/completions", body).json())
    vllm.wait_grown(before, answers=2, posts=2)  # the second is ours


async def test_a_wrapped_sdk_client(vllm, stack):
    body = vllm.question("wrapped async")
    truth = (await vllm.raw(body)).json()
    before = await vllm.idle()
    async with llmmw.wrap_client(sdk_for(vllm), stack) as sdk:
        first = await sdk.chat.completions.create(**vllm.for_sdk(body))
        second = await sdk.chat.completions.create(**vllm.for_sdk(body))
    assert isinstance(first, openai.types.chat.ChatCompletion)
    assert first == second
    assert first.choices[0].message.content == truth["choices"][0]["message"]["content"]
    await vllm.grown(before, answers=1, posts=1)


def test_a_wrapped_sync_sdk_client(vllm, stack):
    body = vllm.question("wrapped sync")
    truth = vllm.post("/chat/completions", body).json()
    before = vllm.wait_idle()
    with llmmw.wrap_client(sdk_for(vllm, openai.OpenAI), stack) as sdk:
        first, second = (sdk.chat.completions.create(**vllm.for_sdk(body)) for _ in range(2))
    assert first == second
    assert first.choices[0].message.content == truth["choices"][0]["message"]["content"]
    vllm.wait_grown(before, answers=1, posts=1)


async def test_every_way_in_hears_the_same_text(vllm, stack):
    body = vllm.question("the same to everybody")
    truth = (await vllm.raw(body)).json()["choices"][0]["message"]["content"]

    async def over_client():
        async with Client(vllm.url, stack=stack) as client:
            return (await client.chat(**body)).text

    async def over_transport():
        async with sdk_for(vllm, http_client=llmmw.httpx2_client(stack)) as sdk:
            return (await sdk.chat.completions.create(**vllm.for_sdk(body))).choices[0].message.content

    async def over_object():
        async with llmmw.wrap_client(sdk_for(vllm), stack) as sdk:
            return (await sdk.chat.completions.create(**vllm.for_sdk(body))).choices[0].message.content

    assert [await over_client(), await over_transport(), await over_object()] == [truth] * 3


async def test_using_names_the_agent_and_nothing_of_it_is_sent(vllm, stack):
    body = vllm.question("who asks")
    async with Client(vllm.url, stack=stack) as client:
        with using(agent="alice", step=3, priority=5):
            await client.chat(**body)
        with using(agent="bob"):
            hit = await client.chat(**body)
            other = await client.chat(**vllm.question("who else asks"))
        agents = client.get_performance_stats()["by_agent"]
    assert hit.source == "cache"
    assert (agents["alice"]["upstream_requests"], agents["alice"]["cache_hits"]) == (1, 0)
    assert (agents["bob"]["upstream_requests"], agents["bob"]["cache_hits"]) == (1, 1)
    assert agents["bob"]["tokens_out"] == other.usage.output_tokens


async def test_using_a_priority_decides_who_is_next(vllm):
    order: list[int] = []
    async with Client(vllm.url, stack=Stack(RateLimiter(concurrency=1))) as client:

        async def ask(priority):
            with using(priority=priority):
                await client.chat(**vllm.question(f"priority {priority}"))
            order.append(priority)

        await asyncio.gather(*(ask(priority) for priority in (7, 5, 9, -3, 0)))
    assert order == [7, -3, 0, 5, 9]  # the first found the server free


async def test_using_a_deadline_ends_the_call_and_frees_the_server(vllm, stack):
    before = await vllm.idle()
    async with Client(vllm.url, stack=stack) as client:
        with using(deadline=1.5), pytest.raises(llmmw.DeadlineExceeded):
            await client.chat(**vllm.long_question("no time"))
        await vllm.freed(before)
        assert client.get_performance_stats()["errors_by_type"] == {"DeadlineExceeded": 1}

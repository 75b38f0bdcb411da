"""A second, small vLLM: a key is asked for, a full queue refuses, tools are called. Its start takes 40 s, once."""

from __future__ import annotations

import asyncio
import json

import openai
import pytest

import llmmw
from llmmw import Client, Coalescer, ConnectionPool, RateLimiter, Retry, Stack, StatusError, Timeout

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1800)]

MOVE = {
    "type": "function",
    "function": {
        "name": "move",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 9}},
            "required": ["x"],
            "additionalProperties": False,
        },
    },
}
THIS_TOOL = {"type": "function", "function": {"name": "move"}}
QUEUE = 4
"""What the server takes at all: its queue cap counts the requests that run, too."""


def crowd(small, text, n=24):
    return [small.question(f"{text} {k}", max_tokens=200, structured_outputs=None, ignore_eos=True) for k in range(n)]


# ── the key ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("key", [None, "sk-wrong"])
async def test_without_the_key_the_client_is_told_auth(small, stack, key):
    async with Client(small.url, key, stack=stack) as client:
        with pytest.raises(StatusError, match="Unauthorized") as caught:
            await client.chat(**small.question("who is there"))
        assert client.get_performance_stats()["upstream_requests"] == 1
    assert (caught.value.status, caught.value.fault) == (401, "auth")
    assert "sk-wrong" not in str(caught.value)


async def test_without_the_key_the_sdk_raises_its_own_class(small, stack):
    async with openai.AsyncOpenAI(
        base_url=small.url, api_key="sk-wrong", max_retries=2, http_client=llmmw.httpx2_client(stack)
    ) as sdk:
        with pytest.raises(openai.AuthenticationError) as caught:
            await sdk.chat.completions.create(**small.for_sdk(small.question("who is there")))
    assert json.loads(caught.value.response.content) == {"error": "Unauthorized"}


async def test_with_the_key_every_way_in_is_answered(small, stack):
    body = small.question("with the key")
    truth = (await small.raw(body)).json()["choices"][0]["message"]["content"]
    options = {"base_url": small.url, "api_key": small.api_key, "max_retries": 0}
    async with Client(small.url, small.api_key, stack=stack) as client:
        texts = [(await client.chat(**body)).text]
    async with openai.AsyncOpenAI(http_client=llmmw.httpx2_client(stack), **options) as sdk:
        texts.append((await sdk.chat.completions.create(**small.for_sdk(body))).choices[0].message.content)
    async with llmmw.wrap_client(openai.AsyncOpenAI(**options), stack) as sdk:
        texts.append((await sdk.chat.completions.create(**small.for_sdk(body))).choices[0].message.content)
    assert texts == [truth] * 3


async def test_a_hit_is_not_for_another_key(small, stack):
    body = small.question("one key's answer")
    async with llmmw.httpx2_client(stack, base_url=small.url) as client:
        for key, status in ((small.api_key, 200), (small.api_key, 200), ("sk-other", 401)):
            answer = await client.post("/chat/completions", json=body, headers={"authorization": f"Bearer {key}"})
            assert answer.status_code == status
        assert client.get_performance_stats()["cache_hits"] == 1


# ── the full queue ──────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_full_queue_refuses_with_503(small):
    async with small.full(QUEUE), Client(small.url, small.api_key, stack=Stack(Timeout(600))) as client:
        refused = []
        while not refused:  # where one that held a place has just ended, a newcomer may get it
            outcomes = await client.map(crowd(small, "refused", 3))
            refused = [outcome.error for outcome in outcomes if not outcome.ok]
    assert all(isinstance(error, StatusError) for error in refused)
    assert {(error.status, error.fault) for error in refused} == {(503, "rate")}
    assert "currently busy" in str(refused[0])


async def test_a_full_queue_is_the_sdks_own_error(small):
    body = small.for_sdk(small.question("sdk refused"))
    async with (
        small.full(QUEUE),
        openai.AsyncOpenAI(
            base_url=small.url,
            api_key=small.api_key,
            max_retries=0,
            http_client=llmmw.httpx2_client(Stack(), pool=ConnectionPool(connect_timeout=600)),
        ) as sdk,
    ):
        with pytest.raises(openai.InternalServerError) as caught:
            while True:  # see above
                await sdk.chat.completions.create(**body)
    assert (caught.value.status_code, caught.value.body["type"]) == (503, "Service Unavailable")


async def test_a_limiter_keeps_the_queue_from_filling(small):
    stack = Stack(RateLimiter(concurrency=QUEUE), Timeout(600))
    before = await small.idle()
    async with Client(small.url, small.api_key, stack=stack) as client:
        outcomes = await client.map(crowd(small, "limited"))
        assert client.get_performance_stats()["upstream_requests"] == 24
    assert all(outcome.ok for outcome in outcomes)
    await small.grown(before, posts=24, answers=24)


async def test_a_retry_outlasts_a_full_queue(small):
    stack = Stack(Retry(attempts=100, backoff=0.5, max_backoff=2), Timeout(600))
    async with Client(small.url, small.api_key, stack=stack) as client:
        calls = []
        async with small.full(QUEUE), asyncio.timeout(600):
            while not client.get_performance_stats()["retries"]:
                if all(call.done() for call in calls):
                    calls.append(asyncio.create_task(client.map(crowd(small, "retried", 3))))
                await asyncio.sleep(0.02)
        outcomes = [outcome for call in calls for outcome in await call]
        stats = client.get_performance_stats()
    assert all(outcome.ok for outcome in outcomes)
    assert stats["upstream_requests"] == len(outcomes) + stats["retries"]


async def test_a_crowd_with_one_question_fits_any_queue(small):
    body = small.question("one question")
    async with Client(small.url, small.api_key, stack=Stack(Coalescer())) as client:
        replies = await asyncio.gather(*(client.chat(**body) for _ in range(50)))
        assert client.get_performance_stats()["upstream_requests"] == 1
    assert len({reply.text for reply in replies}) == 1


# ── tools ───────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_forced_tool_call_comes_back_and_is_cached(small, stack):
    body = small.question("go", tools=[MOVE], tool_choice=THIS_TOOL)
    del body["structured_outputs"]
    truth = (await small.raw(body)).json()["choices"][0]["message"]["tool_calls"][0]["function"]
    async with openai.AsyncOpenAI(
        base_url=small.url, api_key=small.api_key, max_retries=0, http_client=llmmw.httpx2_client(stack)
    ) as sdk:
        first, second = [await sdk.chat.completions.create(**small.for_sdk(body)) for _ in range(2)]
        assert sdk._client.get_performance_stats()["cache_hits"] == 1
    assert first == second
    called = first.choices[0].message.tool_calls[0].function
    assert (called.name, called.arguments) == (truth["name"], truth["arguments"])
    assert 0 <= json.loads(called.arguments)["x"] <= 9


async def test_a_streamed_tool_call_is_replayed(small, stack):
    body = small.question("go on", tools=[MOVE], tool_choice=THIS_TOOL)
    del body["structured_outputs"]
    truth = small.events((await small.raw(small.streamed(body))).content)
    async with Client(small.url, small.api_key, stack=stack) as client:
        first = [piece.body async for piece in client.stream(**body)]
        second = [piece.body async for piece in client.stream(**body)]
        whole = await client.chat(**body)
        assert client.get_performance_stats()["upstream_requests"] == 1
    assert second == first
    arguments = "".join(
        call["function"].get("arguments") or ""
        for event in first
        for choice in event["choices"]
        for call in choice["delta"].get("tool_calls") or ()
    )
    assert len(first) == len(truth)
    assert whole.body["choices"][0]["message"]["tool_calls"][0]["function"]["arguments"] == arguments


async def test_a_tool_call_with_arguments_that_are_no_json_is_delivered_and_not_kept(small, stack):
    loose = {"type": "function", "function": {"name": "move", "parameters": MOVE["function"]["parameters"]}}
    body = small.question("go", tools=[loose], tool_choice=THIS_TOOL)
    del body["structured_outputs"]
    truth = (await small.raw(body)).json()["choices"][0]["message"]["tool_calls"][0]["function"]["arguments"]
    assert truth == "Infinity"  # a model of random weights fills no schema that the server does not force on it
    async with Client(small.url, small.api_key, stack=stack) as client:
        for _ in range(2):
            reply = await client.chat(**body)
            assert reply.source == "upstream"
            assert reply.body["choices"][0]["message"]["tool_calls"][0]["function"]["arguments"] == truth

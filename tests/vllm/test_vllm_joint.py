"""Joint requests and merged samples at a real vLLM: everybody's answer is the one a call of their own gets."""

from __future__ import annotations

import asyncio

import pytest

from llmmw import Client, Coalescer, Retry, Stack, Timeout, TTLCache, Usage, using
from llmmw.endpoints.openai import HTTPEndpoint
from llmmw.endpoints.vllm import VLLMEndpoint

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1800)]

COUNT = 48
FIELDS = {"temperature": 0, "max_tokens": 24}


def questions(name):
    return [f"{name} {number}: what comes after {number * 31 % 97}?" for number in range(COUNT)]


def texts(outcomes):
    return [outcome.text for outcome in outcomes]


def paid(outcomes):
    return sum((outcome.reply.usage for outcome in outcomes), Usage())


async def singly(vllm, **fields):
    async with Client(HTTPEndpoint(vllm.url, vllm.api_key), stack=Stack(Timeout(600)), model=vllm.model) as client:
        return await client.generate_batch(**fields, **FIELDS)


@pytest.mark.parametrize("field", ["messages", "prompts"])
async def test_a_batch_is_one_request_with_the_answers_of_single_calls(vllm, field):
    asked = {field: questions(field)}
    before = await vllm.idle()
    async with Client(VLLMEndpoint(vllm.url, vllm.api_key), model=vllm.model) as client:
        outcomes = await client.generate_batch(**asked, **FIELDS)
        told = client.get_performance_stats()
    await vllm.grown(before, answers=COUNT, posts=1)
    assert (told["upstream_requests"], told["batched_requests"]) == (1, COUNT)
    alone = await singly(vllm, **asked)
    assert texts(outcomes) == texts(alone)
    assert paid(outcomes) == paid(alone)
    assert told["tokens_out"] == paid(alone).output_tokens


async def test_only_what_is_not_cached_is_sent(vllm):
    asked = questions("cached")
    fields = {**vllm.question(""), "max_tokens": 64}
    del fields["messages"], fields["model"]
    stack = Stack(TTLCache(3600), Coalescer(), Retry(), Timeout(600))
    before = await vllm.idle()
    async with Client(VLLMEndpoint(vllm.url, vllm.api_key), stack=stack, model=vllm.model) as client:
        for first in (40, 0):  # the last 8 side by side, then all of them, of which 40 are new
            outcomes = await client.generate_batch(messages=asked[first:], **fields)
            assert all(outcome.ok for outcome in outcomes)
        assert client.get_performance_stats()["cache_hits"] == 8
    await vllm.grown(before, answers=COUNT, posts=9)


async def test_one_that_is_too_long_fails_alone(vllm):
    asked = questions("long")
    async with Client(VLLMEndpoint(vllm.url, vllm.api_key), model=vllm.model) as client:
        outcomes = await client.generate_batch(messages=[*asked, "word " * 9000], **FIELDS)
        told = client.get_performance_stats()
    assert [outcome.ok for outcome in outcomes] == [True] * COUNT + [False]
    assert outcomes[-1].error.fault == "context_length"
    assert told["upstream_requests"] <= 14
    assert texts(outcomes[:-1]) == texts(await singly(vllm, messages=asked))


async def test_leaving_a_batch_frees_the_server(vllm):
    before = await vllm.idle()
    fields = {"temperature": 1, "max_tokens": 4000, "ignore_eos": True}  # else one may end by itself meanwhile
    async with Client(VLLMEndpoint(vllm.url, vllm.api_key), model=vllm.model) as client:
        task = asyncio.create_task(client.generate_batch(messages=questions("left"), **fields))
        await vllm.busy()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await vllm.freed(before)


async def test_the_same_question_of_many_agents_is_one_request_with_a_sample_each(vllm):
    body = vllm.question("which way?", temperature=1)
    stack = Stack(TTLCache(3600, sampling="lanes"), Coalescer(merge_samples=True), Retry(), Timeout(600))
    before = await vllm.idle()
    async with Client(VLLMEndpoint(vllm.url, vllm.api_key), stack=stack) as client:

        async def ask(agent):
            with using(agent=agent):
                return await client.chat(**body)

        async def all_ask():
            return await asyncio.gather(*(ask(f"agent {number}") for number in range(8)))

        replies = await all_ask()
        await vllm.grown(before, posts=1)
        assert len({reply.text for reply in replies}) == 8
        assert sum(reply.usage.output_tokens for reply in replies) == client.get_performance_stats()["tokens_out"]
        single = (await vllm.raw(body)).json()
        assert sum(reply.usage.input_tokens for reply in replies) == single["usage"]["prompt_tokens"]
        client.engine.begin_run()
        assert [reply.text for reply in await all_ask()] == [reply.text for reply in replies]
    await vllm.grown(before, posts=2)

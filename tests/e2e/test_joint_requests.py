"""`generate_batch` and merged samples over real sockets: fewer requests, the answers of single calls."""

from __future__ import annotations

import pytest

from llmmw import Client, Coalescer, RateLimiter, Retry, Stack, SyncClient, Timeout, TTLCache, Usage, using
from llmmw.endpoints.openai import HTTPEndpoint
from llmmw.endpoints.vllm import VLLMEndpoint
from llmmw.testing.server import FaultRule, Match, ServerConfig, running_server, server_process

MODEL = "llmmw-embedded"
QUESTIONS = [f"question {number}: what follows from {number * 7919 % 101}?" for number in range(50)]
FIELDS = {"max_tokens": 5, "temperature": 0}
JOINT = {"messages": "/v1/chat/completions/batch", "prompts": "/v1/completions"}


@pytest.fixture
async def server():
    async with running_server(ServerConfig(max_model_len=2000)) as found:
        yield found


def requests(server, route=None):
    """Paths of the completions it was asked for."""
    found = [entry["route"] for entry in server.stats()["requests"] if "completions" in entry["route"]]
    return found if route is None else [path for path in found if path == route]


def texts(outcomes):
    return [outcome.text for outcome in outcomes]


async def singly(server, field):
    async with Client(HTTPEndpoint(server.base_url), stack=Stack(Timeout(300)), model=MODEL) as client:
        return await client.generate_batch(**{field: QUESTIONS}, **FIELDS)


@pytest.mark.parametrize("field", ["prompts", "messages"])
async def test_a_vllm_server_gets_one_request_and_everybody_their_own_answer(server, field):
    alone = await singly(server, field)
    before = len(requests(server))
    assert before == len(QUESTIONS)
    async with Client(VLLMEndpoint(server.base_url), model=MODEL) as client:
        together = await client.generate_batch(**{field: QUESTIONS}, **FIELDS)
        told = client.get_performance_stats()
    assert texts(together) == texts(alone)
    assert requests(server)[before:] == [JOINT[field]]
    assert [outcome.reply.body["choices"][0]["index"] for outcome in together] == [0] * len(QUESTIONS)

    def paid(outcomes):
        return sum((outcome.reply.usage for outcome in outcomes), Usage())

    assert paid(together) == paid(alone)
    assert (told["upstream_requests"], told["batched_requests"]) == (1, len(QUESTIONS))
    assert told["tokens_in"] == paid(alone).input_tokens


async def test_what_is_cached_is_not_sent(server):
    stack = Stack(TTLCache(3600), Coalescer(), Retry(), RateLimiter(concurrency=64), Timeout(300))
    async with Client(VLLMEndpoint(server.base_url), stack=stack, model=MODEL) as client:
        for asked, stored in ((10, 0), (50, 10)):
            outcomes = await client.generate_batch(messages=QUESTIONS[:asked], max_tokens=60, temperature=0)
            assert all(outcome.ok for outcome in outcomes)
            assert client.get_performance_stats()["cache_hits"] == stored
    assert len(requests(server)) == 11


async def test_one_that_is_too_long_fails_alone(server):
    asked = [*QUESTIONS[:40], "word " * 3000, *QUESTIONS[40:]]
    async with Client(VLLMEndpoint(server.base_url), model=MODEL) as client:
        outcomes = await client.generate_batch(messages=asked, **FIELDS)
    assert [number for number, outcome in enumerate(outcomes) if not outcome.ok] == [40]
    assert outcomes[40].error.fault == "context_length"
    assert len(requests(server)) <= 14
    alone = await singly(server, "messages")
    assert texts(outcomes[:40]) + texts(outcomes[41:]) == texts(alone)


@pytest.mark.parametrize("status", [404, 405, 501])
async def test_a_server_without_batches_is_asked_one_by_one(server, status):
    server.add_fault(FaultRule(kind="status", status=status, match=Match(route=JOINT["messages"]), id="x"))
    async with Client(VLLMEndpoint(server.base_url), model=MODEL) as client:
        for _ in range(2):
            outcomes = await client.generate_batch(messages=QUESTIONS, **FIELDS)
            assert all(outcome.ok for outcome in outcomes)
    assert len(requests(server, JOINT["messages"])) <= 3


def test_plain_code_shares_requests_too():
    with server_process() as server, SyncClient(VLLMEndpoint(server.base_url), model=MODEL) as client:
        assert all(outcome.ok for outcome in client.generate_batch(messages=QUESTIONS, **FIELDS))
        assert client.get_performance_stats()["upstream_requests"] == 1


async def test_an_endpoint_answers_a_batch_itself(server):
    for endpoint, asked in ((VLLMEndpoint(server.base_url), 1), (HTTPEndpoint(server.base_url), len(QUESTIONS))):
        async with Client(endpoint, stack=Stack(Timeout(300)), model=MODEL) as client:
            calls = [client.requests.chat(None, question, dict(FIELDS)) for question in QUESTIONS]
            before = len(requests(server))
            outcomes = await endpoint.generate_batch(calls)
            assert all(outcome.ok for outcome in outcomes)
            assert len(requests(server)) - before == asked


async def test_the_same_question_of_many_agents_is_one_request(server):
    stack = Stack(TTLCache(3600, sampling="lanes"), Coalescer(merge_samples=True), Retry(), Timeout(300))
    async with Client(HTTPEndpoint(server.base_url), stack=stack, model=MODEL) as client:

        async def ask(agent):
            with using(agent=agent):
                return await client.chat("which way?", temperature=1, max_tokens=40)

        async def all_ask():
            outcomes = await client.map([{"messages": "which way?"}] * 3, temperature=1, max_tokens=40)
            return [await ask("alice"), *[outcome.reply for outcome in outcomes]]

        replies = await all_ask()
        assert len({reply.text for reply in replies}) == 4
        assert len(requests(server)) == 2  # alice's, and one for the three
        assert sum(reply.usage.input_tokens for reply in replies[1:]) == replies[0].usage.input_tokens
        client.engine.begin_run()
        assert [reply.text for reply in await all_ask()] == [reply.text for reply in replies]
        assert len(requests(server)) == 2

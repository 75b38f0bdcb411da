"""What vLLM can be asked: lists of prompts, batches, forced shapes, and its own fields, all passed on as they are."""

from __future__ import annotations

import json
import uuid

import openai
import pytest

import llmmw
from llmmw import Client, ProtocolError, Retry, Stack, StatusError, SyncClient

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1800)]

MOOD = {
    "type": "object",
    "properties": {"mood": {"enum": ["good", "bad"]}, "age": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["mood", "age"],
    "additionalProperties": False,
}
AS_MOOD = {"type": "json_schema", "json_schema": {"name": "mood", "schema": MOOD}}


def assert_mood(text: str) -> None:
    found = json.loads(text)
    assert found.keys() == {"mood", "age"}
    assert found["mood"] in {"good", "bad"}
    assert 1 <= found["age"] <= 9


async def test_a_list_of_prompts_is_one_request_with_one_answer_each(vllm, stack):
    prompts = ["north", "south", "east", "west"]
    body = {
        "model": vllm.model,
        "prompt": prompts,
        "temperature": 0,
        "max_tokens": 32,
        "structured_outputs": {"regex": "[a-z ]{20}"},
    }
    truth = (await vllm.raw(body, "/completions")).json()
    before = await vllm.idle()
    async with Client(vllm.url, stack=stack) as client:
        first, second = await client.complete(**body), await client.complete(**body)
        single = await client.complete(**body | {"prompt": "east"})
    assert [choice["index"] for choice in first.body["choices"]] == [0, 1, 2, 3]
    assert vllm.plain(first.body) == vllm.plain(truth)
    assert (second.source, second.data) == ("cache", first.data)
    assert single.text == first.body["choices"][2]["text"]
    assert first.usage.output_tokens == truth["usage"]["completion_tokens"]
    await vllm.grown(before, answers=5, posts=2)


async def test_a_batch_of_prompts_has_one_outcome_each_in_order(vllm, stack):
    fields = {"model": vllm.model, "temperature": 0, "max_tokens": 8}
    prompts = [f"number {n}" for n in range(12)]
    too_long = "x " * 6000
    truth = [(await vllm.raw({**fields, "prompt": prompt}, "/completions")).json() for prompt in prompts]
    told = []
    async with Client(vllm.url, stack=stack) as client:
        outcomes = await client.generate_batch(
            prompts=[*prompts, too_long, prompts[3]],
            on_progress=lambda done, total: told.append((done, total)),
            **fields,
        )
        repeated = await client.map(
            [{"prompt": p} for p in (*prompts, "short now", prompts[3])], previous=outcomes, **fields
        )
    assert [outcome.text for outcome in outcomes[:12]] == [answer["choices"][0]["text"] for answer in truth]
    assert outcomes[13].text == outcomes[3].text
    error = outcomes[12].error
    assert isinstance(error, StatusError)
    assert error.fault == "context_length"
    assert told == [(n + 1, 14) for n in range(14)]
    assert all(outcome.ok for outcome in repeated)
    assert repeated[:12] == outcomes[:12]


def test_a_sync_batch_of_conversations(vllm, stack):
    bodies = [vllm.question(f"conversation {n}") for n in range(6)]
    fields = {name: value for name, value in bodies[0].items() if name != "messages"}
    with SyncClient(vllm.url, stack=stack) as client:
        outcomes = client.generate_batch(messages=[body["messages"] for body in bodies], **fields)
        texts = [client.chat(**body).text for body in bodies]
        assert client.get_performance_stats()["upstream_requests"] == 6
    assert [outcome.text for outcome in outcomes] == texts


async def test_embeddings_of_a_generating_model_are_a_typed_refusal(vllm, stack):
    async with Client(vllm.url, stack=stack, model=vllm.model) as client:
        with pytest.raises(StatusError, match="Not Found") as caught:
            await client.embed(["a", "b"])
        assert client.get_performance_stats()["retries"] == 0
    assert (caught.value.status, caught.value.fault) == (404, "invalid")


async def test_a_json_schema_shapes_the_answer(vllm, stack):
    body = vllm.question("how are you", response_format=AS_MOOD)
    del body["structured_outputs"]
    async with Client(vllm.url, stack=stack) as client:
        first, second = await client.chat(**body), await client.chat(**body)
        pieces = [piece async for piece in client.stream(**body)]
    assert_mood(first.text)
    assert (second.source, second.text) == ("cache", first.text)
    assert "".join(pieces) == first.text
    async with openai.AsyncOpenAI(
        base_url=vllm.url, api_key="none", max_retries=0, http_client=llmmw.httpx2_client(stack)
    ) as sdk:
        answer = await sdk.chat.completions.create(**vllm.for_sdk(body))
    assert answer.choices[0].message.content == first.text


@pytest.mark.parametrize("shape", [{"choice": ["yes", "no"]}, {"regex": "(red|blue) [0-9]{3}"}, {"json": MOOD}])
async def test_structured_outputs_shape_the_answer(vllm, stack, shape):
    body = vllm.question("shape", structured_outputs=shape)
    truth = (await vllm.raw(body)).json()
    async with Client(vllm.url, stack=stack) as client:
        assert vllm.plain((await client.chat(**body)).body) == vllm.plain(truth)


async def test_structured_outputs_separate_answers(vllm, stack):
    async with Client(vllm.url, stack=stack) as client:
        for only in ("yes", "no", "yes"):
            reply = await client.chat(**vllm.question("only one answer", structured_outputs={"choice": [only]}))
            assert reply.text == only
        assert client.get_performance_stats()["upstream_requests"] == 2


async def test_a_seed_is_passed_on_and_separates_answers(vllm, stack):
    body = vllm.question("seeded", temperature=1.0)
    async with Client(vllm.url, stack=Stack()) as client, Client(vllm.url, stack=stack) as cached:
        draws = {seed: (await client.chat(**body, seed=seed)).text for seed in (1, 2, 3)}
        assert (await client.chat(**body, seed=1)).text == draws[1]
        assert {seed: (await cached.chat(**body, seed=seed)).text for seed in (1, 2, 3)} == draws
    assert len(set(draws.values())) == 3


async def test_a_cache_salt_isolates_the_servers_prefix_cache(vllm, stack):
    body = vllm.question("a long common prefix " * 40)
    one, two = uuid.uuid4().hex, uuid.uuid4().hex  # a server that lives on knows those of an earlier run
    async with Client(vllm.url, stack=Stack()) as client:
        cached = [(await client.chat(**body, cache_salt=salt)).usage.cached_tokens for salt in (one, one, two)]
    assert cached[0] == cached[2] == 0
    assert cached[1] >= 128
    async with Client(vllm.url, stack=stack) as client:
        sources = [(await client.chat(**body, cache_salt=salt)).source for salt in ("one", "two", "one")]
    assert sources == ["upstream", "upstream", "cache"]


@pytest.mark.parametrize(
    "fields",
    [
        {"logprobs": True, "top_logprobs": 3},
        {"return_token_ids": True},
        {"min_tokens": 3, "stop": ["e", " "]},
        {"temperature": 0.7, "seed": 5, "n": 3, "top_p": 0.8, "presence_penalty": 0.3, "logit_bias": {"5": -100}},
        {"priority": -3},
        {"unknown_to_everybody": [1, {"a": None}]},
    ],
    ids=lambda fields: next(iter(fields)),
)
async def test_other_fields_pass_both_ways(vllm, stack, fields):
    body = {"model": vllm.model, "messages": [{"role": "user", "content": "fields"}], "temperature": 0}
    body |= {"max_tokens": 6, **fields}
    truth = vllm.plain((await vllm.raw(body)).json())
    async with Client(vllm.url, stack=stack) as client:
        assert vllm.plain((await client.chat(**body)).body) == truth
        under_extra_body = {"messages": body["messages"], "model": vllm.model, "extra_body": body}
        assert vllm.plain((await client.chat(**under_extra_body)).body) == truth
    async with llmmw.httpx2_client(stack, base_url=vllm.url) as client:
        assert vllm.plain((await client.post("/chat/completions", json=body)).json()) == truth


async def test_ignore_eos_is_passed_on(vllm, stack):
    body = vllm.question("ignore eos", structured_outputs={"choice": ["yes", "no"]})
    async with Client(vllm.url, stack=stack) as client:
        stopped = await client.chat(**body)
        went_on = await client.chat(**body | {"ignore_eos": True, "max_tokens": 12})
    assert stopped.usage.output_tokens < 12
    assert went_on.usage.output_tokens == 12


async def test_a_request_id_header_reaches_the_server(vllm, stack):
    async with Client(vllm.url, stack=stack) as client:
        reply = await client.chat(**vllm.question("named"), extra_headers={"X-Request-Id": "llmmw-7"})
    assert reply.body["id"] == "chatcmpl-llmmw-7"


async def test_tokenize_goes_past_the_layers_of_the_transport(vllm, stack):
    async with llmmw.httpx2_client(stack) as client:
        root = vllm.url.removesuffix("/v1")
        found = await client.post(f"{root}/tokenize", json={"model": vllm.model, "prompt": "hello"})
        health = await client.get(f"{root}/health")
        assert "cache" not in found.headers["x-llmmw-source"]
    assert found.json()["count"] == len(found.json()["tokens"]) > 0
    assert health.status_code == 200


async def test_the_responses_and_messages_apis_are_answered_and_counted(vllm, stack):
    before = await vllm.idle()
    async with llmmw.httpx2_client(stack, base_url=vllm.url) as client:
        common = {"model": vllm.model, "temperature": 0}
        spoken = await client.post("/responses", json=common | {"input": "hello", "max_output_tokens": 5})
        message = await client.post(
            "/messages", json=common | {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 5}
        )
        stats = client.get_performance_stats()
    assert spoken.json()["usage"]["output_tokens"] == message.json()["usage"]["output_tokens"] == 5
    assert (stats["tokens_out"], stats["upstream_requests"]) == (10, 2)
    await vllm.grown(before, answers=2, posts=2, generation_tokens=10, prompt_tokens=stats["tokens_in"])


async def test_an_answer_that_is_none_is_a_protocol_error(vllm):
    root = vllm.url.removesuffix("/v1")
    async with Client(f"{root}/health", stack=Stack(Retry(attempts=1)), model=vllm.model) as client:
        with pytest.raises((ProtocolError, StatusError)):
            await client.chat("hello")

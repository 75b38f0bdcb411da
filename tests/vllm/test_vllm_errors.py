"""A real vLLM's refusals: classified, not repeated, and told in the words and classes of each way in."""

from __future__ import annotations

import json

import openai
import pytest

import llmmw
from llmmw import Client, StatusError, SyncClient

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1800)]

LONG = [{"role": "user", "content": "word " * 5000}]
REFUSALS = {
    # case: (fields, status, fault, words, the SDK's exception)
    "unknown model": ({"model": "nobody"}, 404, "invalid", "does not exist", openai.NotFoundError),
    "too long": ({"messages": LONG}, 400, "context_length", "maximum context length", openai.BadRequestError),
    "too much asked": ({"max_tokens": 100_000}, 400, None, "max_model_len", openai.BadRequestError),
    "bad type": ({"temperature": "hot"}, 400, "invalid", "valid number", openai.BadRequestError),
    "bad value": ({"temperature": -1}, 400, "invalid", "non-negative", openai.BadRequestError),
    "bad schema": (
        {"structured_outputs": {"json": {"type": "nonsense"}}},
        400,
        "invalid",
        "Grammar error|nonsense",
        openai.BadRequestError,
    ),
    "too many logprobs": ({"logprobs": True, "top_logprobs": 30}, 400, "invalid", "20", openai.BadRequestError),
}
cases = pytest.mark.parametrize("case", REFUSALS)


@cases
async def test_the_client_tells_what_and_why(vllm, stack, case):
    fields, status, fault, words, _ = REFUSALS[case]
    body = vllm.question("refused") | fields
    before = await vllm.idle()
    async with Client(vllm.url, stack=stack) as client:
        with pytest.raises(StatusError, match=words) as caught:
            await client.chat(**body)
        stats = client.get_performance_stats()
    error = caught.value
    assert (error.status, error.endpoint) == (status, vllm.url)
    assert error.fault == (fault or error.fault)
    assert error.fault in {"invalid", "context_length"}
    assert (stats["upstream_requests"], stats["retries"], stats["errors"]) == (1, 0, 1)
    assert stats["errors_by_type"] == {f"status {status}": 1}
    await vllm.grown(before, answers=0, posts=1)


@cases
async def test_a_stream_is_refused_in_the_same_words(vllm, stack, case):
    fields, status, _, words, _ = REFUSALS[case]
    async with Client(vllm.url, stack=stack) as client:
        with pytest.raises(StatusError, match=words) as caught:
            await anext(client.stream(**vllm.question("refused") | fields))
    assert caught.value.status == status


@cases
async def test_the_sdk_over_the_transport_raises_its_own_class_with_the_body_intact(vllm, stack, case):
    fields, status, _, words, kind = REFUSALS[case]
    body = vllm.question("refused") | fields
    truth = await vllm.raw(body)
    before = await vllm.idle()
    async with openai.AsyncOpenAI(
        base_url=vllm.url, api_key="none", max_retries=2, http_client=llmmw.httpx2_client(stack)
    ) as sdk:
        with pytest.raises(kind, match=words) as caught:
            await sdk.chat.completions.create(**vllm.for_sdk(body))
    error = caught.value
    assert error.status_code == status
    assert error.response.content == truth.content
    assert error.body == truth.json()["error"]
    assert error.response.headers["x-llmmw-attempts"] == "1"
    await vllm.grown(before, answers=0, posts=1)


@cases
async def test_the_wrapped_sdk_raises_its_own_class_with_the_body_intact(vllm, stack, case):
    fields, status, _, words, kind = REFUSALS[case]
    body = vllm.question("refused") | fields
    truth = await vllm.raw(body)
    async with llmmw.wrap_client(openai.AsyncOpenAI(base_url=vllm.url, api_key="none", max_retries=0), stack) as sdk:
        with pytest.raises(kind, match=words) as caught:
            await sdk.chat.completions.create(**vllm.for_sdk(body))
    assert (caught.value.status_code, caught.value.body) == (status, truth.json()["error"])


async def test_a_decorated_function_raises_what_the_sdk_raised(vllm, stack):
    async with openai.AsyncOpenAI(base_url=vllm.url, api_key="none", max_retries=0) as sdk:

        @stack.wrap
        async def ask(text: str, model: str):
            return await sdk.chat.completions.create(**vllm.for_sdk(vllm.question(text, model=model)))

        before = await vllm.idle()
        with pytest.raises(openai.NotFoundError, match="does not exist") as caught:
            await ask("who", "nobody")
        await vllm.grown(before, posts=1, answers=0)
        await ask.aclose()
    assert caught.value.body["type"] == "NotFoundError"


def test_the_sync_ways_in_raise_alike(vllm, stack):
    body = vllm.question("refused", model="nobody")
    with SyncClient(vllm.url, stack=stack) as client, pytest.raises(StatusError, match="does not exist") as caught:
        client.chat(**body)
    assert (caught.value.status, caught.value.code) == (404, "notfounderror")
    with (
        openai.OpenAI(
            base_url=vllm.url, api_key="none", max_retries=2, http_client=llmmw.httpx2_sync_client(stack)
        ) as sdk,
        pytest.raises(openai.NotFoundError) as told,
    ):
        sdk.chat.completions.create(**vllm.for_sdk(body))
    assert told.value.body["param"] == "model"


async def test_what_is_no_json_is_refused_by_the_server(vllm, stack):
    async with llmmw.httpx2_client(stack, base_url=vllm.url) as client:
        headers = {"content-type": "application/json"}
        answer = await client.post("/chat/completions", content=b'{"model": ', headers=headers)
    assert answer.status_code == 400
    assert json.loads(answer.content)["error"]["type"] == "Bad Request"


async def test_an_unknown_path_is_a_plain_404(vllm, stack):
    async with Client(vllm.url + "/nowhere", stack=stack, model=vllm.model) as client:
        with pytest.raises(StatusError, match="Not Found") as caught:
            await client.chat("hello")
    assert (caught.value.status, caught.value.fault) == (404, "invalid")


async def test_refusals_do_not_open_the_circuit(vllm, stack):
    async with Client(vllm.url, stack=stack) as client:
        for n in range(25):
            with pytest.raises(StatusError):
                await client.chat(**vllm.question(f"refused {n}", model="nobody"))
        assert (await client.chat(**vllm.question("still answered"))).text


async def test_one_bad_prompt_refuses_the_whole_list(vllm, stack):
    async with Client(vllm.url, stack=stack) as client:
        with pytest.raises(StatusError) as caught:
            await client.complete(["short", "long " * 5000], model=vllm.model, max_tokens=4)
    assert (caught.value.status, caught.value.fault) == (400, "context_length")

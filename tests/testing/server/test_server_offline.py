"""The embedded server's offline batches, asked by the providers' own SDKs."""

import json

import anthropic
import openai
import pytest

MODEL = "llmmw-embedded"


@pytest.fixture
async def server(serve):
    return await serve(offline_looks=2)


@pytest.fixture
async def sdk(server):
    async with openai.AsyncOpenAI(base_url=server.base_url, api_key="k", max_retries=0) as client:
        yield client


@pytest.fixture
async def claude(server):
    async with anthropic.AsyncAnthropic(base_url=server.url, api_key="k", max_retries=0) as client:
        yield client


def line(custom_id, text, **more):
    body = {"model": MODEL, "messages": [{"role": "user", "content": text}], "max_tokens": 5, **more}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body}


async def submit(sdk, *lines):
    content = b"\n".join(json.dumps(one).encode() if isinstance(one, dict) else one for one in lines) + b"\n"
    file = await sdk.files.create(file=("input.jsonl", content), purpose="batch")
    assert (await sdk.files.content(file.id)).content == content
    return await sdk.batches.create(
        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h", metadata={"mine": "1"}
    )


async def read(sdk, file):
    return {found["custom_id"]: found for found in map(json.loads, (await sdk.files.content(file)).text.splitlines())}


async def test_openai_batch_from_upload_to_both_files(sdk):
    made = await submit(sdk, line("a", "one"), line("b", "two", max_tokens=0), line("c", "three [expire]"))
    assert (made.status, made.metadata) == ("in_progress", {"mine": "1"})
    assert (await sdk.batches.retrieve(made.id)).status == "in_progress"
    ended = await sdk.batches.retrieve(made.id)
    assert ended.status == "expired"
    assert (ended.request_counts.total, ended.request_counts.completed) == (3, 1)
    good, bad = await read(sdk, ended.output_file_id), await read(sdk, ended.error_file_id)
    single = await sdk.chat.completions.create(**line("a", "one")["body"], temperature=0)
    assert single.choices[0].finish_reason == "length"
    assert good["a"]["response"]["body"]["usage"]["completion_tokens"] == 5
    assert bad["b"]["response"]["status_code"] == 400
    assert bad["c"]["error"]["code"] == "batch_expired"
    assert [batch.id for batch in (await sdk.batches.list()).data] == [made.id]


async def test_openai_batches_are_listed_newest_first_page_by_page(sdk, server):
    made = [(await submit(sdk, line(str(number), "x"))).id for number in range(3)]
    assert [batch.id async for batch in await sdk.batches.list(limit=2)] == made[::-1]
    server.reset()
    assert [batch.id async for batch in await sdk.batches.list()] == []


async def test_openai_batch_with_bad_lines_fails_whole_and_names_them(sdk):
    made = await submit(sdk, line("a", "x"), b"{", line("a", "y"), line("d", "z", model="unknown"), line("", "w"))
    await sdk.batches.retrieve(made.id)
    failed = await sdk.batches.retrieve(made.id)
    assert failed.status == "failed"
    assert [(error.line, error.code) for error in failed.errors.data] == [
        (2, "invalid_line"), (3, "duplicate_custom_id"), (4, "model_not_found"), (5, "invalid_line"),
    ]  # fmt: skip
    assert failed.output_file_id is None


async def test_openai_cancel_answers_the_first_half(sdk):
    made = await submit(sdk, *(line(str(number), "x") for number in range(4)))
    assert (await sdk.batches.cancel(made.id)).status == "cancelling"
    ended = await sdk.batches.retrieve(made.id)
    assert ended.status == "cancelled"
    assert set(await read(sdk, ended.output_file_id)) == {"0", "1"}
    assert set(await read(sdk, ended.error_file_id)) == {"2", "3"}


async def test_openai_refuses_what_it_does_not_know(sdk, server, post):
    with pytest.raises(openai.NotFoundError):
        await sdk.batches.retrieve("batch_none")
    with pytest.raises(openai.NotFoundError):
        await sdk.files.content("file-none")
    with pytest.raises(openai.BadRequestError):
        await sdk.batches.create(input_file_id="file-none", endpoint="/v1/chat/completions", completion_window="24h")
    assert (await post(server, "/v1/files", {"purpose": "batch"}))[0] == 400
    made = await submit(sdk, line("a", "x"))
    async with openai.AsyncOpenAI(base_url=server.base_url, api_key="other", max_retries=0) as other:
        with pytest.raises(openai.NotFoundError):
            await other.batches.retrieve(made.id)
        assert (await other.batches.list()).data == []


def asked(custom_id, text, **more):
    messages = [{"role": "user", "content": text}]
    return {"custom_id": custom_id, "params": {"model": MODEL, "messages": messages, "max_tokens": 5, **more}}


async def test_anthropic_batch_from_submission_to_results(claude):
    requests = [asked("a", "one"), asked("b", "two", max_tokens=0), asked("c", "three [expire]")]
    made = await claude.messages.batches.create(requests=requests)
    assert (made.processing_status, made.request_counts.processing) == ("in_progress", 3)
    with pytest.raises(anthropic.AnthropicError):  # the SDK looks itself
        await claude.messages.batches.results(made.id)
    ended = await claude.messages.batches.retrieve(made.id)
    counts = ended.request_counts
    assert (counts.succeeded, counts.errored, counts.expired, counts.canceled) == (1, 1, 1, 0)
    page = await claude.messages.batches.list()
    assert [batch.id for batch in page.data] == [made.id]


async def test_anthropic_results_cancel_and_refusals(claude, server, http, post):
    path = "/v1/messages/batches"
    headers = {"x-api-key": "k"}
    status, made, _ = await post(server, path, {"requests": [asked(str(n), "x") for n in range(4)]}, headers=headers)
    assert status == 200
    assert (await claude.messages.batches.cancel(made["id"])).processing_status == "canceling"
    async with http.get(f"{server.url}{path}/{made['id']}/results", headers=headers) as response:
        assert response.status == 404
    await claude.messages.batches.retrieve(made["id"])
    async with http.get(f"{server.url}{path}/{made['id']}/results", headers=headers) as response:
        found = {entry["custom_id"]: entry["result"] for entry in map(json.loads, (await response.text()).splitlines())}
    assert {name: result["type"] for name, result in found.items()} == {
        "0": "succeeded", "1": "succeeded", "2": "canceled", "3": "canceled",
    }  # fmt: skip
    assert found["0"]["message"]["content"][0]["text"]
    for bad in ([], [asked("a", "x"), asked("a", "y")], [asked("x" * 65, "x")], [{"params": {}}]):
        status, body, _ = await post(server, path, {"requests": bad})
        assert (status, body["type"]) == (400, "error")
    with pytest.raises(anthropic.NotFoundError):
        await claude.messages.batches.retrieve("msgbatch_none")

"""Streams of a real vLLM, through every way in: its own events in its own order, usage in the last, replayed alike."""

from __future__ import annotations

import httpx
import httpx2
import msgspec
import openai
import pytest

import llmmw
from llmmw import Client, Coalescer, Stack, SyncClient, TTLCache

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1800)]


async def raw_stream(vllm, body, path="/chat/completions") -> bytes:
    """The bytes of a stream, past llmmw."""
    return (await vllm.raw(vllm.streamed(body), path)).content


def told(events: list[dict]) -> dict:
    """What a stream says, however it is cut: two streams of one question differ in that, for a vLLM whose cores are
    busy sends several tokens in one event. (That cuts pass unchanged is tests/e2e/test_streaming.py's.)
    """
    choices = [choice for event in events for choice in event["choices"]]
    deltas = [choice.get("delta") or {"content": choice.get("text")} for choice in choices]
    return {
        "kinds": {(event["object"], event["model"]) for event in events},
        "roles": [delta["role"] for delta in deltas if delta.get("role")],
        "text": "".join(delta.get("content") or "" for delta in deltas),
        "fields": {name for delta in deltas for name in delta},
        "ends": [choice["finish_reason"] for choice in choices if choice.get("finish_reason")],
        "usage": [event["usage"] for event in events if event.get("usage")],
    }


def dumped(chunk) -> dict:
    body = chunk.model_dump(exclude_unset=True)
    return {name: value for name, value in body.items() if name not in {"id", "created"}}


async def test_the_client_streams_the_servers_events(vllm, stack):
    body = vllm.question("stream client")
    truth = vllm.events(await raw_stream(vllm, body))
    before = await vllm.idle()
    async with Client(vllm.url, stack=stack) as client:
        first = [piece async for piece in client.stream(**body)]
        second = [piece async for piece in client.stream(**body)]
        whole = await client.chat(**body)
        stats = client.get_performance_stats()
    assert told([vllm.plain(piece.body) for piece in first]) == told(truth)
    assert [piece.body for piece in second] == [piece.body for piece in first]
    usage = truth[-1]["usage"]
    assert (first[-1].usage.input_tokens, first[-1].usage.output_tokens) == (
        usage["prompt_tokens"],
        usage["completion_tokens"],
    )
    assert [piece.finish_reason for piece in first if piece.finish_reason] == ["stop"]
    assert (whole.source, whole.text) == ("cache", "".join(first))
    assert (stats["cache_hits"], stats["tokens_out"]) == (2, usage["completion_tokens"])
    await vllm.grown(before, answers=1, posts=1)


async def test_a_stored_whole_answer_is_replayed_as_a_stream(vllm, stack):
    body = vllm.question("stored whole")
    async with Client(vllm.url, stack=stack) as client:
        whole = await client.chat(**body)
        pieces = [piece async for piece in client.stream(**body)]
        assert client.get_performance_stats()["upstream_requests"] == 1
    assert "".join(pieces) == whole.text
    assert pieces[-1].usage == whole.usage
    assert [piece.finish_reason for piece in pieces if piece.finish_reason] == ["stop"]


def test_the_sync_client_streams_the_servers_events(vllm, stack):
    body = vllm.question("stream sync client")
    truth = vllm.events(vllm.post("/chat/completions", vllm.streamed(body)).content)
    with SyncClient(vllm.url, stack=stack) as client:
        first, second = list(client.stream(**body)), list(client.stream(**body))
        assert client.get_performance_stats()["cache_hits"] == 1
    assert told([vllm.plain(piece.body) for piece in first]) == told(truth)
    assert [piece.body for piece in second] == [piece.body for piece in first]


@pytest.mark.parametrize("library", [httpx, httpx2], ids=lambda library: library.__name__)
async def test_the_transport_passes_the_bytes_on(vllm, stack, library):
    make = {httpx: llmmw.httpx_client, httpx2: llmmw.httpx2_client}[library]
    body = vllm.question(f"stream bare {library.__name__}")
    truth = await raw_stream(vllm, body)
    before = await vllm.idle()
    streams: list[list[bytes]] = []
    async with make(stack, base_url=vllm.url) as client:
        for source in ("upstream", "cache"):
            async with client.stream("POST", "/chat/completions", json=vllm.streamed(body)) as response:
                assert response.headers["x-llmmw-source"] == source
                assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
                streams.append([chunk async for chunk in response.aiter_raw()])
    first, second = streams
    assert told(vllm.events(b"".join(first))) == told(vllm.events(truth))
    assert second == first  # cut where it was cut before
    await vllm.grown(before, answers=1, posts=1)


def test_the_sync_transport_passes_the_bytes_on(vllm, stack):
    body = vllm.question("stream bare sync")
    truth = vllm.post("/chat/completions", vllm.streamed(body)).content
    streams: list[list[bytes]] = []
    with llmmw.httpx2_sync_client(stack, base_url=vllm.url) as client:
        for _ in range(2):
            with client.stream("POST", "/chat/completions", json=vllm.streamed(body)) as response:
                streams.append(list(response.iter_raw()))
        assert client.get_performance_stats()["cache_hits"] == 1
    assert told(vllm.events(b"".join(streams[0]))) == told(vllm.events(truth))
    assert streams[1] == streams[0]


@pytest.mark.parametrize("way", ["transport", "object"])
async def test_the_sdk_streams_its_own_chunks(vllm, stack, way):
    body = vllm.streamed(vllm.question(f"stream sdk {way}"))
    truth = vllm.events((await vllm.raw(body)).content)
    before = await vllm.idle()
    options = {"base_url": vllm.url, "api_key": "none", "max_retries": 0}
    if way == "transport":
        sdk = openai.AsyncOpenAI(http_client=llmmw.httpx2_client(stack), **options)
    else:
        sdk = llmmw.wrap_client(openai.AsyncOpenAI(**options), stack)
    streams = []
    async with sdk:
        for _ in range(2):
            stream = await sdk.chat.completions.create(**vllm.for_sdk(body))
            streams.append([chunk async for chunk in stream])
    first, second = streams
    assert all(isinstance(chunk, openai.types.chat.ChatCompletionChunk) for chunk in (*first, *second))
    assert told([dumped(chunk) for chunk in first]) == told(truth)
    assert second == first
    assert first[-1].usage.completion_tokens == truth[-1]["usage"]["completion_tokens"]
    await vllm.grown(before, answers=1, posts=1)


def test_the_sync_sdk_streams_its_own_chunks(vllm, stack):
    body = vllm.streamed(vllm.question("stream sync sdk"))
    truth = vllm.events(vllm.post("/chat/completions", body).content)
    with openai.OpenAI(
        base_url=vllm.url, api_key="none", max_retries=0, http_client=llmmw.httpx2_sync_client(stack)
    ) as sdk:
        first, second = (list(sdk.chat.completions.create(**vllm.for_sdk(body))) for _ in range(2))
        assert sdk._client.get_performance_stats()["cache_hits"] == 1
    assert told([dumped(chunk) for chunk in first]) == told(truth)
    assert second == first


async def test_a_decorated_generator_yields_the_sdks_chunks(vllm, stack):
    truth = vllm.events(await raw_stream(vllm, vllm.question("stream decorated")))
    before = await vllm.idle()
    async with openai.AsyncOpenAI(base_url=vllm.url, api_key="none", max_retries=0) as sdk:

        @stack.wrap
        async def ask(text: str):
            stream = await sdk.chat.completions.create(**vllm.for_sdk(vllm.streamed(vllm.question(text))))
            async for chunk in stream:
                yield chunk

        first = [chunk async for chunk in ask("stream decorated")]
        second = [chunk async for chunk in ask("stream decorated")]
        assert ask.get_performance_stats()["cache_hits"] == 1
        await ask.aclose()
    assert told([dumped(chunk) for chunk in first]) == told(truth)
    assert second == first
    assert type(second[0]) is openai.types.chat.ChatCompletionChunk
    await vllm.grown(before, answers=1, posts=1)


async def test_a_stream_of_a_text_completion(vllm, stack):
    body = {
        "model": vllm.model,
        "prompt": "Once upon",
        "temperature": 0,
        "max_tokens": 32,
        "structured_outputs": {"regex": "[a-z ]{20}"},
    }
    truth = vllm.events(await raw_stream(vllm, body, "/completions"))
    async with Client(vllm.url, stack=stack) as client:
        first = [piece async for piece in client.stream(**body)]
        second = [piece async for piece in client.stream(**body)]
        whole = await client.complete(**body)
    assert told([vllm.plain(piece.body) for piece in first]) == told(truth)
    assert [piece.body for piece in second] == [piece.body for piece in first]
    assert (whole.source, whole.text) == ("cache", "".join(first))


async def test_a_stream_without_usage_stays_without(vllm, stack):
    body = vllm.question("stream without usage") | {"stream": True}
    async with llmmw.httpx2_client(stack, base_url=vllm.url) as client:
        with_usage = await client.post("/chat/completions", json=vllm.streamed(body))
        without = await client.post("/chat/completions", json=body)
        stats = client.get_performance_stats()
    assert stats["cache_hits"] == 1
    assert msgspec.json.encode(vllm.events(with_usage.content)).count(b'"usage"') == 1
    *truth, last = vllm.events((await vllm.raw(body)).content)
    assert last.pop("system_fingerprint")  # in the last event, which with usage is another one
    assert told(vllm.events(without.content)) == told([*truth, last])


async def test_a_cut_off_stream_is_delivered_and_not_kept(vllm, stack):
    body = vllm.question("cut off", max_tokens=5)
    truth = vllm.events(await raw_stream(vllm, body))
    async with Client(vllm.url, stack=stack) as client:
        for _ in range(2):
            pieces = [piece async for piece in client.stream(**body)]
            assert told([vllm.plain(piece.body) for piece in pieces]) == told(truth)
        assert client.get_performance_stats()["upstream_requests"] == 2
        assert client.get_performance_stats()["layers"]["cache"]["skipped: finish_reason 'length'"] == 2


async def test_followers_of_a_stream_hear_it_whole(vllm):
    body = vllm.question("everybody listens")
    truth = vllm.events(await raw_stream(vllm, body))
    before = await vllm.idle()
    async with Client(vllm.url, stack=Stack(TTLCache(300), Coalescer())) as client:
        leader = client.stream(**body)
        pieces = [await anext(leader)]
        follower = [piece async for piece in client.stream(**body)]
        pieces += [piece async for piece in leader]
        stats = client.get_performance_stats()
    assert told([vllm.plain(piece.body) for piece in follower]) == told(truth)
    assert [piece.body for piece in pieces] == [piece.body for piece in follower]
    assert (stats["coalesced"] + stats["cache_hits"], stats["upstream_requests"]) == (1, 1)
    await vllm.grown(before, answers=1, posts=1)

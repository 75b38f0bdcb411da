"""However a stream ends, permit, tokens, breaker outcome, statistics and connection are settled once, at its end."""

from __future__ import annotations

import asyncio
import contextlib
from concurrent.futures import ThreadPoolExecutor

import anthropic
import openai
import pytest

import llmmw
from llmmw import (
    CircuitBreaker,
    Client,
    Coalescer,
    Deadline,
    RateLimiter,
    Retry,
    Stack,
    SyncClient,
    Timeout,
    TTLCache,
)
from llmmw.engine import closing
from llmmw.errors import (
    Closed,
    DeadlineExceeded,
    StreamInterrupted,
    TruncatedStream,
    UpstreamTimeout,
)

TOKENS = 7  # what the server reports


def stack(**timeout):
    return Stack(
        Deadline(300),
        TTLCache(60),
        Coalescer(),
        Retry(attempts=2, backoff=0.001),
        CircuitBreaker(consecutive=100, failure_share=1, min_calls=1000),
        RateLimiter(tpm=1_000_000, concurrency=4),
        Timeout(300, **timeout),
    )


@contextlib.asynccontextmanager
async def asking(server, **timeout):
    """(engine, ask): `ask(prompt)` gives the chunks of a stream."""
    async with Client(f"{server.origin}/v1", stack=stack(**timeout), model="m") as client:

        async def ask(prompt):
            call = client.requests.chat(None, prompt, {"temperature": 0}, stream=True)
            reply = await client.engine.call(call)
            return reply.chunks

        yield client.engine, ask


async def read(chunks):
    return [chunk async for chunk in chunks]


def spent(stats):
    return stats["layers"]["limit"]["total_in_window"]


async def test_limit_07_a_finished_stream_is_settled_by_its_usage(stream_server, books):
    async with stream_server() as server, asking(server) as (engine, ask):
        assert b"".join(await read(await ask("finish"))) == b"".join(server.CHAT)
        stats = await books.settled(engine)
        assert (stats["answered_upstream"], spent(stats), stats["tokens_out"]) == (1, TOKENS, 4)
        assert stats["layers"]["limit"]["usage_estimated"] == 0
        assert stats["layers"]["cache"]["stored"] == 1


async def test_limit_07_a_stream_that_is_left_is_not_settled_by_what_it_had_told_so_far(stream_server, books):
    async with stream_server() as server:
        http = llmmw.httpx2_client(stack())
        sdk = anthropic.AsyncAnthropic(base_url=server.origin, api_key="k", http_client=http, max_retries=0)
        asked = {"model": "m", "max_tokens": 500, "messages": [{"role": "user", "content": "stall"}]}
        stream = await sdk.messages.create(**asked, stream=True)
        event = await anext(aiter(stream))
        assert event.message.usage.output_tokens == 1
        reserved = spent(http.get_performance_stats())
        await stream.close()
        stats = await books.settled(http.engine)
        assert spent(stats) == reserved > TOKENS
        assert stats["layers"]["limit"]["usage_estimated"] == 1
        await sdk.close()


@pytest.mark.parametrize(
    ("prompt", "error", "requests"),
    [
        ("reset", StreamInterrupted, 1),
        ("error_later", StreamInterrupted, 1),
        ("no_done", TruncatedStream, 1),
        ("no_finish", TruncatedStream, 1),
    ],
)
async def test_cache_13_a_stream_that_breaks_is_an_error_and_not_stored(stream_server, books, prompt, error, requests):
    async with stream_server() as server, asking(server) as (engine, ask):
        with pytest.raises(error) as caught:
            await read(await ask(prompt))
        if error is StreamInterrupted:
            assert caught.value.partial == "one two three"[: len(caught.value.partial)] != ""
        stats = await books.settled(engine)
        assert (stats["errors"], stats["upstream_requests"]) == (1, requests)
        assert "stored" not in stats["layers"]["cache"]
        assert books.counts["grant"] == requests
        with pytest.raises(error):
            await read(await ask(prompt))
        assert server.prompts[prompt] == 2 * requests


async def test_route_09_an_error_before_the_first_token_is_repeated_unseen(stream_server, books):
    async with stream_server() as server, asking(server) as (engine, ask):
        assert await read(await ask("error_first")) == server.CHAT
        stats = await books.settled(engine)
        assert (stats["answered_upstream"], stats["errors"], stats["retries"], stats["upstream_requests"]) == (
            1,
            0,
            1,
            2,
        )
        assert books.counts["grant"] == books.counts["record"] == 2


async def test_route_09_an_error_after_it_tells_what_had_come(stream_server, books):
    async with stream_server() as server, asking(server) as (engine, ask):
        got = []
        with pytest.raises(StreamInterrupted, match="engine died") as caught:
            async for chunk in await ask("error_later"):
                got.append(chunk)
        assert got == server.CHAT[:3]
        assert caught.value.partial == server.TEXT
        await books.settled(engine)


@pytest.mark.parametrize("how", ["closed", "dropped", "cancelled"])
async def test_a_reader_who_leaves_frees_everything_and_the_server(stream_server, books, how):
    async with stream_server() as server, asking(server) as (engine, ask):
        chunks = await ask("stall")
        await anext(chunks)
        if how == "closed":
            await chunks.aclose()
        elif how == "cancelled":
            reading = asyncio.ensure_future(read(chunks))
            await asyncio.sleep(0)
            reading.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reading
        del chunks
        stats = await books.settled(engine)
        assert (stats["cancelled"], stats["errors"]) == (1, 0)
        assert stats["layers"]["limit"]["usage_estimated"] == 1
        async with asyncio.timeout(120):
            await server.gone.wait()


async def test_a_silent_stream_ends_by_the_time_out_between_chunks(stream_server, books):
    async with stream_server() as server, asking(server, between_chunks=0.3) as (engine, ask):
        with pytest.raises(StreamInterrupted, match="between_chunks") as caught:
            await read(await ask("stall"))
        assert isinstance(caught.value.__cause__, UpstreamTimeout)
        assert caught.value.partial == server.TEXT
        stats = await books.settled(engine)
        assert stats["errors"] == 1
        async with asyncio.timeout(120):
            await server.gone.wait()


async def test_a_deadline_within_the_body_ends_it(stream_server, books):
    async with stream_server() as server, asking(server) as (engine, ask):
        for seconds in (0.2, 2, 15):
            with pytest.raises(DeadlineExceeded), llmmw.using(deadline=seconds):
                chunks = None
                chunks = await ask("stall")
                await read(chunks)
            if chunks is not None:
                break  # else the machine was too busy to get as far as the body
        stats = await books.settled(engine)
        assert stats["errors"] == stats["request_count"]
        async with asyncio.timeout(120):
            await server.gone.wait()


async def test_closing_the_engine_ends_a_stream_that_another_task_waits_for(stream_server, books):
    async with stream_server() as server, asking(server) as (engine, ask):
        chunks = await ask("stall")
        for _ in range(3):
            await anext(chunks)
        reading = asyncio.ensure_future(read(chunks))
        await asyncio.sleep(0)
        await engine.aclose(drain_timeout=0.02)
        with pytest.raises(Closed):
            await reading
        with pytest.raises(Closed):
            await anext(chunks)
        stats = await books.settled(engine)
        assert stats["cancelled"] == 1


async def test_closing_the_engine_lets_other_readers_come_to_the_end(stream_server, books):
    async with stream_server(pause=True) as server, asking(server) as (engine, ask):
        reading = asyncio.ensure_future(read(await ask("finish")))
        closing = asyncio.ensure_future(engine.aclose())
        await asyncio.sleep(0)
        server.go.set()
        assert await reading == server.CHAT
        await closing
        assert (await books.settled(engine))["answered_upstream"] == 1


@pytest.mark.parametrize("layers", [None, Stack()], ids=["stack", "bare"])
async def test_nobody_waits_for_a_stream_that_the_closer_itself_would_have_to_read(stream_server, layers, monkeypatch):
    monkeypatch.setattr(closing, "DRAIN_S", 3600.0)
    async with stream_server() as server, asyncio.timeout(120):
        async with Client(f"{server.origin}/v1", stack=layers or stack(), model="m") as client:
            pieces = client.stream(messages="stall")
            assert await anext(pieces) == "one"
        stats = client.get_performance_stats()
        assert (stats["in_flight"], stats["cancelled"]) == (0, 1)
        with pytest.raises(Closed):
            await anext(pieces)


async def in_plain_code(work):
    """On a thread of its own; a test must not wait for ever for what would be stuck there."""
    with ThreadPoolExecutor(1) as thread:
        async with asyncio.timeout(120):
            return await asyncio.get_running_loop().run_in_executor(thread, work)


async def test_nobody_waits_for_it_in_plain_code_either(stream_server, monkeypatch):
    monkeypatch.setattr(closing, "DRAIN_S", 3600.0)
    async with stream_server() as server:

        def work():
            with SyncClient(f"{server.origin}/v1", stack=stack(), model="m") as client:
                pieces = client.stream(messages="stall")
                first = next(pieces)
            pieces.close()  # after its engine
            return first, client.get_performance_stats()

        first, stats = await in_plain_code(work)
        assert first == "one"
        assert (stats["in_flight"], stats["cancelled"]) == (0, 1)


async def test_a_sync_sdk_waiting_in_recv_is_woken_and_its_server_told(stream_server, books):
    async with stream_server() as server:

        def work():
            client = openai.OpenAI(base_url=f"{server.origin}/v1", api_key="k", max_retries=0)
            with llmmw.wrap_client(client, stack(between_chunks=0.05)):
                asked = [{"role": "user", "content": "stall"}]
                pieces = client.chat.completions.create(model="m", messages=asked, stream=True)
                with pytest.raises(openai.APIConnectionError):
                    list(pieces)
                return client.engine

        engine = await in_plain_code(work)
        assert (await books.settled(engine))["errors"] == 1
        async with asyncio.timeout(120):
            await server.gone.wait()


def test_a_bridged_stream_does_not_follow_its_engine_to_another_loop(stream_server):
    async def first(client, held):
        async with stream_server() as server:
            client.append(Client(f"{server.origin}/v1", stack=stack(), model="m"))
            await client[0].engine.__aenter__()

            def work():
                call = client[0].requests.chat(None, "stall", {}, stream=True)
                held.append(client[0].engine.call_sync(call).chunks)
                return held[0].next_sync()

            assert await in_plain_code(work) == server.CHAT[0]

    client, held = [], []
    asyncio.run(first(client, held))
    with ThreadPoolExecutor(1) as thread, pytest.raises(Closed):
        thread.submit(held[0].next_sync).result(120)
    held[0].close_sync()
    client[0].engine.close()

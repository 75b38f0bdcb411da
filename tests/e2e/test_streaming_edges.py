"""Whichever way in, a stream comes piece by piece, comes back from the cache, and is let go when its reader leaves."""

from __future__ import annotations

import asyncio
import contextlib
from concurrent.futures import ThreadPoolExecutor

import anthropic
import openai
import pytest

import llmmw
from llmmw import Client, Stack, SyncClient


def stack():
    return Stack.recommended(deadline=300, cache_ttl=600, tpm=1_000_000)


# Each edge is an async context manager that gives `ask(prompt)`, a stream of texts, and its engine.


@contextlib.asynccontextmanager
async def through_client(origin):
    async with Client(f"{origin}/v1", stack=stack(), model="m") as client:
        yield lambda prompt: client.stream(messages=prompt), client.engine


async def on_a_thread(thread, make):
    """A sync iterator, every step on the same thread."""
    run = asyncio.get_running_loop().run_in_executor
    pieces = iter(await run(thread, make))
    try:
        while (piece := await run(thread, next, pieces, None)) is not None:
            yield piece
    finally:
        await run(thread, pieces.close)


@contextlib.asynccontextmanager
async def through_sync_client(origin):
    with ThreadPoolExecutor(1) as thread, SyncClient(f"{origin}/v1", stack=stack(), model="m") as client:
        yield lambda prompt: on_a_thread(thread, lambda: client.stream(messages=prompt)), client.engine


def asked(prompt):
    return {"model": "m", "messages": [{"role": "user", "content": prompt}]}


def texts_of(chunks):
    return (chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


async def openai_texts(sdk, prompt):
    async for chunk in await sdk.chat.completions.create(**asked(prompt), stream=True):
        if chunk.choices:
            yield chunk.choices[0].delta.content or ""


async def anthropic_texts(sdk, prompt):
    async for event in await sdk.messages.create(**asked(prompt), max_tokens=9, stream=True):
        if event.type == "content_block_delta":
            yield event.delta.text


@contextlib.asynccontextmanager
async def through_openai(origin):
    http = llmmw.httpx2_client(stack())
    async with openai.AsyncOpenAI(base_url=f"{origin}/v1", api_key="k", http_client=http, max_retries=0) as sdk:
        yield lambda prompt: openai_texts(sdk, prompt), http.engine


@contextlib.asynccontextmanager
async def through_anthropic(origin):
    http = llmmw.httpx2_client(stack())
    async with anthropic.AsyncAnthropic(base_url=origin, api_key="k", http_client=http, max_retries=0) as sdk:
        yield lambda prompt: anthropic_texts(sdk, prompt), http.engine


@contextlib.asynccontextmanager
async def through_wrapped_client(origin):
    sdk = llmmw.wrap_client(openai.AsyncOpenAI(base_url=f"{origin}/v1", api_key="k"), stack())
    async with sdk:
        yield lambda prompt: openai_texts(sdk, prompt), sdk.engine


@contextlib.asynccontextmanager
async def through_wrapped_sync_client(origin):
    sdk = llmmw.wrap_client(openai.OpenAI(base_url=f"{origin}/v1", api_key="k"), stack())

    def ask(prompt):
        return texts_of(sdk.chat.completions.create(**asked(prompt), stream=True))

    with ThreadPoolExecutor(1) as thread, sdk:
        yield lambda prompt: on_a_thread(thread, lambda: ask(prompt)), sdk.engine


@contextlib.asynccontextmanager
async def through_a_decorated_generator(origin):
    async with openai.AsyncOpenAI(base_url=f"{origin}/v1", api_key="k", max_retries=0) as sdk:

        @stack().wrap
        async def ask(prompt: str):
            async for text in openai_texts(sdk, prompt):
                yield text

        yield ask, ask.engine
        await ask.aclose()


EDGES = [
    through_client, through_sync_client, through_openai, through_anthropic, through_wrapped_client,
    through_wrapped_sync_client, through_a_decorated_generator,
]  # fmt: skip


every_edge = pytest.mark.parametrize("edge", EDGES, ids=lambda edge: edge.__name__)


@every_edge
async def test_the_first_piece_is_there_before_the_server_sent_the_second(stream_server, books, edge):
    async with stream_server(pause=True) as server, edge(server.origin) as (ask, engine), asyncio.timeout(120):
        stream = ask("finish")
        first = await anext(stream)
        assert first == "one"
        assert not server.go.is_set()
        server.go.set()
        pieces = [first, *[piece async for piece in stream]]
        assert "".join(pieces) == server.TEXT
        again = [piece async for piece in ask("finish")]
        assert again == pieces
        assert len(server.requests) == 1
        stats = await books.settled(engine)
        assert (stats["answered_upstream"], stats["cache_hits"], stats["upstream_requests"]) == (1, 1, 1)


@every_edge
async def test_a_reader_who_leaves_lets_the_stream_go(stream_server, books, edge):
    async with stream_server() as server, edge(server.origin) as (ask, engine), asyncio.timeout(120):
        stream = ask("stall")
        assert await anext(stream) == "one"
        await stream.aclose()
        stats = await books.settled(engine)
        assert (stats["cancelled"], stats["errors"], stats["upstream_requests"]) == (1, 0, 1)
        await server.gone.wait()


@every_edge
async def test_a_reader_who_drops_the_stream_lets_it_go_too(stream_server, books, edge):
    async with stream_server() as server, edge(server.origin) as (ask, engine), asyncio.timeout(120):
        stream = ask("stall")
        assert await anext(stream) == "one"
        del stream
        stats = await books.settled(engine)
        assert (stats["cancelled"], stats["errors"], stats["upstream_requests"]) == (1, 0, 1)
        await server.gone.wait()

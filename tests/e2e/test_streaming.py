"""A stream passes as the server sent it, when it sent it; it is shared while it runs and replayed afterwards."""

from __future__ import annotations

import asyncio
import contextlib
from concurrent.futures import ThreadPoolExecutor

import httpx
import httpx2
import pytest

import llmmw
from llmmw import Client, Stack
from llmmw.testing.server import ServerConfig, server_process

ASKED = {"model": "m", "messages": [{"role": "user", "content": "finish"}]}
WITH_USAGE = {**ASKED, "stream": True, "stream_options": {"include_usage": True}}


def stack(**options):
    return Stack.recommended(deadline=300, cache_ttl=600, tpm=1_000_000, **options)


# ── bytes ───────────────────────────────────────────────────────────────────────────────────────────────────────────


async def raw(client, url):
    async with client.stream("POST", url, json=WITH_USAGE) as reply:
        assert reply.headers["content-type"].startswith("text/event-stream")
        return [piece async for piece in reply.aiter_raw()]


@pytest.mark.parametrize("lib", [httpx, httpx2], ids=["httpx", "httpx2"])
async def test_bytes_and_their_cuts_are_the_servers(stream_server, books, lib, tmp_path):
    make = {httpx: llmmw.httpx_client, httpx2: llmmw.httpx2_client}[lib]
    async with stream_server() as server:
        url = f"{server.origin}/v1/chat/completions"
        async with lib.AsyncClient() as bare:
            sent = await raw(bare, url)
        assert sent == server.CHAT  # six chunks in one segment, two of them within an event
        async with make(stack(cache_directory=tmp_path)) as client:
            assert await raw(client, url) == sent
            assert await raw(client, url) == sent
            await books.settled(client.engine)
        async with make(stack(cache_directory=tmp_path)) as client:
            assert await raw(client, url) == sent
            stats = client.get_performance_stats()
        assert (stats["cache_hits"], stats["layers"]["cache"]["disk hits"], stats["upstream_requests"]) == (1, 1, 0)
        assert stats["tokens_saved"] == 7
        assert len(server.requests) == 2


@pytest.mark.parametrize("engine", ["aiohttp", "httpx", "httpx2", "pyreqwest"])
async def test_every_engine_of_the_pool_keeps_the_servers_cuts(stream_server, engine):
    pool = llmmw.ConnectionPool(engine=engine)
    async with stream_server() as server, Client(f"{server.origin}/v1", stack=Stack(), pool=pool, model="m") as client:
        reply = await client.engine.call(client.requests.chat(None, "finish", {}, stream=True))
        assert [chunk async for chunk in reply.chunks] == server.CHAT
        assert reply.chunks.usage.total_tokens == 7


# ── recording and replaying ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def process():
    with server_process(ServerConfig()) as server:
        yield server


@pytest.fixture
def real(process):
    process.reset()
    return process


@pytest.mark.parametrize("request_", [{"messages": "hello"}, {"prompt": "hello"}], ids=["chat", "complete"])
@pytest.mark.parametrize("stream_first", [True, False], ids=["stream-first", "plain-first"])
async def test_cache_14_recorded_one_way_answered_the_other(real, books, request_, stream_first):
    async with Client(real.base_url, stack=stack(), model="llmmw-embedded") as client:

        async def streamed():
            pieces = [piece async for piece in client.stream(**request_, temperature=0, max_tokens=100)]
            finishes = [choice["finish_reason"] for piece in pieces for choice in piece.body["choices"]]
            return "".join(pieces), pieces[-1].usage, finishes[-1]

        async def plain():
            (value,) = request_.values()
            ask = client.chat if "messages" in request_ else client.complete
            reply = await ask(value, temperature=0, max_tokens=100)
            return reply.text, reply.usage, reply.body["choices"][0]["finish_reason"]

        ways = (streamed, plain) if stream_first else (plain, streamed)
        first, second = await ways[0](), await ways[1]()
        assert first == second
        assert first[0]
        assert first[1].output_tokens > 0
        stats = await books.settled(client.engine)
        assert (stats["upstream_requests"], stats["cache_hits"]) == (1, 1)
        assert stats["tokens_saved"] == first[1].total_tokens


# ── sharing ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@contextlib.asynccontextmanager
async def asking(server):
    async with Client(f"{server.origin}/v1", stack=stack(), model="m") as client, asyncio.timeout(120):

        def call():
            return client.requests.chat(None, "finish", {"temperature": 0}, stream=True)

        async def ask():
            return (await client.engine.call(call())).chunks

        yield client.engine, ask, call


async def read(chunks):
    return [chunk async for chunk in chunks]


async def test_coalesce_09_followers_of_a_running_stream_get_it_from_the_beginning(stream_server, books):
    async with stream_server(pause=True) as server, asking(server) as (engine, ask, call):
        leader = await ask()
        assert await anext(leader) == server.CHAT[0]
        followers = [await ask() for _ in range(10)]
        assert [await anext(follower) for follower in followers] == server.CHAT[:1] * 10
        slow = await ask()

        def elsewhere():
            chunks = engine.call_sync(call()).chunks
            return list(iter(chunks.next_sync, None))

        with ThreadPoolExecutor(1) as thread:
            on_thread = asyncio.get_running_loop().run_in_executor(thread, elsewhere)
            server.go.set()
            assert await read(leader) == server.CHAT[1:]
            for follower in followers:
                assert await read(follower) == server.CHAT[1:]
            assert await on_thread == server.CHAT
        assert await read(slow) == server.CHAT  # it delayed nobody
        assert {chunks.usage for chunks in (leader, slow, *followers)} == {leader.usage}
        assert leader.usage.total_tokens == 7
        stats = await books.settled(engine)
        assert stats["upstream_requests"] == len(server.requests) == 1
        assert stats["answered_upstream"] == 1
        assert stats["coalesced"] + stats["cache_hits"] == 12


async def test_coalesce_10_the_leader_leaves_and_the_others_go_on(stream_server, books):
    async with stream_server(pause=True) as server, asking(server) as (engine, ask, _):
        leader = await ask()
        await anext(leader)
        followers = [await ask() for _ in range(3)]
        await leader.aclose()
        await followers[0].aclose()
        server.go.set()
        assert [await read(follower) for follower in followers[1:]] == [server.CHAT] * 2
        stats = await books.settled(engine)
        assert (stats["cancelled"], stats["coalesced"], stats["upstream_requests"]) == (2, 2, 1)
        assert stats["layers"]["cache"]["stored"] == 1


async def test_coalesce_10_when_all_have_left_the_server_is_told(real, books):
    real.configure(latency="fixed", token_s=60.0)  # after the first token, silence
    try:
        async with Client(real.base_url, stack=stack(), model="llmmw-embedded") as client:
            readers = [client.stream(messages="hello", temperature=0) for _ in range(5)]
            for reader in readers:
                await anext(reader)
            for reader in readers:
                assert real.stats()["aborted"] == 0
                await reader.aclose()
            assert await asyncio.to_thread(real.wait, at_least={"aborted": 1}, at_most={"in_flight": 0})
            stats = await books.settled(client.engine)
            assert (stats["cancelled"], stats["upstream_requests"]) == (5, 1)
            assert "stored" not in stats["layers"]["cache"]
    finally:
        real.configure(latency="none", token_s=0.0)

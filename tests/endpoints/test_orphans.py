"""Connections of an SDK's HTTP client do not outlive their event loop."""

from __future__ import annotations

import asyncio

import httpx
import httpx2
import pytest

from llmmw.endpoints.orphans import forget_orphans
from llmmw.endpoints.sdk import SDKEndpoint
from llmmw.testing.server import ServerConfig, server_process


@pytest.fixture(scope="module")
def url():
    with server_process(ServerConfig()) as server:
        yield server.url + "/v1/models"


@pytest.fixture(params=[httpx, httpx2], ids=["httpx", "httpx2"])
def lib(request):
    return request.param


def held(client):
    return len(client._transport._pool.connections)


def test_connections_of_a_dead_loop_are_dropped(lib, url):
    client = lib.AsyncClient()
    for _ in range(2):
        assert asyncio.run(client.get(url)).status_code == 200
        assert held(client) == 1
        assert forget_orphans(client, forked=False) == 1
        assert held(client) == 0


async def test_connections_of_an_ending_loop_are_closed_and_others_kept(lib, url):
    client = lib.AsyncClient()
    await client.get(url)
    assert await asyncio.to_thread(forget_orphans, client, forked=False) == 0
    assert forget_orphans(client, forked=False) == 1
    await asyncio.sleep(0)
    await client.get(url)
    assert forget_orphans(client, forked=True) == 1
    await client.aclose()


def test_a_sync_client_and_strangers_have_none(lib, url):
    with lib.Client() as client:
        client.get(url)
        assert forget_orphans(client, forked=False) == 0
        assert held(client) == 1
    assert forget_orphans(object(), forked=True) == 0


def test_a_local_server_may_be_asked_twice():
    assert SDKEndpoint("http://127.0.0.1:8000/v1").capabilities == {"idempotent"}
    assert SDKEndpoint("https://api.openai.com:443/v1").capabilities == frozenset()

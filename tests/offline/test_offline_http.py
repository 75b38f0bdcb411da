"""Offline batches through the clients, over HTTP, against the embedded server in a process of its own."""

from __future__ import annotations

import asyncio
import json

import msgspec
import pytest

from llmmw import (
    Client,
    Closed,
    ConfigError,
    ConnectionPool,
    OfflineBatch,
    Stack,
    StatusError,
    SyncClient,
    TTLCache,
    UpstreamTimeout,
)
from llmmw.testing.server import FaultRule, Match, ServerConfig, server_process

MODEL = "llmmw-embedded"
KEY = "sk-very-secret-key"
PATHS = {"openai": "/v1/batches", "anthropic": "/v1/messages/batches"}
APIS = tuple(PATHS)


@pytest.fixture(scope="module")
def process():
    with server_process(ServerConfig(api_keys=(KEY, "other"), log_headers=True)) as server:
        yield server


@pytest.fixture
def server(process):
    process.clear_faults()
    process.configure(offline_looks=2)
    process.reset()
    return process


def offline(tmp_path, api="openai", **options):
    return OfflineBatch(tmp_path / "batches", api=api, **{"poll": "20ms", "settle": "200ms", **options})


@pytest.mark.parametrize("api", APIS)
async def test_batch_12_a_client_gets_what_single_calls_would_get(server, tmp_path, api):
    prompts = [f"question {number}" for number in range(30)]
    told = []
    async with Client(server.base_url, KEY, stack=Stack(), model=MODEL) as client:
        messages = [[{"role": "user", "content": prompt}] for prompt in prompts]
        fields = {"messages": messages, "temperature": 0, "max_tokens": 20}
        outcomes = await client.generate_batch(
            **fields, offline=offline(tmp_path, api), on_progress=lambda *found: told.append(found)
        )
        assert all(outcome.ok for outcome in outcomes)
        assert [outcome.text for outcome in outcomes] == [one.text for one in await client.generate_batch(**fields)]
        stats = client.get_performance_stats()
    assert stats["layers"]["batch"] == {"flushed by offline": 1}
    assert told[-1] == (30, 30)
    assert server.stats()["by_route"][PATHS[api]] == 1


@pytest.mark.parametrize("api", APIS)
def test_plain_code_maps_expired_refused_and_repeats_only_the_failures(server, tmp_path, api):
    requests = [{"messages": "one"}, {"messages": "two [expire]"}, {"messages": "three", "max_tokens": 10**6}]
    with SyncClient(server.base_url, KEY, stack=Stack(), model=MODEL) as client:
        first = client.map(requests, offline=offline(tmp_path, api), max_tokens=5)
        assert [type(outcome.error) for outcome in first] == [type(None), UpstreamTimeout, StatusError]
        server.configure(offline_expire="nothing more")
        again = [*requests[:2], {"messages": "three"}]
        second = client.map(again, previous=first, offline=offline(tmp_path, api), max_tokens=5)
        assert all(outcome.ok for outcome in second)
        assert second[0] is first[0]
        with pytest.raises(ConfigError, match="3 requests"):
            client.map(again, previous=first[:2], offline=offline(tmp_path, api))
    server.configure(offline_expire="[expire]")


@pytest.mark.parametrize("api", APIS)
async def test_a_wait_that_is_given_up_goes_on_later_and_may_be_cancelled(server, tmp_path, api):
    server.configure(offline_looks=10**6)
    where = offline(tmp_path, api)
    async with Client(server.base_url, KEY, stack=Stack(), model=MODEL) as client:
        waiting = asyncio.create_task(client.map([{"messages": "a"}, {"messages": "b"}], max_tokens=5, offline=where))
        await asyncio.to_thread(server.wait, at_least={f"by_route.{PATHS[api]}/look": 1}, timeout_s=120)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert await client.cancel_offline(where) == 1
        outcomes = await client.map([{"messages": "a"}, {"messages": "b"}], max_tokens=5, offline=where)
    assert [type(outcome.error) for outcome in outcomes] == [type(None), Closed]
    assert server.stats()["by_route"][PATHS[api]] == 1


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("kind", ["reset", "reset_mid", "close_mid", "status", "truncate", "html", "close_after"])
async def test_batch_11_no_damage_on_the_way_makes_two_batches(server, tmp_path, api, kind):
    for name in (PATHS[api], "/v1/files", f"{PATHS[api]}/look", "content", "results"):
        server.add_fault(FaultRule(kind=kind, status=502, match=Match(route=name, first=1), id=name))
    async with Client(server.base_url, KEY, stack=Stack(), model=MODEL) as client:
        outcomes = await client.map(
            [{"messages": "a"}, {"messages": "b"}], max_tokens=5, offline=offline(tmp_path, api)
        )
        assert all(outcome.ok for outcome in outcomes), outcomes
        assert await how_many(client, api) == 1


async def how_many(client, api):
    """Batches that the server has for this key."""
    call = client.requests.chat(MODEL, "x", {}).replace(
        op=PATHS[api], native=client.endpoint.request("GET", f"{PATHS[api].removeprefix('/v1')}?limit=100"), direct=True
    )
    return len(json.loads((await client.engine.call(call)).data)["data"])


async def test_the_key_is_in_no_manifest_and_another_key_sees_nothing(server, tmp_path):
    where = offline(tmp_path)
    async with Client(server.base_url, KEY, stack=Stack(), model=MODEL) as client:
        assert (await client.map([{"messages": "my private prompt"}], max_tokens=5, offline=where))[0].ok
    files = [path.read_bytes() for path in where.directory.iterdir()]
    assert any(b'"batch":"batch_' in content for content in files)
    assert not any(secret in content for content in files for secret in (KEY.encode(), b"private"))
    async with Client(server.base_url, "other", stack=Stack(), model=MODEL) as client:
        assert (await client.map([{"messages": "my private prompt"}], max_tokens=5, offline=where))[0].ok
    assert server.stats()["by_route"]["/v1/batches"] == 2


async def test_a_directory_is_enough_and_the_cache_is_filled(server, tmp_path):
    server.configure(offline_looks=1)
    async with Client(server.base_url, KEY, stack=Stack(TTLCache(300)), model=MODEL) as client:
        (outcome,) = await client.generate_batch(
            prompts=["once upon"], temperature=0, max_tokens=500, offline=str(tmp_path / "batches")
        )
        hit = await client.complete("once upon", temperature=0, max_tokens=500)
        assert (hit.source, hit.text) == ("cache", outcome.text)
        again = await client.generate_batch(
            prompts=["once upon"], temperature=0, max_tokens=500, offline=str(tmp_path / "others")
        )
        assert again[0].reply.source == "cache"
        embedded = await client.map([{"input": ["a", "b"]}], offline=tmp_path / "batches")
        assert len(embedded[0].reply.body["data"]) == 2
    assert server.stats()["by_route"]["/v1/batches"] == 2


async def test_what_cannot_work_is_told_before_anything_is_sent(server, tmp_path):
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    async with Client(server.base_url, KEY, stack=Stack(), model=MODEL) as client:
        with pytest.raises(ConfigError, match="chmod 700"):
            await client.map([{"messages": "a"}], offline=tmp_path / "open")
        with pytest.raises(ConfigError, match="must be an OfflineBatch"):
            await client.map([{"messages": "a"}], offline=5)
        with pytest.raises(ConfigError, match="item 1: a request needs exactly one"):
            await client.map([{"messages": "a"}, {}], offline=tmp_path / "batches")
        (outcome,) = await client.map([{"messages": "a", "extra_headers": {"x": "y"}}], offline=tmp_path / "batches")
        assert isinstance(outcome.error, ConfigError)
    assert server.stats()["received"] == 0


@pytest.mark.parametrize("api", APIS)
async def test_a_result_file_with_long_lines_arrives_whole(server, tmp_path, api):
    server.configure(reply_text="word " * 20_000, max_model_len=10**6)
    try:
        async with Client(server.base_url, KEY, stack=Stack(), model=MODEL) as client:
            requests = ({"messages": str(number), "max_tokens": 10**5} for number in range(12))
            outcomes = await client.map(requests, offline=offline(tmp_path, api))
            assert [len(outcome.text) for outcome in outcomes] == [len(outcomes[0].text)] * 12
            assert len(msgspec.json.encode(outcomes[0].reply.body)) > 90_000
    finally:
        server.configure(reply_text="", max_model_len=32_768)


@pytest.mark.parametrize("api", APIS)
async def test_results_may_be_larger_than_the_pool_lets_an_answer_be(server, tmp_path, api):
    pool = ConnectionPool(max_response_bytes=4096)
    async with Client(server.base_url, KEY, stack=Stack(), model=MODEL, pool=pool) as client:
        requests = [{"messages": str(number)} for number in range(40)]
        outcomes = await client.map(requests, max_tokens=10, temperature=0, offline=offline(tmp_path, api))
        assert all(outcome.ok for outcome in outcomes)


async def test_a_submission_is_not_repeated_by_the_pool_whatever_its_settings(server, tmp_path):
    server.add_fault(FaultRule(kind="reset", match=Match(route="/v1/batches", first=1)))
    pool = ConnectionPool(retry_on_stale=True)
    async with Client(server.base_url, KEY, stack=Stack(), model=MODEL, pool=pool) as client:
        (outcome,) = await client.map([{"messages": "a"}], max_tokens=5, offline=offline(tmp_path))
        assert outcome.ok
    stats = server.stats()["by_route"]
    # The upload before it left a kept-alive connection, on which the reset looks stale: only we may send it again.
    assert stats["/v1/batches/list"] >= 1
    assert stats["/v1/batches"] == 2

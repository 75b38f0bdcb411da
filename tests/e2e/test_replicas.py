"""Several servers in processes of their own behind one client; one of them goes and comes back."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections import Counter
from contextlib import ExitStack

import pytest

from llmmw import (
    AmbiguousOutcome,
    Balancer,
    CircuitBreaker,
    Client,
    ConnectionFailed,
    Replica,
    Stack,
    StatusError,
    SyncClient,
    using,
)
from llmmw.endpoints.openai import HTTPEndpoint
from llmmw.endpoints.vllm import VLLMEndpoint
from llmmw.testing.server import FaultRule, ServerConfig, ServerProcess, server_process

PATIENCE_S = 120.0
MODEL = "llmmw-embedded"
FIXED = ServerConfig(latency="fixed", latency_s=0.01)
QUICK = Stack.recommended().replacing("breaker", CircuitBreaker(open_for=0.2, max_open=1))


@pytest.fixture(scope="module")
def processes():
    with ExitStack() as stack:
        yield [stack.enter_context(server_process(FIXED)) for _ in range(2)]


@pytest.fixture
def pair(processes):
    for each in processes:
        each.clear_faults()
        each.configure(latency="fixed", latency_s=0.01)
        each.reset()
    return processes


def urls(servers):
    return [server.base_url for server in servers]


def received(server):
    return server.stats(0)["by_route"].get("/v1/chat/completions", 0)


def told(client):
    return {
        place.removesuffix("/v1"): figures
        for place, figures in client.get_performance_stats()["layers"]["balance"]["replicas"].items()
    }


async def test_a_replica_killed_under_load_loses_no_call_and_works_again_when_it_is_back(pair):
    with server_process(FIXED) as doomed:
        port, url = int(doomed.url.rsplit(":", 1)[1]), doomed.url
        async with Client([*urls(pair[:1]), doomed.base_url], stack=QUICK, model=MODEL) as client:
            answered, done = Counter(), asyncio.Event()

            async def ask_on(worker):
                number = 0
                while not done.is_set():
                    reply = await client.chat(f"{worker} asks {number}")  # raises where a call is lost
                    answered[reply.endpoint.removesuffix("/v1")] += 1
                    number += 1

            async def until(holds):
                async with asyncio.timeout(PATIENCE_S):
                    while not holds():
                        await asyncio.sleep(0.005)

            workers = [asyncio.create_task(ask_on(number)) for number in range(16)]
            await until(lambda: min(answered[url], answered[pair[0].url]) >= 20)
            os.kill(doomed.pid, signal.SIGKILL)
            await until(lambda: told(client)[url]["ejected"])
            since = answered.copy()
            await until(lambda: answered[pair[0].url] >= since[pair[0].url] + 50)
            assert told(client)[url]["in_flight"] <= 1  # a probe
            back = ServerProcess(ServerConfig(latency="fixed", latency_s=0.01, port=port)).start()
            try:
                await until(lambda: answered[url] >= since[url] + 5 and not told(client)[url]["ejected"])
                done.set()
                await asyncio.gather(*workers)
                assert received(back) >= 5
            finally:
                back.stop()
            stats = client.get_performance_stats()
    assert stats["errors"] == 0
    assert stats["layers"]["balance"]["rerouted: not_sent"] > 0


async def test_a_call_that_a_paid_server_may_have_done_is_not_made_again(pair):
    for server in pair:
        server.add_fault(FaultRule(kind="reset"))
    places = [HTTPEndpoint(url, duplicate_ok=False) for url in urls(pair)]
    async with Client(places, stack=QUICK, model=MODEL) as client:
        with pytest.raises(AmbiguousOutcome):
            await client.chat("once")
    assert received(pair[0]) + received(pair[1]) == 1


async def test_a_refusal_of_every_replica_is_the_servers_own(pair):
    for server in pair:
        server.add_fault(FaultRule(kind="status", status=503))
    async with Client(urls(pair), stack=Stack(Balancer()), model=MODEL) as client:
        with pytest.raises(StatusError) as caught:
            await client.chat("hello")
    assert caught.value.status == 503
    assert {attempt.endpoint.removesuffix("/v1") for attempt in caught.value.attempts} == {each.url for each in pair}
    assert [received(server) for server in pair] == [1, 1]


async def test_streams_come_from_replicas_too(pair):
    pair[0].add_fault(FaultRule(kind="status", status=500))
    async with Client(urls(pair), stack=QUICK, model=MODEL) as client:
        for number in range(8):
            text = "".join([piece.text async for piece in client.stream(f"stream {number}")])
            assert text
        assert all(figures["in_flight"] == 0 for figures in told(client).values())


async def test_an_agents_prompts_stay_in_one_servers_prefix_cache(pair):
    def cached():
        hits = sum(server.stats(0)["tokens"]["cached"] for server in pair)
        for server in pair:
            server.reset()
        return hits

    for server in pair:
        server.configure(latency="engine", step_s=0.0005, seq_s=0.0)
    hits = {}
    for affinity in ("agent", "none"):
        async with Client(urls(pair), stack=Stack(Balancer(affinity=affinity)), model=MODEL) as client:
            homes = {}
            for turn in range(6):
                for number in range(8):
                    agent = f"{affinity} agent {number}"
                    with using(agent=agent):
                        history = f"{agent} remembers a long story. " * 40 + "and so on. " * 40 * turn
                        reply = await client.chat(history, max_tokens=2)
                    homes.setdefault(agent, set()).add(reply.endpoint)
        hits[affinity] = cached()
        assert all(len(places) == 1 for places in homes.values()) == (affinity == "agent")
    assert hits["agent"] > hits["none"]


def test_the_cache_knows_replicas_as_one_server_in_whatever_order_and_number(pair, place):
    first, second = sorted(urls(pair), key=lambda url: int(url.rsplit(":", 1)[1].split("/")[0]))
    stack = Stack.recommended(cache_ttl=300, cache_directory=str(place))

    def ask(places, **options):
        with SyncClient(places, stack=stack, model=MODEL, **options) as client:
            reply = client.chat("the same question", temperature=0)
        return reply.source

    assert ask([second, first]) == "upstream"
    assert ask([first, second]) == "cache"
    assert ask(first) == "cache"  # from one server to two and back
    assert ask([first, Replica(second, weight=2), "http://127.0.0.1:65535/v1"]) == "cache"
    assert ask([first, second], api_key="sk-other") == "upstream"
    assert ask([first], name="llama") == "upstream"
    assert ask([second], name="llama") == "cache"  # everything has moved
    assert received(pair[0]) + received(pair[1]) == 3


def test_extra_headers_and_keys_go_to_every_replica(processes):
    with ExitStack() as stack:
        config = ServerConfig(api_keys=("sk-replicas",), log_headers=True)
        servers = [stack.enter_context(server_process(config)) for _ in range(2)]
        with SyncClient(urls(servers), "sk-replicas", model=MODEL, name="mine") as client:
            for number in range(40):
                client.chat(str(number), extra_headers={"x-trace": f"trace {number}"})
        for server in servers:
            asked = [each for each in server.stats()["requests"] if each["route"] == "/v1/chat/completions"]
            assert asked
            assert all("x-trace" in {name.lower() for name in each["headers"]} for each in asked)


async def test_batches_are_spread(pair):
    async with Client(urls(pair), model=MODEL) as client:
        outcomes = await client.generate_batch(prompts=[f"prompt {number}" for number in range(40)], max_tokens=3)
    assert all(outcome.ok for outcome in outcomes)
    assert min(server.stats(0)["by_route"]["/v1/completions"] for server in pair) >= 10


@pytest.mark.parametrize("first_is", ["well", "broken"])
async def test_joint_requests_are_one_for_each_replica(pair, first_is):
    if first_is == "broken":
        pair[0].add_fault(FaultRule(kind="reset"))
    chats = [[{"role": "user", "content": f"question {number}"}] for number in range(128)]
    async with Client([VLLMEndpoint(server.url) for server in pair], model=MODEL) as client:
        outcomes = await client.generate_batch(messages=chats, max_tokens=3)
        figures = told(client)
    assert all(outcome.ok for outcome in outcomes)
    joint = [server.stats(0)["by_route"].get("/v1/chat/completions/batch", 0) for server in pair]
    if first_is == "well":
        assert joint == [1, 1]
    else:
        assert joint[1] >= 1
        assert figures[pair[0].url]["failures"] > 0
        assert sum(received(server) for server in pair) + sum(joint) < 128


async def test_with_all_servers_gone_each_call_ends_at_once_and_says_so():
    async with Client(["http://127.0.0.1:9/v1", "http://127.0.0.1:19/v1"], stack=QUICK, model=MODEL) as client:
        began = time.monotonic()
        with pytest.raises(ConnectionFailed) as caught:
            await client.chat("anybody?", timeout=PATIENCE_S)
        assert time.monotonic() - began < PATIENCE_S
    assert {attempt.endpoint for attempt in caught.value.attempts} == {
        "http://127.0.0.1:9/v1",
        "http://127.0.0.1:19/v1",
    }

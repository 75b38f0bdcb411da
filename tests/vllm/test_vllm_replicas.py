"""Two vLLM servers on one machine behind one client: prefix caches stay warm, and one stops. The second one's start
takes 20 to 60 s, once.
"""

from __future__ import annotations

import asyncio
import importlib
from collections import Counter
from itertools import cycle
from pathlib import Path

import pytest

from llmmw import Client, Stack, using
from llmmw.endpoints.vllm import VLLMEndpoint

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1800)]

BENCHMARKS = Path(__file__).parents[2] / "benchmarks" / "vllm_cpu"
AGENTS = [f"agent {number}" for number in range(7)]
"""An odd number, so that round robin does not meet the same server by chance."""


@pytest.fixture(scope="module")
def other():
    """A second server like the first one; whoever stops it is the last to use it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        serving = importlib.import_module("server")
        with serving.server(serving.Settings(timeout=600)) as running:
            yield running


def history(mode, agent, turns):
    """A conversation that grows; several blocks of 128 tokens are the same every time."""
    begin = f"{mode}, {agent} remembers: " + "the river rose and the town moved uphill. " * 20
    return begin + "another day passed in silence. " * 6 * turns


async def hits_of(endpoints):
    return sum([(await endpoint.read_load()).prefix_hits or 0 for endpoint in endpoints])


async def converse(vllm, mode, client_for):
    """Three turns of every agent, one call after another."""
    for turn in range(3):
        for agent in AGENTS:
            with using(agent=agent):
                client = client_for()
                await client.chat(**vllm.question(history(mode, agent, turn), structured_outputs=None, max_tokens=4))


async def test_agents_at_home_find_their_prompts_more_often_than_by_round_robin(vllm, other):
    urls = [vllm.url, other.url]
    meters = [VLLMEndpoint(url) for url in urls]
    hits = {}
    before = await hits_of(meters)
    async with Client([VLLMEndpoint(url) for url in urls], stack=Stack()) as client:
        await converse(vllm, "home", lambda: client)
        balance = client.get_performance_stats()["layers"]["balance"]
    hits["home"] = await hits_of(meters) - before
    assert (balance["at_home"], balance["spilled"]) == (21, 0)
    assert all(figures["requests"] % 3 == 0 for figures in balance["replicas"].values())
    before = await hits_of(meters)
    async with Client(urls[0], stack=Stack()) as one, Client(urls[1], stack=Stack()) as two:
        turns = cycle((one, two))
        await converse(vllm, "robin", lambda: next(turns))
    hits["robin"] = await hits_of(meters) - before
    for meter in meters:
        await meter.aclose()
    print(f"prompt tokens found in prefix caches: {hits}")
    assert hits["home"] >= 1.5 * hits["robin"]  # two turns of three instead of one


async def test_a_replica_that_stops_is_replaced_by_the_other(vllm, other):
    answered, stopped = Counter(), asyncio.Event()
    async with Client([vllm.url, other.url], stack=Stack.recommended(timeout=600)) as client:

        async def ask_on(agent):
            number = 0
            while not stopped.is_set() or number < 10:
                with using(agent=agent):
                    reply = await client.chat(**vllm.question(f"{agent} asks {number}", temperature=1))
                answered[reply.endpoint] += 1
                number += 1

        workers = [asyncio.create_task(ask_on(agent)) for agent in AGENTS]
        async with asyncio.timeout(600):
            while min(answered[vllm.url], answered[other.url]) < 5:
                await asyncio.sleep(0.02)
            await asyncio.to_thread(other.child.stop)
            since = answered.copy()
            while answered[vllm.url] < since[vllm.url] + 20:
                await asyncio.sleep(0.02)
            stopped.set()
            await asyncio.gather(*workers)  # which raises where a call was lost
        assert client.get_performance_stats()["errors"] == 0
        replicas = client.get_performance_stats()["layers"]["balance"]["replicas"]
        assert replicas[other.url]["failures"] >= 1
        reply = await client.chat(**vllm.question("is anybody left"))
        assert reply.endpoint == vllm.url

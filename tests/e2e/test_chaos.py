"""A soak with real servers that go wrong in every way: afterwards the books balance and nothing is left.

CHAOS_SEEDS=5,7 or 100-199 tries others than the usual seeds, CHAOS_CALLS=20000 makes each longer; `make chaos`.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import time

import pytest
from chaos import handles, seeds
from soak import MODEL, QUIET_S, RawProcess, Soak, faults

from llmmw import Client, ConnectionPool, LLMMWError, Stack
from llmmw.testing.server import ServerConfig, server_process

CALLS = int(os.environ.get("CHAOS_CALLS", "700"))


@pytest.fixture(scope="module")
def servers():
    config = ServerConfig(reply="echo", latency="fixed", latency_s=0.002, token_s=0.0003, any_model=True)
    with server_process(config) as first, server_process(config) as second:
        yield first, second


@pytest.fixture
def raw(seed):
    server = RawProcess(seed)
    yield server
    server.stop()


def soak(seed, servers, raw, directory, *, wild):
    servers[0].clear_faults()
    asyncio.run(warm(servers[0]))
    for server in servers:
        server.reset()
        server.configure(seed=seed, faults=faults(0.012 if wild else 0.01, hanging=wild))
    found = Soak(seed, servers, raw, directory, wild=wild)
    before = handles()
    asyncio.run(found.run(CALLS, rounds=3 + CALLS // 10_000))
    end = time.monotonic() + QUIET_S
    while left := {name: count for name, count in handles().items() if count > before[name]}:
        if time.monotonic() > end:  # some sockets close on threads of pyreqwest's
            found.problems.append(("handles", left))
            break
        gc.collect()
        time.sleep(0.02)
    return found


async def warm(server):
    """Have pyreqwest start its threads, which stay."""
    async with Client(server.base_url, pool=ConnectionPool(engine="pyreqwest"), stack=Stack()) as client:
        with contextlib.suppress(LLMMWError):
            await client.chat("warm", model=MODEL)


@pytest.mark.timeout(0 if "CHAOS_CALLS" in os.environ else 900)
@pytest.mark.parametrize("seed", seeds(range(2)))
@pytest.mark.parametrize("wild", [False, True], ids=["servers", "everybody"])
def test_whoever_goes_wrong_the_books_balance_and_nothing_is_left(servers, raw, tmp_path, seed, wild):
    found = soak(seed, servers, raw, tmp_path, wild=wild)
    assert found.problems == [], f"CHAOS_SEEDS={seed}"
    assert found.outcomes["answered"] > 0.2 * CALLS
    assert min(found.sent["received"], found.sent["attempts"]) > 0.3 * CALLS

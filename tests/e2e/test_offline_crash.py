"""Offline batches in processes that are killed: the batch is found again, and never made twice."""

from __future__ import annotations

import http.client
import json
import signal
import subprocess
import sys
import time
from urllib.parse import urlsplit

import pytest

from llmmw.testing.server import FaultRule, Match, ServerConfig, server_process

RUN = """
import asyncio, json, sys
from llmmw import Client, OfflineBatch, Stack

async def main(url, api, directory):
    async with Client(url, stack=Stack(), model="llmmw-embedded") as client:
        requests = [{"messages": f"question {number}"} for number in range(5)]
        offline = OfflineBatch(directory, api=api, poll=0.02, settle=0.3)
        outcomes = await client.map(requests, temperature=0, max_tokens=5, offline=offline)
        print(json.dumps([outcome.text for outcome in outcomes]))

asyncio.run(main(*sys.argv[1:]))
"""
PATHS = {"openai": "/v1/batches", "anthropic": "/v1/messages/batches"}


@pytest.fixture(scope="module")
def process():
    with server_process(ServerConfig()) as server:
        yield server


@pytest.fixture
def server(process):
    process.clear_faults()
    process.configure(offline_looks=3)
    process.reset()
    return process


def program(server, api, directory):
    command = [sys.executable, "-c", RUN, server.base_url, api, str(directory)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def batches(server, api):
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=120)
    try:
        connection.request("GET", f"{PATHS[api]}?limit=100")
        return json.loads(connection.getresponse().read())["data"]
    finally:
        connection.close()


def wait_for(condition):
    until = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < until


def finished(server, api, directory):
    with program(server, api, directory) as running:
        out, errors = running.communicate(timeout=240)
    assert running.returncode == 0, errors
    return json.loads(out)


MOMENTS = [
    (api, kind, where)
    for api in PATHS
    for kind, where in (("delay", "submit"), ("hang", "submit"), ("hang", "look"), ("hang", "results"))
]


@pytest.mark.parametrize(("api", "kind", "where"), [*MOMENTS, ("openai", "delay", "upload")])
def test_batch_11_kill_9_around_the_submission(server, tmp_path, api, kind, where):
    """delay: the server has done it, and the answer never comes; hang: it has done nothing."""
    results = "/v1/files/content" if api == "openai" else f"{PATHS[api]}/results"
    route = {"submit": PATHS[api], "look": f"{PATHS[api]}/look", "results": results, "upload": "/v1/files"}[where]
    server.add_fault(FaultRule(kind=kind, seconds=600, match=Match(route=route, first=1), id="stop"))
    with program(server, api, tmp_path / "batches") as running:
        server.wait(at_least={f"by_route.{route}": 1}, timeout_s=120)
        if (kind, where) == ("delay", "submit"):
            wait_for(lambda: batches(server, api))
        running.send_signal(signal.SIGKILL)
        running.communicate()
    server.clear_faults()
    answers = finished(server, api, tmp_path / "batches")
    assert len(set(answers)) == 5
    assert all(answers)
    assert len(batches(server, api)) == 1
    assert finished(server, api, tmp_path / "batches") == answers
    assert len(batches(server, api)) == 1


@pytest.mark.parametrize("api", PATHS)
def test_batch_11_kill_9_at_every_request(server, tmp_path, api):
    for number in range(1, 6):
        before = server.stats(0)["received"]
        with program(server, api, tmp_path / "batches") as running:
            wait_for(lambda: server.stats(0)["received"] >= before + number or running.poll() is not None)  # noqa: B023 — called here
            running.send_signal(signal.SIGKILL)
            running.communicate()
        # All that the killed one sent has been read: what the server reads later than `settle` may be made twice.
        server.wait(at_most={"in_flight": 0, "connections.open": 1})
    answers = finished(server, api, tmp_path / "batches")
    assert len(set(answers)) == 5
    assert all(answers)
    assert len(batches(server, api)) == 1

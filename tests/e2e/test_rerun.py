"""A second run of the same program asks only for what failed: over the disk cache, or with the first run's outcomes."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap

import patience
import pytest

from llmmw.testing.server import FaultRule, Match, ServerConfig, server_process

PROGRAM = textwrap.dedent(
    """
    import asyncio, json, pathlib, pickle, sys
    from llmmw import Client, Coalescer, Retry, Stack, TTLCache

    url, directory, way = sys.argv[1:]
    prompts = [f"item {number}" for number in range(40)]
    kept = pathlib.Path(directory) / "outcomes.pickle"
    cache = [] if way == "previous" else [TTLCache("1h", directory=directory + "/cache"), Coalescer()]

    async def main():
        stack = Stack(*cache, Retry(attempts=2, backoff=0.001, budget=10_000))
        async with Client(url, stack=stack, model="llmmw-embedded") as client:
            fields = {"max_tokens": 500, "temperature": 0.7}
            if way == "prompts":
                found = await client.generate_batch(prompts=prompts, **fields)
            elif way == "messages":
                talks = [[{"role": "user", "content": prompt}] for prompt in prompts]
                found = await client.generate_batch(messages=talks, **fields)
            else:
                requests = [{"prompt": p} if number % 2 else {"messages": p} for number, p in enumerate(prompts)]
                previous = pickle.loads(kept.read_bytes()) if way == "previous" and kept.exists() else None
                found = await client.map(requests, previous=previous, **fields)
                kept.write_bytes(pickle.dumps(found))
            told = [{"ok": one.ok, "text": one.text, "error": type(one.error).__name__,
                     "status": getattr(one.error, "status", None),
                     "attempts": len(getattr(one.error, "attempts", ()))} for one in found]
            print(json.dumps({"outcomes": told, "upstream": client.get_performance_stats()["upstream_requests"]}))

    asyncio.run(main())
    """
)


@pytest.fixture(scope="module")
def process():
    with server_process(ServerConfig()) as found:
        yield found


@pytest.fixture
def server(process):
    process.clear_faults()
    process.reset()
    return process


def run(server, directory, way):
    command = [sys.executable, "-c", patience.FOR_A_CHILD + PROGRAM, server.base_url, str(directory), way]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("way", ["prompts", "messages", "map", "previous"])
def test_second_run_in_another_process_asks_for_the_failures_alone(server, tmp_path, way):
    for number in (3, 17, 30):
        server.add_fault(FaultRule(kind="status", status=500, match=Match(contains=f'"item {number}"')))
    first = run(server, tmp_path, way)
    assert [place for place, one in enumerate(first["outcomes"]) if not one["ok"]] == [3, 17, 30]
    failed = first["outcomes"][17]
    assert (failed["error"], failed["status"], failed["attempts"]) == ("StatusError", 500, 2)
    assert server.stats(0)["received"] == first["upstream"] == 37 + 3 * 2
    server.clear_faults()
    server.reset()
    second = run(server, tmp_path, way)
    assert all(one["ok"] for one in second["outcomes"])
    assert server.stats(0)["received"] == second["upstream"] == 3
    kept = [place for place in range(40) if place not in {3, 17, 30}]
    assert [second["outcomes"][place]["text"] for place in kept] == [first["outcomes"][place]["text"] for place in kept]
    if way != "previous":
        third = run(server, tmp_path, way)
        assert third["outcomes"] == second["outcomes"]
        assert third["upstream"] == 0

import asyncio
from contextlib import aclosing

import pytest

from llmmw.testing.server import ServerConfig
from llmmw.testing.server.core import first_token_s
from llmmw.testing.server.engine import Engine, Group, Sequence

CHAT = "/v1/chat/completions"


def said(text, **more):
    return {"messages": [{"role": "user", "content": text}], "temperature": 0, **more}


class Bench:
    """An engine on a clock that only its own sleeps move."""

    def __init__(self, **options):
        self.now = 0.0
        self.finished = []
        self.engine = Engine(ServerConfig(latency="engine", **options), sleep=self.sleep, clock=lambda: self.now)

    async def sleep(self, seconds):
        await asyncio.sleep(0)
        self.now += seconds

    async def run(self, name, *sequences):
        async with aclosing(self.engine.run(Group(sequences, streaming=False))) as steps:
            async for _ in steps:
                pass
        self.finished.append((name, round(self.now, 6)))

    async def together(self, **calls):
        await asyncio.gather(*(self.run(name, call) for name, call in calls.items()))
        await self.engine.aclose()
        return self.finished


async def test_step_time_is_fixed_plus_prefill_plus_sequences():
    bench = Bench(step_s=1.0, prefill_s_per_token=0.01, seq_s=0.1)
    # Step 1 computes 10 prompt tokens and gives the first token; two more steps follow.
    assert await bench.together(a=Sequence(10, 3)) == [("a", 1.2 + 1.1 + 1.1)]


async def test_sequences_share_steps_and_slots_limit_them():
    bench = Bench(step_s=1.0, prefill_s_per_token=0.0, seq_s=0.0, max_num_seqs=2)
    done = await bench.together(a=Sequence(1, 2), b=Sequence(1, 4), c=Sequence(1, 2))
    assert done == [("a", 2.0), ("b", 4.0), ("c", 4.0)]
    assert bench.engine.peak_running == 2


async def test_long_prompts_are_prefilled_in_chunks():
    bench = Bench(step_s=1.0, prefill_s_per_token=0.0, seq_s=0.0, max_batched_tokens=10)
    assert await bench.together(a=Sequence(25, 1)) == [("a", 3.0)]


async def test_smaller_priority_runs_first_then_arrival():
    bench = Bench(step_s=1.0, prefill_s_per_token=0.0, seq_s=0.0, max_num_seqs=1)
    low, same, urgent = (Sequence(1, 1, priority=p) for p in (10, 10, -5))
    done = await bench.together(low=low, same=same, urgent=urgent)
    assert [name for name, _ in done] == ["urgent", "low", "same"]


async def test_prefix_hits_cost_no_prefill_and_salts_separate():
    bench = Bench(step_s=0.0, prefill_s_per_token=1.0, seq_s=0.0, block_tokens=4)
    prompt = "x" * 64  # 16 tokens, 4 blocks; the last token is always computed, so 3 blocks can hit
    for name, salt in (("cold", ""), ("warm", ""), ("salted", "s")):
        await bench.run(name, Sequence(16, 1, units=prompt, salt=salt))
    assert [at for _, at in bench.finished] == [16.0, 20.0, 36.0]
    assert (bench.engine.prefix.queries, bench.engine.prefix.hits) == (48, 12)
    await bench.run("ids", Sequence(8, 1, units=list(range(8))))
    await bench.run("ids", Sequence(8, 1, units=list(range(8))))
    assert bench.engine.prefix.hits == 16
    bench.engine.reset()
    assert len(bench.engine.prefix) == 0
    await bench.engine.aclose()


async def test_prefix_cache_forgets_the_least_recently_used():
    bench = Bench(block_tokens=4, kv_blocks=2)
    cache = bench.engine.prefix
    for text in ("a" * 32, "b" * 32):
        assert cache.visit(text, 8, "") == 0
    assert len(cache) == 2
    assert cache.visit("a" * 32, 8, "") == 0


async def test_leaving_frees_a_running_and_a_waiting_slot():
    bench = Bench(step_s=1.0, max_num_seqs=1)
    running = asyncio.create_task(bench.run("running", Sequence(1, 10**6)))
    waiting = asyncio.create_task(bench.run("waiting", Sequence(1, 1)))
    while not (bench.engine.running and bench.engine.waiting == 1):
        await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait([waiting])
    assert bench.engine.waiting == 0
    running.cancel()
    await asyncio.wait([running])
    assert not bench.engine.running
    await bench.run("next", Sequence(1, 1))
    assert bench.finished[-1][0] == "next"
    await bench.engine.aclose()


async def test_an_idle_or_paused_engine_takes_no_step():
    bench = Bench(paused=True)
    task = asyncio.create_task(bench.run("a", Sequence(1, 3)))
    for _ in range(50):
        await asyncio.sleep(0)
    assert (bench.engine.steps, bench.engine.waiting) == (0, 1)
    bench.engine.configure(ServerConfig(latency="engine"))
    await task
    for _ in range(50):
        await asyncio.sleep(0)
    assert bench.engine.steps == 3
    await bench.engine.aclose()


async def test_priority_order_over_http(serve, post):
    server = await serve(latency="engine", max_num_seqs=1, paused=True, step_s=0.0)
    finished = []

    async def call(name, priority):
        await post(server, CHAT, said(name, priority=priority, max_tokens=1))
        finished.append(name)

    calls = []
    for number, (name, priority) in enumerate((("a", 10), ("b", 10), ("c", -5)), start=1):
        calls.append(asyncio.create_task(call(name, priority)))
        await server.wait(at_least={"engine.waiting": number})
    server.configure(paused=False)
    await asyncio.gather(*calls)
    assert finished == ["c", "a", "b"]
    assert [r["priority"] for r in server.stats()["requests"]] == [10, 10, -5]


@pytest.mark.parametrize("stream", [False, True])
async def test_client_disconnect_frees_the_slot(serve, post, stream):
    server = await serve(latency="engine", max_num_seqs=1, step_s=0.001)
    ask = said("x", max_tokens=30_000, ignore_eos=True, stream=stream)
    task = asyncio.create_task(post(server, CHAT, ask))
    await server.wait(at_least={"engine.running": 1, "engine.steps": 3})
    task.cancel()
    stats = await server.wait(at_least={"aborted": 1}, at_most={"engine.running": 0, "in_flight": 0})
    assert stats["by_outcome"] == {"aborted": 1}
    assert server.stats()["requests"][0]["outcome"] == "aborted"


async def test_stream_arrives_token_by_token(serve, http):
    server = await serve(latency="engine", step_s=0.0)
    async with http.post(server.url + CHAT, json=said("x", max_tokens=6, n=1, stream=True)) as response:
        content = await response.text()
    deltas = [line for line in content.split("\n\n") if '"content":"' in line and '"content":""' not in line]
    assert len(deltas) == 6
    assert server.stats()["engine"]["steps"] == 6


async def test_queue_cap_is_all_or_nothing(serve, post):
    server = await serve(latency="engine", max_queued=8)
    many = {"prompt": ["x"] * 12, "temperature": 0}
    status, body, headers = await post(server, "/v1/completions", many)
    assert (status, body["error"]["type"]) == (503, "Service Unavailable")
    assert "Retry-After" not in headers
    assert (await post(server, "/v1/completions", {**many, "prompt": ["x"] * 8}))[0] == 200


async def test_cached_tokens_are_reported(serve, post):
    server = await serve(latency="engine", step_s=0.0, prefill_s_per_token=0.0)
    ask = said("word " * 100)
    cached = [
        (await post(server, CHAT, body))[1]["usage"]["prompt_tokens_details"]["cached_tokens"]
        for body in (ask, ask, {**ask, "cache_salt": "s"})
    ]
    assert cached[0] == cached[2] == 0
    assert cached[1] > 100
    assert server.stats()["tokens"]["cached"] == cached[1]


async def test_metrics_show_what_runs_and_waits(serve, post, http):
    server = await serve(latency="engine", paused=True)
    task = asyncio.create_task(post(server, CHAT, said("x")))
    await server.wait(at_least={"engine.waiting": 1})
    async with http.get(server.url + "/metrics") as response:
        assert 'num_requests_waiting{engine="0",model_name="llmmw-embedded"} 1' in await response.text()
    server.configure(paused=False, step_s=0.0)
    await task


def test_spread_latencies_are_uniform_and_a_prompts_own():
    config = ServerConfig(latency="fixed", latency_s=0.5, latency_spread=0.6)
    found = [first_token_s(config, f"prompt {number}") for number in range(1000)]
    assert found == [first_token_s(config, f"prompt {number}") for number in range(1000)]
    assert 0.2 <= min(found) < 0.21
    assert 0.79 < max(found) <= 0.8
    assert 0.48 < sum(found) / 1000 < 0.52
    assert first_token_s(ServerConfig(latency="fixed", latency_s=0.5), "prompt") == 0.5


async def test_fixed_latency_streams_and_answers(serve, post, http):
    server = await serve(latency="fixed", latency_s=0.001, token_s=0.0001)
    _, plain, _ = await post(server, CHAT, said("x", max_tokens=5))
    async with http.post(server.url + CHAT, json=said("x", max_tokens=5, stream=True)) as response:
        assert (await response.text()).count('"content":"') == 6
    assert plain["usage"]["completion_tokens"] == 5

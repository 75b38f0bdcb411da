"""The cache among the other layers: what a hit needs, what it adds to the figures, and what a rerun repeats."""

from __future__ import annotations

import asyncio
import logging
import random
import threading

import pytest

from llmmw import (
    CircuitBreaker,
    CircuitOpen,
    Closed,
    Coalescer,
    Deadline,
    RateLimited,
    RateLimiter,
    Retry,
    Stack,
    Timeout,
    TTLCache,
    using,
)  # fmt: skip
from llmmw.call import Context, Reply
from llmmw.env import Env
from llmmw.events import CallEnded, CallStarted
from llmmw.testing.clock import manual_time
from llmmw.testing.fake import FakeUpstream, ScriptedChunks, chat_call, chat_chunks, error_reply


def engine_of(stack, upstream, **options):
    return stack.bind(upstream, env=Env(seed=1, **options))


@manual_time
async def test_cache_24_a_hit_is_served_while_the_breaker_is_open(clock):
    upstream = FakeUpstream()
    stack = Stack(TTLCache(300), Coalescer(), CircuitBreaker(min_calls=2))
    async with engine_of(stack, upstream) as engine:
        await engine.call(chat_call("known"))
        upstream._script = [error_reply(500)] * 50
        with pytest.raises(CircuitOpen):
            for number in range(50):
                await engine.call(chat_call(f"new {number}"))
        assert (await engine.call(chat_call("known"))).source == "cache"
        with pytest.raises(CircuitOpen):
            await engine.call(chat_call("unknown"))


@manual_time
async def test_cache_24_a_hit_is_served_while_the_limiter_is_empty_and_takes_nothing_from_it(clock):
    stack = Stack(Deadline(5), TTLCache(300), Coalescer(), RateLimiter(rpm=1, tpm=1000, concurrency=1), Timeout(30))
    async with engine_of(stack, FakeUpstream()) as engine:
        await engine.call(chat_call("known"))
        before = engine.get_performance_stats()
        began = clock.monotonic()
        for _ in range(100):
            assert (await engine.call(chat_call("known"))).source == "cache"
        assert clock.monotonic() == began
        after = engine.get_performance_stats()
        assert after["layers"]["limit"] == before["layers"]["limit"]
        for name in ("tokens_in", "tokens_out", "upstream_requests", "rate_limit_wait_s", "retries"):
            assert after[name] == before[name]
        with pytest.raises(RateLimited):
            await engine.call(chat_call("unknown"))


@pytest.mark.parametrize("way", ["here", "thread"])
async def test_cache_24_a_hit_is_served_while_the_client_drains(way):
    arrived, go = asyncio.Event(), asyncio.Event()

    async def upstream(call):
        if call.payload["messages"][0]["content"] == "slow":
            arrived.set()
            await go.wait()
        return await fake(call)

    fake = FakeUpstream()
    fake.start(Env())
    engine = Stack(TTLCache(300), Coalescer()).bind(upstream)
    await engine.call(chat_call("known"))
    slow = asyncio.create_task(engine.call(chat_call("slow")))
    await arrived.wait()
    closing = asyncio.create_task(engine.aclose())
    while not engine.closed:
        await asyncio.sleep(0)
    if way == "here":
        assert (await engine.call(chat_call("known"))).source == "cache"
        with pytest.raises(Closed):
            await engine.call(chat_call("unknown"))
    else:
        reply = await asyncio.to_thread(engine.call_sync, chat_call("known"))
        assert reply.source == "cache"
    go.set()
    await closing
    assert (await slow).ok
    with pytest.raises(Closed):
        await engine.call(chat_call("known"))
    stats = engine.get_performance_stats()
    assert stats["request_count"] == stats["cache_hits"] + stats["answered_upstream"] == 3


@manual_time
async def test_the_figures_of_hits_are_the_same_whether_somebody_listens_or_not(clock):
    found, told = [], []
    for sinks in ((), (told.append,)):
        stack = Stack(TTLCache(300, negative_ttl=30, stale_while_revalidate=1000), Coalescer())
        upstream = FakeUpstream([error_reply(404)], latency_s=2.0)
        async with engine_of(stack, upstream, sinks=sinks) as engine:
            for agent in ("a", "a", "b", None):
                await engine.call(chat_call("not there", context=Context(agent=agent)))
            for agent in ("a", "b", None, None):
                await engine.call(chat_call("one two", context=Context(agent=agent)))
            clock.advance(400)
            assert (await engine.call(chat_call("one two", context=Context(agent="b")))).stale
            await asyncio.sleep(3)
            found.append(engine.get_performance_stats())
    assert found[0] == found[1]
    assert found[0]["errors_by_type"] == {"status 404": 4}
    assert (found[0]["cache_hits"], found[0]["layers"]["cache"]["memory hits"]) == (4, 7)
    assert found[0]["time_saved_s"] == pytest.approx(2.0 * 7)
    ends = [event for event in told if isinstance(event, CallEnded)]
    assert len(ends) == len([event for event in told if isinstance(event, CallStarted)]) == 9


@manual_time
async def test_hits_add_to_what_was_saved_and_never_to_what_was_spent(clock):
    upstream = FakeUpstream(latency_s=2.0)
    async with engine_of(Stack(TTLCache(300), Coalescer()), upstream) as engine:
        first = await engine.call(chat_call("one two", context=Context(agent="a")))
        spent = engine.get_performance_stats()
        for _ in range(3):
            await engine.call(chat_call("one two", context=Context(agent="a")))
        stream = await engine.call(chat_call("one two", stream=True, stream_options={"include_usage": True}))
        async for _ in stream.chunks:
            pass
        stats = engine.get_performance_stats()
        assert first.usage.total_tokens > 0
        assert stats["tokens_saved"] == 4 * first.usage.total_tokens
        assert stats["time_saved_s"] == pytest.approx(8.0)
        assert (stats["tokens_in"], stats["tokens_out"]) == (spent["tokens_in"], spent["tokens_out"])
        assert stats["by_agent"]["a"]["tokens_out"] == spent["by_agent"]["a"]["tokens_out"]
        assert (stats["request_count"], stats["cache_hits"], stats["cache_misses"]) == (5, 4, 1)


def scrambled(agents, draws, seed):
    order = [agent for agent in agents for _ in range(draws)]
    random.Random(seed).shuffle(order)
    return order


@pytest.mark.parametrize("stack", [Stack(TTLCache(300, sampling="lanes"), Coalescer()),
                                   Stack(TTLCache(300, sampling="lanes"))])  # fmt: skip
@manual_time
async def test_cache_09_a_rerun_in_any_order_and_all_at_once_replays_the_same_diversity(clock, stack):
    upstream = FakeUpstream(latency_s=0.5, numbered=True)
    agents = "abcdefgh"
    async with engine_of(stack, upstream) as engine:

        async def run(seed, at_once):
            engine.begin_run()
            found = {agent: [] for agent in agents}

            async def ask(agent):
                found[agent].append((await engine.call(chat_call(context=Context(agent=agent)))).text)

            if at_once:
                await asyncio.gather(*(ask(agent) for agent in scrambled(agents, 5, seed)))
            else:
                for agent in scrambled(agents, 5, seed):
                    await ask(agent)
            return found

        first = await run(1, at_once=True)
        assert len({text for texts in first.values() for text in texts}) == 40
        for seed in (2, 3):
            again = await run(seed, at_once=seed == 3)
            assert {agent: sorted(texts) for agent, texts in again.items()} == {
                agent: sorted(texts) for agent, texts in first.items()
            }
        in_turn = await run(4, at_once=False)
        assert await run(5, at_once=False) == in_turn
        assert len(upstream.calls) == 40


def test_cache_09_a_rerun_by_threads_replays_the_same_diversity(tmp_path):
    """Each agent is a thread; the disk carries the answers from one run, a new process as it were, to the next."""
    tmp_path.chmod(0o700)
    agents, draws, asked = "abcdef", 4, []

    def run():
        @Stack(TTLCache(300, sampling="lanes", directory=tmp_path / "c"), Coalescer()).wrap
        def ask(prompt):
            asked.append(prompt)
            return f"{prompt} #{len(asked)}"

        found, begin = {}, threading.Barrier(len(agents))

        def agent(name):
            begin.wait()
            with using(agent=name):
                found[name] = [ask("x") for _ in range(draws)]

        threads = [threading.Thread(target=agent, args=(name,)) for name in agents]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for name in agents:  # what the disk was too slow for is drawn again by nobody
            with using(agent=name):
                assert [ask_again(ask, sample) for sample in range(draws)] == found[name]
        ask.close()
        return found

    def ask_again(ask, sample):
        with using(sample=sample):
            return ask("x")

    first = run()
    assert len({text for texts in first.values() for text in texts}) == len(agents) * draws
    assert len(asked) == len(agents) * draws


@pytest.mark.parametrize(
    ("mode", "upstream_calls", "sources"),
    [
        ("on", 1, ["upstream", "cache", "cache"]),
        ("off", 3, ["upstream"] * 3),
        ("read", 3, ["upstream"] * 3),
        ("write", 3, ["upstream"] * 3),
    ],
)
@manual_time
async def test_modes_from_the_environment_rule_the_whole_stack(clock, monkeypatch, mode, upstream_calls, sources):
    monkeypatch.setenv("LLMMW_CACHE", mode)
    upstream = FakeUpstream()
    async with engine_of(Stack(TTLCache(300), Coalescer()), upstream) as engine:
        assert [(await engine.call(chat_call())).source for _ in range(3)] == sources
        assert len(upstream.calls) == upstream_calls
        assert engine.get_performance_stats()["layers"]["cache"]["mode"] == mode


async def test_modes_read_and_write_share_a_directory(tmp_path, monkeypatch):
    tmp_path.chmod(0o700)
    upstream = FakeUpstream(numbered=True)

    async def ask(mode):
        monkeypatch.setenv("LLMMW_CACHE", mode)
        async with engine_of(Stack(TTLCache(300, directory=tmp_path / "c"), Coalescer()), upstream) as engine:
            return (await engine.call(chat_call())).text

    found = [await ask(mode) for mode in ("read", "on", "read", "write", "read", "off", "on")]
    assert [text[-2:] for text in found] == ["#1", "#2", "#2", "#3", "#3", "#4", "#3"]


@manual_time
async def test_disk_01_neither_keys_nor_prompts_are_told_to_anybody(clock, caplog):
    told = []
    caplog.set_level(logging.DEBUG)
    script = [Reply(chunks=ScriptedChunks(chat_chunks("x")[:1])), error_reply(400), error_reply(503)]
    async with engine_of(
        Stack(TTLCache(10, auth_check=True, stale_if_error=60, negative_ttl=5), Coalescer(), Retry(attempts=2)),
        FakeUpstream(script), sinks=(told.append,),
    ) as engine:  # fmt: skip
        call = chat_call("the hidden prompt", user="hidden user").replace(namespace="hidden namespace")
        async for _ in (await engine.call(call.replace(stream=True))).chunks:
            pass
        for extra in ({}, {}, {"x": {1}}, {"x": float("nan")}):
            await engine.call(call.replace(payload={**call.payload, **extra}))
        engine.invalidate(call)
        shown = repr(told) + repr(engine.get_performance_stats()) + repr(engine) + caplog.text
    assert "hidden" not in shown
    assert len(told) > 10


# ── many entries of one age ─────────────────────────────────────────────────────────────────────────────────────────


@manual_time
async def test_cache_19_ten_thousand_entries_set_together_do_not_expire_together(clock):
    """Every question is asked all the time, so each entry that ends costs a call in that second."""
    upstream = FakeUpstream()
    env = Env(seed=1)
    upstream.start(env)

    async def busiest_second(**options):
        cache = TTLCache(600, **options).bind(upstream, env)
        calls = [chat_call(str(number)) for number in range(10_000)]
        for call in calls:
            await cache(call)
        began = clock.monotonic()
        entries = cache._store.memory._entries
        ends = {}
        for call in calls:
            (key,) = (cache._sharing.draw(call).key,)
            ends.setdefault(int(entries[key].expires - began), []).append(call)
        assert set(ends) <= set(range(540, 661))
        peak = 0
        for second in sorted(ends):
            clock.advance(began + second + 1 - clock.monotonic())
            before = len(upstream.calls)
            for call in ends[second]:
                assert (await cache(call)).source == "upstream"
            peak = max(peak, len(upstream.calls) - before)
        return peak

    # 10,000 over 120 s are 83 a second; without jitter all come in one.
    assert await busiest_second() < 130
    assert await busiest_second(jitter=0) == 10_000

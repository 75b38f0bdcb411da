"""Invalidation by request, tag and tenant, through every way in; it beats what is in flight."""

from __future__ import annotations

import asyncio

import pytest

from llmmw import Client, Coalescer, ConfigError, Stack, SyncClient, TTLCache, using
from llmmw.call import Context, Reply
from llmmw.env import Env
from llmmw.keys.identity import namespace_of
from llmmw.stores.base import Match
from llmmw.testing.clock import manual_time
from llmmw.testing.fake import FakeUpstream, ScriptedChunks, chat_call, chat_chunks

STACK = Stack(TTLCache(300), Coalescer())
TAGGED = Context(tags=("t",))


def engine_of(upstream, stack=STACK):
    return stack.bind(upstream, env=Env(seed=1))


def forgetters(engine, call):
    """Every way of forgetting this tagged call of tenant acme."""
    return [
        lambda: engine.invalidate(call),
        lambda: engine.invalidate_tag("t"),
        lambda: engine.invalidate_tenant("acme"),
    ]


def acme(prompt="hello", **fields):
    call = chat_call(prompt, context=Context(tags=("t",), tenant="acme"), **fields)
    return call.replace(namespace=namespace_of("acme"))


@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("stack", [STACK, Stack(TTLCache(300)), Stack(TTLCache(300, sampling="lanes"), Coalescer())])
@manual_time
async def test_invalidation_beats_a_fill_in_flight_and_who_asks_later_does_not_join_it(clock, which, stack):
    upstream = FakeUpstream(latency_s=1, numbered=True)
    async with engine_of(upstream, stack) as engine:
        call = acme().within(sample=0)
        early = asyncio.create_task(engine.call(call))
        await asyncio.sleep(0.4)
        assert forgetters(engine, call)[which]() == 0
        late = asyncio.create_task(engine.call(call))
        await asyncio.sleep(0.1)
        assert [(await early).text, (await late).text] == ["echo: hello #1", "echo: hello #2"]
        assert (await engine.call(call)).text == "echo: hello #2"
        assert forgetters(engine, call)[which]() == 1
        assert (await engine.call(call)).text == "echo: hello #3"


@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("stack", [STACK, Stack(TTLCache(300))])
@manual_time
async def test_invalidation_beats_a_stream_in_flight(clock, which, stack):
    async def streamed(call):
        return [chunk async for chunk in (await engine.call(call)).chunks]

    script = [Reply(chunks=ScriptedChunks(chat_chunks(text), gap_s=0.2)) for text in ("old old", "new new")]
    upstream = FakeUpstream(script)
    async with engine_of(upstream, stack) as engine:
        call = acme(stream=True)
        early = asyncio.create_task(streamed(call))
        await asyncio.sleep(0.5)
        assert forgetters(engine, call)[which]() == 0
        assert await streamed(call) == chat_chunks("new new")
        assert await early == chat_chunks("old old")
        assert await streamed(call) == chat_chunks("new new")
        assert len(upstream.calls) == 2


@manual_time
async def test_invalidation_beats_a_refresh_in_flight(clock):
    upstream = FakeUpstream(latency_s=1, numbered=True)
    async with engine_of(upstream, Stack(TTLCache(10, jitter=0, stale_while_revalidate=60), Coalescer())) as engine:
        call = acme()
        await engine.call(call)
        clock.advance(12)
        assert (await engine.call(call)).stale
        await asyncio.sleep(0.5)
        assert engine.invalidate_tag("t") == 1
        await asyncio.sleep(1)
        assert (await engine.call(call)).text == "echo: hello #3"


@pytest.mark.parametrize("match", [Match("tag", "t"), Match("namespace", "tenant:acme")])
@manual_time
async def test_a_coalescer_without_cache_forgets_its_flights(clock, match):
    upstream = FakeUpstream(latency_s=1, numbered=True)
    async with engine_of(upstream, Stack(Coalescer())) as engine:
        call, other = acme(temperature=0), chat_call("other", temperature=0)
        early = [asyncio.create_task(engine.call(one)) for one in (call, other)]
        await asyncio.sleep(0.5)
        assert engine.discard(match) == 0
        assert {(await engine.call(call)).source, (await early[0]).source} == {"upstream"}
        late = asyncio.create_task(engine.call(other.replace(payload=dict(other.payload))))
        await asyncio.gather(*early, late)
        assert len(upstream.calls) == 4


@manual_time
async def test_only_what_is_meant_is_forgotten(clock):
    upstream = FakeUpstream()
    async with engine_of(upstream) as engine:
        calls = [
            chat_call("a", context=TAGGED),
            chat_call("b", context=Context(tags=("u", "t"))),
            chat_call("c", context=Context(tags=("u",))),
            acme("d").within(tags=()),
            chat_call("e"),
        ]
        for call in calls:
            await engine.call(call)
        assert engine.invalidate_tag("t") == 2
        assert engine.invalidate_tenant("other") == engine.invalidate_tag("tt") == 0
        assert [(await engine.call(call)).source for call in calls] == ["upstream"] * 2 + ["cache"] * 3
        assert engine.invalidate_tenant("acme") == 1
        assert [(await engine.call(call)).source for call in calls[2:]] == ["cache", "upstream", "cache"]


@pytest.mark.parametrize("wrong", ["", None, 3, ["t"]])
def test_what_is_no_tag_or_tenant_is_refused(wrong):
    engine = STACK.bind(FakeUpstream())
    for forget in (engine.invalidate_tag, engine.invalidate_tenant):
        with pytest.raises(ConfigError, match="invalidate_"):
            forget(wrong)
    engine.close()


async def test_a_wrapped_function_forgets_by_tag_and_tenant():
    asked = []

    @STACK.wrap
    async def ask(prompt):
        asked.append(prompt)
        return prompt

    async def all_of_them():
        with using(tags="t"):
            await ask("a")
        with using(tenant="acme"):
            await ask("b")
        await ask("c")

    await all_of_them()
    assert (ask.invalidate_tag("t"), ask.invalidate_tenant("acme"), ask.invalidate_tag("t")) == (1, 1, 0)
    await all_of_them()
    assert asked == ["a", "b", "c", "a", "b"]
    await ask.aclose()


def test_plain_code_forgets_too_while_another_thread_serves():
    asked = []

    @STACK.wrap
    def ask(prompt):
        asked.append(prompt)
        return prompt

    for _ in range(2):
        with using(tags="t"):
            assert ask("a") == "a"
        assert ask.invalidate_tag("t") == 1
    ask.close()
    assert asked == ["a", "a"]


def test_after_the_loop_has_ended_forgetting_still_works():
    asked = []

    @STACK.wrap
    async def ask(prompt):
        asked.append(prompt)
        return prompt

    async def main():
        with using(tags="t"):
            return await ask("a")

    asyncio.run(main())
    assert ask.invalidate_tag("t") == 1
    asyncio.run(main())
    assert asked == ["a", "a"]
    ask.close()


async def test_a_client_forgets_what_its_own_credential_stored():
    url = "http://127.0.0.1:9/v1"
    for make in (lambda: Client(url, "k", stack=STACK, model="m"), lambda: Client(url, stack=STACK, tenant="acme")):
        client = make()
        assert client.requests.namespace == client.requests.chat("m", "hi", {}).namespace != ""
        assert client.invalidate_tenant() == client.invalidate_tenant("acme") == client.invalidate_tag("t") == 0
        await client.aclose()


def test_a_sync_client_has_the_same_methods():
    with SyncClient("http://127.0.0.1:9/v1", "k", stack=STACK, model="m") as client:
        assert client.invalidate_tenant() == client.invalidate_tag("t") == 0

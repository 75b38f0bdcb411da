"""TTLCache: what is stored, what is served, and what is never served."""

from __future__ import annotations

import asyncio
import contextlib
import threading

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmmw import events as ev
from llmmw.call import Call, Context, Item, Reply
from llmmw.env import Env
from llmmw.errors import ConfigError, ConnectionFailed
from llmmw.layers.cache import TTLCache
from llmmw.order import Role
from llmmw.stores.base import Match
from llmmw.stores.memory import MemoryStore
from llmmw.testing.clock import manual_time
from llmmw.testing.fake import FakeUpstream, ScriptedChunks, chat_body, chat_call, chat_chunks, error_reply, sse


class Rig:
    """A bound cache over a fake upstream, with everything it told."""

    def __init__(self, *script, ttl=300, upstream=None, seed=1, **options):
        self.told = []
        self.env = Env(seed=seed, sinks=(self.told.append,))
        self.upstream = upstream or FakeUpstream(script, numbered=True)
        self.upstream.start(self.env)
        self.cache = TTLCache(ttl, **options).bind(self.upstream, self.env)

    async def __call__(self, *args, **fields):
        return await self.cache(chat_call(*args, **fields))

    @property
    def asked(self):
        return len(self.upstream.calls)

    def of(self, kind):
        return [event for event in self.told if type(event) is kind]

    def skipped(self):
        return [event.reason for event in self.of(ev.CacheSkipped)]


async def read(reply):
    return [chunk async for chunk in reply.chunks]


def ok(text="x", **fields):
    return Reply(data=chat_body(text, **fields), headers=(("content-type", "application/json"), ("x-id", "1")))


def body(**changes):
    found = msgspec.json.decode(chat_body("x"))
    return Reply(data=msgspec.json.encode(found | changes))


def choice(finish="stop", **message):
    return body(choices=[{"index": 0, "finish_reason": finish, "message": {"role": "assistant", **message}}])


@manual_time
async def test_cache_01_the_second_call_is_a_hit(clock):
    rig = Rig()
    first, second = await rig(), await rig()
    assert (first.source, second.source, rig.asked) == ("upstream", "cache", 1)
    assert second.body == first.body
    assert (second.usage, second.endpoint) == (first.usage, first.endpoint)
    assert second.headers == (("content-type", "application/json"),)
    assert rig.of(ev.CacheHit) == [ev.CacheHit("memory", first.usage)]
    assert len(rig.of(ev.CacheMiss)) == len(rig.of(ev.CacheStored)) == 1


@manual_time
async def test_cache_07_uncacheable_calls_are_answered_and_counted(clock):
    rig = Rig()
    for value in (float("nan"), {1}, b"x", "\ud800"):
        assert [(await rig(x=value)).source for _ in range(2)] == ["upstream"] * 2
    assert len(rig.skipped()) == 8
    assert not rig.of(ev.CacheMiss)


@manual_time
async def test_cache_09_sampling_decides_who_shares(clock):
    async def answers(sampling, agents, **fields):
        rig = Rig(sampling=sampling)
        return [(await rig(context=Context(agent=agent), **fields)).text for agent in agents]

    assert len(set(await answers("share", "aab"))) == 1
    assert len(set(await answers("lanes", "aab"))) == 3
    assert len(set(await answers("deterministic", "aab"))) == 3
    for sampling in ("share", "lanes", "deterministic"):
        assert len(set(await answers(sampling, "aab", temperature=0))) == 1


@manual_time
async def test_cache_09_a_rerun_with_lanes_replays_the_same_answers_in_any_order(clock):
    rig = Rig(sampling="lanes")

    async def run(agents):
        rig.cache.begin_run()
        found = {}
        for agent in agents:
            found.setdefault(agent, []).append((await rig(context=Context(agent=agent))).text)
        return found

    assert await run("aabb") == await run("baba")
    assert rig.asked == 4


@manual_time
async def test_a_failed_draw_is_drawn_again(clock):
    rig = Rig(error_reply(500), ConnectionFailed("no"), sampling="lanes")
    alice = Context(agent="a")
    assert (await rig(context=alice)).status == 500
    with pytest.raises(ConnectionFailed):
        await rig(context=alice)
    first = await rig(context=alice)
    rig.cache.begin_run()
    assert (await rig(context=alice)).text == first.text


@pytest.mark.parametrize(
    "reply",
    [
        choice("length", content="x"),
        choice("content_filter", content="x"),
        choice(None, content="x"),
        choice(refusal="no", content="x"),
        choice(content=""),
        choice(content=None),
        body(choices=[]),
        body(error={"message": "no"}),
        Reply(data=b"<html>"),
        Reply(data=b'{"choices": ['),
        Reply(data=b"[" * 100_000),
        Reply(native={"no": "bytes"}),
        error_reply(400),
        error_reply(500),
        error_reply(401),
    ],
)
@manual_time
async def test_cache_11_what_is_no_whole_answer_is_not_stored(clock, reply):
    rig = Rig(reply)
    await rig()
    assert (await rig()).source == "upstream"
    assert len(rig.skipped()) == 1


@manual_time
async def test_cache_12_cut_off_tool_arguments_are_not_stored(clock):
    def tool(arguments):
        call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
        return choice("tool_calls", content=None, tool_calls=[call])

    rig = Rig(tool('{"a": '), tool('{"a": 1}'))
    assert [(await rig()).source for _ in range(3)] == ["upstream", "upstream", "cache"]


async def ask_stream(rig, *args, **fields):
    reply = await rig(*args, stream=True, **fields)
    return reply.source, await read(reply)


@manual_time
async def test_streams_are_replayed_with_their_chunk_boundaries_and_usage(clock):
    rig = Rig()
    first = await ask_stream(rig, "one two")
    second = await rig("one two", stream=True)
    assert await read(second) == first[1] == chat_chunks("echo: one two #1")
    assert second.source == "cache"
    assert second.usage.output_tokens == 4
    assert second.chunks.usage == second.usage
    assert second.header("content-type") == "text/event-stream"


@pytest.mark.parametrize(
    ("chunks", "reason"),
    [
        ([b'data: {"choices":[{"index":0,"delta":{"content":"x"}}]}\n\n', b"data: [DONE]\n\n"], "no finish_reason"),
        (chat_chunks("x")[:-1], "no [DONE]"),
        ([*chat_chunks("x")[:1], b"data: {oops\n\n", *chat_chunks("x")[1:]], "an event is not JSON"),
        ([sse({"error": {"message": "no"}}), *chat_chunks("x")], "an error in the stream"),
        ([*chat_chunks("x")[:1], sse({"choices": [{"index": 0, "delta": {}, "finish_reason": "length"}]}),
          b"data: [DONE]\n\n"], "finish_reason 'length'"),
    ],
)  # fmt: skip
@manual_time
async def test_cache_13_unfinished_streams_are_not_stored(clock, chunks, reason):
    rig = Rig(Reply(chunks=ScriptedChunks(chunks)))
    assert (await ask_stream(rig))[1] == chunks
    assert rig.skipped() == [reason]
    assert (await rig()).source == "upstream"


@manual_time
async def test_cache_13_streams_that_fail_or_are_left_early_are_not_stored(clock):
    broken = ScriptedChunks([*chat_chunks("x y")[:1], ConnectionFailed("gone")])
    rig = Rig(Reply(chunks=broken), Reply(chunks=ScriptedChunks(chat_chunks("a b"))))
    with pytest.raises(ConnectionFailed):
        await ask_stream(rig)
    left = await rig(stream=True)
    await left.chunks.__anext__()
    await left.chunks.aclose()
    assert rig.skipped() == ["stream failed", "stream closed"]
    assert (await rig()).source == "upstream"


@manual_time
async def test_a_stream_left_after_its_terminator_is_whole(clock):
    rig = Rig()
    reply = await rig(stream=True)
    async for chunk in reply.chunks:
        if b"[DONE]" in chunk:
            break
    await reply.chunks.aclose()
    assert (await rig(stream=True)).source == "cache"


@manual_time
async def test_cache_14_a_recorded_stream_answers_a_plain_call(clock):
    rig = Rig()
    await ask_stream(rig, "one two")
    for _ in range(2):
        plain = await rig("one two")
        assert (plain.source, plain.text) == ("cache", "echo: one two #1")
        assert plain.body["usage"]["completion_tokens"] == 4
        assert plain.body["choices"][0]["finish_reason"] == "stop"
        assert plain.header("content-type") == "application/json"


@manual_time
async def test_cache_14_a_plain_answer_answers_a_streamed_call(clock):
    rig = Rig()
    plain = await rig("one two")
    source, chunks = await ask_stream(rig, "one two", stream_options={"include_usage": True})
    assert source == "cache"
    events = [msgspec.json.decode(chunk[6:]) for chunk in chunks[:-1]]
    assert "".join(e["choices"][0]["delta"].get("content", "") for e in events if e["choices"]) == plain.text
    assert events[-1]["usage"] == plain.body["usage"]
    assert chunks[-1] == b"data: [DONE]\n\n"
    assert not any("usage" in event for event in events[:-1])


@manual_time
async def test_cache_14_what_cannot_be_converted_without_loss_is_asked_again(clock):
    rig = Rig(body(choices=[{"index": 0, "finish_reason": "stop", "message": {"content": "x"}, "logprobs": {"a": 1}}]))
    await rig()
    assert (await rig(stream=True)).source == "upstream"


@manual_time
async def test_usage_events_go_to_those_who_asked_for_them(clock):
    rig = Rig()
    wants = {"stream_options": {"include_usage": True}}
    _, recorded = await ask_stream(rig, **wants)
    source, without = await ask_stream(rig)
    assert source == "cache"
    assert without == [chunk for chunk in recorded if b'"usage"' not in chunk]
    silent = [chunk for chunk in chat_chunks("x") if b'"usage"' not in chunk]
    rig = Rig(Reply(chunks=ScriptedChunks(silent)))
    await ask_stream(rig)
    assert (await ask_stream(rig))[0] == "cache"
    assert (await ask_stream(rig, **wants))[0] == "upstream"


@manual_time
async def test_cache_15_a_changed_hit_reaches_nobody_else(clock):
    rig = Rig()
    await rig()
    (await rig()).body["choices"][0]["message"]["content"] = "changed"
    assert (await rig()).text == "echo: hello #1"


@manual_time
async def test_cache_16_an_item_too_large_is_skipped_and_others_stay(clock):
    rig = Rig(ok("small"), ok("x" * 20_000), max_bytes=100_000)
    await rig("a")
    await rig("b")
    assert [(await rig(prompt)).source for prompt in "ab"] == ["cache", "upstream"]
    assert rig.skipped() == ["too large or invalidated"]


@manual_time
async def test_a_stream_too_large_is_not_kept_in_memory_while_it_passes(clock):
    chunks = [sse({"choices": [{"index": 0, "delta": {"content": "x" * 5_000}}]})] * 10
    rig = Rig(Reply(chunks=ScriptedChunks(chunks)), max_bytes=100_000)
    assert (await ask_stream(rig))[1] == chunks
    assert rig.skipped() == ["too large"]


@manual_time
async def test_cache_17_cost_is_service_time_without_queueing(clock):
    async def slow_queue(call):
        await asyncio.sleep(60)
        return await upstream(call)

    upstream = FakeUpstream(latency_s=2)
    env = Env(seed=1)
    upstream.start(env)
    hits = []
    env.add_sink(lambda event: hits.append(event.saved_s) if isinstance(event, ev.CacheHit) else None)
    cache = TTLCache(300).bind(slow_queue, env)
    await cache(chat_call())
    await cache(chat_call())
    assert hits == [pytest.approx(2)]


@manual_time
async def test_the_cost_of_a_stream_is_the_time_it_ran(clock):
    rig = Rig(Reply(chunks=ScriptedChunks(chat_chunks("a b c"), gap_s=1.0)))
    await ask_stream(rig)
    await ask_stream(rig)
    assert rig.of(ev.CacheHit)[0].saved_s == pytest.approx(7)


@manual_time
async def test_an_entry_lives_for_its_ttl(clock):
    rig = Rig(ttl="10s", jitter=0)
    await rig()
    clock.advance(9.9)
    assert (await rig()).source == "cache"
    clock.advance(0.2)
    assert (await rig()).source == "upstream"


@manual_time
async def test_cache_19_lifetimes_are_spread_by_ten_percent(clock):
    rig = Rig(ttl=100)
    for index in range(400):
        await rig(str(index))
    ends = sorted(resident.expires - clock.monotonic() for resident in rig.cache._store.memory._entries.values())
    assert 90 <= ends[0] < 91
    assert 109 < ends[-1] <= 110


def hot_rig(clock, **options):
    """An entry of cost 10 s, 1 s before its end, with early refresh due at once."""
    rig = Rig(jitter=0, ttl=100, early_refresh=True, upstream=FakeUpstream(latency_s=10, numbered=True), **options)
    rig.env.rng.random = lambda: 0.9  # -ln(0.1) * 10 s = 23 s ahead
    return rig


@manual_time
async def test_cache_20_one_refresh_for_many_readers_and_nobody_waits(clock):
    rig = hot_rig(clock)
    await rig()
    clock.advance(99)
    began = clock.monotonic()
    replies = await asyncio.gather(*(rig() for _ in range(200)))
    assert clock.monotonic() == began
    assert {reply.source for reply in replies} == {"cache"}
    await asyncio.sleep(11)
    assert (rig.asked, rig.upstream.peak) == (2, 1)
    assert (await rig()).text == "echo: hello #2"
    await rig.cache.aclose()


@manual_time
async def test_cache_21_a_failed_refresh_is_tried_again_and_the_old_value_lives_on(clock):
    rig = hot_rig(clock)
    await rig()
    rig.upstream._script = [ConnectionFailed("no"), error_reply(500)]
    clock.advance(95)
    for _ in range(2):
        assert (await rig()).text == "echo: hello #1"
        clock.advance(-9)
        await asyncio.sleep(10.5)
    assert rig.asked == 3
    assert "refresh failed: ConnectionFailed" in rig.skipped()
    await rig.cache.aclose()


@manual_time
async def test_an_answer_far_from_its_end_is_not_refreshed(clock):
    rig = hot_rig(clock)
    await rig()
    await rig()
    assert rig.asked == 1
    assert not rig.cache._filler._refreshes


@manual_time
async def test_peek_leaves_refreshing_to_the_loop(clock):
    rig = hot_rig(clock)
    call = chat_call()
    await rig.cache(call)
    assert rig.cache.peek(call).source == "cache"
    clock.advance(99)
    assert rig.cache.peek(call) is None


@manual_time
async def test_stale_while_revalidate_serves_the_old_answer_and_fetches_a_new_one(clock):
    rig = Rig(ttl=10, jitter=0, stale_while_revalidate=5)
    await rig()
    clock.advance(12)
    old = await rig()
    assert (old.text, old.stale, old.source) == ("echo: hello #1", True, "cache")
    await asyncio.sleep(0.1)
    assert (await rig()).text == "echo: hello #2"
    clock.advance(16)
    assert (await rig()).text == "echo: hello #3"
    assert rig.of(ev.CacheHit)[0].stale


@manual_time
async def test_a_streamed_refresh_is_read_to_its_end(clock):
    rig = Rig(ttl=10, jitter=0, stale_while_revalidate=5)
    await ask_stream(rig)
    clock.advance(12)
    await ask_stream(rig)
    await asyncio.sleep(1)
    assert (await ask_stream(rig))[1] == chat_chunks("echo: hello #2")


@manual_time
async def test_a_refresh_ends_with_the_cache(clock):
    rig = hot_rig(clock)
    await rig()
    clock.advance(99)
    await rig()
    await asyncio.sleep(0)
    await rig.cache.aclose()
    assert rig.upstream.cancelled == 1
    rig.cache.rehome()


@manual_time
async def test_cache_22_stale_if_error_covers_outages_and_never_refusals(clock):
    rig = Rig(ttl=10, jitter=0, stale_if_error=60)
    await rig()
    clock.advance(20)
    for outage in (error_reply(503), ConnectionFailed("no")):
        rig.upstream._script = [outage]
        reply = await rig()
        assert (reply.text, reply.stale, reply.source) == ("echo: hello #1", True, "cache")
    for refusal in (401, 400):
        rig.upstream._script = [error_reply(refusal)]
        assert (await rig()).status == refusal
    rig.upstream._script = [RuntimeError("a user's own")]
    clock.advance(60)
    with pytest.raises(RuntimeError):
        await rig()


@manual_time
async def test_cache_23_a_revoked_key_gets_no_hits_until_it_works_again(clock):
    rig = Rig(ok("a"), error_reply(401), error_reply(401), ok("b"), auth_check=True)
    await rig("a")
    assert (await rig("b")).status == 401
    assert rig.cache.peek(chat_call("a")) is None
    assert (await rig("a")).status == 401
    assert (await rig("b")).ok
    assert (await rig("a")).source == "cache"


@manual_time
async def test_cache_24_a_hit_asks_nothing_inside(clock):
    rig = Rig()
    await rig()
    rig.upstream._script = [AssertionError("asked")]
    assert (await rig()).source == "cache"


@manual_time
async def test_refusals_are_kept_only_on_request_and_briefly(clock):
    rig = Rig(error_reply(404), error_reply(429), negative_ttl="20s", jitter=0)
    assert [(await rig("a")).source for _ in range(2)] == ["upstream", "cache"]
    assert (await rig("a", stream=True)).status == 404
    clock.advance(21)
    assert (await rig("a")).status == 429
    assert (await rig("a")).ok


@manual_time
async def test_a_function_is_stored_by_its_encoded_form(clock):
    rig = Rig(Reply(data=b'j"x"', native=object()), Reply(native=object()))
    call = Call("function", "", {"prompt": "x"}, target="m.f")
    await rig.cache(call)
    hit = await rig.cache(call)
    assert (hit.data, hit.native, hit.source) == (b'j"x"', None, "cache")
    await rig.cache(call.replace(payload={"prompt": "y"}))
    assert rig.skipped() == ["no encoded form"]


@manual_time
async def test_a_generator_is_stored_item_by_item(clock):
    items = [Item(object(), b"j1"), Item(object(), b"j2")]
    rig = Rig(*(Reply(chunks=ScriptedChunks(found)) for found in (items, [*items, Item(3)], [*items, b"raw"])))
    calls = [Call("function", "", {"prompt": prompt}, stream=True, target="m.f") for prompt in "abc"]
    for call in calls:
        await read(await rig.cache(call))
    hit = await rig.cache(calls[0])
    assert await read(hit) == [Item(None, b"j1"), Item(None, b"j2")]
    assert rig.skipped() == ["no encoded form"] * 2


@manual_time
async def test_a_generator_left_early_is_not_stored(clock):
    rig = Rig(Reply(chunks=ScriptedChunks([Item(1, b"j1"), Item(2, b"j2")])))
    reply = await rig.cache(Call("function", "", {}, stream=True))
    await reply.chunks.__anext__()
    await reply.chunks.aclose()
    assert rig.skipped() == ["stream closed"]


@manual_time
async def test_unknown_operations_pass_through(clock):
    rig = Rig()
    call = chat_call().replace(op="/audio/speech")
    assert [(await rig.cache(call)).source for _ in range(2)] == ["upstream"] * 2
    assert rig.skipped() == ["unknown operation"] * 2


@manual_time
async def test_inner_layers_get_the_key_and_where_the_answer_goes(clock):
    rig = Rig(sampling="deterministic")
    await rig(temperature=0)
    await rig()
    first, second = rig.upstream.calls
    assert (len(first.key), second.key) == (32, b"")
    assert first.fill is not None
    assert second.fill is None


@manual_time
async def test_an_answer_is_stored_once_by_whoever_owns_it(clock):
    answers = []

    async def flight(call):
        answers.append(call.fill.answered(ok("first")))
        return answers[0].replace(source="coalesced")

    told = []
    cache = TTLCache(10).bind(flight, Env(sinks=(told.append,)))
    await cache(chat_call())
    await cache(chat_call())
    assert [type(event) for event in told] == [ev.CacheMiss, ev.CacheStored, ev.CacheHit]

    async def follower(call):
        return ok("first").replace(source="coalesced")

    cache = TTLCache(10).bind(follower, Env(sinks=(told.append,)))
    del told[:]
    await cache(chat_call())
    assert [type(event) for event in told] == [ev.CacheMiss]


@manual_time
async def test_invalidation_beats_a_fill_in_flight(clock):
    rig = Rig(upstream=FakeUpstream(latency_s=1, numbered=True))
    call = chat_call()
    fill = asyncio.create_task(rig.cache(call))
    other = asyncio.create_task(rig.cache(chat_call("other")))
    await asyncio.sleep(0.5)
    assert rig.cache.invalidate(call) == 0
    await asyncio.gather(fill, other)
    assert (await rig.cache(chat_call("other"))).source == "cache"
    assert (await rig.cache(call)).source == "upstream"
    assert rig.cache.invalidate(call) == 1
    assert (await rig.cache(call)).source == "upstream"


@manual_time
async def test_more_invalidations_than_are_remembered_drop_an_older_fill(clock):
    rig = Rig(upstream=FakeUpstream(latency_s=1))
    fill = asyncio.create_task(rig())
    await asyncio.sleep(0.5)
    for index in range(300):
        rig.cache.invalidate(chat_call(str(index)))
    await fill
    assert (await rig()).source == "upstream"


@manual_time
async def test_invalidation_by_request_covers_its_lanes_and_by_namespace_and_tag_everything(clock):
    rig = Rig(sampling="lanes")
    for agent in "ab":
        await rig(context=Context(agent=agent))
    await rig("det", temperature=0)
    assert rig.cache.invalidate(chat_call()) == 2
    assert rig.cache.invalidate(chat_call("det", temperature=0)) == 1
    rig = Rig()
    await rig.cache(chat_call("a").replace(namespace="n"))
    await rig.cache(chat_call("b", context=Context(tags=("t",))))
    await rig.cache(chat_call("c"))
    assert rig.cache.discard(Match("namespace", "n")) == 1
    assert rig.cache.discard(Match("tag", "t")) == 1
    assert rig.cache.invalidate(chat_call(x=float("nan"))) == 0
    assert rig.cache.gauges()["entries"] == 1


@manual_time
async def test_modes_switch_reading_and_writing(clock, monkeypatch):
    for mode, expected in {"on": ["upstream", "cache"], "read": ["upstream"] * 2, "write": ["upstream"] * 2}.items():
        rig = Rig(mode=mode)
        assert [(await rig()).source for _ in range(2)] == expected
        assert rig.cache.gauges()["mode"] == mode
    rig = Rig(mode="write")
    await rig()
    rig.cache._reads = True
    assert (await rig()).text == "echo: hello #1"
    rig = Rig(mode="off")
    assert [(await rig()).source for _ in range(2)] == ["upstream"] * 2
    assert rig.cache.peek(chat_call()) is None
    assert {type(event) for event in rig.told} == {ev.UpstreamStarted, ev.UpstreamEnded}
    monkeypatch.setenv("LLMMW_CACHE", "OFF")
    assert Rig().cache.gauges()["mode"] == "off"
    monkeypatch.setenv("LLMMW_CACHE", "perhaps")
    with pytest.raises(ConfigError, match="LLMMW_CACHE"):
        Rig()


@manual_time
async def test_peek_answers_from_memory_on_any_thread(clock):
    rig = Rig()
    call = chat_call()
    assert rig.cache.peek(call) is None
    await rig.cache(call)
    found = []
    threads = [threading.Thread(target=lambda: found.append(rig.cache.peek(call))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [reply.text for reply in found] == ["echo: hello #1"] * 4
    assert rig.of(ev.CacheHit) == []  # told by whoever gives the answer to somebody
    assert rig.cache.peek(chat_call(x={1})) is None


@manual_time
async def test_peek_in_lanes_takes_no_draw_unless_it_hits(clock):
    rig = Rig(sampling="lanes")
    call = chat_call(context=Context(agent="a"))
    assert rig.cache.peek(call) is None
    first = await rig.cache(call)
    rig.cache.begin_run()
    assert rig.cache.peek(call).text == first.text
    assert rig.cache.peek(call) is None


@manual_time
async def test_an_entry_that_cannot_be_had_in_the_wanted_form_is_no_hit_for_peek(clock):
    rig = Rig(Reply(chunks=ScriptedChunks([c for c in chat_chunks("x") if b'"usage"' not in c])))
    await ask_stream(rig)
    assert rig.cache.peek(chat_call()) is None


@pytest.mark.parametrize(
    "options",
    [
        {"ttl": 0}, {"ttl": "soon"}, {"ttl": None}, {"sampling": "all"}, {"mode": "auto"}, {"max_bytes": 0},
        {"max_entries": 0}, {"disk_bytes": 1}, {"jitter": 0.6}, {"jitter": -1}, {"negative_ttl": 31},
        {"stale_if_error": -1}, {"size": 3},
    ],
)  # fmt: skip
def test_settings_that_cannot_work_are_refused(options):
    with pytest.raises(ConfigError, match="TTLCache"):
        TTLCache(**{"ttl": 300} | options)


def test_settings_are_values():
    assert TTLCache("5m") == TTLCache(300)
    assert TTLCache(300, "x") != TTLCache(300)
    assert TTLCache.role is Role.CACHE
    assert "ttl=300.0" in repr(TTLCache(300))


def message_stream(*deltas, stop="end_turn"):
    usage = {"input_tokens": 3, "output_tokens": 1}
    yield sse({"type": "message_start", "message": {"role": "assistant", "content": [], "usage": usage}})
    yield sse({"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}})
    for text in deltas:
        yield sse({"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": text}})
    yield sse({"type": "message_delta", "delta": {"stop_reason": stop}, "usage": {"output_tokens": 9}})
    yield sse({"type": "message_stop"})


@manual_time
async def test_cache_14_anthropic_and_responses_streams_answer_plain_calls_and_not_the_reverse(clock):
    done = {"status": "completed", "output": [{"content": [{"text": "x"}]}], "usage": {"input_tokens": 1}}
    streams = {
        "messages": list(message_stream("a", "b")),
        "responses": [sse({"type": "response.completed", "response": done})],
    }
    for op, chunks in streams.items():
        rig = Rig(Reply(chunks=ScriptedChunks(chunks)), Reply(chunks=ScriptedChunks(chunks)))
        call = chat_call().replace(op=op)
        await read(await rig.cache(call.replace(stream=True)))
        plain = await rig.cache(call)
        assert (plain.source, plain.text) == ("cache", "ab" if op == "messages" else "x")
        plain_first = Rig(Reply(data=plain.data), Reply(chunks=ScriptedChunks(chunks)))
        await plain_first.cache(call)
        assert (await plain_first.cache(call)).source == "cache"
        assert (await plain_first.cache(call.replace(stream=True))).source == "upstream"


@manual_time
async def test_streams_that_make_no_sense_are_not_stored(clock):
    senseless = [
        sse({"choices": [{"index": 0, "delta": {"content": 7}, "finish_reason": "stop"}]}),
        b"data: [DONE]\n\n",
    ]
    numbers = [*chat_chunks("x")[:1], *senseless]
    rig = Rig(
        Reply(chunks=ScriptedChunks(numbers)),
        Reply(chunks=ScriptedChunks(chat_chunks("x")), status=500),
        Reply(chunks=ScriptedChunks(chat_chunks("x")), status=404),
        negative_ttl=10,
    )
    for _ in range(3):
        await ask_stream(rig)
    assert rig.skipped() == ["a stream that cannot be judged", "refused", "refused"]


@manual_time
async def test_reasons_that_a_server_invents_are_counted_as_one(clock):
    rig = Rig(*(choice(f"because {index}", content="x") for index in range(3)), choice("length", content="x"))
    for _ in range(4):
        await rig()
    assert rig.skipped() == ["unknown finish_reason"] * 3 + ["finish_reason 'length'"]


@manual_time
async def test_refusals_are_kept_thirty_seconds_at_most_whatever_the_jitter(clock):
    rig = Rig(error_reply(404), negative_ttl=30, jitter=0.5)
    rig.env.rng.random = lambda: 1.0
    await rig()
    clock.advance(29.9)
    assert (await rig()).source == "cache"
    clock.advance(0.2)
    assert (await rig()).source == "upstream"


@manual_time
async def test_a_refusal_that_another_process_keeps_is_not_served_where_none_are_kept(clock):
    rig = Rig(error_reply(404), negative_ttl=30)
    await rig()
    assert (await rig()).status == 404
    rig.cache._filler._negative_s = 0.0
    assert rig.cache.peek(chat_call()) is None
    assert (await rig()).ok


@manual_time
async def test_cache_21_a_refresh_that_is_refused_does_not_replace_the_answer(clock):
    rig = Rig(ok("good"), error_reply(404), ttl=10, jitter=0, stale_while_revalidate=50, negative_ttl=20)
    await rig()
    clock.advance(12)
    assert (await rig()).stale
    await asyncio.sleep(0.1)
    assert rig.asked == 2
    assert (await rig()).text == "good"
    assert "refused" in rig.skipped()


@manual_time
async def test_where_nothing_is_stored_nothing_is_refreshed(clock):
    rig = Rig(ttl=10, jitter=0, stale_while_revalidate=50, mode="write")
    await rig()
    rig.cache._reads, rig.cache._filler._stores = True, False
    clock.advance(12)
    assert (await rig()).stale
    await asyncio.sleep(0.1)
    assert rig.asked == 1


@pytest.mark.parametrize(("reply", "hits"), [
    (error_reply(401), False),
    (error_reply(403), False),
    (error_reply(401).replace(source="batch"), False),
    (error_reply(401).replace(fallback=True), True),
    (error_reply(404), True),
])  # fmt: skip
@manual_time
async def test_cache_23_whose_credential_was_refused_closes_its_namespace_and_no_other(clock, reply, hits):
    rig = Rig(ok("a"), reply, auth_check=True)
    await rig("a")
    await rig("b")
    assert (rig.cache.peek(chat_call("a")) is not None) is hits
    elsewhere = chat_call("a").replace(namespace="other")
    await rig.cache(elsewhere)
    assert rig.cache.peek(elsewhere) is not None


@manual_time
async def test_cache_23_without_auth_check_a_refused_credential_changes_nothing(clock):
    rig = Rig(ok("a"), error_reply(401))
    await rig("a")
    await rig("b")
    assert (await rig("a")).source == "cache"


@manual_time
async def test_cache_15_a_request_changed_on_its_way_is_not_stored_under_its_old_key(clock):
    rig = Rig(upstream=FakeUpstream(latency_s=1, numbered=True))
    for stream in (False, True):
        call = chat_call(f"alice {stream}", stream=stream)
        asking = asyncio.create_task(rig.cache(call))
        await asyncio.sleep(0.5)
        call.payload["messages"].append({"role": "user", "content": "and now bob"})
        reply = await asking
        if stream:
            await read(reply)
        assert (await rig(f"alice {stream}", stream=stream)).source == "upstream"
        await asyncio.sleep(2)
    assert rig.skipped() == ["request changed meanwhile"] * 2


@manual_time
async def test_cache_15_a_request_that_lost_its_form_on_the_way_is_not_stored_either(clock):
    rig = Rig(upstream=FakeUpstream(latency_s=1, numbered=True))
    call = chat_call()
    asking = asyncio.create_task(rig.cache(call))
    await asyncio.sleep(0.5)
    call.payload["messages"].append({"role": "user", "content": {1}})
    assert (await asking).ok
    assert rig.skipped() == ["request changed meanwhile"]


@manual_time
async def test_a_stale_answer_in_place_of_an_error_is_the_agents_draw(clock):
    rig = Rig(ttl=10, jitter=0, stale_if_error=60, sampling="lanes")
    alice = Context(agent="a")
    first, second = await rig(context=alice), await rig(context=alice)
    rig.cache.begin_run()
    clock.advance(20)
    rig.upstream._script = [error_reply(503), ConnectionFailed("no")]
    assert [(await rig(context=alice)).text for _ in range(2)] == [first.text, second.text]


@manual_time
async def test_a_refused_stream_that_breaks_gives_its_draw_back_once(clock):
    broken = Reply(chunks=ScriptedChunks([b"x", ConnectionFailed("gone")]), status=404)
    rig = Rig(broken, sampling="lanes", negative_ttl=10)
    alice = Context(agent="a")
    reply = await rig(stream=True, context=alice)
    with pytest.raises(ConnectionFailed):
        await read(reply)
    assert len({(await rig(context=alice)).text for _ in range(3)}) == 3


FUZZ = [
    b"data: [DONE]\n\n", sse({"choices": [{"index": "x", "delta": 3}]}), sse({"choices": {"a": 1}}), sse([1]),
    sse({"choices": [{"index": [], "delta": {"tool_calls": [{"index": {}, "function": {"arguments": 5}}]}}]}),
    sse({"choices": [{"finish_reason": ["stop"], "delta": {"content": ["a"]}}]}), b"data: {\n\n", b"\xff\n", b": x\n\n",
    sse({"type": "message_start", "message": {"usage": "x"}}), sse({"type": "content_block_delta", "index": "a"}),
    sse({"type": "content_block_delta", "index": None, "delta": {"type": "text_delta", "text": 3}}),
    sse({"type": "message_delta", "delta": {"stop_reason": {}}, "usage": [1]}), sse({"type": "message_stop"}),
    sse({"type": "response.completed", "response": {"output": [{"type": [], "content": 3, "status": {}}]}}),
    sse({"choices": [{"index": 0, "delta": {"content": "x"}, "finish_reason": "stop"}]}),
]  # fmt: skip


@settings(max_examples=200, derandomize=True, deadline=None)
@given(st.sampled_from(["chat", "complete", "messages", "responses", "embed", "function"]),
       st.lists(st.sampled_from(FUZZ), max_size=5), st.booleans())  # fmt: skip
def test_cache_13_whatever_a_server_streams_storing_it_never_raises(op, chunks, stream):
    from llmmw.stores.record import Making, NotStorable, play, record_stream

    call = chat_call(stream=True).replace(op=op)
    with contextlib.suppress(NotStorable):
        entry = record_stream(call, Reply(), chunks, Reply().usage, Making(b"", 0.0, 1.0, 0.0))
        play(entry, call.replace(stream=stream))


class Denied(Exception):
    """As SDKs raise it."""

    status_code = 401


@manual_time
async def test_cache_23_an_sdk_within_a_function_that_was_refused_closes_the_namespace_too(clock):
    rig = Rig(ok("a"), Denied(), ok("b"), auth_check=True)
    await rig("a")
    with pytest.raises(Denied):
        await rig("b")
    assert rig.cache.peek(chat_call("a")) is None
    assert (await rig("b")).ok
    assert (await rig("a")).source == "cache"


@manual_time
async def test_no_refusal_is_served_stale(clock):
    rig = Rig(error_reply(404), negative_ttl=10, jitter=0, stale_while_revalidate=100, stale_if_error=100)
    await rig()
    clock.advance(11)
    rig.upstream._script = [error_reply(503)]
    assert (await rig()).status == 503
    assert (await rig()).ok


@manual_time
async def test_cache_20_a_reader_on_another_thread_never_starts_a_refresh(clock):
    rig = hot_rig(clock)
    call = chat_call()
    await rig.cache(call)
    clock.advance(99)
    dice = iter([0.0] + [0.9] * 99)
    rig.env.rng.random = lambda: next(dice)
    found = []
    reader = threading.Thread(target=lambda: found.append(rig.cache.peek(call)))
    reader.start()
    reader.join()
    assert [reply.source for reply in found] == ["cache"]
    assert not rig.cache._filler._refreshes


@manual_time
async def test_a_call_cancelled_while_the_disk_is_read_gives_its_draw_back(clock):
    rig = Rig(sampling="lanes")
    alice = Context(agent="a")
    first = await rig(context=alice)
    rig.cache.begin_run()

    class Slow:
        max_item_bytes = 0

        async def get(self, key):
            await asyncio.sleep(9)

    store, rig.cache._store.backing = rig.cache._store, Slow()
    memory, store.memory = store.memory, MemoryStore(1000, 1)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1):
            await rig(context=alice)
    store.memory, store.backing = memory, None
    assert (await rig(context=alice)).text == first.text

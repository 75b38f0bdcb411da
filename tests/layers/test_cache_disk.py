"""TTLCache with a directory: answers outlive the engine."""

from __future__ import annotations

import pytest

from llmmw import events as ev
from llmmw.call import Context
from llmmw.env import Env, SystemClock
from llmmw.errors import ConfigError
from llmmw.layers.cache import TTLCache
from llmmw.testing.fake import FakeUpstream, chat_call, chat_chunks


@pytest.fixture
def place(tmp_path):
    tmp_path.chmod(0o700)
    return tmp_path / "cache"


async def run(*calls, **options):
    """The sources of the answers to these calls, by a cache of their own."""
    told = []
    cache = TTLCache(300, **options).bind(FakeUpstream(), Env(sinks=(told.append,)))
    sources = []
    for call in calls:
        reply = await cache(call)
        sources.append(reply.source)
        if reply.chunks is not None:
            assert [chunk async for chunk in reply.chunks] == chat_chunks("echo: hello")
    await cache.aclose()
    hits = [event.tier for event in told if isinstance(event, ev.CacheHit)]
    return sources, hits


async def test_answers_outlive_the_engine_and_move_to_memory(place):
    assert await run(chat_call(), directory=place) == (["upstream"], [])
    assert await run(chat_call(), chat_call(), directory=str(place)) == (["cache", "cache"], ["disk", "memory"])
    streamed = chat_call(stream=True, temperature=0)
    assert await run(streamed, directory=place) == (["upstream"], [])
    assert await run(streamed, streamed, directory=place) == (["cache"] * 2, ["disk", "memory"])


async def test_the_directory_may_come_from_the_environment_and_an_argument_wins(place, monkeypatch):
    monkeypatch.setenv("LLMMW_CACHE_DIR", str(place))
    await run(chat_call())
    assert (await run(chat_call()))[1] == ["disk"]
    assert (await run(chat_call(), directory=place / "other"))[0] == ["upstream"]
    assert (await run(chat_call(), mode="off"))[0] == ["upstream"]


async def test_lanes_are_replayed_by_the_next_process(place):
    calls = [chat_call(context=Context(agent=agent)) for agent in "aab"]
    assert (await run(*calls, directory=place, sampling="lanes"))[0] == ["upstream"] * 3
    assert (await run(*reversed(calls), directory=place, sampling="lanes"))[0] == ["cache"] * 3


async def test_an_invalidated_answer_is_gone_for_the_next_process_too(place):
    await run(chat_call(), directory=place)
    cache = TTLCache(300, directory=place).bind(FakeUpstream(), Env())
    cache.invalidate(chat_call())
    assert (await cache(chat_call())).source == "upstream"
    cache.invalidate(chat_call())
    await cache.aclose()
    assert (await run(chat_call(), directory=place))[0] == ["upstream"]


async def test_disk_01_neither_prompt_nor_credential_reaches_the_disk(place):
    call = chat_call("my secret prompt").replace(native={"authorization": "Bearer sk-123"})
    upstream = FakeUpstream()
    cache = TTLCache(300, directory=place).bind(upstream, Env())
    await cache(call)
    await cache.aclose()
    written = b"".join(path.read_bytes() for path in place.iterdir())
    assert b"sk-123" not in written
    assert written.count(b"my secret prompt") == written.count(b"echo: my secret prompt")


async def test_an_unusable_directory_costs_a_warning_and_no_call(place):
    place.write_text("in the way")
    told = []
    cache = TTLCache(300, directory=place).bind(FakeUpstream(), Env(sinks=(told.append,)))
    assert [(await cache(chat_call())).source for _ in range(2)] == ["upstream", "cache"]
    await cache.aclose()
    assert [event.kind for event in told if isinstance(event, ev.Warned)] == ["cache: refused"]


class Plain:
    """A codec that hides nothing, under any name."""

    def __init__(self, name):
        self.name = name

    def seal(self, data):
        return data

    def open(self, data):
        return data


@pytest.mark.parametrize("name", ["", None, 7, b"aes", "n" * 256, "ü" * 128])
def test_a_codec_needs_a_name_that_can_be_told_from_none(name):
    with pytest.raises(ConfigError, match="1 to 255 bytes"):
        TTLCache(300, codec=Plain(name))


async def test_answers_are_read_only_under_the_codec_that_wrote_them_and_stay(place):
    one, other = Plain("one"), Plain("other")
    assert (await run(chat_call(), directory=place, codec=one))[0] == ["upstream"]
    assert (await run(chat_call(), directory=place, codec=other, mode="read"))[0] == ["upstream"]
    assert (await run(chat_call(), directory=place, mode="read"))[0] == ["upstream"]
    assert (await run(chat_call(), directory=place, codec=one))[0] == ["cache"]


@pytest.mark.parametrize(("ttl", "expected"), [(300, "cache"), (1, "upstream")])
async def test_a_shorter_lifetime_rules_over_what_was_stored_under_a_longer_one(place, ttl, expected):
    await run(chat_call(), directory=place)
    told = []
    env = Env(clock=Later(5), sinks=(told.append,))
    cache = TTLCache(ttl, directory=place).bind(FakeUpstream(), env)
    assert (await cache(chat_call())).source == expected
    await cache.aclose()


class Later(SystemClock):
    """The machine's clock, some seconds on."""

    def __init__(self, seconds):
        self._seconds = seconds

    def wall(self):
        return super().wall() + self._seconds

"""The httpx and httpx2 clients over a stack, against a scripted endpoint; both libraries run the same tests."""

from __future__ import annotations

import asyncio
import importlib
import sys
import threading

import httpx
import httpx2
import pytest

import llmmw
from llmmw import Coalescer, Retry, Stack, TTLCache
from llmmw.call import Item
from llmmw.errors import (
    CircuitOpen,
    ConfigError,
    ConnectionFailed,
    MissingExtra,
    ProtocolError,
    RateLimited,
    StatusError,
    StreamInterrupted,
    TruncatedStream,
    UpstreamTimeout,
)
from llmmw.testing.fake import FakeUpstream, Reply, ScriptedChunks, chat_body, chat_chunks, error_reply

URL = "http://fake.test/v1/chat/completions"
CACHED = Stack(TTLCache(300), Coalescer())


def asking(prompt="hi", **fields):
    return {"model": "m", "messages": [{"role": "user", "content": prompt}], **fields}


@pytest.fixture(params=["httpx", "httpx2"])
def lib(request):
    return {"httpx": httpx, "httpx2": httpx2}[request.param]


@pytest.fixture
def connect(lib):
    name = f"{lib.__name__}_client"

    def make(upstream, stack=None, **options):
        return getattr(llmmw, name)(stack or Stack(), endpoint=upstream, **options)

    return make


@pytest.fixture
def connect_sync(lib):
    name = f"{lib.__name__}_sync_client"

    def make(upstream, stack=None, **options):
        return getattr(llmmw, name)(stack or Stack(), endpoint=upstream, **options)

    return make


def streaming(chunks):
    return Reply(chunks=ScriptedChunks(chunks), headers=(("content-type", "text/event-stream"),))


async def test_a_hit_says_where_it_comes_from(connect):
    upstream = FakeUpstream()
    async with connect(upstream, CACHED, base_url="http://fake.test/v1/") as client:
        replies = [await client.post("chat/completions", json=asking()) for _ in range(2)]
        assert [reply.headers["x-llmmw-source"] for reply in replies] == ["upstream", "cache"]
        assert replies[0].content == replies[1].content
        assert replies[1].json()["choices"][0]["message"]["content"] == "echo: hi"
        assert client.get_performance_stats()["cache_hits"] == 1
    assert upstream.closed
    assert client.engine.closed
    assert len(upstream.calls) == 1


async def test_a_client_is_the_librarys_own_class(lib, connect, connect_sync):
    client = connect(FakeUpstream())
    assert isinstance(client, lib.AsyncClient)
    await client.aclose()
    sync = connect_sync(FakeUpstream())
    assert isinstance(sync, lib.Client)
    await asyncio.to_thread(sync.close)
    assert sync.engine.closed


@pytest.mark.parametrize(
    ("error", "status"),
    [(RateLimited("no", retry_after_s=3), 429), (CircuitOpen("no"), 503), (ProtocolError("no"), 502)],
)
async def test_refusals_are_responses(connect, error, status):
    async with connect(FakeUpstream([error])) as client:
        reply = await client.post(URL, json=asking())
    assert (reply.status_code, reply.headers["x-should-retry"]) == (status, "false")
    assert reply.headers.get("retry-after") == ("3" if status == 429 else None)
    assert reply.json()["error"]["message"] == "llmmw: no"


@pytest.mark.parametrize(
    ("error", "name"), [(UpstreamTimeout("slow"), "ReadTimeout"), (ConnectionFailed("refused"), "ConnectError")]
)
async def test_lost_calls_raise_the_librarys_exceptions(lib, connect, error, name):
    async with connect(FakeUpstream([error])) as client:
        with pytest.raises(getattr(lib, name), match=error.message) as caught:
            await client.post(URL, json=asking())
    assert caught.value.__cause__ is error
    assert str(caught.value.request.url) == URL


async def test_a_repetition_by_the_sdk_raises_the_same_and_sends_nothing(lib, connect):
    upstream = FakeUpstream([UpstreamTimeout("slow")])
    async with connect(upstream, Stack(Retry(attempts=2))) as client:
        for count in ("0", "1", "2"):
            with pytest.raises(lib.ReadTimeout):
                await client.post(URL, json=asking(), headers={"x-stainless-retry-count": count})
        assert "doubled-retries" in client.get_performance_stats()["warnings"]
    assert len(upstream.calls) == 1


async def test_a_refusal_by_the_server_keeps_its_body(connect):
    async with connect(FakeUpstream([error_reply(404, message="no such model")])) as client:
        reply = await client.post(URL, json=asking())
    assert (reply.status_code, reply.json()["error"]["message"]) == (404, "no such model")


async def test_bad_settings_of_a_call_are_raised_as_they_are(connect):
    async with connect(FakeUpstream([ConfigError("a host that is refused")])) as client:
        with pytest.raises(ConfigError, match="a host"):
            await client.post(URL, json=asking())


async def test_a_stream_passes_chunk_by_chunk(connect):
    chunks = chat_chunks("one two three")
    async with connect(FakeUpstream([streaming(chunks)])) as client:
        async with client.stream("POST", URL, json=asking(stream=True)) as reply:
            assert reply.headers["content-type"] == "text/event-stream"
            assert [chunk async for chunk in reply.aiter_raw()] == chunks
        assert client.get_performance_stats()["answered_upstream"] == 1


async def test_a_reader_who_stops_at_the_terminator_has_read_all(connect):
    async with connect(FakeUpstream(), CACHED) as client:
        for expected in ("upstream", "cache"):
            async with client.stream("POST", URL, json=asking(stream=True)) as reply:
                assert reply.headers["x-llmmw-source"] == expected
                async for line in reply.aiter_lines():
                    if line == "data: [DONE]":
                        break
        assert client.get_performance_stats()["cancelled"] == 0


async def test_a_reader_who_stops_before_is_gone(connect):
    stream = ScriptedChunks(chat_chunks("one two three"))
    async with connect(FakeUpstream([Reply(chunks=stream)]), CACHED) as client:
        async with client.stream("POST", URL, json=asking(stream=True)) as reply:
            async for _ in reply.aiter_raw():
                break
        assert client.get_performance_stats()["cancelled"] == 1
    assert stream.closed


@pytest.mark.parametrize(
    ("error", "name"),
    [
        (TruncatedStream("ended early"), "RemoteProtocolError"),
        (StreamInterrupted("broke"), "ReadError"),
        (UpstreamTimeout("silent"), "ReadTimeout"),
        (RateLimited("odd"), "ReadError"),
    ],
)
async def test_a_broken_stream_raises_the_librarys_exception(lib, connect, connect_sync, error, name):
    def upstream():
        return FakeUpstream([streaming([chat_chunks("one")[0], error])])

    async with connect(upstream()) as client:
        with pytest.raises(getattr(lib, name), match=error.message):
            await client.post(URL, json=asking(stream=True))

    def ask():
        with connect_sync(upstream()) as client, pytest.raises(getattr(lib, name), match=error.message):
            client.post(URL, json=asking(stream=True))

    await asyncio.to_thread(ask)


async def test_an_error_event_of_the_server_stays_an_event(connect, connect_sync):
    def upstream():
        return FakeUpstream([streaming([chat_chunks("one")[0], StatusError("died", status=500, code="engine")])])

    async with connect(upstream()) as client:
        text = (await client.post(URL, json=asking(stream=True))).text
    assert text.endswith(
        'event: error\ndata: {"type":"error","error":{"type":"engine","message":"died","code":"engine"}}\n\n'
    )

    def ask():
        with connect_sync(upstream()) as client:
            return client.post(URL, json=asking(stream=True)).text

    assert await asyncio.to_thread(ask) == text


def test_plain_code_asks_and_streams(connect_sync):
    with connect_sync(FakeUpstream(), CACHED) as client:
        for expected in ("upstream", "cache"):
            assert client.post(URL, json=asking()).headers["x-llmmw-source"] == expected
        for expected in ("upstream", "cache"):
            with client.stream("POST", URL, json=asking("streamed", stream=True)) as reply:
                assert reply.headers["x-llmmw-source"] == expected
                for line in reply.iter_lines():
                    if line == "data: [DONE]":
                        break
        with client.stream("POST", URL, json=asking("other", stream=True)) as reply:
            next(reply.iter_raw())
        assert client.get_performance_stats()["cancelled"] == 1


def test_a_stream_closed_after_its_client_is_harmless(connect_sync):
    client = connect_sync(FakeUpstream())
    request = client.build_request("POST", URL, json=asking(stream=True))
    reply = client.send(request, stream=True)
    for line in reply.iter_lines():
        if line == "data: [DONE]":
            break
    client.engine.close(drain_timeout=0)
    reply.close()
    client.close()


async def test_one_client_serves_several_loops_and_threads(connect):
    upstream = FakeUpstream()
    client = connect(upstream, CACHED)
    text = (await client.post(URL, json=asking())).text
    found = []

    def elsewhere():
        async def ask():
            found.append((await client.post(URL, json=asking())).text)
            found.append((await client.post(URL, json=asking(stream=True))).text)

        asyncio.run(ask())

    threads = [threading.Thread(target=elsewhere) for _ in range(3)]
    for thread in threads:
        thread.start()
    await asyncio.gather(*(asyncio.to_thread(thread.join) for thread in threads))
    await client.aclose()
    assert found.count(text) == 3
    assert len(found) == 6
    assert len(upstream.calls) <= 2


def test_async_one_run_per_step(connect):
    client = connect(FakeUpstream(), CACHED)

    async def step():
        return (await client.post(URL, json=asking())).headers["x-llmmw-source"]

    assert [asyncio.run(step()) for _ in range(3)] == ["upstream", "cache", "cache"]
    asyncio.run(client.aclose())


async def test_what_is_no_completion_passes_untouched(connect):
    upstream = FakeUpstream([lambda call: Reply(data=call.native.body, headers=(("content-type", "text/plain"),))] * 3)
    async with connect(upstream, CACHED) as client:
        assert (await client.post("http://fake.test/v1/files", files={"file": b"data"})).text.startswith("--")
        assert (await client.post(URL, content=b"not json")).text == "not json"
        assert (await client.get("http://fake.test/v1/models")).text == ""
        stats = client.get_performance_stats()
    assert (stats["request_count"], stats["upstream_requests"], stats["cache_misses"]) == (3, 3, 0)


@pytest.mark.parametrize(
    "options",
    [{"transport": object()}, {"proxy": "http://p"}, {"verify": "ca.pem"}, {"limits": 3}, {"follow_redirects": True}],
)
def test_options_that_would_go_past_the_stack_are_refused(connect, lib, options):
    (name,) = options
    with pytest.raises(ConfigError, match=rf"{lib.__name__}_client\({name}=\)"):
        connect(FakeUpstream(), **options)


def test_wrong_arguments_are_named(lib):
    make = getattr(llmmw, f"{lib.__name__}_client")
    with pytest.raises(ConfigError, match="expected a Stack"):
        make([TTLCache(300)])
    with pytest.raises(ConfigError, match="endpoint of your own"):
        make(Stack(), endpoint=FakeUpstream(), allow_hosts=("x",))


def test_a_missing_httpx2_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "httpx2", None)
    monkeypatch.delitem(sys.modules, "llmmw.edges.httpx2", raising=False)
    with pytest.raises(MissingExtra, match=r"pip install 'llmmw\[httpx2\]'"):
        importlib.import_module("llmmw.edges.httpx2")


async def test_hooks_headers_and_cookies_of_the_client_work(connect):
    seen = []

    async def hook(response):
        seen.append(response.status_code)

    upstream = FakeUpstream([Reply(data=chat_body("hi"), headers=(("set-cookie", "c=1"),))])
    async with connect(upstream, headers={"x-own": "1"}, event_hooks={"response": [hook]}) as client:
        await client.post(URL, json=asking())
        assert client.cookies["c"] == "1"
    assert seen == [200]
    assert ("x-own", "1") in upstream.calls[0].native.headers


def test_wrong_endpoints_and_options_are_named(lib):
    make = getattr(llmmw, f"{lib.__name__}_client")
    with pytest.raises(ConfigError, match="expected an Endpoint"):
        make(Stack(), endpoint="http://fake.test/v1")
    with pytest.raises(ConfigError, match="unexpected keyword argument 'retries'"):
        make(Stack(), retries=3)


def test_plain_code_gets_refusals_and_lost_calls_as_the_library_tells_them(lib, connect_sync):
    with connect_sync(FakeUpstream([RateLimited("no", retry_after_s=3), ConnectionFailed("refused")])) as client:
        assert client.post(URL, json=asking()).status_code == 429
        with pytest.raises(lib.ConnectError, match="refused"):
            client.post(URL, json=asking())


async def test_a_stream_of_values_is_no_http_stream(connect):
    async with connect(FakeUpstream([Reply(chunks=ScriptedChunks([Item(3)]))])) as client:
        with pytest.raises(TypeError, match="carries bytes"):
            await client.post(URL, json=asking(stream=True))


@pytest.mark.parametrize("later", [StreamInterrupted("broke after the end"), 100])
async def test_what_comes_after_the_terminator_is_nobody_s_business(connect, monkeypatch, later):
    monkeypatch.setattr("llmmw.edges.transport._DRAIN_S", 0.01)
    chunks = chat_chunks("one")
    rest = [later] if isinstance(later, Exception) else []
    stream = ScriptedChunks([*chunks, *rest])
    if not rest:
        stream = Lingering(chunks)
    async with connect(FakeUpstream([Reply(chunks=stream)])) as client:
        async with client.stream("POST", URL, json=asking(stream=True)) as reply:
            async for line in reply.aiter_lines():
                if line == "data: [DONE]":
                    break
        assert client.get_performance_stats()["in_flight"] == 0
    assert stream.closed


class Lingering(ScriptedChunks):
    """Says nothing after its last chunk, and does not end."""

    async def __anext__(self):
        try:
            return await super().__anext__()
        except StopAsyncIteration:
            await asyncio.Event().wait()
            raise

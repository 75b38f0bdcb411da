"""Bad replies are typed errors, never successes, never cached: every way in, against a server that misbehaves."""

from __future__ import annotations

import asyncio

import httpx
import openai
import pytest

import llmmw
from llmmw import (
    AmbiguousOutcome,
    Client,
    ConnectionFailed,
    ConnectionPool,
    ProtocolError,
    ResponseTooLarge,
    Retry,
    Stack,
    StaleConnection,
    StatusError,
    StreamInterrupted,
    SyncClient,
    Timeout,
    TruncatedStream,
    UpstreamTimeout,
)
from llmmw.testing.server import FaultRule, ServerConfig, server_process

MODEL = "llmmw-embedded"
HELLO = [{"role": "user", "content": "hello"}]
ASKED = {"model": MODEL, "messages": HELLO, "temperature": 0}
POOL = ConnectionPool(max_response_bytes=1_000_000)
ATTEMPTS = 2
LOST = (ConnectionFailed, StaleConnection, AmbiguousOutcome)


def rule(kind, **options):
    return FaultRule(kind=kind, **options)


PLAIN = {
    "html": (rule("html"), ProtocolError),
    "error_200": (rule("error_200"), (ProtocolError, StatusError)),
    "garbage": (rule("garbage"), ProtocolError),
    "truncate": (rule("truncate"), ProtocolError),
    "empty": (rule("empty"), ProtocolError),
    "reset": (rule("reset"), LOST),
    "close": (rule("close"), LOST),
    "reset_mid": (rule("reset_mid"), (*LOST, ProtocolError)),
    "close_mid": (rule("close_mid"), (*LOST, ProtocolError)),
    "gzip_bomb": (rule("gzip_bomb", size=2_000_000), (ResponseTooLarge, ProtocolError)),
    "hang": (rule("hang"), UpstreamTimeout),
    "429": (rule("status", status=429, retry_after="0"), StatusError),
    "500": (rule("status", status=500), StatusError),
    "503": (rule("status", status=503), StatusError),
    "529": (rule("status", status=529), StatusError),
    "400": (rule("status", status=400), StatusError),
}
STREAMED = {
    name: PLAIN[name] for name in ("html", "error_200", "garbage", "reset", "close", "hang", "429", "500", "529", "400")
} | {
    "empty": (rule("empty"), (TruncatedStream, ProtocolError)),
    "no_finish": (rule("no_finish"), TruncatedStream),
    "no_done": (rule("no_done"), TruncatedStream),
    "sse_error_at_once": (rule("sse_error", after=0), StatusError),
    "sse_error_later": (rule("sse_error", after=3), (StreamInterrupted, StatusError)),
    "reset_mid": (rule("reset_mid"), (StreamInterrupted, *LOST)),
    "close_mid": (rule("close_mid"), (StreamInterrupted, TruncatedStream, *LOST)),
}


def stack(fault):
    made = Stack.recommended(cache_ttl=60, attempts=ATTEMPTS)
    made = made.replacing("retry", Retry(attempts=ATTEMPTS, backoff=0.001, max_backoff=0.002, rate_patience=0))
    if fault == "429":
        made = made.without("limit")  # its gate would rest for a second, which is tested elsewhere
    return made.replacing("timeout", Timeout(0.5 if fault == "hang" else 20))


@pytest.fixture(scope="module")
def process():
    with server_process(ServerConfig()) as server:
        yield server


@pytest.fixture
def server(process):
    process.clear_faults()
    process.reset()
    return process


def asked(server):
    return sum(count for route, count in server.stats()["by_route"].items() if "completions" in route)


class Way:
    """One way in: `ask` and `stream` answer with the text; `raises` is what its callers catch."""

    def __init__(self, ask, stream, stats, close, raises):
        self.ask, self.stream, self.stats, self.close, self.raises = ask, stream, stats, close, raises


def by_client(server, made):
    client = Client(server.base_url, stack=made, model=MODEL, pool=POOL)

    async def ask():
        return (await client.chat(HELLO, temperature=0)).text

    async def stream():
        return "".join([piece async for piece in client.stream(messages=HELLO, temperature=0)])

    return Way(ask, stream, client.get_performance_stats, client.aclose, None)


def by_sync_client(server, made):
    client = SyncClient(server.base_url, stack=made, model=MODEL, pool=POOL)

    async def ask():
        return await asyncio.to_thread(lambda: client.chat(HELLO, temperature=0).text)

    async def stream():
        return await asyncio.to_thread(lambda: "".join(client.stream(messages=HELLO, temperature=0)))

    async def close():
        await asyncio.to_thread(client.close)

    return Way(ask, stream, client.get_performance_stats, close, None)


def of_sdk(sdk, stats, close):
    async def ask():
        return (await sdk.chat.completions.create(**ASKED)).choices[0].message.content

    async def stream():
        found = ""
        async for chunk in await sdk.chat.completions.create(**ASKED, stream=True):
            found += chunk.choices[0].delta.content or "" if chunk.choices else ""
        return found

    return Way(ask, stream, stats, close, (openai.APIError, openai.OpenAIError, httpx.HTTPError))


def below_the_sdk(server, made):
    http_client = llmmw.httpx2_client(made, pool=POOL)
    sdk = openai.AsyncOpenAI(base_url=server.base_url, api_key="k", http_client=http_client, max_retries=0)
    return of_sdk(sdk, http_client.get_performance_stats, sdk.close)


def above_the_sdk(server, made):
    sdk = llmmw.wrap_client(openai.AsyncOpenAI(base_url=server.base_url, api_key="k"), made)
    return of_sdk(sdk, sdk.get_performance_stats, sdk.close)


def bare_httpx(server, made):
    client = llmmw.httpx_client(made, pool=POOL)

    async def ask():
        answer = await client.post(f"{server.base_url}/chat/completions", json=ASKED)
        answer.raise_for_status()
        return answer.json()["choices"][0]["message"]["content"]

    return Way(ask, None, client.get_performance_stats, client.aclose, httpx.HTTPError)


def decorated(server, made):
    sdk = openai.AsyncOpenAI(base_url=server.base_url, api_key="k", max_retries=0)

    @made.wrap
    async def call(prompt: str) -> str:
        messages = [{"role": "user", "content": prompt}]
        answer = await sdk.chat.completions.create(model=MODEL, messages=messages)
        return answer.choices[0].message.content

    async def close():
        await call.aclose()
        await sdk.close()

    # The user's function reads the answer itself: what it stumbles over comes back as it is.
    return Way(lambda: call("hello"), None, call.get_performance_stats, close, Exception)


WAYS = (by_client, by_sync_client, below_the_sdk, above_the_sdk, bare_httpx, decorated)
STREAMING_WAYS = (by_client, by_sync_client, below_the_sdk, above_the_sdk)


async def check(server, way, ask, fault, wanted):
    server.add_fault(fault)
    with pytest.raises(way.raises or wanted) as caught:
        await ask()
    assert str(caught.value)
    if way.raises is None and ask is way.ask:
        assert caught.value.attempts
    sent = asked(server)
    assert 1 <= sent <= ATTEMPTS
    stats = way.stats()
    assert (stats["request_count"], stats["errors"], stats["answered_upstream"]) == (1, 1, 0), stats
    assert stats["upstream_requests"] == sent
    server.clear_faults()
    server.reset()
    text = await ask()
    assert text
    assert asked(server) == 1, "the bad reply was kept, or its error"
    assert await ask() == text
    assert asked(server) == 1
    stats = way.stats()
    ended = ("cache_hits", "coalesced", "answered_upstream", "errors", "cancelled")
    assert [stats[name] for name in ended] == [1, 0, 1, 1, 0], stats
    assert stats["request_count"] == sum(stats[name] for name in ended) == 3
    assert stats["in_flight"] == 0


@pytest.mark.parametrize("fault", PLAIN)
@pytest.mark.parametrize("make", WAYS, ids=lambda make: make.__name__)
async def test_a_bad_reply_is_an_error_and_never_cached(server, make, fault):
    kind, wanted = PLAIN[fault]
    way = make(server, stack(fault))
    try:
        await check(server, way, way.ask, kind, wanted)
    finally:
        await way.close()


@pytest.mark.parametrize("fault", STREAMED)
@pytest.mark.parametrize("make", STREAMING_WAYS, ids=lambda make: make.__name__)
async def test_a_bad_stream_is_an_error_and_never_cached(server, make, fault):
    kind, wanted = STREAMED[fault]
    way = make(server, stack(fault))
    try:
        await check(server, way, way.stream, kind, wanted)
    finally:
        await way.close()

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
from llmmw.layers import timeout
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
    return made.replacing("timeout", Timeout(300))


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


async def check(server, way, ask, fault, wanted, hang_s):
    """Whether the requests came to be sent within the time-out, which on a busy machine they may not."""
    server.add_fault(fault)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(way.raises or wanted) as caught:
        if fault.kind == "hang":
            real = timeout._Watch
            patch.setattr(timeout, "_Watch", lambda call, began, _total: real(call, began, hang_s))
        await ask()
    if fault.kind == "hang" and not await arrived(server, way.stats()["upstream_requests"]):
        return False
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
    return True


async def arrived(server, requests):
    try:
        await asyncio.to_thread(server.wait, at_least={"received": requests}, timeout_s=5)
    except TimeoutError:
        return False
    return True


async def ends_badly(server, make, ask, fault, kind, wanted):
    for hang_s in (0.5, 10, 60):
        way = make(server, stack(fault))
        try:
            if await check(server, way, getattr(way, ask), kind, wanted, hang_s):
                return
        finally:
            await way.close()
        server.clear_faults()
        server.reset()
    raise AssertionError("in a minute the machine sent no request")


@pytest.mark.parametrize("fault", PLAIN)
@pytest.mark.parametrize("make", WAYS, ids=lambda make: make.__name__)
async def test_a_bad_reply_is_an_error_and_never_cached(server, make, fault):
    await ends_badly(server, make, "ask", fault, *PLAIN[fault])


@pytest.mark.parametrize("fault", STREAMED)
@pytest.mark.parametrize("make", STREAMING_WAYS, ids=lambda make: make.__name__)
async def test_a_bad_stream_is_an_error_and_never_cached(server, make, fault):
    await ends_badly(server, make, "stream", fault, *STREAMED[fault])

"""`wrap_client` itself: what it takes over, what it leaves alone, how it is undone. Behaviour is in tests/sdk."""

from __future__ import annotations

import asyncio
import sys

import anthropic
import httpx
import httpx2
import msgspec
import openai
import pytest

import llmmw
from llmmw import Coalescer, Deadline, ErrorRouter, Retry, Stack, Timeout, TTLCache, using
from llmmw.edges.sdk import unwrap_client, wrap_client
from llmmw.errors import ConfigError
from llmmw.testing.fake import FakeUpstream, chat_body, chat_chunks, error_reply

CACHED = Stack(TTLCache(300), Coalescer())
ASK = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
BODY = msgspec.json.decode(chat_body("hello")) | {"id": "c", "created": 1}


class Server:
    """The wire below an SDK client: answers from a script, remembers what it was asked."""

    def __init__(self, *script, lib=httpx2):
        self.script = list(script)
        self.seen = []
        self.lib = lib

    def respond(self, request):
        self.seen.append(request)
        answer = self.script.pop(0) if self.script else 200
        if isinstance(answer, Exception):
            raise answer
        if isinstance(answer, int):
            body = BODY if answer < 400 else {"error": {"message": "no", "type": "t", "code": "c"}}
            answer = self.lib.Response(answer, json=body, headers={"x-request-id": f"req-{len(self.seen)}"})
        return answer

    async def respond_async(self, request):
        return self.respond(request)

    def client(self, make=openai.AsyncOpenAI, **options):
        is_async = make.__name__.startswith("Async")
        transport = self.lib.MockTransport(self.respond_async if is_async else self.respond)
        http = (self.lib.AsyncClient if is_async else self.lib.Client)(transport=transport)
        options.setdefault("api_key", "k")
        return make(http_client=http, base_url="http://sdk.test/v1", **options)


@pytest.fixture(params=[httpx, httpx2], ids=["httpx", "httpx2"])
def server(request):
    return Server(lib=request.param)


async def test_the_same_object_comes_back_with_an_engine(server):
    client = server.client()
    assert wrap_client(client, CACHED) is client
    first, second = [await client.chat.completions.create(**ASK) for _ in range(2)]
    assert first == second
    assert first is not second
    assert (first._request_id, second._request_id) == ("req-1", None)  # a hit caused no request
    assert client.get_performance_stats()["cache_hits"] == 1
    assert client.engine.get_performance_stats()["upstream_requests"] == 1
    assert client.chat.completions.create.__name__ == "create"
    assert server.seen[0].url == "http://sdk.test/v1/chat/completions"
    await client.close()
    assert client.engine.closed
    assert client.is_closed()


async def test_a_clients_copies_share_the_engine():
    server = Server()
    client = wrap_client(server.client(max_retries=5), Stack(TTLCache(300), Retry()))
    assert client.max_retries == 0
    copy = client.with_options(timeout=3, max_retries=4)
    assert (copy.engine, copy.max_retries) == (client.engine, 0)
    assert await copy.chat.completions.create(**ASK) == await client.chat.completions.create(**ASK)
    assert len(server.seen) == 1
    await client.copy().copy().chat.completions.create(**ASK)
    assert len(server.seen) == 1
    await client.close()


async def test_with_blocks_close_client_and_engine():
    async with wrap_client(Server().client(), Stack()) as client:
        await client.chat.completions.create(**ASK)
    assert client.engine.closed

    def plain():
        with wrap_client(Server().client(openai.OpenAI), Stack()) as sync:
            assert sync.chat.completions.create(**ASK).choices
        return sync.engine.closed

    assert await asyncio.to_thread(plain)


async def test_unwrapping_restores_the_client():
    server = Server()
    client = server.client(max_retries=5)
    original = client.chat.completions.create
    wrap_client(client, Stack(TTLCache(300), Retry()))
    engine = client.engine
    with pytest.raises(ConfigError, match="wrapped already"):
        wrap_client(client, Stack())
    assert unwrap_client(client) is client
    assert client.max_retries == 5
    assert client.chat.completions.create == original
    assert not hasattr(client, "engine")
    for _ in range(2):
        await client.chat.completions.create(**ASK)
    assert len(server.seen) == 2
    assert engine.get_performance_stats()["request_count"] == 0
    with pytest.raises(ConfigError, match="not wrapped"):
        unwrap_client(client)
    wrap_client(client, Stack())
    await client.close()
    await engine.aclose()


@pytest.mark.parametrize("client", [object(), httpx.AsyncClient, "openai"])
def test_other_objects_are_refused_by_name(client):
    with pytest.raises(ConfigError, match="AsyncOpenAI"):
        wrap_client(client, Stack())


def test_a_list_of_layers_is_no_stack():
    with pytest.raises(ConfigError, match="expected a Stack"):
        wrap_client(Server().client(), [TTLCache(300)])


def test_a_client_over_a_foreign_http_client_is_refused():
    client = Server().client()
    client._client = object()
    with pytest.raises(ConfigError, match="httpx"):
        wrap_client(client, Stack())


async def test_what_is_not_taken_over_stays_the_sdks(server):
    client = wrap_client(server.client(), CACHED)
    completions = client.chat.completions
    for _ in range(2):
        raw = await completions.with_raw_response.create(**ASK)
        assert raw.parse().choices[0].message.content == "hello"
        async with completions.with_streaming_response.create(**ASK) as response:
            assert await response.parse()
        assert await completions.create(**ASK, extra_headers={"X-Stainless-Raw-Response": "true"})
    assert len(server.seen) == 6
    assert client.get_performance_stats()["request_count"] == 0
    with pytest.raises(TypeError, match="Missing required"):
        await completions.create(messages=[])
    with pytest.raises(TypeError):
        await completions.create("positional")
    await client.close()


def test_the_sync_sdk_judges_its_own_arguments():
    client = wrap_client(Server().client(openai.OpenAI), CACHED)
    with pytest.raises(TypeError, match="Missing required"):
        client.chat.completions.create(messages=[])
    client.close()


async def test_absent_arguments_and_iterators_do_not_disturb_the_key():
    server = Server()
    client = wrap_client(server.client(), CACHED)
    absent = {"temperature": openai.omit, "top_p": openai.NOT_GIVEN}
    await client.chat.completions.create(**ASK)
    await client.chat.completions.create(**ASK, **absent)
    await client.chat.completions.create(model="m", messages=iter(ASK["messages"]))
    await client.chat.completions.create(**ASK, extra_query={"q": "1"})
    assert len(server.seen) == 2
    await client.chat.completions.create(model="m", messages=iter([{"role": "user", "content": "other"}]))
    assert b"other" in server.seen[2].content
    await client.close()


async def test_objects_of_the_sdk_are_sent_as_json_to_a_fallback():
    fallback = FakeUpstream()
    server = Server(200, 503)
    client = wrap_client(server.client(max_retries=0), Stack(ErrorRouter(fallbacks=[fallback])))
    message = (await client.chat.completions.create(**ASK)).choices[0].message
    answer = await client.chat.completions.create(model="m", messages=[message, *ASK["messages"]])
    assert answer.choices[0].message.content == "echo: hi"
    assert fallback.calls[0].payload["messages"][0] == {"role": "assistant", "content": "hello"}
    await client.close()


async def test_a_body_that_is_not_json_is_the_sdks_to_judge():
    server = Server()
    client = wrap_client(server.client(), CACHED)
    with pytest.raises(TypeError):
        await client.chat.completions.create(**ASK, extra_body={"x": object()})
    assert server.seen == []
    await client.close()


@pytest.mark.parametrize("change", ["api_key", "organization", "base_url"])
async def test_cache_08_a_changed_client_does_not_share(change):
    server = Server()
    client = wrap_client(server.client(), CACHED)
    await client.chat.completions.create(**ASK)
    setattr(client, change, "http://other.test/v1" if change == "base_url" else "changed")
    await client.chat.completions.create(**ASK)
    assert len(server.seen) == 2
    await client.close()


@pytest.mark.parametrize(
    "change",
    [
        lambda client: client._custom_headers.update({"api-version": "2"}),
        lambda client: client._custom_headers.update({"x-other-key": "2"}),
        lambda client: client._custom_query.update(v="2"),
    ],
)
async def test_cache_08_a_client_changed_in_place_does_not_share(change):
    server = Server()
    client = wrap_client(server.client(), CACHED)
    for _ in range(2):
        await client.chat.completions.create(**ASK)
    change(client)
    for _ in range(2):
        await client.chat.completions.create(**ASK)
    assert len(server.seen) == 2
    await client.close()


async def test_cache_08_a_credential_in_the_query_does_not_share():
    server = Server()
    client = wrap_client(server.client(), CACHED)
    for key in ("one", "two", "one"):
        await client.chat.completions.create(**ASK, extra_query={"key": key})
    assert len(server.seen) == 2
    await client.close()


async def test_a_tenant_shares_across_keys():
    server = Server()
    client = wrap_client(server.client(), CACHED, tenant="t")
    await client.chat.completions.create(**ASK)
    client.api_key = "rotated"
    await client.chat.completions.create(**ASK)
    assert len(server.seen) == 1
    with using(tenant="u"):
        await client.chat.completions.create(**ASK)
    assert len(server.seen) == 2
    await client.close()


async def test_a_key_that_changes_by_itself_is_shared_within_the_engine():
    async def provide():
        return "fresh"

    server = Server()
    client = wrap_client(server.client(api_key=provide), CACHED)
    for _ in range(2):
        await client.chat.completions.create(**ASK)
    assert len({(await one.chat.completions.create(**ASK)).id for one in (client, client.copy())}) == 1
    other = wrap_client(server.client(api_key=provide), CACHED)
    await other.chat.completions.create(**ASK)
    assert len(server.seen) >= 2
    await client.close()
    await other.close()


async def test_a_server_that_leaves_the_schema_gets_the_sdks_tolerance(server):
    odd = {
        **BODY,
        "choices": [{"index": 0, "finish_reason": "abort", "message": {"role": "assistant", "content": "x"}}],
    }
    server.script = [server.lib.Response(200, json=odd)]
    client = wrap_client(server.client(), Stack())
    answer = await client.chat.completions.create(**ASK)
    assert type(answer).__name__ == "ChatCompletion"
    assert answer.choices[0].finish_reason == "abort"
    await client.close()


async def test_the_sdks_own_exception_comes_back_with_a_note(server):
    server.script = [503, 503, 503]
    client = wrap_client(server.client(), Stack(Retry(attempts=3, backoff=0.001)))
    with pytest.raises(openai.InternalServerError) as caught:
        await client.chat.completions.create(**ASK)
    assert caught.value.request_id == "req-3"
    (note,) = caught.value.__notes__
    assert note.startswith("llmmw: ")
    assert note.count("(server: 503)") == 3
    assert caught.value.response.request.url == "http://sdk.test/v1/chat/completions"
    await client.close()


async def test_followers_get_an_exception_of_their_own():
    server = Server(404)
    client = wrap_client(server.client(), CACHED)
    calls = [client.chat.completions.create(**ASK, temperature=0) for _ in range(3)]
    errors = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(error) for error in errors] == [openai.NotFoundError] * 3
    assert len(server.seen) == 1
    assert {error.body["message"] for error in errors} == {"no"}
    await client.close()


async def test_the_sdks_connection_errors_come_through(server):
    request = server.lib.Request("POST", "http://sdk.test")
    server.script = [
        server.lib.ConnectError("refused", request=request),
        server.lib.ReadTimeout("slow", request=request),
    ]
    client = wrap_client(server.client(max_retries=0), Stack())
    with pytest.raises(openai.APIConnectionError):
        await client.chat.completions.create(**ASK)
    with pytest.raises(openai.APITimeoutError):
        await client.chat.completions.create(**ASK)
    await client.close()


async def test_what_llmmw_raises_becomes_the_sdks_exception(server):
    client = wrap_client(server.client(), Stack(Deadline(60), Timeout(30)))
    with using(deadline=0), pytest.raises(openai.InternalServerError, match="llmmw") as caught:
        await client.chat.completions.create(**ASK)
    assert isinstance(caught.value.__cause__, llmmw.DeadlineExceeded)
    server.script = [server.lib.Response(200, text="<html>")]
    with pytest.raises(openai.InternalServerError, match="HTML"):
        await client.chat.completions.create(**ASK)
    await client.close()


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (llmmw.UpstreamTimeout("slow"), openai.APITimeoutError),
        (llmmw.ConnectionFailed("refused"), openai.APIConnectionError),
        (llmmw.RateLimited("full", retry_after_s=3), openai.RateLimitError),
        (ConfigError("wrong"), ConfigError),
    ],
)
async def test_errors_of_layers_are_mapped(error, expected):
    class Raising(llmmw.Bound):
        async def __call__(self, call):
            raise error

    class Layer:
        role = llmmw.Role.CUSTOM

        def bind(self, inner, env):
            return Raising(inner, env)

    for make in (openai.AsyncOpenAI, openai.OpenAI):
        client = wrap_client(Server().client(make), Stack(Layer()))
        with pytest.raises(expected) as caught:
            if make is openai.AsyncOpenAI:
                await client.chat.completions.create(**ASK)
            else:
                await asyncio.to_thread(client.chat.completions.create, **ASK)
        assert expected is ConfigError or caught.value.__cause__ is error
        if make is openai.AsyncOpenAI:
            await client.close()
        else:
            await asyncio.to_thread(client.close)


def streamed(lib, *pieces, error=None):
    async def agenerate():
        for piece in pieces:
            yield piece
        if error:
            raise error

    return lib.Response(200, headers={"content-type": "text/event-stream"}, content=agenerate())


async def test_a_stream_that_breaks_is_the_sdks_connection_error(server):
    lib = server.lib
    first = chat_chunks("one")[0]
    client = wrap_client(server.client(), Stack())
    expected = {lib.ReadError("reset"): openai.APIConnectionError, lib.ReadTimeout("slow"): openai.APIConnectionError}
    for error, kind in expected.items():
        server.script = [streamed(lib, first, error=error)]
        stream = await client.chat.completions.create(**ASK, stream=True)
        assert type(stream) is openai.AsyncStream
        with pytest.raises(kind):
            async for _ in stream:
                pass
    await client.close()


def test_a_sync_stream_runs_and_closes():
    def generate():
        yield from chat_chunks("one two")

    server = Server(httpx2.Response(200, headers={"content-type": "text/event-stream"}, content=generate()))
    client = wrap_client(server.client(openai.OpenAI), CACHED)
    for _ in range(2):
        with client.chat.completions.create(**ASK, stream=True) as stream:
            assert type(stream) is openai.Stream
            assert "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices) == "one two"
    assert len(server.seen) == 1
    client.close()


def test_a_sync_stream_that_breaks_is_the_sdks_error():
    def generate():
        yield chat_chunks("one")[0]
        raise httpx2.ReadError("reset")

    server = Server(httpx2.Response(200, headers={"content-type": "text/event-stream"}, content=generate()))
    client = wrap_client(server.client(openai.OpenAI), Stack())
    with pytest.raises(openai.APIConnectionError):
        list(client.chat.completions.create(**ASK, stream=True))
    client.close()


async def test_anthropic_is_wrapped_by_messages():
    message = {
        "id": "m", "type": "message", "role": "assistant", "model": "m", "stop_reason": "end_turn",
        "content": [{"type": "text", "text": "hello"}], "usage": {"input_tokens": 1, "output_tokens": 1},
    }  # fmt: skip
    server = Server(httpx2.Response(200, json=message, headers={"request-id": "r"}))
    client = wrap_client(server.client(anthropic.AsyncAnthropic), CACHED)
    first, second = [await client.messages.create(**ASK, max_tokens=5) for _ in range(2)]
    assert first == second
    assert first._request_id == "r"
    assert len(server.seen) == 1
    assert server.seen[0].url == "http://sdk.test/v1/v1/messages"
    await client.close()


async def test_the_endpoint_survives_an_error_whose_body_was_closed():
    from llmmw.endpoints.sdk import _refusal

    class Gone(Exception):
        status_code = 500
        response = httpx2.Response(500, stream=httpx2.ByteStream(b"unread") if hasattr(httpx2, "ByteStream") else None)

    reply = _refusal(Gone())
    assert reply.status == 500
    assert _refusal(ValueError()) is None
    assert error_reply(400).status == 400
    assert "sdk" in repr(__import__("llmmw.endpoints.sdk", fromlist=["x"]).SDKEndpoint("sdk"))
    assert "openai" in sys.modules


MESSAGE = {
    "id": "1", "type": "message", "role": "assistant", "model": "m", "content": [{"type": "text", "text": "yes"}],
    "stop_reason": "end_turn", "stop_sequence": None, "usage": {"input_tokens": 1, "output_tokens": 1},
}  # fmt: skip


def test_clients_of_one_account_share_also_anthropics(tmp_path):
    """Whose `organization` is an object of its own in every client and copy."""
    stack = Stack(TTLCache(300, directory=tmp_path / "c"))
    server = Server(httpx2.Response(200, json=MESSAGE), lib=httpx2)
    for _ in range(2):
        client = wrap_client(server.client(anthropic.Anthropic), stack)
        for sender in (client, client.with_options(timeout=5)):
            assert sender.messages.create(max_tokens=5, **ASK).content[0].text == "yes"
        client.close()
    assert len(server.seen) == 1
    other = wrap_client(server.client(anthropic.Anthropic, api_key="l"), stack)
    server.script.append(httpx2.Response(200, json=MESSAGE))
    other.messages.create(max_tokens=5, **ASK)
    assert len(server.seen) == 2
    other.close()

"""`HTTPEndpoint` against real sockets: what it sends, what it makes of the answer, what it never shows."""

import asyncio
import logging
import pickle

import msgspec
import pytest

from llmmw.answer import Usage
from llmmw.call import Context
from llmmw.endpoints import as_endpoint
from llmmw.endpoints.base import Endpoint
from llmmw.endpoints.openai import HTTPEndpoint
from llmmw.env import Env
from llmmw.errors import (
    AmbiguousOutcome,
    ConfigError,
    ConnectionFailed,
    ProtocolError,
    ResponseTooLarge,
    StaleConnection,
    StatusError,
    StreamInterrupted,
    TruncatedStream,
    UpstreamError,
)
from llmmw.events import UpstreamEnded, UpstreamStarted
from llmmw.pool import ConnectionPool
from llmmw.testing.fake import chat_body, chat_call, chat_chunks, sse
from llmmw.testing.rawserver import RawServer, answer_bytes, chunked, hang_up, say
from llmmw.wire import HTTPRequest
from llmmw.wire.assemble import assemble

KEY = "sk-verysecret"


def stream_of(*chunks, end=True):
    body = chunked(*chunks) if end else chunked(*chunks)[: -len(b"0\r\n\r\n")]
    return answer_bytes(200, body, transfer_encoding="chunked", content_type="text/event-stream; charset=utf-8")


class Opened:
    """An endpoint at a RawServer, with its events."""

    def __init__(self, server, **options):
        self.events = []
        self.endpoint = HTTPEndpoint(server.origin + "/v1", KEY, **options)
        self.endpoint.start(Env(sinks=(self.events.append,)))

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        await self.endpoint.aclose()

    async def ask(self, call=None):
        return await self.endpoint(call or chat_call())

    def ended(self):
        return [(e.ok, e.usage.total_tokens) for e in self.events if isinstance(e, UpstreamEnded)]


async def collect(reply):
    return [chunk async for chunk in reply.chunks]


async def test_a_chat_call_is_sent_and_answered():
    async with RawServer(say(answer_bytes(200, chat_body("hi"), X_Request_Id="r"))) as server, Opened(server) as at:
        call = chat_call("hello", temperature=0, context=Context(agent="alice"))
        reply = await at.ask(call)
        assert (reply.text, reply.usage, reply.status, reply.ok) == ("hi", Usage(3, 2, reported=True), 200, True)
        assert (reply.endpoint, reply.source) == (server.origin + "/v1", "upstream")
        assert reply.header("x-request-id") == "r"
        assert reply.service_s > 0
        sent = server.requests[0]
        assert (sent.method, sent.target) == ("POST", "/v1/chat/completions")
        assert msgspec.json.decode(sent.body) == {**call.payload}
        assert sent.headers["authorization"] == f"Bearer {KEY}"
        assert sent.headers["content-type"] == "application/json"
        started, ended = at.events[0], at.events[-1]
        assert started == UpstreamStarted(server.origin + "/v1", "alice")
        assert (ended.ok, ended.usage, ended.agent) == (True, reply.usage, "alice")


async def test_the_key_goes_where_the_server_looks_for_it():
    async with RawServer(say(answer_bytes(200, b'{"content":[]}'))) as server:
        endpoint = HTTPEndpoint(server.origin, "k", key_header="X-API-Key", headers={"anthropic-version": "2023-06-01"})
        await endpoint(chat_call().replace(op="messages"))
        await endpoint.aclose()
        sent = server.requests[0]
        assert sent.target == "/v1/messages"
        assert (sent.headers["x-api-key"], sent.headers["anthropic-version"]) == ("k", "2023-06-01")
        assert "authorization" not in sent.headers


async def test_headers_given_with_a_call_are_added_at_its_own_endpoint_only():
    async with RawServer(say(answer_bytes(200, chat_body("x")))) as server, Opened(server) as at:
        extra = (("authorization", "Bearer other"), ("x-tag", "1"))
        await at.ask(chat_call().replace(native=extra, target=at.endpoint.name))
        await at.ask(chat_call().replace(native=extra, target="http://primary/v1"))
        mine, fallback = server.requests
        assert (mine.headers["authorization"], mine.headers["x-tag"]) == ("Bearer other", "1")
        assert fallback.headers["authorization"] == f"Bearer {KEY}"
        assert "x-tag" not in fallback.headers


async def test_the_stream_field_follows_the_call():
    async with RawServer(say(answer_bytes(200, chat_body("x")))) as server, Opened(server) as at:
        await at.ask(chat_call(stream=True))
        await at.ask(chat_call().replace(payload={"model": "m", "stream": True}))
        assert [msgspec.json.decode(sent.body)["stream"] for sent in server.requests] == [True, False]


async def test_a_request_of_a_transport_edge_is_sent_exactly_as_it_is():
    async with RawServer(say(answer_bytes(200, b"RIFF", content_type="audio/wav"))) as server, Opened(server) as at:
        native = HTTPRequest("PUT", server.origin + "/v1/audio/x?a=1", (("x-custom", "1"),), b"\x00raw")
        reply = await at.ask(chat_call().replace(op="/v1/audio/x", native=native))
        assert (reply.data, reply.header("content-type")) == (b"RIFF", "audio/wav")
        sent = server.requests[0]
        assert (sent.method, sent.target, sent.body) == ("PUT", "/v1/audio/x?a=1", b"\x00raw")
        assert sent.headers["x-custom"] == "1"
        assert "authorization" not in sent.headers


async def test_security_03_a_request_for_another_origin_is_rebuilt_with_own_credentials():
    async with (
        RawServer() as primary,
        RawServer(say(answer_bytes(200, chat_body("x")))) as server,
        Opened(server) as at,
    ):
        native = HTTPRequest(
            "POST", primary.origin + "/v1/chat/completions", (("authorization", "Bearer theirs"),), b"{}"
        )
        await at.ask(chat_call().replace(native=native))
        await at.ask(chat_call().replace(native=HTTPRequest("POST", "nonsense://x")))
        assert primary.requests == []
        assert [sent.headers["authorization"] for sent in server.requests] == [f"Bearer {KEY}"] * 2


async def test_a_lone_surrogate_is_sent_escaped():
    async with RawServer(say(answer_bytes(200, chat_body("x")))) as server, Opened(server) as at:
        await at.ask(chat_call("\ud800"))
        assert b'"\\ud800"' in server.requests[0].body


async def test_a_payload_that_is_no_json_is_a_config_error():
    async with RawServer() as server, Opened(server) as at:
        nested = []
        for _ in range(100_000):
            nested = [nested]
        for value in (object(), nested):
            with pytest.raises(ConfigError, match="payload"):
                await at.ask(chat_call().replace(payload={"x": value}))
        assert server.requests == []


async def test_a_refusal_is_a_reply_with_a_bounded_body():
    answers = (
        say(answer_bytes(429, b'{"error":{"message":"slow"}}', retry_after="7")),
        say(answer_bytes(500, b"x" * 100_000)),
    )
    async with RawServer(*answers) as server, Opened(server) as at:
        refused = await at.ask()
        assert (refused.status, refused.ok, refused.header("retry-after")) == (429, False, "7")
        assert refused.body["error"]["message"] == "slow"
        long = await at.ask()
        assert (long.status, len(long.data)) == (500, 65536)
        assert at.ended() == [(False, 0), (False, 0)]


@pytest.mark.parametrize(
    "body", [b"<html>", b"", chat_body("hi")[:-5], b'{"error":{"message":"x"}}', b'{"choices":[]}']
)
async def test_route_08_a_success_without_an_answer_is_a_protocol_error(body):
    async with RawServer(say(answer_bytes(200, body))) as server, Opened(server) as at:
        with pytest.raises(ProtocolError) as caught:
            await at.ask()
        assert caught.value.endpoint == at.endpoint.name
        assert at.ended() == [(False, 0)]


async def test_security_03_a_redirect_is_not_followed():
    async with RawServer() as elsewhere:
        away = say(answer_bytes(307, b"", location=elsewhere.origin + "/v1/chat/completions?key=s"))
        async with RawServer(away) as server, Opened(server) as at:
            with pytest.raises(ProtocolError, match="307") as caught:
                await at.ask()
            assert "key=s" not in str(caught.value)
            native = HTTPRequest("POST", server.origin + "/v1/chat/completions", (), b"{}")
            assert (await at.ask(chat_call().replace(native=native))).status == 307
        assert elsewhere.requests == []


async def test_connection_errors_name_the_endpoint():
    async with RawServer() as server:
        pass_through = Opened(server)
    async with pass_through as at:
        with pytest.raises(ConnectionFailed) as caught:
            await at.ask()
        assert caught.value.endpoint == at.endpoint.name
        assert at.ended() == [(False, 0)]


async def test_pool_03_a_stale_connection_is_repeated_where_the_server_is_this_machine():
    for options, works in (({}, True), ({"duplicate_ok": False}, False)):
        answers = say(answer_bytes(200, chat_body("1"))), hang_up(), say(answer_bytes(200, chat_body("2")))
        async with RawServer(*answers) as server, Opened(server, **options) as at:
            assert at.endpoint.capabilities == ({"n", "idempotent"} if works else {"n"})
            await at.ask()
            if works:
                assert (await at.ask()).text == "2"
            else:
                with pytest.raises(StaleConnection):
                    await at.ask()


# Streams


async def test_a_stream_passes_unchanged_and_its_usage_is_learned():
    chunks = chat_chunks("one two three")
    answers = say(stream_of(*chunks)), say(answer_bytes(200, chat_body("x")))
    async with RawServer(*answers) as server, Opened(server) as at:
        reply = await at.ask(chat_call(stream=True))
        assert reply.data is None
        assert at.ended() == []
        assert b"".join(await collect(reply)) == b"".join(chunks)
        assert reply.chunks.usage == Usage(3, 3, reported=True)
        assert at.ended() == [(True, 6)]
        assert at.endpoint.gauges()["in_flight"] == 0
        await reply.chunks.aclose()
        assert await collect(reply) == []
        await at.ask()
        assert server.connections == 1


async def test_chunks_arrive_one_by_one_as_the_server_sends_them():
    chunks = chat_chunks("one two three")
    turn = asyncio.Semaphore(0)

    async def slowly(_, writer):
        writer.write(answer_bytes(200, b"", transfer_encoding="chunked", content_type="text/event-stream"))
        for chunk in chunks:
            writer.write(b"%x\r\n%s\r\n" % (len(chunk), chunk))
            await writer.drain()
            await turn.acquire()
        writer.write(b"0\r\n\r\n")

    async with RawServer(slowly) as server, Opened(server) as at:
        found = []
        async for chunk in (await at.ask(chat_call(stream=True))).chunks:
            found.append(chunk)
            turn.release()
        assert found == chunks


async def test_whoever_reads_a_stream_gets_one_from_a_server_that_does_not_stream():
    async with RawServer(say(answer_bytes(200, chat_body("x y"), etag="w"))) as server, Opened(server) as at:
        reply = await at.ask(chat_call(stream=True, stream_options={"include_usage": True}))
        assert assemble("chat", b"".join(await collect(reply))).body["choices"][0]["message"]["content"] == "x y"
        assert (reply.data, reply.header("etag"), reply.header("content-length")) == (None, None, None)
        assert reply.header("content-type").startswith("text/event-stream")
        assert at.ended() == [(True, 5)]


async def test_an_answer_that_cannot_be_a_stream_is_a_protocol_error_to_who_reads_one():
    body = msgspec.json.decode(chat_body("x"))
    body["choices"][0]["logprobs"] = {"content": [{"token": "x", "logprob": -0.1}]}
    async with RawServer(say(answer_bytes(200, msgspec.json.encode(body)))) as server, Opened(server) as at:
        with pytest.raises(ProtocolError, match="does not stream"):
            await at.ask(chat_call(stream=True))


async def test_a_stream_is_a_protocol_error_to_who_asked_for_none():
    async with RawServer(say(stream_of(*chat_chunks("one two")))) as server, Opened(server) as at:
        with pytest.raises(ProtocolError, match="a stream where none was asked for"):
            await at.ask(chat_call())


async def test_a_stream_of_an_unknown_operation_passes_without_judgement():
    raw = answer_bytes(200, chunked(b"anything", b" at all"), transfer_encoding="chunked", content_type="audio/mpeg")
    async with RawServer(say(raw)) as server, Opened(server) as at:
        native = HTTPRequest("POST", server.origin + "/v1/audio/speech", (), b"{}")
        reply = await at.ask(chat_call(stream=True).replace(op="/v1/audio/speech", native=native))
        assert b"".join(await collect(reply)) == b"anything at all"
        assert at.ended() == [(True, 0)]


@pytest.mark.parametrize("drop", [1, 4])
async def test_cache_13_a_stream_that_ends_early_is_truncated(drop):
    async with RawServer(say(stream_of(*chat_chunks("one two")[:-drop]))) as server, Opened(server) as at:
        reply = await at.ask(chat_call(stream=True))
        with pytest.raises(TruncatedStream, match="ended early"):
            await collect(reply)
        assert [ok for ok, _ in at.ended()] == [False]


@pytest.mark.parametrize(
    ("error", "status", "fault", "code"),
    [
        ({"error": {"message": f"out of memory {KEY}", "type": "server_error"}}, 500, "server", "server_error"),
        ({"error": {"message": "slow down", "code": 429}}, 429, "rate", None),
        (
            {"type": "error", "error": {"type": "overloaded_error", "message": "busy"}},
            500,
            "server",
            "overloaded_error",
        ),
        ({"error": "plain"}, 500, "server", None),
    ],
)
async def test_route_09_an_error_event_before_the_first_token_is_a_status_error(error, status, fault, code):
    role = sse({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
    async with RawServer(say(stream_of(role, sse(error)))) as server, Opened(server) as at:
        reply = await at.ask(chat_call(stream=True))
        with pytest.raises(StatusError) as caught:
            await collect(reply)
        assert (caught.value.status, caught.value.fault, caught.value.code) == (status, fault, code)
        assert KEY not in str(caught.value)
        assert [ok for ok, _ in at.ended()] == [False]
        assert at.endpoint.gauges()["in_flight"] == 0


async def test_route_09_an_error_event_after_the_first_token_interrupts_with_what_arrived():
    chunks = [*chat_chunks("one two")[:2], sse({"error": {"message": "gpu fell off"}})]
    async with RawServer(say(stream_of(*chunks))) as server, Opened(server) as at:
        with pytest.raises(StreamInterrupted, match="gpu fell off") as caught:
            await collect(await at.ask(chat_call(stream=True)))
        assert caught.value.partial == "one two"
        assert isinstance(caught.value.__cause__, StatusError)


@pytest.mark.parametrize("tokens", [0, 2])
async def test_a_connection_lost_within_a_stream(tokens):
    async def cut(_, writer):
        writer.write(stream_of(*chat_chunks("one two three")[:tokens], end=False))
        await writer.drain()
        writer.close()

    async with RawServer(cut) as server, Opened(server) as at:
        reply = await at.ask(chat_call(stream=True))
        with pytest.raises(StreamInterrupted if tokens else AmbiguousOutcome) as caught:
            await collect(reply)
        assert caught.value.endpoint == at.endpoint.name
        if tokens:
            assert caught.value.partial == "one two"
        assert at.endpoint.gauges()["in_flight"] == 0


async def test_security_04_an_endless_line_is_refused():
    pool = ConnectionPool(max_line_bytes=10_000)
    endless = say(stream_of(*[b"data: " + b"x" * 5000] * 20))
    async with RawServer(endless) as server, Opened(server, pool=pool) as at:
        with pytest.raises(ResponseTooLarge):
            await collect(await at.ask(chat_call(stream=True)))
        assert at.endpoint.gauges()["in_flight"] == 0


async def test_closing_a_stream_early_frees_everything_and_tells_the_server():
    async def endless(_, writer):
        writer.write(answer_bytes(200, b"", transfer_encoding="chunked", content_type="text/event-stream"))
        chunk = chat_chunks("word")[0]
        while not server.gone.is_set():
            writer.write(b"%x\r\n%s\r\n" % (len(chunk), chunk))
            await writer.drain()
            await asyncio.sleep(0.001)

    async with RawServer(endless) as server, Opened(server) as at:
        reply = await at.ask(chat_call(stream=True))
        await anext(reply.chunks)
        await reply.chunks.aclose()
        async with asyncio.timeout(120):
            await server.gone.wait()
        assert await collect(reply) == []
        assert len(at.ended()) == 1
        assert at.endpoint.gauges()["in_flight"] == 0


async def test_a_cancelled_reader_frees_everything():
    async def stalls(_, writer):
        writer.write(stream_of(chat_chunks("word")[0], end=False))
        await writer.drain()
        await asyncio.Event().wait()

    async with RawServer(stalls) as server, Opened(server) as at:
        reply = await at.ask(chat_call(stream=True))
        reading = asyncio.create_task(collect(reply))
        await asyncio.sleep(0.02)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        assert [ok for ok, _ in at.ended()] == [False]
        assert at.endpoint.gauges()["in_flight"] == 0


# Identity, secrets, life


def test_an_endpoint_is_known_by_its_place():
    endpoint = HTTPEndpoint("http://Host:8000/v1/?api-version=1&key=secret", KEY)
    assert isinstance(endpoint, Endpoint)
    assert endpoint.name == "http://host:8000/v1"
    assert repr(endpoint) == "HTTPEndpoint('http://host:8000/v1')"
    assert endpoint.capabilities == {"n"}
    assert endpoint.gauges() == {}
    assert isinstance(as_endpoint("http://127.0.0.1:8000/v1"), HTTPEndpoint)


@pytest.mark.parametrize(
    "options",
    [
        {"api_key": "secret\n"},
        {"api_key": "sec\r\nret: x"},
        {"headers": {"x-key": "secret\x00"}},
        {"headers": {"connection": "close"}},
        {"headers": {"Content-Length": "7"}},
        {"base_url": "http://h/v1#secret"},
        {"base_url": "http://user:secret@h/v1"},
        {"base_url": "http://169.254.169.254/v1"},
    ],
)
def test_security_01_what_must_not_be_sent_is_refused_at_once_and_not_shown(options):
    with pytest.raises(ConfigError) as caught:
        HTTPEndpoint(**{"base_url": "http://h/v1", **options})
    assert "secret" not in str(caught.value)


def test_security_05_allow_hosts_permits_what_is_otherwise_refused():
    assert HTTPEndpoint("http://169.254.169.254/v1", allow_hosts=("169.254.169.254",)).name.startswith("http://169.254")


@pytest.mark.parametrize("engine", ["aiohttp", "httpx", "httpx2", "pyreqwest"])
async def test_security_02_the_key_appears_in_no_error_event_or_log(engine, caplog):
    caplog.set_level(logging.DEBUG)
    answers = (
        say(b"SSH-2.0\r\n\r\n"),
        hang_up(),
        say(answer_bytes(200, b"<html>")),
        say(answer_bytes(200, chat_body("x"))),
    )
    async with RawServer(*answers) as server:
        endpoint = HTTPEndpoint(
            server.origin + f"/v1?key={KEY}", KEY, headers={"x-api-key": KEY}, pool=ConnectionPool(engine=engine)
        )
        events = []
        endpoint.start(Env(sinks=(events.append,)))
        errors = []
        for _ in range(3):
            with pytest.raises(UpstreamError) as caught:
                await endpoint(chat_call())
            errors.append(caught.value)
        await endpoint(chat_call())
        await endpoint.aclose()
        assert f"key={KEY}" in server.requests[0].target
    for error in errors:
        chain, link = [], error
        while link is not None:
            chain.append(f"{link!r} {link}")
            link = link.__cause__ or link.__context__
        assert KEY not in " ".join(chain)
        assert pickle.loads(pickle.dumps(error)).endpoint == endpoint.name
    assert KEY not in repr(events)
    assert KEY not in repr(endpoint)
    assert KEY not in caplog.text


async def test_an_endpoint_serves_one_engine_at_a_time():
    async with RawServer(say(answer_bytes(200, chat_body("x")))) as server:
        endpoint = HTTPEndpoint(server.origin)
        endpoint.start(Env())
        env = Env()
        endpoint.start(env)  # nothing was asked yet
        await endpoint(chat_call())
        endpoint.start(env)
        with pytest.raises(ConfigError, match="another engine"):
            endpoint.start(Env())
        endpoint.rehome()
        await endpoint(chat_call())
        assert server.connections == 2
        await endpoint.aclose()
        await endpoint.aclose()


async def test_an_unused_endpoint_closes_quietly():
    endpoint = HTTPEndpoint("http://127.0.0.1:9/v1")
    endpoint.rehome()
    await endpoint.aclose()


async def test_the_connect_limit_of_a_call_reaches_the_pool():
    async with RawServer() as server:
        endpoint = HTTPEndpoint(server.origin.replace("http:", "https:"))
        with pytest.raises(ConnectionFailed):
            await endpoint(chat_call().replace(connect_s=0.05))
        await endpoint.aclose()


async def test_prewarming_asks_for_the_models():
    pool = ConnectionPool(prewarm=2)
    async with RawServer(say(answer_bytes(200, chat_body("x")))) as server, Opened(server, pool=pool) as at:
        await at.ask()
        while len(server.requests) < 3:
            await asyncio.sleep(0.001)
        assert sorted(sent.target for sent in server.requests) == ["/v1/chat/completions", "/v1/models", "/v1/models"]

"""security-2: the key is nowhere but in the request, however it was given and whatever the server does with it."""

from __future__ import annotations

import asyncio
import logging
import os
import pickle
import subprocess
import sys
import traceback
import warnings

import msgspec
import pytest

import llmmw
from llmmw import Client, ConnectionPool, ErrorRouter, Retry, Stack, TTLCache
from llmmw.endpoints.openai import HTTPEndpoint
from llmmw.env import Env
from llmmw.errors import LLMMWError
from llmmw.testing.fake import chat_body, chat_call, sse
from llmmw.testing.rawserver import RawServer, answer_bytes, chunked, hang_up, say

KEY = "hunter2/With+odd=characters"
"""Looks like no provider's key, so only knowing it helps; and it changes when it is quoted or written as JSON."""

WAYS = {
    "authorization": {"api_key": KEY},
    "x-api-key": {"api_key": KEY, "key_header": "x-api-key"},
    "api-key": {"api_key": KEY, "key_header": "api-key"},
    "x-goog-api-key": {"headers": {"x-goog-api-key": KEY}},
    "proxied authorization": {"headers": {"x-forwarded-authorization": f"Bearer {KEY}"}},
    "cookie": {"headers": {"cookie": f"a=b; session={KEY}"}},
    "?key=": {"query": "?api-version=1&key=hunter2%2FWith%2Bodd%3Dcharacters"},
    "a header of one's own": {"api_key": KEY, "key_header": "x-whatever"},
}
"""The six kinds of SPEC 10 and two more."""


def echo(status, content_type="application/json"):
    """Everything the server was sent, thrown back: in the message, in codes, in headers."""

    async def answer(request, writer):
        said = " ".join([*request.headers.values(), request.target, KEY])
        body = {"error": {"message": f"bad key: {said}", "type": KEY, "code": KEY, "param": KEY}}
        raw = msgspec.json.encode(body)
        writer.write(answer_bytes(status, raw, content_type=content_type, www_authenticate=KEY, location=f"/x/{KEY}"))

    return answer


async def echo_in_stream(request, writer):
    said = " ".join(request.headers.values())
    event = sse({"error": {"message": f"{said} {KEY}", "code": KEY, "type": "server_error"}})
    writer.write(answer_bytes(200, chunked(event), transfer_encoding="chunked", content_type="text/event-stream"))


async def echo_as_type(request, writer):
    writer.write(answer_bytes(200, b"<html>", content_type=f"text/{KEY}"))


ANSWERS = [
    echo(401), echo(400), echo(429), echo(500), echo(307), echo(200), echo_as_type, hang_up(),
    say(b"HTTP/1.1 200 " + KEY.encode() + b"\r\nbad header\r\n\r\n"), say(answer_bytes(200, chat_body("fine"))),
]  # fmt: skip
FORMS = {KEY, KEY.replace("/", "%2F").replace("+", "%2B").replace("=", "%3D"), KEY.replace("/", "\\/")}


def leaks(text):
    return [form for form in FORMS if form in text]


def told_by(error):
    """Everything an exception can be asked for, with its causes and their own frames' variables."""
    found = []
    seen = set()
    waiting = [error]
    while waiting:
        one = waiting.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        found += [repr(one), str(one), repr(one.__dict__), repr(getattr(one, "attempts", "")), repr(one.args)]
        found += ["".join(traceback.format_exception(one))]
        waiting += [one.__cause__, one.__context__, *getattr(one, "exceptions", ())]
    # As error trackers do it, with the values of all variables (of llmmw's own frames; the test's hold the key).
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if "/llmmw/" in frame.f_code.co_filename and "/tests/" not in frame.f_code.co_filename:
            found += [f"{name}={value!r}" for name, value in frame.f_locals.items()]
    found += [repr(pickle.dumps(error)), repr(pickle.loads(pickle.dumps(error)).__dict__)]
    return "\n".join(found)


class Heard:
    """Everything that is logged, warned or emitted anywhere."""

    def __init__(self, caplog):
        caplog.set_level(logging.DEBUG)
        for name in ("llmmw", "httpx", "httpx2", "httpcore", "httpcore2", "aiohttp", "asyncio", "h2", "hpack"):
            caplog.set_level(logging.DEBUG, logger=name)
        self.caplog = caplog
        self.events = []
        self.told = []

    def add(self, *values):
        self.told += [value if isinstance(value, str) else f"{value!r} {value}" for value in values]

    def all(self):
        return "\n".join([*self.told, repr(self.events), self.caplog.text])


@pytest.mark.parametrize("engine", ["aiohttp", "httpx", "httpx2", "pyreqwest"])
@pytest.mark.parametrize("way", WAYS)
async def test_security_02_the_key_is_nowhere_but_in_the_request(engine, way, caplog, tmp_path):
    """Failures of every kind, by a server that throws everything back."""
    pytest.importorskip(engine)
    options = dict(WAYS[way])
    query = options.pop("query", "")
    heard = Heard(caplog)
    asyncio.get_running_loop().set_debug(True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        async with RawServer(*ANSWERS) as server:
            stack = Stack(TTLCache(60, directory=tmp_path / "cache"), ErrorRouter(), Retry(attempts=1))
            endpoint = HTTPEndpoint(
                f"{server.origin}/v1{query}", pool=ConnectionPool(engine=engine, retry_on_stale=False), **options
            )
            engine_ = stack.bind(endpoint, env=Env(sinks=(heard.events.append,)))
            async with engine_:
                for _ in ANSWERS:
                    try:
                        reply = await engine_.call(chat_call("q", target=endpoint.name))
                        heard.add(reply, repr(reply.headers) if not reply.ok else "", repr(reply.attempts))
                        if not reply.ok:
                            heard.add((reply.data or b"").decode())
                            heard.add(told_by(llmmw.fault.error_of(reply)))
                    except LLMMWError as error:
                        heard.add(told_by(error))
                heard.add(
                    endpoint, engine_, stack, stack.explain(), engine_.get_performance_stats(), pickle.dumps(stack)
                )
            sent = "\n".join(f"{request.target} {request.headers}" for request in server.requests)
            assert leaks(sent), "the test sends the key"
    heard.add(*(str(one.message) for one in caught))
    assert leaks(heard.all()) == []
    for file in (tmp_path / "cache").rglob("*"):
        assert not file.is_file() or leaks(file.read_bytes().decode("latin-1")) == []


@pytest.mark.parametrize("engine", ["aiohttp", "httpx", "httpx2", "pyreqwest"])
async def test_security_02_an_error_within_a_stream_does_not_echo_the_key(engine):
    pytest.importorskip(engine)
    async with RawServer(echo_in_stream) as server:
        client = Client(
            f"{server.origin}/v1", api_key=KEY, stack=Stack(Retry(attempts=1)), pool=ConnectionPool(engine=engine)
        )
        async with client:
            with pytest.raises(LLMMWError) as caught:
                async for _ in client.stream(model="m", messages=[{"role": "user", "content": "q"}]):
                    pass
        assert leaks(told_by(caught.value)) == []


@pytest.mark.parametrize("library", ["httpx", "httpx2"])
@pytest.mark.parametrize("header", ["authorization", "x-api-key", "api-key", "x-goog-api-key", "cookie"])
async def test_security_02_the_transport_edge_hides_the_keys_of_each_request(library, header, caplog):
    """Here the key comes with every request and llmmw was never told it. What the server says reaches the SDK whole
    but for the key; the library's own request object has it, as it must."""
    lib = pytest.importorskip(library)
    heard = Heard(caplog)
    make = llmmw.httpx_client if library == "httpx" else llmmw.httpx2_client
    value = f"a={KEY}" if header == "cookie" else f"Bearer {KEY}" if header == "authorization" else KEY
    async with RawServer(*ANSWERS) as server:
        client = make(Stack(TTLCache(60), Retry(attempts=1)), env=Env(sinks=(heard.events.append,)))
        async with client:
            for _ in ANSWERS:
                try:
                    response = await client.post(
                        f"{server.origin}/v1/chat/completions",
                        headers={header: value},
                        json={"model": "m", "messages": [{"role": "user", "content": "q"}]},
                    )
                    if response.status_code >= 400:
                        heard.add(response.text, repr(response.headers), str(response.headers))
                except lib.HTTPError as error:
                    heard.add(str(error), repr(error), told_by(error.__cause__) if error.__cause__ else "")
            heard.add(repr(client.engine), repr(client.get_performance_stats()))
    assert leaks(heard.all()) == []


async def test_security_02_a_short_dummy_key_does_not_eat_ordinary_words():
    body = b'{"error":{"message":"the latest test of tests failed for key test"}}'
    async with RawServer(say(answer_bytes(400, body))) as server:
        endpoint = HTTPEndpoint(server.origin, api_key="test")
        reply = await endpoint(chat_call())
        await endpoint.aclose()
    assert reply.body["error"]["message"] == "the latest *** of tests failed for key ***"


async def test_security_02_the_answer_itself_is_not_touched():
    """A success is the caller's: whoever asks a model to repeat a word gets that word."""
    async with RawServer(say(answer_bytes(200, chat_body(KEY)))) as server:
        endpoint = HTTPEndpoint(server.origin, api_key=KEY)
        assert (await endpoint(chat_call())).text == KEY
        await endpoint.aclose()


async def test_security_02_the_command_line_shows_no_key(tmp_path):
    """Of a cache directory that calls with a key have filled."""
    async with RawServer(say(answer_bytes(200, chat_body("fine")))) as server:
        stack = Stack(TTLCache(60, directory=tmp_path / "cache"))
        async with Client(f"{server.origin}/v1", api_key=KEY, stack=stack) as client:
            await client.chat(model="m", messages="q")
    for command in (["cache", "stats", "--directory", str(tmp_path / "cache")], ["explain"]):
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-c", "from llmmw.cli import main; main()", *command,
            env={**os.environ, "OPENAI_API_KEY": KEY}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        said, _ = await child.communicate()
        assert child.returncode == 0, said.decode()
        assert leaks(said.decode()) == []

"""`VLLMEndpoint`, a call's way: what it adds, what it takes back, and how a call ends. Real sockets."""

from __future__ import annotations

import asyncio
import json
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest

from llmmw import Client, Stack
from llmmw.algo.load import Load
from llmmw.call import Call, Context
from llmmw.endpoints.openai import HTTPEndpoint
from llmmw.endpoints.salts import Salts
from llmmw.endpoints.vllm import VLLMEndpoint
from llmmw.env import Env
from llmmw.errors import ConfigError, ConnectionFailed, StatusError
from llmmw.events import UpstreamStarted
from llmmw.fault import classify
from llmmw.pool import ConnectionPool
from llmmw.testing.clock import ManualClock
from llmmw.testing.fake import chat_body, chat_call
from llmmw.testing.rawserver import RawServer, answer_bytes, hang_up
from llmmw.testing.server import FaultRule, Match, ServerConfig, running_server
from llmmw.wire import HTTPRequest

MODEL = "llmmw-embedded"
HELLO = [{"role": "user", "content": "hello"}]
SECRET = "a long and secret text"
BODIES = json.loads((Path(__file__).parent.parent / "data" / "vllm_errors.json").read_text("utf-8"))


def chat(text="hi", *, context=None, stream=False, **fields):
    return chat_call(text, context=context, stream=stream, **{"model": MODEL, **fields})


def complete(*prompts, **fields):
    return Call("complete", MODEL, {"model": MODEL, "prompt": list(prompts) or "hi", **fields})


def bodies(server):
    return [json.loads(entry["body"]) for entry in server.stats()["requests"]]


@pytest.fixture
async def server():
    async with running_server(ServerConfig(log_body_bytes=4096, log_headers=True)) as found:
        yield found


@pytest.fixture
async def endpoint(server):
    found = VLLMEndpoint(server.base_url)
    yield found
    await found.aclose()


class By:
    """Answers by method and path; what is not named is asked for an answer to a chat."""

    def __init__(self, **answers):
        self.answers = answers
        self.chats = []

    async def __call__(self, request, writer):
        if request.method == "GET":
            writer.write(answer_bytes(404, b'{"detail":"Not Found"}'))
            return
        self.chats.append(request)
        answer = self.answers.get(str(len(self.chats)), self.answers.get("always"))
        if callable(answer):
            await answer(request, writer)
        else:
            writer.write(answer or answer_bytes(200, chat_body("ok")))


# ── fields ──────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_every_field_goes_to_the_server_as_it_is_given(server, endpoint):
    given = {
        "seed": 7, "temperature": 0.5, "structured_outputs": {"regex": "[a-z ]+"}, "ignore_eos": False, "priority": 4,
        "cache_salt": "mine", "vllm_xargs": {"a": [1]}, "min_tokens": 1, "something_new": {"x": None},
    }  # fmt: skip
    reply = await endpoint(chat(**given))
    assert reply.ok
    sent = bodies(server)[-1]
    assert {name: sent[name] for name in given} == given
    assert (await endpoint(chat(seed=7, temperature=1.0))).text == (await endpoint(chat(seed=7, temperature=1.0))).text


@pytest.mark.parametrize(
    "call",
    [
        chat(context=Context(priority=-5)),
        chat(context=Context(priority=-5), stream=True),
        complete("a", "b").within(priority=-5),
        Call("chat_batch", MODEL, {"model": MODEL, "messages": [HELLO]}).within(priority=-5),
    ],
    ids=["chat", "stream", "list", "batch"],
)
async def test_the_priority_of_the_caller_goes_along(server, endpoint, call):
    reply = await endpoint(call)
    if reply.chunks is not None:
        assert [chunk async for chunk in reply.chunks]
    assert reply.ok
    assert bodies(server)[-1]["priority"] == -5
    assert "priority" not in call.payload, "the call itself is not changed"


async def test_no_priority_is_sent_where_there_is_none_or_another_or_nobody_reads_it(server, endpoint):
    await endpoint(chat(context=Context(priority=0)))
    await endpoint(chat(context=Context(priority=3), priority=-1))
    await endpoint(chat(context=Context(priority=2**40)))
    anthropic = {"model": MODEL, "max_tokens": 1, "messages": HELLO}
    await endpoint(Call("messages", MODEL, anthropic).within(priority=3))
    body = b'{"model":"llmmw-embedded","prompt":"x"}'
    native = HTTPRequest("POST", server.base_url + "/completions", (("content-type", "application/json"),), body)
    await endpoint(complete().within(priority=3).replace(native=native))
    assert [body.get("priority") for body in bodies(server)] == [None, -1, 2**31 - 1, None, None]


def error(message, **fields):
    return {"error": {"message": message, "type": "BadRequestError", **fields}}


SGLANG = "Using priority is disabled for this server. Please send a new request without a priority."
REFUSALS = {
    "older vLLM": (400, error("Got priority 3 but Priority scheduling is not enabled.", param=None, code=400)),
    "vLLM's shape": (400, error("not here", param="body.priority", code=400)),
    "OpenAI": (400, error("Unknown parameter: 'priority'.", param="priority")),
    "SGLang": (503, {"object": "error", "message": SGLANG, "code": 503}),
    "FastAPI": (422, {"detail": [{"loc": ["body", "priority"], "msg": "extra fields not permitted"}]}),
    "a string": (400, {"error": "priority: extra inputs are not permitted"}),
}


def minds_priority(status=400, body=None, **match):
    said = REFUSALS["older vLLM"][1] if body is None else body
    match = Match(contains='"priority"', **match)
    return FaultRule(kind="status", status=status, body=json.dumps(said), match=match)


@pytest.mark.parametrize("case", REFUSALS)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_refused_priority_is_dropped_once_and_for_all(server, endpoint, case, stream):
    events = []
    endpoint.start(Env(sinks=(events.append,)))
    server.add_fault(minds_priority(*REFUSALS[case]))
    urgent = chat(context=Context(priority=3), stream=stream)
    for call in (urgent, urgent, chat(priority=7)):
        reply = await endpoint(call)
        assert reply.ok
        assert reply.chunks is None or [chunk async for chunk in reply.chunks]
    assert ["priority" in body for body in bodies(server)] == [True, False, False, False]
    assert not endpoint.takes_priority
    assert sum(isinstance(event, UpstreamStarted) for event in events) == 4, "what was sent is counted"


async def test_each_of_many_calls_at_once_is_sent_again_once(server, endpoint):
    server.add_fault(minds_priority())
    replies = await asyncio.gather(*(endpoint(chat(str(n), context=Context(priority=n + 1))) for n in range(20)))
    assert all(reply.ok for reply in replies)
    asked = ["priority" in body for body in bodies(server)]
    assert asked.count(False) == 20
    assert asked.count(True) <= 20


async def test_a_bad_priority_is_the_callers_own_mistake(server, endpoint):
    for wrong in ("high", 2**70, True, None, 1.5):
        server.clear_faults()
        server.add_fault(minds_priority(400, REFUSALS["vLLM's shape"][1]))
        before = len(bodies(server))
        reply = await endpoint(chat(priority=wrong))
        assert (reply.status, len(bodies(server)) - before) == (400, 1)
    assert endpoint.takes_priority


async def test_a_call_that_fails_without_its_priority_too_proves_nothing(server, endpoint):
    server.add_fault(FaultRule(kind="status", status=400, body=json.dumps({"error": "no priority for you"})))
    reply = await endpoint(chat(context=Context(priority=3)))
    assert (reply.status, len(bodies(server))) == (400, 2)
    assert endpoint.takes_priority
    server.clear_faults()
    await endpoint(chat(context=Context(priority=3)))
    assert bodies(server)[-1]["priority"] == 3


@pytest.mark.parametrize("status", [401, 403, 404, 429])
async def test_other_refusals_that_speak_of_priorities_are_taken_as_they_are(server, endpoint, status):
    server.add_fault(minds_priority(status, {"error": {"message": "buy a higher priority"}}))
    reply = await endpoint(chat(context=Context(priority=3)))
    assert (reply.status, len(bodies(server))) == (status, 1)


async def test_without_a_priority_a_refusal_is_final(server, endpoint):
    server.add_fault(FaultRule(kind="status", status=400, body=json.dumps(REFUSALS["OpenAI"][1])))
    assert (await endpoint(chat())).status == 400
    assert len(bodies(server)) == 1


# ── salts ───────────────────────────────────────────────────────────────────────────────────────────────────────────


async def salts_of(server, *calls, **options):
    endpoint = VLLMEndpoint(server.base_url, **options)
    before = len(bodies(server))
    for call in calls:
        await endpoint(call)
    await endpoint.aclose()
    return [body.get("cache_salt") for body in bodies(server)[before:]]


async def test_each_tenant_has_a_salt_of_its_own_in_every_process(server):
    calls = [chat().replace(namespace=name) for name in ("a", "b", "a", "")]
    one, other, same, nobody = found = await salts_of(server, *calls, cache_salt=SECRET)
    assert one == same
    assert len({one, other, nobody}) == 3
    assert all(len(salt) == 43 and not {*"@/\\\0="} & {*salt} for salt in found)
    assert await salts_of(server, *calls, cache_salt=SECRET) == found
    assert await salts_of(server, *calls, cache_salt=SECRET + "!") != found
    assert await salts_of(server, calls[0], cache_salt=True) != await salts_of(server, calls[0], cache_salt=True)
    assert await salts_of(server, calls[0]) == await salts_of(server, calls[0], cache_salt=False) == [None]


def test_any_number_of_tenants_has_salts():
    salts = Salts(SECRET)
    first = salts.of("0")
    assert len({salts.of(str(n)) for n in range(10_000)}) == 10_000
    assert salts.of("0") == first
    assert len(salts._known) <= 4096


async def test_a_calls_own_salt_goes_before_it(server):
    assert await salts_of(server, chat(cache_salt="own"), cache_salt=SECRET) == ["own"]


@pytest.mark.parametrize(("options", "own"), [({"cache_salt": SECRET}, {}), ({}, {"cache_salt": 'said "by" hand'})])
async def test_a_salt_is_not_in_what_a_server_says_about_a_body_that_it_refuses(options, own):
    def quote(request, writer):
        writer.write(answer_bytes(400, json.dumps({"detail": [{"input": json.loads(request.body)}]}).encode()))
        return asyncio.sleep(0)

    front = By(always=quote)
    async with RawServer(front) as server:
        endpoint = VLLMEndpoint(server.origin, **options)
        reply = await endpoint(chat(**own))
        await endpoint.aclose()
    salt = json.loads(front.chats[0].body)["cache_salt"]
    assert reply.status == 400
    assert json.dumps(salt).encode()[1:-1] not in reply.data
    assert b'"cache_salt": "***"' in reply.data


@pytest.mark.parametrize("value", ["short", "", 5, b"bytes that are long enough", ["x" * 20]])
def test_a_salt_that_could_be_guessed_is_refused_without_being_shown(value):
    with pytest.raises(ConfigError, match="cache_salt") as caught:
        VLLMEndpoint("http://127.0.0.1:1/v1", cache_salt=value)
    assert "short" not in str(caught.value)
    assert SECRET not in repr(VLLMEndpoint("http://127.0.0.1:1/v1", cache_salt=SECRET)._salts)


# ── the server's load ───────────────────────────────────────────────────────────────────────────────────────────────


def asks(server):
    return ["endpoint-load-metrics-format" in entry["headers"] for entry in named(server)]


def named(server):
    found = server.stats()["requests"]
    return [{**entry, "headers": {name.lower(): value for name, value in entry["headers"].items()}} for entry in found]


async def test_now_and_then_an_answer_tells_of_the_servers_queue(server):
    clock = ManualClock()
    endpoint = VLLMEndpoint(server.base_url)
    endpoint.start(Env(clock=clock))
    assert endpoint.load == Load()
    for step in (0.0, 0.06, 0.06, 0.01):
        clock.advance(step)
        await endpoint(chat())
    assert asks(server) == [True, False, True, False]
    assert endpoint.load == Load(waiting=0, kv_cache_usage=0.0)
    assert endpoint.gauges()["server_waiting"] == 0
    clock.advance(1.0)
    assert [chunk async for chunk in (await endpoint(chat(stream=True))).chunks]
    await endpoint(Call("embed", MODEL, {"model": MODEL, "input": "x"}))
    assert asks(server)[4:] == [False, False], "vLLM tells it in whole answers only"
    await endpoint(complete())
    assert asks(server)[-1]
    await endpoint.aclose()


async def test_of_a_burst_one_call_in_32_asks(server):
    endpoint = VLLMEndpoint(server.base_url)
    endpoint.start(Env(clock=ManualClock()))
    for _ in range(100):
        await endpoint(chat())
    assert [n for n, asked in enumerate(asks(server)) if asked] == [0, 32, 64, 96]
    await endpoint.aclose()


async def test_headers_of_a_call_and_the_question_for_the_load_go_together(server):
    endpoint = VLLMEndpoint(server.base_url, load_interval=0)
    reply = await endpoint(chat().replace(native=(("x-mine", "1"),), target=endpoint.name))
    headers = named(server)[-1]["headers"]
    assert (headers["x-mine"], headers["endpoint-load-metrics-format"]) == ("1", "JSON")
    assert reply.header("endpoint-load-metrics")
    await endpoint.aclose()


@pytest.mark.parametrize(
    ("options", "wanted"), [({"load_interval": None}, [False] * 5), ({"load_interval": 0}, [True] * 5)]
)
async def test_how_often_is_a_matter_of_settings(server, options, wanted):
    endpoint = VLLMEndpoint(server.base_url, **options)
    for _ in range(5):
        await endpoint(chat())
    assert asks(server) == wanted
    await endpoint.aclose()


async def test_a_server_that_never_tells_is_not_asked_for_ever():
    front = By(always=None)
    front.answers = {"2": answer_bytes(500), "3": answer_bytes(200, chat_body("x"), endpoint_load_metrics="JSON {}")}
    async with RawServer(front) as server:
        endpoint = VLLMEndpoint(server.origin, load_interval=0)
        for _ in range(9):
            await endpoint(chat())
        asked = ["endpoint-load-metrics-format" in request.headers for request in front.chats]
        assert asked == [True] * 6 + [False] * 3, "three answers in a row without a word; a refusal does not count"
        await endpoint.aclose()


# ── connections ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_idle_connections_are_kept_for_less_than_the_server_keeps_them():
    assert VLLMEndpoint("http://h/v1")._settings.keepalive_expiry == 3.0
    own = ConnectionPool(keepalive_expiry=1.5)
    assert VLLMEndpoint("http://h/v1", pool=own)._settings is own


@pytest.mark.parametrize("reset", [False, True])
async def test_a_kept_connection_that_died_before_any_byte_costs_one_free_retry(reset):
    front = By()
    front.answers = {"2": hang_up(reset=reset), "4": hang_up(reset=reset)}
    async with RawServer(front) as server:
        endpoint = VLLMEndpoint(server.origin, load_interval=None)
        events = []
        endpoint.start(Env(sinks=(events.append,)))
        replies = [await endpoint(chat(str(n))) for n in range(3)]
        assert [reply.text for reply in replies] == ["ok"] * 3
        texts = [msgspec.json.decode(request.body)["messages"][0]["content"] for request in front.chats]
        assert texts == ["0", "1", "1", "2", "2"]
        over = [request.connection for request in front.chats]
        assert all(one != other for one, other in pairwise(over) if over.index(other) != over.index(one))
        await endpoint.aclose()


async def test_a_fresh_connection_that_dies_is_not_retried_for_free():
    front = By(always=hang_up())
    async with RawServer(front) as server:
        endpoint = VLLMEndpoint(server.origin)
        with pytest.raises(Exception, match="the server may have done the work") as caught:
            await endpoint(chat())
        assert len(front.chats) == 1
        assert classify(caught.value, wall=0.0).kind == "ambiguous"
        await endpoint.aclose()


async def test_a_dead_server_is_told_at_once():
    endpoint = VLLMEndpoint("http://127.0.0.1:1/v1")
    with pytest.raises(ConnectionFailed):
        await endpoint(chat())
    await endpoint.aclose()


@pytest.mark.parametrize("call", [chat(), chat(stream=True), complete("a", "b")], ids=["chat", "stream", "list"])
async def test_a_cancelled_call_frees_its_place_at_the_server(call):
    async with running_server(ServerConfig(latency="engine", reply_tokens=100_000, step_s=0.05)) as server:
        endpoint = VLLMEndpoint(server.base_url)

        async def ask():
            reply = await endpoint(call)
            async for _ in reply.chunks:
                pass

        task = asyncio.create_task(ask())
        await server.wait(at_least={"engine.running": 1})
        task.cancel()
        await asyncio.wait([task])
        await server.wait(at_most={"engine.running": 0, "engine.waiting": 0})
        assert task.cancelled()
        await endpoint.aclose()


# ── refusals ────────────────────────────────────────────────────────────────────────────────────────────────────────

FAULTS = {
    "prompt_too_long": "context_length", "prompt_too_long_stream": "context_length",
    "prompt_too_long_in_batch": "context_length", "prompt_too_long_in_list": "context_length",
    "max_tokens_too_large": "context_length", "no_key": "auth", "wrong_key": "auth",
}  # fmt: skip


@pytest.mark.parametrize("case", BODIES, ids=lambda case: case["case"])
async def test_every_refusal_of_a_real_vllm_is_understood(case):
    body = json.dumps(case["body"]).encode()
    async with RawServer(By(always=answer_bytes(case["status"], body))) as server:
        endpoint = VLLMEndpoint(server.origin, "sk-k")
        reply = await endpoint(chat(context=Context(priority=1)))
        fault = classify(reply, wall=0.0)
        name = case["case"]
        wanted = "rate" if name.startswith("overload") else FAULTS.get(name, "invalid")
        assert (reply.status, fault.kind, fault.retry_after_s) == (case["status"], wanted, None)
        assert fault.message, "in the server's words"
        await endpoint.aclose()


# ── settings ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000/v1"),
        ("http://127.0.0.1:8000/", "http://127.0.0.1:8000/v1"),
        ("http://127.0.0.1:8000/v1", "http://127.0.0.1:8000/v1"),
        ("http://127.0.0.1:8000/v1/", "http://127.0.0.1:8000/v1"),
        ("https://gateway/team/vllm/v1", "https://gateway:443/team/vllm/v1"),
        ("https://gateway/openai", "https://gateway:443/openai"),
        ("http://[::1]:8000", "http://[::1]:8000/v1"),
    ],
)
def test_where_it_is(url, name):
    endpoint = VLLMEndpoint(url)
    assert (endpoint.name, repr(endpoint)) == (name, f"VLLMEndpoint({name!r})")
    assert isinstance(endpoint, HTTPEndpoint)


@pytest.mark.parametrize("url", [None, 5, "", "127.0.0.1:8000", "ftp://h", "http://", "http://a\nb:1", "http://u:pw@h"])
def test_a_url_that_cannot_work_is_refused(url):
    with pytest.raises(ConfigError, match="base_url") as caught:
        VLLMEndpoint(url)
    assert "pw" not in str(caught.value)


@pytest.mark.parametrize(
    "options", [{"load_interval": -1}, {"load_interval": "often"}, {"pool": 3}, {"duplicate_ok": 1}]
)
def test_a_setting_that_cannot_work_is_refused(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        VLLMEndpoint("http://h/v1", **options)


async def test_a_query_is_kept_and_never_shown():
    front = By()
    async with RawServer(front) as server:
        endpoint = VLLMEndpoint(f"{server.origin}?key=sk-hidden", "sk-top")
        assert (await endpoint(chat())).ok
        assert front.chats[0].target == "/v1/chat/completions?key=sk-hidden"
        assert not await endpoint.health()
        assert {request.target for request in server.requests if request.method == "GET"} >= {
            "/health?key=sk-hidden",
            "/v1/models?key=sk-hidden",
        }
        assert "hidden" not in repr(endpoint)
        await endpoint.aclose()


async def test_the_refusal_of_a_client_names_what_happened(server):
    async with Client(VLLMEndpoint(server.base_url), stack=Stack(), model="nobody") as client:
        with pytest.raises(StatusError, match="does not exist") as caught:
            await client.chat("hello")
    assert (caught.value.status, caught.value.fault) == (404, "invalid")

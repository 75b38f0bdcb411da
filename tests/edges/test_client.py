"""Client and SyncClient against the embedded server in its own process: every method, every kind of answer."""

from __future__ import annotations

import asyncio
import subprocess
import sys

import pytest

from llmmw import (
    Batcher,
    Client,
    ConfigError,
    Outcome,
    ProtocolError,
    Stack,
    StatusError,
    SyncClient,
    TTLCache,
    using,
)
from llmmw.endpoints.openai import HTTPEndpoint
from llmmw.testing.fake import FakeUpstream
from llmmw.testing.server import FaultRule, Match, ServerConfig, server_process

MODEL = "llmmw-embedded"
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def process():
    with server_process(ServerConfig(log_body_bytes=4096, log_headers=True)) as server:
        yield server


@pytest.fixture
def server(process):
    process.clear_faults()
    process.reset()
    return process


def last_request(server):
    return server.stats()["requests"][-1]


async def test_chat_complete_and_embed(server):
    async with Client(server.base_url, stack=Stack(), model=MODEL) as client:
        chat = await client.chat(HELLO, temperature=0)
        assert chat.text
        assert chat.body["choices"][0]["message"]["content"] == chat.text
        assert chat.usage.output_tokens > 0
        assert (chat.source, chat.endpoint) == ("upstream", server.base_url)
        assert (await client.chat("hello", temperature=0)).text == chat.text
        assert (await client.complete("once upon", temperature=0, max_tokens=3)).text
        vectors = (await client.embed(["a", "b"])).body["data"]
        assert len(vectors) == 2


async def test_tools_response_format_and_unknown_fields_pass_through(server):
    tool = {
        "type": "function",
        "function": {"name": "move", "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}}},
    }
    schema = {"type": "object", "properties": {"mood": {"enum": ["good"]}}, "required": ["mood"]}
    wanted = {"type": "json_schema", "json_schema": {"name": "mood", "schema": schema}}
    async with Client(server.base_url, stack=Stack(), model=MODEL) as client:
        called = await client.chat(HELLO, tools=[tool], tool_choice="required")
        assert called.body["choices"][0]["message"]["tool_calls"][0]["function"]["name"] == "move"
        assert (await client.chat(HELLO, response_format=wanted)).text.replace(" ", "") == '{"mood":"good"}'
        await client.chat(HELLO, extra_body={"guided_choice": ["yes"]}, made_up=[1], extra_headers={"X-Mine": "1"})
    body = str(last_request(server))
    for part in ("guided_choice", "made_up", "x-mine"):
        assert part in body.lower()
    assert "extra_body" not in body


async def test_a_stream_comes_piece_by_piece(server):
    async with Client(server.base_url, stack=Stack(), model=MODEL) as client:
        whole = await client.chat(HELLO, temperature=0)
        pieces = [piece async for piece in client.stream(messages=HELLO, temperature=0)]
        assert len(pieces) > 2
        assert "".join(pieces) == whole.text
        assert pieces[-1].usage == whole.usage
        assert [piece.finish_reason for piece in pieces if piece.finish_reason] == ["stop"]
        assert "".join([piece async for piece in client.stream(prompt="once", model=MODEL, max_tokens=4)])
        assert "".join([piece async for piece in client.stream("hello", temperature=0)]) == whole.text
        stats = client.get_performance_stats()
    assert stats["tokens_out"] >= 2 * whole.usage.output_tokens


async def test_a_batch_has_one_outcome_per_item_in_order(server):
    server.add_fault(FaultRule(kind="status", status=400, match=Match(contains="bad one")))
    seen = []
    async with Client(server.base_url, stack=Stack(), model=MODEL) as client:
        outcomes = await client.generate_batch(
            prompts=["first", "bad one", "third"], temperature=0, on_progress=lambda *p: seen.append(p)
        )
        assert [outcome.ok for outcome in outcomes] == [True, False, True]
        assert isinstance(outcomes[1].error, StatusError)
        assert outcomes[0].text == (await client.complete("first", temperature=0)).text
        chats = await client.generate_batch(messages=[HELLO, "hi"], max_tokens=2)
        assert all(chat.ok for chat in chats)
    assert sorted(seen) == [(1, 3), (2, 3), (3, 3)]


async def test_map_repeats_only_what_failed(server):
    rule = FaultRule(kind="status", status=400, match=Match(contains="bad one"))
    server.add_fault(rule)
    requests = [{"prompt": "one"}, {"messages": "bad one"}, {"input": "three"}]
    async with Client(server.base_url, stack=Stack(), model=MODEL) as client:
        first = await client.map(requests)
        assert [outcome.ok for outcome in first] == [True, False, True]
        server.clear_faults()
        server.reset()
        second = await client.map(requests, previous=first)
        assert all(outcome.ok for outcome in second)
        assert second[0] is first[0]
        with pytest.raises(ConfigError, match="2 outcomes for 3 requests"):
            await client.map(requests, previous=first[:2])
    assert len(server.stats()["requests"]) == 1


async def test_refusals_are_typed_errors(server):
    async with Client(server.base_url, stack=Stack(), model=MODEL) as client:
        with pytest.raises(StatusError) as caught:
            await client.chat(HELLO, model="unknown-model")
        assert caught.value.status == 404
        assert "unknown-model" in caught.value.message


@pytest.mark.parametrize("kind", ["html", "error_200", "garbage", "truncate", "empty"])
async def test_a_success_status_without_an_answer_is_a_typed_error(server, kind):
    server.add_fault(FaultRule(kind=kind))
    async with Client(server.base_url, stack=Stack(), model=MODEL) as client:
        with pytest.raises(ProtocolError):
            await client.chat(HELLO)
        assert client.get_performance_stats()["errors"] == 1


async def test_what_cannot_work_is_refused_before_anything_is_sent(server):
    async with Client(server.base_url, stack=Stack()) as client:
        with pytest.raises(ConfigError, match="name the model"):
            await client.chat(HELLO)
        with pytest.raises(ConfigError, match="non-empty"):
            await client.chat([], model=MODEL)
        with pytest.raises(ConfigError, match="iterate client"):
            await client.chat(HELLO, model=MODEL, stream=True)
        with pytest.raises(ConfigError, match="exactly one of"):
            await client.generate_batch(prompts=["a"], messages=[HELLO])
        with pytest.raises(ConfigError, match="exactly one of messages, prompt, input"):
            await client.map([{"prompt": "a", "messages": "b"}])
        for single in ("text", b"text", {"prompt": "a"}, 5):
            with pytest.raises(ConfigError, match="list of prompts"):
                await client.generate_batch(prompts=single)
            with pytest.raises(ConfigError, match="list of conversations"):
                await client.generate_batch(messages=single)
            with pytest.raises(ConfigError, match="list of requests"):
                await client.map(single)
        with pytest.raises(ConfigError, match="item 1: a request must be a mapping, not str"):
            await client.map([{"prompt": "a", "model": MODEL}, "b"])
    assert server.stats()["requests"] == []
    for wrong in ("ftp://x/v1", "http://user:secret@x/v1", "", "127.0.0.1:8000"):
        with pytest.raises(ConfigError) as caught:
            Client(wrong, stack=Stack())
        assert "secret" not in str(caught.value)
    with pytest.raises(ConfigError, match="must be a Stack"):
        Client(server.base_url, stack=[])


async def test_the_key_is_sent_and_shown_nowhere(server):
    async with Client(server.base_url, "sk-very-secret", stack=Stack(), model=MODEL) as client:
        await client.chat(HELLO)
        assert "sk-very-secret" not in repr(client) + repr(client.engine) + str(client.get_performance_stats())
    sent = {name.lower(): value for name, value in last_request(server)["headers"].items()}
    assert sent["authorization"] == "Bearer sk-very-secret"


async def test_using_reaches_the_statistics(server):
    async with Client(server.base_url, stack=Stack(), model=MODEL) as client:
        with using(agent="alice", step=3):
            await client.chat(HELLO)
        assert client.get_performance_stats()["by_agent"]["alice"]["tokens_out"] > 0


def test_the_sync_client_does_the_same_in_plain_code(server):
    with SyncClient(server.base_url, stack=Stack(), model=MODEL) as client:
        whole = client.chat(HELLO, temperature=0)
        assert "".join(client.stream(messages=HELLO, temperature=0)) == whole.text
        assert client.complete("x", max_tokens=2).text
        assert client.embed("x").body["data"]
        outcomes = client.generate_batch(prompts=["a", "b"], max_tokens=2)
        assert [type(outcome) for outcome in outcomes] == [Outcome, Outcome]
        assert client.map([{"prompt": "a"}])[0].ok
        with pytest.raises(StatusError):
            client.chat(HELLO, model="unknown")
        stream = client.stream(messages=HELLO)
        next(stream)
        stream.close()
        stats = client.get_performance_stats()
    assert stats["cancelled"] == 1


@pytest.mark.parametrize("forget", ["request", "tag", "tenant", "own"])
async def test_what_is_forgotten_is_asked_again(server, forget):
    async with Client(server.base_url, stack=Stack(TTLCache(300)), model="other", tenant="we") as client:
        asked = {"messages": HELLO, "temperature": 0, "model": MODEL}
        with using(tags="mine"):
            for _ in range(2):
                assert (await client.map([asked]))[0].ok
        assert len(server.stats()["requests"]) == 1
        gone = {
            "request": lambda: client.invalidate(**asked),
            "tag": lambda: client.invalidate_tag("mine"),
            "tenant": lambda: client.invalidate_tenant("we"),
            "own": client.invalidate_tenant,
        }
        assert gone[forget]() == 1
        assert (await client.map([asked]))[0].ok
        assert len(server.stats()["requests"]) == 2


async def test_a_tick_ends_a_step(server):
    async with Client(server.base_url, stack=Stack(Batcher(barrier=3, flush_interval=3600)), model=MODEL) as client:
        with using(step=1):
            waiting = [asyncio.create_task(client.chat(HELLO, max_tokens=2)) for _ in range(2)]
            while client.get_performance_stats()["layers"]["batch"]["waiting"] < 2:
                await asyncio.sleep(0)
            client.tick()
            assert all(reply.ok for reply in await asyncio.gather(*waiting))


@pytest.mark.parametrize("field", ["prompts", "messages"])
@pytest.mark.parametrize("known", [True, False])
async def test_joint_requests_give_everybody_the_answer_of_a_single_call(server, field, known):
    items = [f"question {number}" for number in range(12)]
    fields = {field: items, "max_tokens": 5, "temperature": 0}
    async with Client(server.base_url, stack=Stack(), model=MODEL) as client:
        singly = await client.generate_batch(**fields)
    alone = len(server.stats()["requests"])
    assert alone == 12
    if not known:
        server.add_fault(FaultRule(kind="status", status=404, match=Match(route="/v1/chat/completions/batch"), id="x"))
    joint = Batcher(joint="on", max_size=6, flush_interval=3600)
    async with Client(server.base_url, stack=Stack(joint), model=MODEL) as client:
        jointly = await client.generate_batch(**fields)
    assert [outcome.text for outcome in jointly] == [outcome.text for outcome in singly]
    assert all(outcome.reply.usage.output_tokens > 0 for outcome in jointly)
    asked = len(server.stats()["requests"]) - alone
    assert asked == 2 if known or field == "prompts" else asked >= 13


def test_plain_code_streams_a_completion_and_cancels_nothing(server, tmp_path):
    with SyncClient(server.base_url, stack=Stack()) as client:
        assert "".join(client.stream(prompt="x", model=MODEL, max_tokens=3, temperature=0))
        assert client.cancel_offline(tmp_path / "none") == 0
        assert server.base_url in repr(client)


async def test_an_endpoint_of_ones_own_takes_the_place_of_the_url(server):
    endpoint = HTTPEndpoint(server.base_url, "sk-own")
    async with Client(endpoint, stack=Stack(TTLCache(300)), model=MODEL) as client:
        first = await client.chat(HELLO, temperature=0)
        assert (first.endpoint, client.endpoint) == (server.base_url, endpoint)
        assert (await client.chat(HELLO, temperature=0)).source == "cache"
        assert client.requests.namespace
    with SyncClient(HTTPEndpoint(server.base_url), stack=Stack(), model=MODEL) as plain:
        assert plain.chat(HELLO, temperature=0).text == first.text
    async with Client(FakeUpstream(), stack=Stack(), model="m") as client:
        assert (await client.chat("any endpoint")).text == "echo: any endpoint"


@pytest.mark.parametrize("make", [Client, SyncClient])
def test_what_belongs_to_an_endpoint_is_not_taken_beside_it(server, make, tmp_path):
    for option, value in {"api_key": "sk-1", "headers": {"x": "1"}, "allow_hosts": ["h"]}.items():
        with pytest.raises(ConfigError, match=f"{option}: belongs to the endpoint") as caught:
            make(HTTPEndpoint(server.base_url), **{option: value})
        assert "sk-1" not in str(caught.value)
    with pytest.raises(ConfigError, match="base_url"):
        make(HTTPEndpoint)
    with pytest.raises(ConfigError, match="FakeUpstream"), SyncClient(FakeUpstream(), stack=Stack()) as plain:
        plain.generate_batch(model="m", prompts=["a"], offline=tmp_path)


def test_one_client_over_five_asyncio_runs(server):
    client = Client(server.base_url, stack=Stack(), model=MODEL)
    texts = {asyncio.run(client.chat(HELLO, temperature=0)).text for _ in range(5)}
    asyncio.run(client.aclose())
    assert len(texts) == 1
    assert server.stats()["connections"]["open"] <= 1  # the control plane's own


def test_a_client_never_closed_ends_with_the_interpreter(server):
    code = f"""
import asyncio, warnings
warnings.simplefilter("error")
from llmmw import Client, Stack, SyncClient
client = Client({server.base_url!r}, stack=Stack(), model={MODEL!r})
print(asyncio.run(client.chat("a")).text != "")
plain = SyncClient({server.base_url!r}, stack=Stack(), model={MODEL!r})
print(plain.chat("b").text != "")
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=False)
    assert (found.returncode, found.stdout) == (0, "True\nTrue\n"), found.stderr
    assert "Traceback" not in found.stderr

"""A bench asks what it says it asks: the embedded server counts."""

from __future__ import annotations

import asyncio
import json
import math
import re

import pytest

from llmmw import ConfigError, LLMMWError
from llmmw.bench import run as run_module
from llmmw.bench.run import Bench, Plan, look
from llmmw.bench.shapes import SHAPES, Shape, Tally, Target, _posting, client_of
from llmmw.endpoints.vllm import VLLMEndpoint
from llmmw.errors import MissingExtra, StatusError, UpstreamTimeout
from llmmw.testing.rawserver import RawServer, answer_bytes
from llmmw.testing.server import FaultRule, Match, ServerConfig, running_server


def shapes(*names):
    return tuple(SHAPES[name] for name in names)


async def bench(server, plan, **target):
    found = Bench(Target(server.base_url, "llmmw-embedded", max_tokens=4, **target), plan)
    told = []
    await found.run(lambda done, text: told.append((done, text)))
    return found, told


async def test_every_shape_gets_an_answer_to_every_question_and_is_clocked():
    async with running_server(ServerConfig(reply_tokens=9, reply_spread=0.0)) as server:
        found, told = await bench(server, Plan(tuple(SHAPES.values()), (3, 1), repeats=2))
    rows = found.rows()
    assert [(row.calls, row.shape) for row in rows] == [(count, name) for count in (1, 3) for name in SHAPES]
    for row in rows:
        assert row.skipped == row.said == ""
        assert [len(sample.latencies_s) for sample in row.samples] == [row.calls] * 2
        assert [sample.tokens for sample in row.samples] == [4 * row.calls] * 2
        assert all(0 < latency <= sample.wall_s for sample in row.samples for latency in sample.latencies_s)
        assert all(sample.cpu_s > 0 and math.isfinite(sample.wall_s) for sample in row.samples)
    assert (told[0], told[-1]) == ((0, "1 calls: one-by-one"), (28, ""))
    assert found.failures == 0


async def test_requests_arrive_in_the_shape_they_are_named_after_and_no_prompt_twice():
    routes, bodies = {}, []
    async with running_server(ServerConfig(log_body_bytes=4000)) as server:
        for name in SHAPES:
            server.core.reset()
            await bench(server, Plan(shapes(name), (3,), repeats=1, cold=True))
            report = server.core.report(100)
            routes[name] = report["by_route"]
            bodies += [request["body"] for request in report["requests"]]
    chat = "/v1/chat/completions"
    assert routes["one-by-one"] == routes["sdk"] == routes["aiohttp"] == routes["client"] == {chat: 3}
    assert routes["list"] == {"/v1/completions": 1}
    assert routes["batch"] == {"/v1/chat/completions/batch": 1}
    assert sum(routes["generate-batch"].values()) in {1, 3}
    prompts = re.findall(r"[0-9a-f]{6}-\d+\. You live", " ".join(bodies))
    assert len(prompts) == len(set(prompts)) == 3 * len(SHAPES)


@pytest.mark.parametrize(("name", "together"), [("sdk", 3), ("aiohttp", 3), ("client", 3), ("one-by-one", 1)])
async def test_all_at_once_means_that_nobody_waits_for_another_one(name, together):
    async with running_server(ServerConfig(latency="engine", step_s=0, paused=True)) as server:
        asked = asyncio.ensure_future(bench(server, Plan(shapes(name), (3,), repeats=1, cold=True)))
        assert await server.core.wait(lambda report: report["in_flight"] == together, 30)
        server.configure(paused=False)
        await asked
        assert server.core.report(0)["peak_in_flight"] == together


async def test_the_bare_client_keeps_no_connection_longer_than_a_server_may(monkeypatch):
    monkeypatch.setattr("llmmw.endpoints.vllm.KEEPALIVE_S", 0.01)
    async with RawServer() as server, _posting(Target(server.origin, "m")) as post:
        for _ in range(2):
            await post("chat/completions", {})
            await asyncio.sleep(0.05)
        assert server.connections == 2


async def test_waves_alternate_and_only_as_many_calls_are_made_one_by_one_as_allowed():
    plan = Plan(shapes("one-by-one", "client"), (1, 4, 64), repeats=2, sequential_most=4)
    names = [(shape.name, count) for shape, count in plan.waves()]
    assert names[5:] == names[:5][::-1]
    assert names[:5] == [("one-by-one", 1), ("client", 1), ("one-by-one", 4), ("client", 4), ("client", 64)]
    assert plan.calls == 2 * (1 + 1 + 4 + 4 + 64)


async def test_what_is_extrapolated_needs_no_smaller_wave_to_be_asked_for():
    async with running_server() as server:
        found, _ = await bench(server, Plan(shapes("one-by-one"), (6,), repeats=1, sequential_most=2))
        assert server.core.report(0)["by_route"] == {"/v1/chat/completions": 3}  # one to warm up
    (row,) = found.rows()
    assert (row.calls, row.measured_at) == (6, 2)


async def test_a_shape_the_server_does_not_know_is_skipped_and_says_why():
    fault = FaultRule(kind="status", status=404, match=Match(route="/v1/chat/completions/batch"))
    async with running_server(ServerConfig(faults=(fault,))) as server:
        found, _ = await bench(server, Plan(shapes("batch", "client"), (2,), repeats=3))
        assert server.core.report(0)["by_route"]["/v1/chat/completions/batch"] == 1
    batch, client = found.rows()
    assert batch.samples == []
    assert "404" in batch.skipped
    assert len(client.samples) == 3


@pytest.mark.parametrize("name", ["aiohttp", "list", "client", "generate-batch", "sdk"])
async def test_calls_without_an_answer_are_counted_and_the_first_one_is_quoted(name):
    fault = FaultRule(kind="status", status=400, match=Match())
    async with running_server(ServerConfig(faults=(fault,))) as server:
        found, _ = await bench(server, Plan(shapes(name), (2,), repeats=1, cold=True))
    (row,) = found.rows()
    assert row.samples[0].failures == found.failures == 2
    assert "400" in row.said
    assert row.samples[0].tokens == 0


async def test_a_client_that_cannot_be_made_is_skipped(monkeypatch):
    def missing(_):
        raise MissingExtra("pip install it")

    shape = Shape("engine", "", missing)
    found = Bench(Target("http://127.0.0.1:1/v1", "m"), Plan((shape,), (1,), repeats=2))
    await found.run(lambda *_: None)
    assert found.rows()[0].skipped == "MissingExtra: pip install it"


async def test_without_the_sdk_its_row_says_what_to_install(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "openai", None)
    found = Bench(Target("http://127.0.0.1:1/v1", "m"), Plan(shapes("sdk"), (1,), repeats=1))
    await found.run(lambda *_: None)
    assert "pip install 'llmmw[demo]'" in found.rows()[0].skipped


def test_the_credential_is_not_in_the_repr():
    assert "secret" not in repr(Target("http://x/v1", "m", "secret"))


@pytest.mark.parametrize("cold", [False, True])
@pytest.mark.parametrize("name", ["aiohttp", "list", "client", "generate-batch", "sdk"])
async def test_a_credential_that_the_server_quotes_is_told_by_no_shape(name, cold):
    key = "key-of-mine-" + "x" * 80  # the report has 300 characters of a refusal

    async def quote(request, writer):
        said = {"error": {"message": f"no such key: {request.headers['authorization']}", "type": "auth"}}
        writer.write(answer_bytes(401, json.dumps(said).encode()))

    async with RawServer(quote) as server:
        found = Bench(Target(server.origin + "/v1", "m", key), Plan(shapes(name), (1,), repeats=1, cold=cold))
        await found.run(lambda *_: None)
    (row,) = found.rows()
    assert "401" in row.said + row.skipped
    assert "no such key" in row.said + row.skipped
    assert key[:20] not in row.said + row.skipped


def test_a_failure_is_told_in_one_short_line():
    tally = Tally()
    tally.failed(ValueError("a\nb" + "c" * 999))
    tally.failed(KeyError("later"), 2)
    assert tally.failures == 3
    assert tally.said.startswith("ValueError: a bccc")
    assert len(tally.said) == 300


# ── the first look ───────────────────────────────────────────────────────────────────────────────────────────────────


async def test_the_first_model_is_taken_where_none_is_named():
    async with running_server(ServerConfig(models=("alpha", "beta"))) as server:
        assert (await look(Target(server.base_url, ""))).model == "alpha"
        assert (await look(Target(server.base_url, "beta"))).model == "beta"


async def test_an_unknown_model_is_told_with_those_that_are_there():
    async with running_server(ServerConfig(models=tuple(f"m{n}" for n in range(12)))) as server:
        with pytest.raises(ConfigError, match=r"model='nope': http://.* does not list it; it has m0, .*m7, \.\.\.$"):
            await look(Target(server.base_url, "nope"))
        assert "/v1/chat/completions" not in server.core.report(0)["by_route"]


CHAT = {"choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "a"}}]}


@pytest.mark.parametrize("listed", [b"no json", b'{"data": {"id": 1}}', b'{"data": [{}, 3]}'])
async def test_a_server_without_a_list_of_models_is_asked_for_the_one_that_is_named(listed):
    async def answer(request, writer):
        bodies = {"/v1/models": listed, "/v1/chat/completions": json.dumps(CHAT).encode()}
        found = bodies.get(request.target)
        writer.write(answer_bytes(200 if found else 404, found or b'{"detail": "Not Found"}'))

    async with RawServer(answer) as server:
        found = await look(Target(server.origin + "/v1", "m"))
        assert (found.model, found.vllm) == ("m", False)
        with pytest.raises(ConfigError, match="lists none; name one"):
            await look(Target(server.origin + "/v1", ""))
    assert [request.target for request in server.requests].count("/v1/chat/completions") == 1


async def test_a_vllm_server_is_asked_as_one_wherever_its_api_begins():
    async with running_server() as server:
        found = await look(Target(server.url, ""))
    assert (found.vllm, found.base_url, found.model) == (True, server.url + "/v1", "llmmw-embedded")
    assert isinstance(client_of(found).endpoint, VLLMEndpoint)
    assert not isinstance(client_of(Target(server.base_url, "m")).endpoint, VLLMEndpoint)


async def test_a_refused_credential_is_the_servers_own_words():
    async with running_server(ServerConfig(api_keys=("right",))) as server:
        with pytest.raises(StatusError) as caught:
            await look(Target(server.base_url, "llmmw-embedded", "wrong-key-of-mine"))
        assert caught.value.status == 401
        assert "wrong-key-of-mine" not in str(caught.value)
        assert (await look(Target(server.base_url, "", "right"))).model == "llmmw-embedded"


async def test_a_query_with_a_secret_is_refused_and_not_shown():
    with pytest.raises(ConfigError, match="base_url: must be without a query") as caught:
        await look(Target("http://127.0.0.1:1/v1?key=sk-hidden", "m"))
    assert "hidden" not in str(caught.value)


async def test_a_server_that_is_not_there_or_stays_silent_is_an_error_of_ours(monkeypatch):
    with pytest.raises(LLMMWError, match=r"127\.0\.0\.1"):
        await look(Target("http://127.0.0.1:1/v1", "m"))
    monkeypatch.setattr(run_module, "LOOK_S", 0.2)
    async with running_server(ServerConfig(latency="engine", paused=True)) as server:
        with pytest.raises(UpstreamTimeout, match=r"did not answer a first call within 0\.2 s"):
            await look(Target(server.base_url, "llmmw-embedded"))

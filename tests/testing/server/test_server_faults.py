import asyncio
import gzip
import json
import time

import aiohttp
import openai
import pytest

from llmmw.testing.server import FaultRule, Match, ServerConfig, server_process
from llmmw.testing.server.damage import bomb
from llmmw.testing.server.faults import FaultBook

CHAT = "/v1/chat/completions"
ASK = {"messages": [{"role": "user", "content": "needle"}], "temperature": 0, "max_tokens": 8}
STREAM = {**ASK, "stream": True}
DONE = "data: [DONE]"


@pytest.fixture
async def broken(serve):
    """``server = await broken("status", status=503)``: every request meets this rule."""

    async def start(kind, **options):
        return await serve(faults=(FaultRule(kind=kind, **options),))

    return start


def picked(rule, requests, route=CHAT, seed=0):
    book = FaultBook((rule,), seed)
    return [index for index, (body, now) in enumerate(requests) if book.pick(route, body, now)]


def test_matching_by_route_model_text_and_stream():
    body = json.dumps({**STREAM, "model": "m"}).encode()
    for match, hit in (
        (Match(route="chat/completions"), True),
        (Match(route="embeddings"), False),
        (Match(model="m"), True),
        (Match(model="other"), False),
        (Match(contains="needle"), True),
        (Match(contains="thread"), False),
        (Match(stream=True), True),
        (Match(stream=False), False),
    ):
        assert bool(picked(FaultRule(kind="reset", match=match), [(body, 0)])) is hit
    assert picked(FaultRule(kind="reset", match=Match(model="m")), [(b"no json", 0)]) == []
    assert picked(FaultRule(kind="no_done"), [(b"{}", 0)]) == []


def test_matching_by_turn_time_and_chance():
    many = [(b"{}", float(second)) for second in range(10)]
    assert picked(FaultRule(kind="reset", match=Match(every=3)), many) == [2, 5, 8]
    assert picked(FaultRule(kind="reset", match=Match(skip=1, first=2)), many) == [1, 2]
    assert picked(FaultRule(kind="reset", match=Match(after_s=3, until_s=5)), many) == [3, 4]
    half = FaultRule(kind="reset", match=Match(probability=0.5))
    drawn = picked(half, many * 20)
    assert drawn == picked(half, many * 20) != picked(half, many * 20, seed=1)
    assert 60 < len(drawn) < 140


def test_a_rule_with_a_known_id_replaces_it():
    book = FaultBook((FaultRule(kind="reset", id="x"), FaultRule(kind="html")), 0)
    assert book.add(FaultRule(kind="close", id="x")) == "x"
    assert [(rule.id, rule.kind) for rule in book.rules()] == [("html-2", "html"), ("x", "close")]


@pytest.mark.parametrize("status", [429, 500, 502, 503, 529])
async def test_status_with_retry_after_verbatim(broken, post, status):
    server = await broken("status", status=status, retry_after="soon", headers={"x-should-retry": "false"})
    got, body, headers = await post(server, CHAT, ASK)
    assert (got, body["error"]["code"]) == (status, status)
    assert (headers["Retry-After"], headers["x-should-retry"]) == ("soon", "false")
    stats = server.stats()
    assert stats["by_outcome"] == {f"http_{status}": 1}
    assert stats["requests"][0]["fault"] == "status-1"
    assert stats["faults"] == {"status-1": {"kind": "status", "matched": 1, "fired": 1}}


async def test_status_with_own_body(broken, post):
    server = await broken("status", status=502, body='{"own": 1}')
    assert (await post(server, CHAT, ASK))[:2] == (502, {"own": 1})


@pytest.mark.parametrize(
    ("kind", "error"), [("reset", aiohttp.ClientOSError), ("close", aiohttp.ServerDisconnectedError)]
)
async def test_connection_ends_before_any_byte(broken, post, kind, error):
    server = await broken(kind)
    with pytest.raises(error):
        await post(server, CHAT, ASK)
    assert (await server.wait(at_most={"in_flight": 0}))["by_outcome"] == {"broken": 1}


@pytest.mark.parametrize("kind", ["reset_mid", "close_mid"])
@pytest.mark.parametrize("ask", [ASK, STREAM])
async def test_connection_ends_inside_the_body(broken, http, kind, ask):
    server = await broken(kind)
    async with http.post(server.url + CHAT, json=ask) as response:
        assert response.status == 200
        with pytest.raises(aiohttp.ClientError):
            await response.read()


async def test_hang_lasts_until_the_client_leaves_or_the_time_is_over(broken, post):
    server = await broken("hang")
    task = asyncio.create_task(post(server, CHAT, ASK))
    await server.wait(at_least={"in_flight": 1})
    task.cancel()
    await asyncio.wait([task])
    assert (await server.wait(at_most={"in_flight": 0}))["by_outcome"] == {"aborted": 1}
    server.clear_faults()
    server.add_fault(FaultRule(kind="hang", seconds=0.001))
    with pytest.raises(aiohttp.ServerDisconnectedError):
        await post(server, CHAT, ASK)


@pytest.mark.parametrize(("kind", "start"), [("html", "<!DOCTYPE"), ("garbage", '{"choices": [{"mess')])
async def test_200_that_is_no_json(broken, http, kind, start):
    server = await broken(kind)
    async with http.post(server.url + CHAT, json=ASK) as response:
        assert response.status == 200
        content = await response.text()
    assert content.startswith(start)
    with pytest.raises(ValueError):
        json.loads(content)


async def test_200_with_an_error_and_with_no_choices(broken, post):
    status, body, _ = await post(await broken("error_200"), CHAT, ASK)
    assert (status, body["error"]["code"]) == (200, 500)
    status, body, _ = await post(await broken("empty"), CHAT, ASK)
    assert (status, body["choices"]) == (200, [])
    assert body["usage"]["completion_tokens"] == 8


async def test_truncated_json_has_complete_framing(broken, http):
    server = await broken("truncate", after=20)
    async with http.post(server.url + CHAT, json=ASK) as response:
        assert len(await response.read()) == 20


async def test_delay_and_trickle_deliver_everything(broken, post, serve):
    true = (await post(await serve(), CHAT, ASK))[1]["choices"]
    for kind in ("delay", "slow"):
        server = await broken(kind, seconds=0.001)
        assert (await post(server, CHAT, ASK))[1]["choices"] == true
        assert (await post(server, CHAT, STREAM))[1].endswith(DONE + "\n\n")
        assert server.stats()["by_outcome"] == {"ok": 2}


@pytest.mark.parametrize(
    ("kind", "options", "finish", "done", "error", "events"),
    [
        ("no_finish", {}, False, False, False, 9),
        ("no_done", {}, True, False, False, 10),
        ("sse_error", {"after": 0}, False, True, True, 2),
        ("sse_error", {"after": 4}, False, True, True, 6),
        ("empty", {}, False, True, False, 1),
        ("truncate", {"after": 3}, False, False, False, 4),
    ],
)
async def test_damaged_streams(broken, post, kind, options, finish, done, error, events):
    server = await broken(kind, **options)
    _, content, _ = await post(server, CHAT, STREAM)
    assert ('"finish_reason":"' in content) is finish
    assert (DONE in content) is done
    assert ('"error"' in content) is error
    assert len(content.rstrip().split("\n\n")) == events
    assert server.stats()["by_outcome"] == {"broken": 1}


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/responses"])
async def test_other_streams_lose_their_end_too(broken, post, path):
    server = await broken("no_finish")
    ask = {"messages": ASK["messages"], "input": "x", "max_tokens": 3, "stream": True}
    _, content, _ = await post(server, path, ask)
    assert "delta" in content
    assert "message_stop" not in content
    assert "response.completed" not in content


@pytest.mark.parametrize("ask", [ASK, STREAM])
async def test_silent_close_after_a_complete_answer(broken, http, ask):
    server = await broken("close_after")
    async with http.post(server.url + CHAT, json=ask) as response:
        assert response.headers.get("Connection") is None
        assert await response.read()
    stats = await server.wait(at_most={"connections.open": 0})
    assert stats["by_outcome"] == {"ok": 1}
    assert stats["connections"]["seen"] == 1


@pytest.mark.parametrize("ask", [ASK, STREAM])
async def test_duplicate_header(broken, http, ask):
    server = await broken("duplicate_header")
    async with http.post(server.url + CHAT, json=ask) as response:
        assert len(response.headers.getall("Content-Type")) == 2
        assert await response.read()


def test_bomb_is_valid_gzip_of_the_asked_size():
    size = 3 * (1 << 20) + 17
    assert gzip.decompress(bomb(size)) == b" " * size
    assert len(bomb(200_000_000)) < 250_000


async def test_bomb_arrives_compressed(broken):
    server = await broken("gzip_bomb", size=1_000_000)
    async with aiohttp.ClientSession(auto_decompress=False) as http, http.post(server.url + CHAT, json=ASK) as response:
        assert response.headers["Content-Encoding"] == "gzip"
        assert len(await response.read()) < 5000


async def test_openai_sdk_meets_faults_of_a_running_process():
    rule = FaultRule(kind="status", status=500, match=Match(first=1))
    with server_process(ServerConfig(faults=(rule,))) as server:
        async with openai.AsyncOpenAI(base_url=server.base_url, api_key="k", max_retries=0) as client:
            ask = {"model": "llmmw-embedded", "messages": ASK["messages"]}
            with pytest.raises(openai.InternalServerError):
                await client.chat.completions.create(**ask)
            assert (await client.chat.completions.create(**ask)).choices
            name = server.add_fault(FaultRule(kind="close"))
            with pytest.raises(openai.APIConnectionError):
                await client.chat.completions.create(**ask)
            server.clear_faults()
            assert (await client.chat.completions.create(**ask)).choices
        assert name == "close-2"


async def test_faults_by_time_count_from_reset(serve, post):
    server = await serve(faults=(FaultRule(kind="status", match=Match(until_s=3600)),))
    assert (await post(server, CHAT, ASK))[0] == 500
    server.core.stats.started = time.monotonic() - 7200
    assert (await post(server, CHAT, ASK))[0] == 200
    server.reset()
    assert (await post(server, CHAT, ASK))[0] == 500

import asyncio
import os
import signal
import subprocess
import sys

import aiohttp
import pytest
from aiohttp.test_utils import make_mocked_request

from llmmw.testing.server import (
    FaultRule,
    Match,
    ModelServer,
    ServerConfig,
    ServerProcess,
    running_server,
    server_process,
)
from llmmw.testing.server.cli import config_from, main, parser
from llmmw.testing.server.control import control

CHAT = "/v1/chat/completions"
ASK = {"messages": [{"role": "user", "content": "hello"}], "temperature": 0}


async def test_stats_count_and_summarise(serve, post):
    server = await serve(log_requests=2, log_body_bytes=9, log_headers=True)
    for _ in range(3):
        await post(server, CHAT, {**ASK, "priority": 4})
    await post(server, "/v1/embeddings", {"input": "x"}, headers={"X-Mine": "1"})
    _, stats, _ = await ask_control(server, "GET", "stats?requests=1")
    assert stats["received"] == stats["completed"] == 4
    assert stats["by_route"] == {CHAT: 3, "/v1/embeddings": 1}
    assert (stats["peak_in_flight"], stats["in_flight"], stats["requests_dropped"]) == (1, 0, 2)
    assert stats["connections"] == {"open": 1, "peak": 1, "seen": 1}
    (last,) = stats["requests"]
    assert (last["number"], last["route"], last["body"], last["outcome"]) == (4, "/v1/embeddings", '{"input":', "ok")
    assert last["headers"]["X-Mine"] == "1"
    chat = server.stats()["requests"][0]
    assert (chat["text"], chat["priority"], chat["connection"]) == ("hello", 4, 1)
    assert stats["tokens"]["output"] == 3 * chat["output_tokens"]


async def ask_control(server, method, name, body=None):
    async with (
        aiohttp.ClientSession() as http,
        http.request(method, f"{server.url}/_control/{name}", json=body) as response,
    ):
        return response.status, await response.json(), response.headers


async def test_connections_are_counted_by_requests_not_by_control(serve):
    server = await serve()
    async with aiohttp.ClientSession() as one, aiohttp.ClientSession() as two:
        for session in (one, one, two):
            async with session.post(server.url + CHAT, json=ASK) as response:
                await response.read()
        await ask_control(server, "GET", "stats")
        assert server.stats()["connections"] == {"open": 2, "peak": 2, "seen": 2}
        server.reset()
        async with one.post(server.url + CHAT, json=ASK) as response:
            await response.read()
        assert server.stats()["connections"] == {"open": 2, "peak": 2, "seen": 1}
    assert (await server.wait(at_most={"connections.open": 0}))["received"] == 1


async def test_control_over_http(serve, post):
    server = await serve()
    assert (await ask_control(server, "POST", "config", {"rpm": 1}))[1]["rpm"] == 1
    assert (await ask_control(server, "GET", "config"))[1]["latency"] == "none"
    assert [(await post(server, CHAT, ASK))[0] for _ in range(2)] == [200, 429]
    assert (await ask_control(server, "POST", "reset"))[1] == {"ok": True}
    rule = {"kind": "status", "status": 502, "match": {"first": 1}}
    assert (await ask_control(server, "POST", "faults", [rule, {**rule, "id": "mine"}]))[1] == {
        "ids": ["status-1", "mine"]
    }
    assert (await ask_control(server, "GET", "faults"))[1]["counts"]["mine"]["fired"] == 0
    assert (await post(server, CHAT, ASK))[0] == 502
    assert (await ask_control(server, "DELETE", "faults"))[1] == {"rules": [], "counts": {}}
    wait = {"at_least": {"received": 1}, "timeout_s": 5}
    assert (await ask_control(server, "POST", "wait", wait))[1]["ok"] is True
    wait = {"at_least": {"received": 99}, "timeout_s": 0.01}
    assert (await ask_control(server, "POST", "wait", wait))[1]["ok"] is False
    with pytest.raises(TimeoutError):
        await server.wait(at_least={"by_outcome.nothing": 1}, timeout_s=0.01)


@pytest.mark.parametrize(
    ("method", "name", "body", "status", "says"),
    [
        ("POST", "config", {"rpm": 0}, 400, "rpm: 0 is not allowed; expected `int` >= 1"),
        ("POST", "config", {"port": 1}, 400, "port: cannot change while the server runs"),
        ("POST", "config", {"speed": 1}, 400, "unknown field `speed`; options are: host, port"),
        ("POST", "faults", {"kind": "explode"}, 400, "explode"),
        ("POST", "faults", {"kind": "reset", "match": {"when": 1}}, 400, "when"),
        ("GET", "stats?requests=x", None, 400, "x"),
        ("GET", "other", None, 404, "there are stats, reset, config"),
    ],
)
async def test_control_explains_refusals(serve, method, name, body, status, says):
    server = await serve()
    got, answer, _ = await ask_control(server, method, name, body)
    assert got == status
    assert says in answer["error"]


async def test_settings_change_while_running(serve, post):
    server = await serve(log_requests=5)
    server.configure(latency="engine", step_s=0.0, block_tokens=8, log_requests=1)
    await post(server, CHAT, ASK)
    assert server.stats()["engine"]["steps"] > 0
    server.configure(faults=[{"kind": "html"}])
    assert server.core.faults.report() == {"html-1": {"kind": "html", "matched": 0, "fired": 0}}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"port": -1}, "port: -1 is not allowed; expected `int` >= 0"),
        ({"latency": "fast"}, "latency: 'fast' is not allowed; invalid enum value"),
        ({"models": ()}, "models: () is not allowed"),
        ({"host": "0.0.0.0"}, "host: '0.0.0.0' is not allowed; a loopback address is"),
        ({"host": "example.com"}, "allow_remote"),
        ({"rpm": "ten"}, "rpm: 'ten' is not allowed; expected `int | null`, got `str`"),
        ({"step_s": object}, "step_s"),
    ],
)
def test_bad_config_names_option_value_and_allowed(options, says):
    with pytest.raises(ValueError) as caught:
        ModelServer(ServerConfig(**options))
    assert says in str(caught.value)


async def test_stop_ends_requests_under_way():
    async with aiohttp.ClientSession() as http:
        async with running_server(ServerConfig(faults=(FaultRule(kind="hang"),))) as server:
            task = asyncio.create_task(http.post(server.url + CHAT, json=ASK).__aenter__())
            await server.wait(at_least={"in_flight": 1})
        with pytest.raises(aiohttp.ClientError):
            await task
    await server.stop()


async def test_ipv6_and_idle_connections_close():
    async with (
        running_server(ServerConfig(host="localhost", keepalive_s=0.05)) as server,
        aiohttp.ClientSession() as http,
        http.post(server.base_url + "/completions", json={"prompt": "x"}) as r,
    ):
        assert r.status == 200
        await server.wait(at_most={"connections.open": 0})


def test_process_serves_and_leaves_nothing_behind():
    with server_process(ServerConfig(rpm=7)) as server:
        assert server.stats()["received"] == 0
        assert server.configure(tpm=9)["tpm"] == 9
        assert server.add_fault(FaultRule(kind="reset", match=Match(every=2))) == "reset-1"
        server.clear_faults()
        server.reset()
        assert server.wait(at_most={"in_flight": 0})["received"] == 0
        with pytest.raises(TimeoutError):
            server.wait(at_least={"received": 1}, timeout_s=0.01)
        with pytest.raises(ValueError, match="rpm: -1 is not allowed"):
            server.configure(rpm=-1)
        process = server._process
        assert server.pid == process.pid
    assert process.returncode == 0
    assert server.pid == 0
    server.stop()


def test_process_ends_with_a_parent_that_is_killed():
    code = (
        "import sys, time; from llmmw.testing.server import ServerProcess\n"
        "s = ServerProcess().start(); print(s.url, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        orphan = ServerProcess()
        orphan.url = parent.stdout.readline().strip()
        assert orphan.stats()["received"] == 0
        parent.kill()
        parent.wait()
        with pytest.raises(OSError):
            while True:
                orphan.stats()


def test_process_reports_why_it_did_not_start():
    with server_process() as first:
        port = int(first.url.rsplit(":", 1)[1])
        with pytest.raises(RuntimeError, match="did not start"), server_process(ServerConfig(port=port)):
            pass
    with pytest.raises(RuntimeError, match="not running"):
        first.stats()


def test_a_stuck_process_is_killed():
    with server_process() as server:
        process = server._process
        process.send_signal(signal.SIGSTOP)
        server.stop(grace_s=0.05)
    assert process.returncode == -signal.SIGKILL


def test_command_line_options(capsys):
    flags = ["--models", "a,b", "--rpm", "5", "--max-queued", "none", "--latency", "engine", "--no-prefix-cache"]
    config = config_from(vars(parser().parse_args([*flags, "--faults", '[{"kind": "reset"}]', "--reply-text", "7"])))
    assert (config.models, config.rpm, config.max_queued, config.prefix_cache) == (("a", "b"), 5, None, False)
    assert (config.faults[0].kind, config.reply_text) == ("reset", "7")
    for flags, says in (
        (["--rpm", "ten"], "rpm: 'ten' is not allowed"),
        (["--config-json", "{"], "--config-json: '{' is not allowed"),
        (["--host", "0.0.0.0"], "--allow-remote"),
    ):
        assert main(flags) == 2
        assert says in capsys.readouterr().err
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert "not a model" in capsys.readouterr().out


def test_command_line_runs_until_a_signal():
    command = [sys.executable, "-m", "llmmw.testing.server", "--config-json", '{"seed": 3}']
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert "not a model" in process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 0


@pytest.fixture
def closed_stdin(monkeypatch):
    reader, writer = os.pipe()
    os.close(writer)
    with os.fdopen(reader) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        yield


@pytest.mark.parametrize("flags", [["--announce"], [], ["--announce", "--uvloop"]])
def test_main_announces_and_ends_with_its_input(closed_stdin, capsys, flags):
    assert main([*flags, "--until-stdin-closes"]) == 0
    line = capsys.readouterr().out
    assert line.startswith('{"url":"http://127.0.0.1:' if flags else "llmmw embedded server (not a model) on http")


def test_missing_uvloop_names_the_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "uvloop", None)
    assert main(["--uvloop"]) == 2
    assert "llmmw[speed]" in capsys.readouterr().err


async def test_control_refuses_remote_clients(serve):
    server = await serve()
    request = make_mocked_request("GET", "/_control/stats")
    assert request.remote is None
    assert (await control(server.core, request, "/_control/stats")).status == 200
    far = request.clone(remote="192.0.2.1")
    assert (await control(server.core, far, "/_control/stats")).status == 403
    odd = request.clone(remote="somewhere")
    assert (await control(server.core, odd, "/_control/stats")).status == 403


async def test_a_bug_in_a_route_is_counted_and_answered(serve, post, monkeypatch, caplog):
    async def bug(exchange):
        raise ZeroDivisionError

    monkeypatch.setattr("llmmw.testing.server.app.ROUTES", {CHAT: bug})
    server = await serve()
    assert (await post(server, CHAT, ASK))[0] == 500
    assert server.stats()["by_outcome"] == {"crashed": 1}

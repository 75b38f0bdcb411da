"""What every wire engine promises under load, cancellation, time-outs, proxies and forks, over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import os
import random
import socket
import ssl
import subprocess
import sys
import threading
import warnings
import weakref

import pytest

from llmmw.env import Env
from llmmw.errors import (
    Closed,
    ConfigError,
    ConnectionFailed,
    PoolTimeout,
    UpstreamTimeout,
)
from llmmw.interrupt import Until
from llmmw.pool import ConnectionPool
from llmmw.testing import ManualClock
from llmmw.testing.rawserver import RawServer, answer_bytes, say
from llmmw.wire import HTTPRequest

ENGINES = ["aiohttp", "httpx", "httpx2", "pyreqwest"]
OURS = ENGINES[:3]
"""Whose sockets are Python's own."""


@pytest.fixture(autouse=True)
def _installed(request):
    engine = request.node.callspec.params.get("engine") if hasattr(request.node, "callspec") else None
    if engine in {"httpx2", "pyreqwest"}:
        pytest.importorskip(engine)


def post(server, body=b"{}", path="/v1/chat/completions"):
    return HTTPRequest("POST", server.origin + path, (("content-type", "application/json"),), body)


async def ask(pool, request, **options):
    response = await pool.request(request, **options)
    return await response.body.read()


@contextlib.asynccontextmanager
async def opened(engine, *, env=None, **options):
    options = {"keepalive_expiry": 3600, **options}  # a busy machine may pause for seconds
    pool = ConnectionPool(engine=engine, **options).open(env or Env())
    try:
        yield pool
    finally:
        await pool.aclose()


async def until(condition):
    async with asyncio.timeout(120):
        while not condition():
            await asyncio.sleep(0.001)


# Load and cancellation


@pytest.mark.parametrize("engine", ENGINES)
async def test_pool_01_thousands_of_cancellations_leak_no_slot(engine):
    """20 tasks on 10 connections, cancelled at every stage of a request, 2,000 times."""
    rng = random.Random(1)
    hold = asyncio.Event()

    async def sometimes(request, writer):
        if request.body == b"hold":
            await hold.wait()
        elif request.body == b"half":
            writer.write(answer_bytes(200, b"1\r\nx\r\n", transfer_encoding="chunked"))
            await writer.drain()
            await hold.wait()
        else:
            writer.write(answer_bytes())

    async with RawServer(sometimes) as server, opened(engine, max_connections=10) as pool:
        cancelled = 0

        async def churn():
            nonlocal cancelled
            while cancelled < 2000:
                kind = rng.choice([b"hold", b"half", b"{}"])
                task = asyncio.create_task(ask(pool, post(server, kind), duplicate_ok=True))
                for _ in range(rng.choice([0, 1, 2, 3, 5, 8, 13])):
                    await asyncio.sleep(0)
                if rng.random() < 0.1:
                    seen = len(server.requests)
                    while len(server.requests) == seen and not task.done() and cancelled < 2000:
                        await asyncio.sleep(0)
                task.cancel()
                cancelled += 1
                await asyncio.wait([task])

        await asyncio.gather(*(churn() for _ in range(20)))
        assert pool.gauges()["in_flight"] == pool.gauges()["waiting"] == 0
        async with asyncio.timeout(120):
            assert await asyncio.gather(*(ask(pool, post(server)) for _ in range(30))) == [b"{}"] * 30


@pytest.mark.parametrize("engine", ENGINES)
async def test_pool_02_150_calls_on_100_connections_are_all_answered(engine):
    """No call is given up for waiting, however long the first hundred take."""
    together, most = 0, 0
    full, go = asyncio.Event(), asyncio.Event()

    async def held(_, writer):
        nonlocal together, most
        together += 1
        most = max(most, together)
        if together == 100:
            full.set()
        await go.wait()
        together -= 1
        writer.write(answer_bytes())

    async with RawServer(held) as server, opened(engine, max_connections=100) as pool:
        asking = [asyncio.create_task(ask(pool, post(server))) for _ in range(150)]
        async with asyncio.timeout(120):
            await full.wait()
        assert pool.gauges()["waiting"] == 50
        go.set()
        assert await asyncio.gather(*asking) == [b"{}"] * 150
        assert most == 100


async def test_callers_who_gave_up_waiting_for_a_slot_leave_nothing_behind():
    async def never(_, __):
        await asyncio.Event().wait()

    async with RawServer(never) as server, opened("aiohttp", max_connections=1, drain_timeout=0) as pool:
        held = asyncio.create_task(ask(pool, post(server)))
        await until(lambda: server.requests)
        for _ in range(200):
            waiting = asyncio.create_task(ask(pool, post(server)))
            await asyncio.sleep(0)
            waiting.cancel()
            await asyncio.wait([waiting])
        assert len(pool._fleet._queue) == 0
        assert pool.gauges()["waiting"] == 0
        held.cancel()


# Time-outs


async def test_a_pool_timeout_says_that_nothing_was_sent():
    async def never(_, __):
        await asyncio.Event().wait()

    options = {"max_connections": 1, "pool_timeout": 0.01, "drain_timeout": 0}
    async with RawServer(never) as server, opened("aiohttp", **options) as pool:
        held = asyncio.create_task(ask(pool, post(server)))
        await until(lambda: server.requests)
        with pytest.raises(PoolTimeout):
            await ask(pool, post(server))
        assert pool.gauges()["waiting"] == 0
        assert len(server.requests) == 1
        held.cancel()


async def test_a_layers_timeout_that_finds_a_call_waiting_for_a_slot_is_a_pool_timeout():
    """Else the breaker would blame the endpoint, and a paid call would count as perhaps done."""

    async def never(_, __):
        await asyncio.Event().wait()

    async with RawServer(never) as server, opened("aiohttp", max_connections=1, drain_timeout=0) as pool:
        held = asyncio.create_task(ask(pool, post(server)))
        await until(lambda: server.requests)
        clock = Env().clock
        due = clock.monotonic() + 0.01
        with pytest.raises(PoolTimeout):
            await Until(ask(pool, post(server)), clock, lambda: due, lambda: UpstreamTimeout("late"))
        waiting = asyncio.create_task(ask(pool, post(server)))
        await until(lambda: pool.gauges()["waiting"] == 1)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        held.cancel()


@pytest.mark.parametrize("engine", ENGINES)
async def test_the_connect_timeout_bounds_the_resolver_too(engine, monkeypatch):
    """A time-out of aiohttp's `sock_connect` would not."""
    stuck = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: stuck.wait(30) and [])
    try:
        async with opened(engine) as pool:
            with pytest.raises(ConnectionFailed):
                await pool.request(HTTPRequest("POST", "http://slow.test/v1"), connect_s=0.02)
    finally:
        stuck.set()


@contextlib.asynccontextmanager
async def server_that_stops_reading(tls=None):
    closing = asyncio.Event()

    async def serve(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        await closing.wait()
        writer.transport.abort()

    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    listener.bind(("127.0.0.1", 0))
    server = await asyncio.start_server(serve, sock=listener, limit=4096)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    finally:
        closing.set()
        server.close()
        await asyncio.sleep(0)


@pytest.mark.parametrize("engine", OURS)
async def test_the_write_timeout_ends_a_request_that_the_server_does_not_take(engine):
    async with server_that_stops_reading() as url, opened(engine, write_timeout=0.1) as pool:
        with pytest.raises(UpstreamTimeout, match="took nothing more") as caught:
            await pool.request(HTTPRequest("POST", url, (), bytes(30_000_000)))
        assert caught.value.sent is False
        assert pool.gauges()["in_flight"] == 0


@pytest.mark.parametrize("engine", OURS)
async def test_the_write_timeout_leaves_large_requests_alone_that_are_taken(engine):
    async with RawServer() as server, opened(engine, write_timeout=10) as pool:
        body = bytes(range(256)) * 20_000
        await ask(pool, post(server, body))
        await ask(pool, post(server, b""))
        assert [request.body for request in server.requests] == [body, b""]


@pytest.mark.parametrize("engine", ENGINES)
async def test_the_first_byte_timeout_knows_whether_the_request_was_sent(engine):
    async def never(_, __):
        await asyncio.Event().wait()

    async with RawServer(never) as server, opened(engine, first_byte_timeout=0.3) as pool:
        with pytest.raises(UpstreamTimeout, match="no response") as caught:
            await pool.request(post(server))
        assert caught.value.sent is True
        with pytest.raises((UpstreamTimeout, ConnectionFailed)) as refused:  # a handshake that never ends
            await pool.request(HTTPRequest("POST", server.origin.replace("http:", "https:")))
        if engine != "pyreqwest":  # which cannot tell
            assert refused.value.sent is False


@pytest.mark.parametrize("engine", ENGINES)
async def test_the_total_timeout_ends_a_trickle_that_no_other_limit_would(engine):
    async def trickle(_, writer):
        writer.write(answer_bytes(200, b"", transfer_encoding="chunked"))
        while not server.gone.is_set():
            writer.write(b"1\r\nx\r\n")
            await writer.drain()
            await asyncio.sleep(0.005)

    async with RawServer(trickle) as server, opened(engine, total_timeout=0.3, chunk_timeout=20) as pool:
        with pytest.raises(UpstreamTimeout, match=r"not over within 0\.3 s"):
            await ask(pool, post(server))
        if server.requests:  # else the machine was too busy to get as far as that
            async with asyncio.timeout(120):
                await server.gone.wait()
        assert pool.gauges()["in_flight"] == 0


def test_an_engine_that_cannot_bound_writing_says_so():
    pytest.importorskip("pyreqwest")
    with pytest.raises(ConfigError, match="write_timeout"):
        ConnectionPool(engine="pyreqwest", write_timeout=1)


# The environment


@pytest.mark.parametrize("engine", ENGINES)
async def test_pool_08_no_proxy_and_proxy_credentials_count_where_the_environment_does(engine, monkeypatch):
    async with (
        RawServer(say(answer_bytes(200, b'"direct"'))) as server,
        RawServer(say(answer_bytes(200, b'"proxied"'))) as proxy,
    ):
        place = proxy.origin.removeprefix("http://")
        for name in ("HTTP_PROXY", "http_proxy"):
            monkeypatch.setenv(name, f"http://user:p%40ss@{place}")
        for name in ("NO_PROXY", "no_proxy"):
            monkeypatch.delenv(name, raising=False)
        async with opened(engine, trust_env=True) as pool:
            assert await ask(pool, post(server)) == b'"proxied"'
        assert proxy.requests[0].headers["proxy-authorization"] == "Basic dXNlcjpwQHNz"
        for name in ("NO_PROXY", "no_proxy"):
            monkeypatch.setenv(name, "127.0.0.1")
        async with opened(engine, trust_env=True) as pool:
            assert await ask(pool, post(server)) == b'"direct"'
        assert "proxy-authorization" not in server.requests[0].headers


@pytest.mark.parametrize("engine", OURS)
async def test_pool_08_a_proxy_that_cannot_be_reached_is_named_without_its_password(engine, monkeypatch):
    async with RawServer() as gone:
        place = gone.origin.removeprefix("http://")
    monkeypatch.setenv("http_proxy", f"http://user:hunter2@{place}")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    async with opened(engine, trust_env=True) as pool:
        with pytest.raises(ConnectionFailed) as caught:
            await ask(pool, HTTPRequest("POST", "http://127.0.0.1:9/v1"))
        assert "hunter2" not in repr(caught.value)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("trust_env", [False, True])
async def test_pool_08_netrc_is_never_read(engine, trust_env, tmp_path, monkeypatch):
    """No cache key would know of such credentials; and aiohttp raises where a header holds others."""
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login somebody password hunter2\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))
    async with RawServer() as server, opened(engine, trust_env=trust_env) as pool:
        await ask(pool, post(server))
        await ask(pool, HTTPRequest("POST", server.origin, (("authorization", "Bearer k"),), b"{}"))
        assert [request.headers.get("authorization") for request in server.requests] == [None, "Bearer k"]


@pytest.mark.parametrize("engine", OURS)
@pytest.mark.parametrize("trust_env", [False, True])
def test_pool_08_certificates_and_key_logs_of_the_environment(engine, trust_env, certificate, tls, tmp_path):
    script = """
import asyncio, sys
from llmmw.env import Env
from llmmw.errors import ConnectionFailed
from llmmw.pool import ConnectionPool
from llmmw.wire import HTTPRequest

async def main():
    pool = ConnectionPool(engine=sys.argv[1], trust_env=sys.argv[2] == "True").open(Env())
    try:
        await (await pool.request(HTTPRequest("POST", sys.argv[3]))).body.read()
        print("trusted")
    except ConnectionFailed:
        print("refused")
    await pool.aclose()

asyncio.run(main())
"""
    log = tmp_path / "keys.log"

    async def main():
        async with RawServer(tls=tls) as server:
            child = await asyncio.create_subprocess_exec(
                sys.executable, "-c", script, engine, str(trust_env), server.origin,
                env={**os.environ, "SSL_CERT_FILE": str(certificate[0]), "SSLKEYLOGFILE": str(log), "NO_PROXY": "*"},
                stdout=subprocess.PIPE,
            )  # fmt: skip
            return (await child.communicate())[0].decode().strip()

    assert asyncio.run(main()) == ("trusted" if trust_env else "refused")
    assert trust_env or not log.exists() or "CLIENT" not in log.read_text()  # aiohttp's import writes a comment


@pytest.mark.parametrize("engine", ENGINES)
async def test_pool_07_a_changed_address_is_noticed_within_the_maximum_age(engine, monkeypatch):
    real = socket.getaddrinfo
    now_at = "127.0.0.1"

    def resolve(host, *args, **kwargs):
        return real(now_at if host == "moves.test" else host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    clock = ManualClock()
    async with RawServer(say(answer_bytes(200, b'"old"'))) as old:
        port = int(old.origin.rpartition(":")[2])

        async def serve(reader, writer):
            await reader.readuntil(b"\r\n\r\n{}")
            writer.write(answer_bytes(200, b'"new"', connection="close"))
            await writer.drain()
            writer.close()
            await writer.wait_closed()

        new = await asyncio.start_server(serve, "127.0.0.2", port)
        async with new, opened(engine, env=Env(clock=clock), max_connection_age=30) as pool:
            request = HTTPRequest("POST", f"http://moves.test:{port}", (), b"{}")
            assert await ask(pool, request) == b'"old"'
            now_at = "127.0.0.2"
            assert await ask(pool, request) == b'"old"'
            clock.advance(31)
            assert await ask(pool, request) == b'"new"'


# Ends


@pytest.mark.parametrize("engine", ENGINES)
async def test_pool_06_whoever_needs_the_pool_while_it_drains_is_refused_at_once(engine):
    go = asyncio.Event()

    async def waits(_, writer):
        await go.wait()
        writer.write(answer_bytes())

    async with RawServer(waits) as server, opened(engine) as pool:
        running = asyncio.create_task(ask(pool, post(server)))
        await until(lambda: server.requests)
        closers = [asyncio.create_task(pool.aclose()) for _ in range(3)]
        await asyncio.sleep(0)
        closers[0].cancel()
        with pytest.raises(Closed):
            await ask(pool, post(server))
        assert not running.done()
        go.set()
        assert await running == b"{}"
        outcomes = await asyncio.gather(*closers, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [asyncio.CancelledError, type(None), type(None)]
        await pool.aclose()


@pytest.mark.parametrize("engine", OURS)
@pytest.mark.parametrize("secure", [False, True])
async def test_a_forked_child_neither_writes_nor_closes_and_the_parent_goes_on(engine, secure, tls):
    three = asyncio.Barrier(3)

    async def together(_, writer):
        await three.wait()
        writer.write(answer_bytes())

    async with RawServer(together, tls=tls if secure else None) as server:
        pool = ConnectionPool(engine=engine, verify=not secure, keepalive_expiry=3600).open(Env())
        await asyncio.gather(*(ask(pool, post(server)) for _ in range(3)))
        assert server.connections == 3
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # fork with threads (the resolver's); the child only drops
            child = os.fork()
        if child == 0:
            try:
                pool.rehome()
                del pool
                gc.collect()
                os._exit(0)
            except BaseException:
                os._exit(1)
        _, status = await asyncio.to_thread(os.waitpid, child, 0)
        assert status == 0
        assert not server.gone.is_set()
        assert await asyncio.gather(*(ask(pool, post(server)) for _ in range(3))) == [b"{}"] * 3
        assert server.connections == 3
        await pool.aclose()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("where", ["running", "closed"])
def test_pool_05_a_pool_collected_unclosed_warns_once(engine, where):
    server = RawServer()
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    asyncio.run_coroutine_threadsafe(server.__aenter__(), loop).result(120)
    kept = []

    def lose():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            kept.clear()
            gc.collect()
        return caught

    async def use():
        pool = ConnectionPool(engine=engine).open(Env())
        await ask(pool, post(server))
        kept.append(pool)
        del pool
        if where == "closed":
            return []
        caught = lose()
        with warnings.catch_warnings(record=True) as later:
            warnings.simplefilter("always")
            await asyncio.sleep(0.01)
            gc.collect()
        return [*caught, *later]

    try:
        caught = asyncio.run(use())
        if where == "closed":
            caught = lose()
        told = [(w.category, str(w.message)) for w in caught]
        assert told == [(ResourceWarning, f"BoundPool({engine}, closed=False) was not closed")]
    finally:
        asyncio.run_coroutine_threadsafe(server.__aexit__(None, None, None), loop).result(120)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(120)
        loop.close()


class Secret:
    """Stands for a call with its prompt."""


@pytest.mark.parametrize("engine", OURS)
@pytest.mark.parametrize("secure", ["http", "https", "h2"])
async def test_a_connection_does_not_keep_the_call_alive_that_it_was_made_for(engine, secure, tls):
    """Its handles keep the context variables of whoever made it, so it is made in a context of its own."""
    if secure == "h2":
        pytest.importorskip("h2")
    flight = contextvars.ContextVar("flight")
    # An HTTP/1.1 server; asked for h2 first, it shows both ways of making a connection.
    context = None if secure == "http" else tls
    async with (
        RawServer(tls=context) as server,
        opened(engine, verify=not context, http2=secure == "h2") as pool,
    ):
        kept = []

        async def call():
            secret = Secret()
            kept.append(weakref.ref(secret))
            flight.set(secret)
            await ask(pool, post(server))

        for _ in range(2):
            await asyncio.create_task(call())
        await asyncio.sleep(0)
        gc.collect()
        assert [ref() for ref in kept] == [None, None]


def test_a_context_of_the_users_is_taken_as_it_is(tls):
    mine = ssl.create_default_context()
    assert ConnectionPool(verify=mine).verify is mine

"""What `ConnectionPool` promises apart from the wire: settings, slots, generations, homes, ends."""

import asyncio
import gc
import os
import ssl
import subprocess
import sys
import warnings
from typing import ClassVar

import pytest

import llmmw
from llmmw.env import Env
from llmmw.errors import (
    AmbiguousOutcome,
    Closed,
    ConfigError,
    ConnectionFailed,
    MissingExtra,
    PoolTimeout,
    StaleConnection,
)
from llmmw.events import ConnectionOpened
from llmmw.fault import classify
from llmmw.pool import BoundPool, ConnectionPool
from llmmw.pool import bound as bound_module
from llmmw.pool import engines as engines_module
from llmmw.pool.engine import Lost, as_utf8
from llmmw.pool.guard import Guard
from llmmw.testing import manual_time
from llmmw.testing.rawserver import RawServer, answer_bytes, hang_up, say
from llmmw.wire import HTTPRequest


def post(server, path="/v1/chat/completions", body=b"{}"):
    return HTTPRequest("POST", server.origin + path, (("content-type", "application/json"),), body)


async def ask(pool, request, **options):
    response = await pool.request(request, **options)
    return await response.body.read()


# Settings


def test_the_pool_is_a_public_name_with_checked_settings():
    assert llmmw.ConnectionPool is ConnectionPool
    assert ConnectionPool() == ConnectionPool()
    assert "max_connections=512" in repr(ConnectionPool())


@pytest.mark.parametrize(
    "options",
    [
        {"engine": "curl"},
        {"max_connections": 0},
        {"keepalive_expiry": 0},
        {"prewarm": -1},
        {"prewarm": 600},
        {"connect_timeout": -1},
        {"chunk_timeout": "soon"},
        {"drain_timeout": float("nan")},
        {"max_response_bytes": 0},
        {"verify": "ca.pem"},
        {"engine": "pyreqwest", "verify": ssl.create_default_context()},
        {"colour": "red"},
    ],
)
def test_an_impossible_setting_fails_when_it_is_made(options):
    with pytest.raises(ConfigError):
        ConnectionPool(**options)


async def test_a_missing_package_names_the_pip_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "llmmw.pool.engines.pyreqwest", None)
    pool = ConnectionPool(engine="pyreqwest").open(Env())
    with pytest.raises(MissingExtra, match=r"pip install 'llmmw\[speed\]'"):
        await pool.request(HTTPRequest("GET", "http://127.0.0.1:9/"))
    assert pool.gauges()["in_flight"] == 0


async def test_pyreqwest_refuses_to_work_in_a_forked_child(monkeypatch):
    module = pytest.importorskip("llmmw.pool.engines.pyreqwest")
    monkeypatch.setattr(module, "_first_pid", [os.getpid() + 1])
    with pytest.raises(ConfigError, match="fork"):
        await ConnectionPool(engine="pyreqwest").open(Env()).request(HTTPRequest("GET", "http://127.0.0.1:9/"))


# A scripted engine


class Raw:
    def __init__(self, engine, pieces=(b"{}",), headers=()):
        self.status = 200
        self.headers = headers
        self.pieces = list(pieces)
        self.closed = False

    @property
    def ended(self):
        return not self.pieces

    async def next(self):
        await asyncio.sleep(0)
        return self.pieces.pop(0)

    async def aclose(self):
        self.closed = True

    def abandon(self):
        self.closed = True


class Scripted:
    """An engine whose outcomes are given: an exception is raised, True/False says whether the connection is new."""

    made: ClassVar[list["Scripted"]] = []
    script: ClassVar[list[object]] = []

    def __init__(self):
        self.closed = False
        self.dropped = False
        self.held_now = None
        self.sent = 0
        Scripted.made.append(self)

    async def send(self, request, exchange):
        self.sent += 1
        opened, outcome = Scripted.script.pop(0) if Scripted.script else (True, None)
        exchange.opened = opened
        await asyncio.sleep(0)
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome or Raw(self)

    def held(self):
        return self.held_now

    def drop(self):
        self.dropped = True

    async def aclose(self):
        self.closed = True


@pytest.fixture
def scripted(monkeypatch):
    monkeypatch.setattr(bound_module, "make_engine", lambda name, options: Scripted())
    Scripted.made = []
    Scripted.script = []
    return Scripted


REQUEST = HTTPRequest("POST", "http://127.0.0.1:9/v1")


@manual_time
@pytest.mark.parametrize(
    ("took_s", "others", "kind"),
    [(5.0, 1, PoolTimeout), (5.0, 0, ConnectionFailed), (4.9, 1, ConnectionFailed)],
)
async def test_a_slow_connection_while_others_are_answered_is_our_own_slowness(clock, scripted, took_s, others, kind):
    """A thousand calls at once keep the loop busy for seconds: no circuit may open for that."""
    began = asyncio.Event()

    class Slow(Scripted):
        async def send(self, request, exchange):
            if request.body != b"slow":
                return await super().send(request, exchange)
            began.set()
            await asyncio.sleep(took_s)
            raise ConnectionFailed("no connection (ConnectionTimeoutError)")

    pool = BoundPool(ConnectionPool(connect_timeout=5), Env(clock=clock), Guard(), make=lambda _: Slow())
    slow = asyncio.create_task(pool.request(HTTPRequest("POST", REQUEST.url, (), b"slow")))
    await began.wait()
    for _ in range(others):
        await ask(pool, REQUEST)
    with pytest.raises(ConnectionFailed) as caught:
        await slow
    assert type(caught.value) is kind
    fault = classify(caught.value, wall=0.0)
    assert fault.local is (kind is PoolTimeout)
    assert pool.gauges()["in_flight"] == 0
    await pool.aclose()


@manual_time
async def test_connections_are_replaced_after_their_maximum_age(clock, scripted):
    pool = ConnectionPool(max_connection_age=60).open(Env(clock=clock))
    streaming = await pool.request(REQUEST)
    clock.advance(61)
    await ask(pool, REQUEST)
    old, new = scripted.made
    assert not old.closed
    await streaming.body.read()
    await asyncio.sleep(0)
    assert old.closed
    assert not new.closed
    await pool.aclose()
    assert new.closed


@manual_time
async def test_connections_held_beyond_the_requests_for_a_second_are_rebuilt(clock, scripted):
    pool = ConnectionPool(max_connection_age=None).open(Env(clock=clock))
    await ask(pool, REQUEST)
    scripted.made[0].held_now = 3
    for _ in range(3):
        clock.advance(0.4)
        await ask(pool, REQUEST)
    assert len(scripted.made) == 1
    clock.advance(1.1)
    await ask(pool, REQUEST)
    assert len(scripted.made) == 2
    await pool.aclose()


@manual_time
async def test_connections_held_for_a_moment_only_are_kept(clock, scripted):
    pool = ConnectionPool().open(Env(clock=clock))
    await ask(pool, REQUEST)
    for held in (3, 0, 3, 0):
        scripted.made[0].held_now = held
        clock.advance(1.1)
        await ask(pool, REQUEST)
    assert len(scripted.made) == 1
    await pool.aclose()


@manual_time
async def test_pool_03_retry_on_stale_repeats_what_otherwise_would_not_be(clock, scripted):
    scripted.script = [(False, Lost("gone")), (True, None), (False, Lost("gone")), (False, Lost("gone"))]
    pool = ConnectionPool(retry_on_stale=True).open(Env(clock=clock))
    assert await ask(pool, REQUEST) == b"{}"
    with pytest.raises(StaleConnection):
        await pool.request(REQUEST)
    assert [engine.sent for engine in scripted.made] == [1, 2, 1]
    assert pool.gauges()["in_flight"] == 0
    await pool.aclose()


@manual_time
async def test_pool_03_idempotent_methods_are_repeated(clock, scripted):
    scripted.script = [(False, Lost("gone")), (True, None)]
    pool = ConnectionPool().open(Env(clock=clock))
    assert await ask(pool, HTTPRequest("GET", REQUEST.url)) == b"{}"
    await pool.aclose()


@manual_time
async def test_slots_go_to_those_who_waited_longest_and_survive_cancellation(clock, scripted):
    pool = ConnectionPool(max_connections=1).open(Env(clock=clock))
    first = await pool.request(REQUEST)
    order = []

    async def queue(name):
        response = await pool.request(REQUEST)
        order.append(name)
        await response.body.read()

    waiting = {name: asyncio.create_task(queue(name)) for name in "abcd"}
    await asyncio.sleep(0.01)
    assert pool.gauges() == {"engine": "aiohttp", "in_flight": 1, "waiting": 4}
    waiting["b"].cancel()
    await asyncio.sleep(0.01)
    assert pool.gauges()["waiting"] == 3
    # The slot reaches "a" in the same turn as its cancellation: it must go on to "c".
    await first.body.read()
    waiting["a"].cancel()
    await asyncio.gather(*waiting.values(), return_exceptions=True)
    assert order == ["c", "d"]
    assert pool.gauges() == {"engine": "aiohttp", "in_flight": 0, "waiting": 0}
    await pool.aclose()


@manual_time
async def test_closing_while_the_closer_is_cancelled_goes_on(clock, scripted):
    pool = ConnectionPool(drain_timeout=5).open(Env(clock=clock))
    streaming = await pool.request(REQUEST)
    closing = asyncio.create_task(pool.aclose())
    await asyncio.sleep(1)
    closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closing
    assert await streaming.body.read() == b"{}"
    await pool.aclose()
    assert scripted.made[0].closed


@manual_time
async def test_pool_06_a_request_while_draining_is_refused_at_once(clock, scripted):
    pool = ConnectionPool(drain_timeout=5).open(Env(clock=clock))
    streaming = await pool.request(REQUEST)
    closing = asyncio.create_task(pool.aclose())
    await asyncio.sleep(0)
    before = clock.monotonic()
    with pytest.raises(Closed):
        await pool.request(REQUEST)
    assert clock.monotonic() == before
    await streaming.body.aclose()
    await closing


@manual_time
async def test_a_body_nobody_holds_any_more_gives_its_slot_back(clock, scripted):
    pool = ConnectionPool(max_connections=1).open(Env(clock=clock))
    response = await pool.request(REQUEST)
    with pytest.warns(ResourceWarning, match="neither read to its end nor closed"):  # noqa: PT031 — both needed
        del response
        gc.collect()
    async with asyncio.timeout(1):
        await ask(pool, REQUEST)
    await pool.aclose()


@manual_time
async def test_a_response_that_cannot_be_read_gives_its_slot_back(clock, scripted):
    raw = Raw(None, headers=((b"Content-Encoding", b"br"),))
    scripted.script = [(True, raw)]
    pool = ConnectionPool().open(Env(clock=clock))
    with pytest.raises(llmmw.ProtocolError):
        await pool.request(REQUEST)
    assert raw.closed
    assert pool.gauges()["in_flight"] == 0
    await pool.aclose()


@manual_time
async def test_a_body_is_read_up_to_a_limit(clock, scripted):
    raw = Raw(None, pieces=[b"abc", b"def", b"ghi"])
    scripted.script = [(True, raw)]
    pool = ConnectionPool().open(Env(clock=clock))
    response = await pool.request(REQUEST)
    assert await response.body.read(4) == b"abcd"
    assert raw.closed
    assert raw.pieces == [b"ghi"]
    assert await response.body.read() == b""
    await pool.aclose()


@manual_time
async def test_identity_coding_and_repeated_headers(clock, scripted):
    scripted.script = [(True, Raw(None, headers=((b"Content-Encoding", b"identity"), (b"A", b"1"), (b"a", b"2"))))]
    pool = ConnectionPool().open(Env(clock=clock))
    response = await pool.request(REQUEST)
    assert response.headers == (("content-encoding", "identity"), ("a", "1"), ("a", "2"))
    assert response.header("b") == ""
    await response.body.read()
    await pool.aclose()


@manual_time
async def test_caches_of_urls_headers_and_names_stay_bounded(clock, scripted):
    pool = ConnectionPool().open(Env(clock=clock))
    for number in range(600):
        raw = Raw(None, headers=((f"x-{number}".encode(), b"y"),))
        scripted.script = [(True, raw)]
        request = HTTPRequest("POST", f"http://127.0.0.1:9/{number}", (("x", str(number)),))
        response = await pool.request(request)
        assert response.header(f"x-{number}") == "y"
        await response.body.read()
    assert len(pool._origins) <= 256
    assert len(pool._outgoing) <= 256
    await pool.aclose()


# Sockets and homes


async def test_prewarm_opens_connections_before_they_are_needed():
    events = []
    async with RawServer() as server:
        pool = ConnectionPool(prewarm=3).open(Env(sinks=(events.append,)))
        pool.warm_up(HTTPRequest("GET", server.origin + "/v1/models"))
        while len(server.requests) < 3:
            await asyncio.sleep(0.001)
        await pool.aclose()
        assert [request.target for request in server.requests] == ["/v1/models"] * 3
        assert events == [ConnectionOpened(server.origin)] * 3


async def test_prewarming_a_dead_server_is_no_news():
    async with RawServer() as server:
        request = HTTPRequest("GET", server.origin)
    pool = ConnectionPool(prewarm=2).open(Env())
    pool.warm_up(request)
    await pool.aclose()


class Served:
    """A RawServer on a loop in another thread, so that the client's loop can die."""

    def __init__(self, *answers, tls=None):
        self.server = RawServer(*answers, tls=tls)

    def __enter__(self):
        import threading

        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        asyncio.run_coroutine_threadsafe(self.server.__aenter__(), self.loop).result(120)
        return self.server

    def __exit__(self, *_):
        try:
            asyncio.run_coroutine_threadsafe(self.server.__aexit__(None, None, None), self.loop).result(120)
        finally:
            self.loop.call_soon_threadsafe(self.loop.stop)
            self.thread.join(120)
            self.loop.close()


@pytest.mark.parametrize("engine", ["aiohttp", "httpx", "httpx2", "pyreqwest"])
@pytest.mark.parametrize("secure", [False, True])
@pytest.mark.parametrize("told", [False, True])
def test_pool_04_a_pool_works_in_a_second_asyncio_run(engine, secure, told, tls):
    with warnings.catch_warnings(), Served(tls=tls if secure else None) as server:
        warnings.simplefilter("error")
        pool = ConnectionPool(engine=engine, verify=not secure).open(Env())
        for _ in range(2):
            assert asyncio.run(ask(pool, post(server))) == b"{}"
            if told:
                pool.rehome()
            gc.collect()
        assert server.connections == 2
        asyncio.run(pool.aclose())
        gc.collect()


def test_pool_04_a_pool_works_in_a_second_run_on_uvloop():
    uvloop = pytest.importorskip("uvloop")
    with warnings.catch_warnings(), Served() as server:
        # uvloop closes open transports itself when the loop closes, warns, and hangs if that warning is an error.
        warnings.simplefilter("ignore", ResourceWarning)
        pool = ConnectionPool().open(Env())
        for _ in range(2):
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                assert runner.run(ask(pool, post(server))) == b"{}"
            pool.rehome()
            gc.collect()
        assert server.connections == 2


@pytest.mark.parametrize("engine", ["aiohttp", "httpx"])
async def test_rehome_on_a_living_loop_closes_the_connections(engine):
    async with RawServer() as server:
        pool = ConnectionPool(engine=engine).open(Env())
        await ask(pool, post(server))
        pool.rehome()
        async with asyncio.timeout(120):
            await server.gone.wait()
        await ask(pool, post(server))
        assert server.connections == 2
        await pool.aclose()


async def test_a_pool_closed_from_another_loop_drops_its_sockets(scripted):
    pool = ConnectionPool().open(Env())
    await ask(pool, REQUEST)
    await asyncio.to_thread(lambda: asyncio.run(pool.aclose()))
    assert scripted.made[0].dropped


async def test_a_stale_connection_takes_its_idle_neighbours_along():
    async with RawServer(*[say(answer_bytes())] * 2, hang_up(), say(answer_bytes())) as server:
        pool = ConnectionPool().open(Env())
        await asyncio.gather(*(ask(pool, post(server)) for _ in range(2)))
        assert await ask(pool, post(server), duplicate_ok=True) == b"{}"
        assert await ask(pool, post(server)) == b"{}"
        assert server.connections == 3
        await pool.aclose()


BOMB = """
import asyncio, gzip, resource, sys
from llmmw.env import Env
from llmmw.errors import ResponseTooLarge
from llmmw.pool import ConnectionPool
from llmmw.wire import HTTPRequest

async def main():
    pool = ConnectionPool(engine=sys.argv[2]).open(Env())
    await (await pool.request(HTTPRequest("POST", sys.argv[1] + "/small"))).body.read()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        await (await pool.request(HTTPRequest("POST", sys.argv[1] + "/bomb"))).body.read()
    except ResponseTooLarge:
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    await pool.aclose()

asyncio.run(main())
"""


@pytest.mark.parametrize("engine", ["aiohttp", "httpx"])
def test_security_04_a_bomb_of_200_mb_costs_no_memory(engine):
    # Compressed in pieces, so that this process does not hold the 200 MB either.
    packer = __import__("zlib").compressobj(9, wbits=31)
    bomb = b"".join(packer.compress(bytes(1_000_000)) for _ in range(200)) + packer.flush()
    assert len(bomb) < 200_000
    with Served(say(answer_bytes()), say(answer_bytes(200, bomb, content_encoding="gzip"))) as server:
        found = subprocess.run(
            [sys.executable, "-c", BOMB, server.origin, engine], capture_output=True, text=True, check=True
        )
    assert int(found.stdout) < 100_000  # KiB


def test_header_values_survive_a_library_that_writes_utf_8():
    assert as_utf8("plain") == "plain"
    assert as_utf8("café".encode().decode("latin-1")) == "café"
    assert as_utf8("caf\xe9") == "caf\xe9"


def test_the_names_of_the_engines_are_those_of_the_settings():
    for name in engines_module.ENGINES:
        ConnectionPool(engine=name)


def test_a_bound_pool_shows_no_url():
    assert repr(ConnectionPool().open(Env())) == "BoundPool(aiohttp, closed=False)"
    assert BoundPool.__doc__


def test_a_lost_connection_of_a_closed_pool_says_so(scripted):
    async def main():
        scripted.script = [(True, Lost("gone"))]
        pool = ConnectionPool(drain_timeout=1).open(Env())
        asking = asyncio.create_task(ask(pool, REQUEST))
        await asyncio.sleep(0)
        pool._closed = True
        with pytest.raises(AmbiguousOutcome, match="the pool was closed"):
            await asking

    asyncio.run(main())

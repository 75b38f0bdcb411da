"""HTTP/2: shared connections, what a GOAWAY does to requests in flight, and what a hostile peer does to a pool."""

from __future__ import annotations

import asyncio
import contextlib
import ssl

import pytest

pytest.importorskip("h2")
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import ConnectionTerminated, DataReceived, RequestReceived, StreamEnded, StreamReset, WindowUpdated
from h2.settings import SettingCodes, Settings

from llmmw.env import Env
from llmmw.errors import (
    AmbiguousOutcome,
    ConfigError,
    ConnectionFailed,
    MissingExtra,
    ProtocolError,
    ResponseTooLarge,
    StaleConnection,
)
from llmmw.events import ConnectionOpened, ConnectionReused
from llmmw.pool import ConnectionPool
from llmmw.pool import engines as engines_module
from llmmw.pool.engines import h2connection
from llmmw.testing.rawserver import RawServer
from llmmw.wire import HTTPRequest

OK = [(":status", "200"), ("content-type", "application/json")]
OURS = ["aiohttp", "httpx", "httpx2"]
"""Engines below our own HTTP/2; pyreqwest brings its own."""


class Peer:
    """One connection of `H2Server`, as its script sees it."""

    def __init__(self, server, transport):
        self.server = server
        self.transport = transport
        self.h2 = H2Connection(H2Configuration(client_side=False, header_encoding="latin-1"))
        self.heads: dict[int, dict[str, str]] = {}
        self.bodies: dict[int, bytes] = {}
        self.resets: dict[int, int] = {}

    def flush(self):
        self.transport.write(self.h2.data_to_send())

    def answer(self, stream, body=b"{}", head=OK, end=True):
        if head:
            self.h2.send_headers(stream, head, end_stream=end and not body)
        if body:
            self.h2.send_data(stream, body, end_stream=end)
        self.flush()

    def go_away(self, last, code=ErrorCodes.NO_ERROR):
        # By hand: h2 sends nothing more after its own.
        payload = last.to_bytes(4, "big") + int(code).to_bytes(4, "big")
        self.transport.write(len(payload).to_bytes(3, "big") + b"\x07\x00" + bytes(4) + payload)


class H2Server:
    """Serves HTTP/2 over TLS; `script(peer, stream)` is called for every complete request."""

    def __init__(self, tls, script=None, settings=None):
        self.tls = tls
        self.script = script or (lambda peer, stream: peer.answer(stream))
        self.settings = settings or {}
        self.peers: list[Peer] = []
        self.requests: list[tuple[int, dict[str, str], bytes]] = []
        self.changed = asyncio.Event()
        self.farewells = 0

    @property
    def origin(self):
        return f"https://127.0.0.1:{self.server.sockets[0].getsockname()[1]}"

    async def __aenter__(self):
        self.server = await asyncio.start_server(self.serve, "127.0.0.1", 0, ssl=self.tls)
        self.tasks = set()
        return self

    async def __aexit__(self, *_):
        self.server.close()
        for peer in self.peers:
            peer.transport.transport.abort()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        await self.server.wait_closed()

    async def serve(self, reader, writer):
        self.tasks.add(asyncio.current_task())
        peer = Peer(self, writer)
        self.peers.append(peer)
        if self.settings:
            peer.h2.local_settings = Settings(client=False, initial_values=self.settings)
        peer.h2.initiate_connection()
        peer.flush()
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                for event in peer.h2.receive_data(data):
                    self.take(peer, event)
                if not writer.is_closing():
                    peer.flush()
                self.changed.set()
        self.changed.set()
        writer.close()

    def take(self, peer, event):
        if isinstance(event, RequestReceived):
            peer.heads[event.stream_id] = dict(event.headers)
            peer.bodies[event.stream_id] = b""
        elif isinstance(event, DataReceived):
            peer.bodies[event.stream_id] += event.data
            peer.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
        elif isinstance(event, StreamReset):
            peer.resets[event.stream_id] = event.error_code
        elif isinstance(event, ConnectionTerminated):
            self.farewells += 1
        elif isinstance(event, StreamEnded):
            self.requests.append((event.stream_id, peer.heads[event.stream_id], peer.bodies[event.stream_id]))
            self.script(peer, event.stream_id)
        elif isinstance(event, WindowUpdated):
            pass

    async def until(self, condition):
        async with asyncio.timeout(120):
            while not condition():
                self.changed.clear()
                await self.changed.wait()


def post(server, body=b"{}", path="/v1/chat/completions"):
    return HTTPRequest("POST", server.origin + path, (("Content-Type", "application/json"), ("x-n", "caf\xe9")), body)


async def ask(pool, request, **options):
    response = await pool.request(request, **options)
    return await response.body.read()


@contextlib.asynccontextmanager
async def opened(engine="aiohttp", **options):
    events = []
    pool = ConnectionPool(
        **{"engine": engine, "http2": True, "verify": False, "keepalive_expiry": 3600, **options}
    ).open(Env(sinks=(events.append,)))
    pool.events = events
    try:
        yield pool
    finally:
        await pool.aclose()


# What is sent and what comes back


@pytest.mark.parametrize("engine", OURS)
async def test_a_request_goes_over_http2_where_the_server_offers_it(engine, tls_h2):
    head = [*OK, ("x-request-id", "r1")]
    async with (
        H2Server(tls_h2, lambda peer, stream: peer.answer(stream, b'"hi"', head)) as server,
        opened(engine) as pool,
    ):
        responses = [await pool.request(post(server, b"x" * 100, "/v1/x%2Fy?a=b%20c")) for _ in range(3)]
        assert [await response.body.read() for response in responses] == [b'"hi"'] * 3
        assert (responses[0].status, responses[0].header("x-request-id")) == (200, "r1")
        stream, got, body = server.requests[0]
        assert (stream, body, len(server.peers)) == (1, b"x" * 100, 1)
        assert (got[":method"], got[":path"], got[":scheme"]) == ("POST", "/v1/x%2Fy?a=b%20c", "https")
        assert got[":authority"] == server.origin.removeprefix("https://")
        assert (got["content-type"], got["content-length"]) == ("application/json", "100")
        assert got["accept-encoding"] == "gzip, deflate"
        assert "host" not in got
        origin = server.origin
        assert pool.events == [ConnectionOpened(origin), *[ConnectionReused(origin)] * 2]


@pytest.mark.parametrize("engine", OURS)
async def test_a_server_without_http2_is_asked_in_http1(engine, tls):
    async with RawServer(tls=tls) as server, opened(engine) as pool:
        for _ in range(2):
            assert await ask(pool, post(server)) == b"{}"
        assert [request.method for request in server.requests] == ["POST", "POST"]
        assert server.connections == 2  # the handshake that showed it, and one kept alive


async def test_plain_http_is_asked_in_http1():
    async with RawServer() as server, opened() as pool:
        assert await ask(pool, post(server)) == b"{}"


async def test_pool_08_a_proxy_is_asked_in_http1(tls_h2, monkeypatch):
    for name in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    async with H2Server(tls_h2) as server:
        async with opened() as direct:
            assert await ask(direct, post(server)) == b"{}"
        async with opened(trust_env=True) as proxied:
            with pytest.raises(ConnectionFailed):
                await ask(proxied, post(server))
        assert len(server.requests) == 1


async def test_requests_share_connections_as_far_as_the_server_allows(tls_h2):
    waiting = []
    settings = {SettingCodes.MAX_CONCURRENT_STREAMS: 10}
    async with H2Server(tls_h2, lambda *one: waiting.append(one), settings) as server, opened() as pool:
        asking = [asyncio.create_task(ask(pool, post(server))) for _ in range(35)]
        await server.until(lambda: len(waiting) == 35)
        assert len(server.peers) == 4
        for peer, stream in waiting:
            peer.answer(stream)
        assert await asyncio.gather(*asking) == [b"{}"] * 35
        assert pool.gauges()["in_flight"] == 0


async def test_a_body_larger_than_every_window_arrives_both_ways(tls_h2):
    size = 3_000_000

    def script(peer, stream):
        async def feed():
            data, sent = peer.bodies[stream], 0
            peer.h2.send_headers(stream, OK)
            while sent < len(data):
                room = min(peer.h2.local_flow_control_window(stream), peer.h2.max_outbound_frame_size)
                if room == 0:
                    peer.flush()
                    peer.server.changed.clear()
                    await peer.server.changed.wait()
                    continue
                peer.h2.send_data(stream, data[sent : sent + room])
                sent += room
            peer.h2.end_stream(stream)
            peer.flush()

        peer.server.tasks.add(asyncio.ensure_future(feed()))

    async with H2Server(tls_h2, script) as server, opened() as pool:
        body = bytes(range(256)) * (size // 256)
        assert await ask(pool, post(server, body)) == body


async def test_a_reader_who_stands_still_delays_nobody(tls_h2):
    def script(peer, stream):
        if stream == 1:
            peer.h2.send_headers(stream, OK)
            while room := min(peer.h2.local_flow_control_window(stream), 16384):
                peer.h2.send_data(stream, bytes(room))
            peer.flush()
        else:
            peer.answer(stream)

    async with H2Server(tls_h2, script) as server, opened() as pool:
        standing = await pool.request(post(server))
        assert [await ask(pool, post(server)) for _ in range(20)] == [b"{}"] * 20
        assert len(server.peers) == 1
        await standing.body.aclose()


# Giving up


async def test_whoever_gives_up_resets_the_exchange_so_that_the_server_stops(tls_h2):
    def script(peer, stream):
        if peer.bodies[stream] == b"stream":
            peer.answer(stream, b"x" * 1000, end=False)
        elif peer.bodies[stream] != b"hold":
            peer.answer(stream)

    async with H2Server(tls_h2, script) as server, opened() as pool:
        held = asyncio.create_task(ask(pool, post(server, b"hold")))
        await server.until(lambda: len(server.requests) == 1)
        held.cancel()
        streaming = await pool.request(post(server, b"stream"))
        assert await anext(streaming.body) == b"x" * 1000
        await streaming.body.aclose()
        await streaming.body.aclose()
        await server.until(lambda: len(server.peers[0].resets) == 2)
        assert set(server.peers[0].resets.values()) == {ErrorCodes.CANCEL}
        assert await ask(pool, post(server)) == b"{}"
        assert len(server.peers) == 1
        assert pool.gauges()["in_flight"] == 0


async def test_pool_01_cancelled_exchanges_do_not_eat_the_window_of_the_others(tls_h2):
    """Each leaves 64 KiB unread; without giving them back the connection's window would be gone after 400."""

    def script(peer, stream):
        if peer.bodies[stream] == b"give up":
            peer.h2.send_headers(stream, OK)
            for _ in range(4):
                peer.h2.send_data(stream, bytes(16384))
            peer.flush()
        else:
            peer.answer(stream)

    async with H2Server(tls_h2, script) as server, opened() as pool:
        for _ in range(450):
            response = await pool.request(post(server, b"give up"))
            await response.body.aclose()
        assert await ask(pool, post(server)) == b"{}"
        assert len(server.peers) == 1


async def test_pool_01_cancel_churn_leaves_every_slot_free(tls_h2):
    def script(peer, stream):
        if peer.bodies[stream] != b"hold":
            peer.answer(stream)

    async with H2Server(tls_h2, script) as server, opened(max_connections=10) as pool:
        for turn in range(30):
            tasks = [asyncio.create_task(ask(pool, post(server, b"hold"))) for _ in range(20)]
            for _ in range(turn):
                await asyncio.sleep(0)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        assert await asyncio.gather(*(ask(pool, post(server)) for _ in range(30))) == [b"{}"] * 30
        assert pool.gauges()["in_flight"] == pool.gauges()["waiting"] == 0


# GOAWAY


@pytest.mark.parametrize("engine", [*OURS, "pyreqwest"])
@pytest.mark.parametrize("last", [0, 1])
async def test_pool_09_a_request_that_the_server_has_not_begun_is_sent_again(engine, last, tls_h2):
    """Also where a duplicate could cost: the server says itself that it has not begun."""
    pytest.importorskip("pyreqwest")

    def script(peer, stream):
        if len(peer.server.peers) > 1:
            peer.answer(stream, b'"second"')
        elif stream == 1 and last == 1:
            peer.answer(stream, b'"first"')
        else:
            peer.go_away(last)

    async with H2Server(tls_h2, script) as server, opened(engine) as pool:
        if last:
            assert await ask(pool, post(server)) == b'"first"'
        assert await ask(pool, post(server)) == b'"second"'
        assert len(server.requests) == 2 + last
        assert len(server.peers) == 2


async def test_pool_09_a_request_that_the_server_never_begins_was_not_sent(tls_h2):
    async with H2Server(tls_h2, lambda peer, _: peer.go_away(0)) as server, opened() as pool:
        with pytest.raises(ConnectionFailed, match="not begun"):
            await ask(pool, post(server), duplicate_ok=True)
        assert len(server.requests) == 2
        assert pool.gauges()["in_flight"] == 0


async def test_pool_09_a_refused_stream_was_not_begun_either(tls_h2):
    def script(peer, stream):
        if stream == 1:
            peer.h2.reset_stream(stream, ErrorCodes.REFUSED_STREAM)
        else:
            peer.answer(stream)

    async with H2Server(tls_h2, script) as server, opened() as pool:
        assert await ask(pool, post(server)) == b"{}"
        assert (len(server.requests), len(server.peers)) == (2, 1)


@pytest.mark.parametrize("engine", [*OURS, "pyreqwest"])
async def test_pool_09_a_request_that_the_server_has_begun_is_ambiguous_when_the_connection_ends(engine, tls_h2):
    pytest.importorskip("pyreqwest")

    def script(peer, stream):
        peer.go_away(stream, ErrorCodes.INTERNAL_ERROR)
        peer.transport.close()

    async with H2Server(tls_h2, script) as server, opened(engine) as pool:
        with pytest.raises(AmbiguousOutcome):
            await ask(pool, post(server))
        assert len(server.requests) == 1
        assert pool.gauges()["in_flight"] == 0


async def test_pool_09_of_one_connection_each_request_has_the_outcome_of_its_own(tls_h2):
    """In one flight: 1 and 3 are begun (3 is answered after the GOAWAY, 1 is lost), 5 and 7 are not."""
    waiting = []

    def script(peer, stream):
        if peer is not peer.server.peers[0]:
            peer.answer(stream, b'"again"')
            return
        waiting.append(stream)
        if len(waiting) == 4:
            peer.go_away(3)
            peer.answer(3, b'"after all"')

    async with H2Server(tls_h2, script) as server, opened() as pool:
        asking = [asyncio.create_task(ask(pool, post(server, b"%d" % number))) for number in range(4)]
        assert await asking[1] == b'"after all"'
        assert await asyncio.gather(*asking[2:]) == [b'"again"'] * 2
        assert not asking[0].done()
        server.peers[0].transport.close()
        with pytest.raises(AmbiguousOutcome):
            await asking[0]
        assert len(server.requests) == 6


async def test_pool_09_a_server_that_goes_away_in_two_steps_finishes_what_it_began(tls_h2):
    """As nginx and Envoy do: first "no more", later the true last request."""

    def script(peer, stream):
        if len(peer.server.peers) == 1:
            peer.go_away(2**31 - 1)
            peer.answer(stream, b'"part', end=False)
            peer.go_away(stream)
            peer.answer(stream, b' two"', head=None)
        else:
            peer.answer(stream)

    async with H2Server(tls_h2, script) as server, opened() as pool:
        assert await ask(pool, post(server)) == b'"part two"'
        assert await ask(pool, post(server)) == b"{}"
        assert (len(server.peers), len(server.requests)) == (2, 2)
        await server.until(lambda: server.farewells == 1)  # the first connection closes with its last exchange


@pytest.mark.parametrize("safe", [True, False])
async def test_pool_03_an_idle_connection_closed_just_before_reuse(safe, tls_h2):
    def script(peer, stream):
        if stream == 1:
            peer.answer(stream)
        else:
            peer.transport.transport.abort()

    async with H2Server(tls_h2, script) as server, opened() as pool:
        await ask(pool, post(server))
        if safe:
            assert await ask(pool, post(server), duplicate_ok=True) == b"{}"
            assert len(server.peers) == 2
        else:
            with pytest.raises(StaleConnection):
                await ask(pool, post(server))


# Peers that break the rules


@pytest.mark.parametrize("status", ["0", "000", "abc", "", "2000"])
async def test_a_status_that_is_none_is_a_protocol_error(status, tls_h2):
    def script(peer, stream):
        # By hand: h2 checks nothing here, but its state must know of the response.
        peer.h2.send_headers(stream, [(":status", status)])
        peer.flush()

    async with H2Server(tls_h2, script) as server, opened() as pool:
        with pytest.raises((ProtocolError, AmbiguousOutcome)):
            await ask(pool, post(server))
        assert pool.gauges()["in_flight"] == 0


async def test_security_04_a_peer_that_pings_and_takes_no_answer_is_left(tls_h2, monkeypatch):
    monkeypatch.setattr(h2connection, "_MAX_UNSENT", 64 * 1024)  # the system's own buffers take enough time to fill

    async def flood(peer):
        peer.transport.transport.pause_reading()
        with contextlib.suppress(OSError):
            while not peer.transport.is_closing():
                peer.transport.write((b"\x00\x00\x08\x06\x00\x00\x00\x00\x00" + bytes(8)) * 4000)
                await peer.transport.drain()

    def script(peer, stream):
        peer.server.tasks.add(asyncio.ensure_future(flood(peer)))

    async with H2Server(tls_h2, script) as server, opened() as pool:
        async with asyncio.timeout(120):
            with pytest.raises(AmbiguousOutcome):
                await ask(pool, post(server))
        server.peers[0].transport.transport.abort()


@pytest.mark.parametrize(
    "garbage",
    [
        b"\xff" * 9,  # a frame of 16 MiB
        b"HTTP/1.1 200 OK\r\n\r\n",
        b"\x00\x00\x08\x07\x00\x00\x00\x00\x05" + bytes(8),  # GOAWAY on a stream
        b"\x00\x00\x04\x08\x00\x00\x00\x00\x00" + bytes(4),  # WINDOW_UPDATE of nothing
    ],
)
async def test_what_is_not_http2_breaks_the_connection_and_nothing_else(garbage, tls_h2):
    def script(peer, stream):
        if len(peer.server.peers) == 1:
            peer.transport.write(garbage)
        else:
            peer.answer(stream)

    async with H2Server(tls_h2, script) as server, opened() as pool:
        with pytest.raises(AmbiguousOutcome):
            await ask(pool, post(server))
        assert await ask(pool, post(server)) == b"{}"
        assert pool.gauges()["in_flight"] == 0


async def test_security_04_a_head_over_the_bound_is_refused(tls_h2):
    head = [*OK, *[(f"x-{number}", "y" * 4000) for number in range(40)]]
    async with H2Server(tls_h2, lambda peer, stream: peer.answer(stream, b"{}", head)) as server, opened() as pool:
        with pytest.raises(ResponseTooLarge):
            await ask(pool, post(server))
        assert pool.gauges()["in_flight"] == 0


async def test_security_04_an_endless_body_is_refused_and_stopped(tls_h2):
    def script(peer, stream):
        peer.h2.send_headers(stream, OK)
        for _ in range(10):
            peer.h2.send_data(stream, bytes(16000))
        peer.flush()

    async with H2Server(tls_h2, script) as server, opened(max_response_bytes=50_000) as pool:
        with pytest.raises(ResponseTooLarge):
            await ask(pool, post(server))
        await server.until(lambda: server.peers[0].resets)


async def test_an_answer_before_the_whole_request_is_taken(tls_h2):
    async def reject(peer):
        await peer.server.until(lambda: peer.heads)
        peer.answer(1, b"no", [(":status", "413")])

    async with H2Server(tls_h2, settings={SettingCodes.INITIAL_WINDOW_SIZE: 10}) as server, opened() as pool:
        asking = asyncio.create_task(pool.request(post(server, b"x" * 100)))
        await server.until(lambda: server.peers)
        server.tasks.add(asyncio.ensure_future(reject(server.peers[0])))
        response = await asking
        assert (response.status, await response.body.read()) == (413, b"no")
        await server.until(lambda: server.peers[0].resets)
        assert pool.gauges()["in_flight"] == 0


async def test_trailers_and_early_hints_are_read_over(tls_h2):
    def script(peer, stream):
        peer.h2.send_headers(stream, [(":status", "103"), ("link", "x")])
        peer.h2.send_headers(stream, OK)
        peer.h2.send_data(stream, b"{}")
        peer.h2.send_data(stream, b"")
        peer.h2.send_headers(stream, [("grpc-status", "0")], end_stream=True)
        peer.flush()

    async with H2Server(tls_h2, script) as server, opened() as pool:
        response = await pool.request(post(server))
        assert await response.body.read() == b"{}"
        assert response.header("link") == response.header("grpc-status") == ""


# Making connections


async def test_an_untrusted_certificate_was_not_sent(tls_h2):
    async with H2Server(tls_h2) as server, opened(verify=True) as pool:
        with pytest.raises(ConnectionFailed):
            await ask(pool, post(server))
        assert server.requests == []


async def test_a_context_of_the_users_is_used(tls_h2, certificate):
    context = ssl.create_default_context(cafile=str(certificate[0]))
    async with H2Server(tls_h2) as server, opened(verify=context) as pool:
        assert await ask(pool, post(server)) == b"{}"
        assert len(server.requests) == 1


async def test_a_refused_or_hanging_connect_fails_for_everybody_who_waits_for_it(tls_h2):
    async with H2Server(tls_h2) as server:
        request = post(server)
    async with opened() as pool:
        found = await asyncio.gather(*(ask(pool, request) for _ in range(3)), return_exceptions=True)
        assert [type(error) for error in found] == [ConnectionFailed] * 3
        assert len({id(error) for error in found}) == 3
    async with RawServer() as silent, opened() as pool:
        with pytest.raises(ConnectionFailed, match="in time"):
            await pool.request(HTTPRequest("POST", silent.origin.replace("http:", "https:")), connect_s=0.05)


async def test_security_05_a_name_rebound_to_a_metadata_address_is_refused(monkeypatch):
    import socket

    monkeypatch.setattr(
        socket, "getaddrinfo", lambda *_, **__: [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("169.254.169.254", 443))]
    )
    async with opened() as pool:
        with pytest.raises(ConfigError, match="metadata"):
            await ask(pool, HTTPRequest("POST", "https://innocent.test/v1"))


async def test_the_next_address_of_a_name_is_tried(monkeypatch, tls_h2):
    import socket

    real = socket.getaddrinfo

    def two(host, port, *args, **kwargs):
        if host != "two.test":
            return real(host, port, *args, **kwargs)
        return real("127.0.0.2", port, *args, **kwargs) + real("127.0.0.1", port, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", two)
    async with H2Server(tls_h2) as server, opened() as pool:
        request = HTTPRequest("POST", server.origin.replace("127.0.0.1", "two.test"))
        assert await ask(pool, request) == b"{}"


async def test_an_idle_connection_says_farewell_after_its_expiry(tls_h2):
    async with H2Server(tls_h2) as server, opened(keepalive_expiry=0.02) as pool:
        await ask(pool, post(server))
        await server.until(lambda: server.farewells == 1)
        await ask(pool, post(server))
        assert len(server.peers) == 2


async def test_closing_the_pool_while_it_connects_or_waits(tls_h2):
    async with RawServer() as silent, H2Server(tls_h2, lambda *_: None) as server:
        async with opened(drain_timeout=0.02) as pool:
            connecting = asyncio.create_task(ask(pool, HTTPRequest("POST", silent.origin.replace("http:", "https:"))))
            waiting = asyncio.create_task(ask(pool, post(server)))
            await server.until(lambda: server.requests)
        for task, kind in ((connecting, ConnectionFailed), (waiting, AmbiguousOutcome)):
            with pytest.raises(kind):
                await task


async def test_a_pool_that_moves_to_another_loop_forgets_its_connections(tls_h2):
    async with H2Server(tls_h2) as server:
        pool = ConnectionPool(http2=True, verify=False).open(Env())

        def elsewhere():
            return asyncio.run(ask(pool, post(server)))

        assert await asyncio.to_thread(elsewhere) == b"{}"
        assert await asyncio.to_thread(elsewhere) == b"{}"
        assert await ask(pool, post(server)) == b"{}"
        pool.rehome()
        assert await ask(pool, post(server)) == b"{}"
        assert len(server.peers) == 4
        await pool.aclose()


def test_without_h2_the_pip_command_is_named(monkeypatch):
    monkeypatch.setattr(engines_module, "find_spec", lambda name: None if name == "h2" else object())
    with pytest.raises(MissingExtra, match=r"pip install 'llmmw\[http2\]'"):
        ConnectionPool(http2=True)
    ConnectionPool(engine="pyreqwest", http2=True)

"""Every wire engine of `ConnectionPool` keeps the same contract, over real sockets on 127.0.0.1."""

from __future__ import annotations

import asyncio
import gzip
import socket
import zlib
from typing import TYPE_CHECKING, Any, ClassVar

import pytest

from llmmw.env import Env
from llmmw.errors import (
    AmbiguousOutcome,
    Closed,
    ConfigError,
    ConnectionFailed,
    ProtocolError,
    ResponseTooLarge,
    StaleConnection,
    UpstreamTimeout,
)
from llmmw.events import ConnectionOpened, ConnectionReused, Event
from llmmw.pool import BoundPool, ConnectionPool
from llmmw.testing.rawserver import RawRequest, RawServer, answer_bytes, chunked, hang_up, say
from llmmw.wire import HTTPRequest

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncGenerator

    from llmmw.pool import Response

    Writer = asyncio.StreamWriter


def post(server: RawServer, path: str = "/v1/chat/completions", body: bytes = b"{}") -> HTTPRequest:
    """A POST to the server."""
    return HTTPRequest("POST", server.origin + path, (("content-type", "application/json"),), body)


async def _whole(pool: BoundPool, request: HTTPRequest, **options: bool) -> tuple[Response, bytes]:
    response = await pool.request(request, **options)
    return response, await response.body.read()


class PoolContract:
    """The contract; `sees_connections` is False for an engine that cannot tell new connections from reused ones."""

    engine: ClassVar[str]
    sees_connections: ClassVar[bool] = True

    @pytest.fixture
    async def make(self) -> AsyncGenerator[Any]:
        """Makes pools that are closed after the test; the events of the last one are in `make.events`."""
        made: list[BoundPool] = []

        def make(**options: Any) -> BoundPool:
            events: list[Event] = []
            allow_hosts = options.pop("allow_hosts", ())
            options = {"keepalive_expiry": 3600, **options}  # a busy machine may pause for seconds
            pool = ConnectionPool(engine=self.engine, **options).open(
                Env(sinks=(events.append,)), allow_hosts=allow_hosts
            )
            setattr(make, "events", events)  # noqa: B010 — a function's attribute
            made.append(pool)
            return pool

        yield make
        for pool in made:
            await pool.aclose()

    async def test_what_a_server_sends_beyond_its_answer_is_nobodys_answer(self, make: Any) -> None:
        async def twice(request: RawRequest, writer: Writer) -> None:
            mine, theirs = (b'{"to": %d}' % number for number in (request.number, 0))
            writer.write(answer_bytes(body=mine) + answer_bytes(body=theirs)[: 40 if request.number % 2 else None])

        async with RawServer(twice) as server:
            pool = make()
            for number in range(1, 7):
                assert (await _whole(pool, post(server)))[1] == b'{"to": %d}' % number
            assert server.connections > 1

    async def test_the_request_arrives_as_it_was_given(self, make: Any) -> None:
        async with RawServer() as server:
            request = HTTPRequest(
                "POST",
                server.origin + "/v1/x%2Fy?a=b%20c&d=",
                (
                    ("x-custom", "caf\xc3\xa9"),
                    ("authorization", "Bearer k"),
                    ("content-type", "a/b"),
                    ("connection", "close"),
                ),
                b"\x00\xffbody",
            )
            response, body = await _whole(make(), request)
            assert (response.status, body) == (200, b"{}")
            got = server.requests[0]
            assert (got.method, got.target, got.body) == ("POST", "/v1/x%2Fy?a=b%20c&d=", b"\x00\xffbody")
            assert (got.headers["x-custom"], got.headers["authorization"]) == ("caf\xc3\xa9", "Bearer k")
            assert got.headers["content-type"] == "a/b"
            assert got.headers["content-length"] == "6"
            assert got.headers["accept-encoding"] == "gzip, deflate"
            assert got.headers["host"] == server.origin.removeprefix("http://")
            assert got.headers.get("connection", "keep-alive").lower() == "keep-alive"
            assert "transfer-encoding" not in got.headers

    async def test_a_body_of_three_megabytes_arrives(self, make: Any) -> None:
        async with RawServer() as server:
            await _whole(make(), post(server, body=b"x" * 3_000_000))
            assert len(server.requests[0].body) == 3_000_000

    async def test_headers_come_back_in_lower_case_without_those_of_the_connection(self, make: Any) -> None:
        raw = answer_bytes(200, b"{}", X_Request_Id="r1", Keep_Alive="timeout=5", Connection="keep-alive")
        async with RawServer(say(raw)) as server:
            response, _ = await _whole(make(), post(server))
            assert response.header("x-request-id") == "r1"
            assert {"keep-alive", "connection"}.isdisjoint(name for name, _ in response.headers)

    async def test_connections_are_reused_and_counted(self, make: Any) -> None:
        async with RawServer() as server:
            pool = make()
            replies = [await _whole(pool, post(server)) for _ in range(3)]
            assert server.connections == 1
            if self.sees_connections:
                assert [response.reused for response, _ in replies] == [False, True, True]
                assert make.events == [ConnectionOpened(server.origin), *[ConnectionReused(server.origin)] * 2]

    async def test_security_03_redirects_are_returned_not_followed(self, make: Any) -> None:
        async with RawServer() as elsewhere:
            for status in (301, 302, 303, 307, 308):
                async with RawServer(say(answer_bytes(status, b"", location=elsewhere.origin + "/x"))) as server:
                    response, body = await _whole(make(), post(server))
                    assert (response.status, body) == (status, b"")
            assert elsewhere.requests == []

    async def test_cookies_are_not_kept(self, make: Any) -> None:
        async with RawServer(say(answer_bytes(200, b"{}", set_cookie="a=b"))) as server:
            pool = make()
            await _whole(pool, post(server))
            await _whole(pool, post(server))
            assert "cookie" not in server.requests[1].headers

    async def test_a_refused_connection_was_not_sent(self, make: Any) -> None:
        async with RawServer() as server:
            request = post(server)
        with pytest.raises(ConnectionFailed):
            await make().request(request)

    async def test_a_name_that_does_not_resolve_was_not_sent(self, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: object, **__: object) -> None:
            raise socket.gaierror(socket.EAI_NONAME, "no such name")

        monkeypatch.setattr(socket, "getaddrinfo", fail)
        with pytest.raises(ConnectionFailed):
            await make().request(HTTPRequest("POST", "http://nowhere.test/v1"))

    async def test_a_handshake_that_hangs_ends_with_the_connect_timeout(self, make: Any) -> None:
        async with RawServer() as server:
            request = HTTPRequest("POST", server.origin.replace("http:", "https:"))
            with pytest.raises(ConnectionFailed):
                await make().request(request, connect_s=0.05)

    async def test_an_untrusted_certificate_was_not_sent(self, make: Any, tls: ssl.SSLContext) -> None:
        async with RawServer(tls=tls) as server:
            with pytest.raises(ConnectionFailed):
                await make().request(post(server))
            assert server.requests == []
            response, _ = await _whole(make(verify=False), post(server))
            assert response.status == 200

    async def test_security_05_a_name_rebound_to_a_metadata_address_is_refused(
        self, make: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def rebound(*_: object, **__: object) -> list[Any]:
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("169.254.169.254", 80))]

        monkeypatch.setattr(socket, "getaddrinfo", rebound)
        with pytest.raises(ConfigError, match="metadata"):
            await make().request(HTTPRequest("POST", "http://innocent.test/v1"))

    async def test_the_next_address_of_a_name_is_tried(self, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        real = socket.getaddrinfo

        def two(host: Any, port: Any, *args: Any, **kwargs: Any) -> list[Any]:
            if host != "two.test":
                return real(host, port, *args, **kwargs)
            return real("127.0.0.2", port, *args, **kwargs) + real("127.0.0.1", port, *args, **kwargs)

        monkeypatch.setattr(socket, "getaddrinfo", two)
        async with RawServer() as server:
            request = HTTPRequest("POST", server.origin.replace("127.0.0.1", "two.test"))
            assert (await _whole(make(), request))[1] == b"{}"

    async def test_an_idle_connection_is_given_up_after_its_expiry(self, make: Any) -> None:
        async with RawServer() as server:
            pool = make(keepalive_expiry=0.02)
            await asyncio.gather(*(_whole(pool, post(server)) for _ in range(3)))
            before = server.connections
            await asyncio.sleep(0.05)
            await _whole(pool, post(server))
            assert server.connections == before + 1

    @pytest.mark.parametrize("reset", [False, True])
    async def test_a_new_connection_lost_after_sending_is_ambiguous(self, make: Any, reset: bool) -> None:
        async with RawServer(hang_up(reset=reset)) as server:
            with pytest.raises(AmbiguousOutcome):
                await make().request(post(server), duplicate_ok=True)
            assert len(server.requests) == 1

    @pytest.mark.parametrize("reset", [False, True])
    async def test_pool_03_stale_connection_is_replaced_once_where_a_duplicate_is_harmless(
        self,
        make: Any,
        reset: bool,
    ) -> None:
        async with RawServer(say(answer_bytes()), hang_up(reset=reset), say(answer_bytes(200, b'"again"'))) as server:
            pool = make()
            await _whole(pool, post(server))
            if not self.sees_connections:
                return
            response, body = await _whole(pool, post(server), duplicate_ok=True)
            assert (body, response.reused, server.connections) == (b'"again"', False, 2)

    async def test_pool_03_stale_connection_is_an_error_where_a_duplicate_may_cost(self, make: Any) -> None:
        async with RawServer(say(answer_bytes()), hang_up()) as server:
            pool = make()
            await _whole(pool, post(server))
            with pytest.raises(StaleConnection if self.sees_connections else AmbiguousOutcome):
                await pool.request(post(server))
            assert len(server.requests) == 2

    async def test_a_second_loss_is_not_repeated(self, make: Any) -> None:
        async with RawServer(say(answer_bytes()), hang_up()) as server:
            pool = make()
            await _whole(pool, post(server))
            with pytest.raises(AmbiguousOutcome):
                await pool.request(post(server), duplicate_ok=True)
            assert len(server.requests) == (3 if self.sees_connections else 2)

    async def test_a_connection_lost_within_the_head_is_ambiguous_even_when_reused(self, make: Any) -> None:
        async def half(_: RawRequest, writer: Writer) -> None:
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-len")
            await writer.drain()
            writer.close()

        async with RawServer(say(answer_bytes()), half) as server:
            pool = make()
            await _whole(pool, post(server))
            with pytest.raises(AmbiguousOutcome):
                await pool.request(post(server), duplicate_ok=True)
            assert len(server.requests) == 2

    async def test_pieces_of_a_stream_arrive_while_it_runs(self, make: Any) -> None:
        more = asyncio.Event()

        async def slow(_: RawRequest, writer: Writer) -> None:
            writer.write(answer_bytes(200, b"3\r\none\r\n", transfer_encoding="chunked"))
            await writer.drain()
            await more.wait()
            writer.write(b"3\r\ntwo\r\n0\r\n\r\n")

        async with RawServer(slow) as server:
            pool = make()
            body = (await pool.request(post(server))).body
            assert await anext(body) == b"one"
            more.set()
            assert await anext(body) == b"two"
            with pytest.raises(StopAsyncIteration):
                await anext(body)
            assert pool.gauges()["in_flight"] == 0
            await _whole(pool, post(server))
            assert server.connections == 1

    async def test_a_body_cut_short_is_an_error(self, make: Any) -> None:
        async def cut(_: RawRequest, writer: Writer) -> None:
            writer.write(answer_bytes(200, b"half", content_length="8"))
            await writer.drain()
            writer.close()

        async with RawServer(cut) as server:
            pool = make()
            body = (await pool.request(post(server))).body
            with pytest.raises(AmbiguousOutcome):
                await body.read()
            assert pool.gauges()["in_flight"] == 0

    async def test_closing_a_body_early_closes_the_connection_and_frees_the_slot(self, make: Any) -> None:
        gone = asyncio.Semaphore(0)

        async def endless(_: RawRequest, writer: Writer) -> None:
            writer.write(answer_bytes(200, b"", transfer_encoding="chunked"))
            try:
                while True:
                    writer.write(b"1\r\nx\r\n")
                    await writer.drain()
                    await asyncio.sleep(0.001)
            finally:
                gone.release()

        async with RawServer(endless) as server:
            pool = make(max_connections=1)
            for _ in range(3):
                body = (await pool.request(post(server))).body
                assert (await anext(body)).startswith(b"x")
                await body.aclose()
                await body.aclose()
                async with asyncio.timeout(120):
                    await gone.acquire()
            assert pool.gauges()["in_flight"] == 0

    async def test_pool_08_proxies_of_the_environment_are_ignored_unless_asked_for(
        self, make: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async with (
            RawServer(say(answer_bytes(200, b'"direct"'))) as server,
            RawServer(say(answer_bytes(200, b'"proxied"'))) as proxy,
        ):
            for name in ("HTTP_PROXY", "http_proxy"):
                monkeypatch.setenv(name, proxy.origin)
            for name in ("NO_PROXY", "no_proxy"):
                monkeypatch.delenv(name, raising=False)
            assert (await _whole(make(), post(server)))[1] == b'"direct"'
            assert (await _whole(make(trust_env=True), post(server)))[1] == b'"proxied"'
            assert proxy.requests[0].target.startswith(server.origin)

    @pytest.mark.parametrize("coding", ["gzip", "deflate", "raw deflate"])
    async def test_compressed_bodies_are_decoded(self, make: Any, coding: str) -> None:
        plain = b'{"text": "' + b"words " * 5000 + b'"}'
        packed = {
            "gzip": gzip.compress(plain),
            "deflate": zlib.compress(plain),
            "raw deflate": zlib.compress(plain, wbits=-15),
        }[coding]
        async with RawServer(say(answer_bytes(200, packed, content_encoding=coding.removeprefix("raw ")))) as server:
            response, body = await _whole(make(), post(server))
            assert body == plain
            assert {"content-encoding", "content-length"}.isdisjoint(name for name, _ in response.headers)

    async def test_security_04_a_gzip_bomb_is_refused(self, make: Any) -> None:
        bomb = gzip.compress(bytes(20_000_000))
        async with RawServer(say(answer_bytes(200, bomb, content_encoding="gzip"))) as server:
            with pytest.raises(ResponseTooLarge):
                await _whole(make(), post(server))

    async def test_security_04_nested_codings_are_refused(self, make: Any) -> None:
        twice = gzip.compress(gzip.compress(b"{}"))
        async with RawServer(say(answer_bytes(200, twice, content_encoding="gzip, gzip"))) as server:
            pool = make()
            with pytest.raises(ResponseTooLarge):
                await _whole(pool, post(server))
            assert pool.gauges()["in_flight"] == 0

    @pytest.mark.parametrize(("coding", "body"), [("br", b"x"), ("gzip", b"not gzip")])
    async def test_a_coding_we_cannot_decode_is_a_protocol_error(self, make: Any, coding: str, body: bytes) -> None:
        async with RawServer(say(answer_bytes(200, body, content_encoding=coding))) as server:
            with pytest.raises(ProtocolError):
                await _whole(make(), post(server))

    async def test_security_04_a_body_over_the_bound_is_refused(self, make: Any) -> None:
        endless = answer_bytes(200, chunked(*[b"x" * 1000] * 100), transfer_encoding="chunked")
        async with RawServer(say(endless)) as server:
            pool = make(max_response_bytes=50_000)
            with pytest.raises(ResponseTooLarge):
                await _whole(pool, post(server))
            assert pool.gauges()["in_flight"] == 0

    async def test_security_04_headers_over_the_bound_are_refused(self, make: Any) -> None:
        for headers in ({"x": "y" * 200_000}, {f"x{n}": "y" * 1500 for n in range(60)}):
            async with RawServer(say(answer_bytes(200, b"{}", **headers))) as server:
                pool = make()
                with pytest.raises(
                    (ResponseTooLarge, AmbiguousOutcome) if not self.sees_connections else ResponseTooLarge
                ):
                    await _whole(pool, post(server))
                assert pool.gauges()["in_flight"] == 0

    async def test_what_is_not_http_is_a_protocol_error(self, make: Any) -> None:
        async with RawServer(say(b"SSH-2.0-OpenSSH_9.6\r\n\r\n")) as server:
            with pytest.raises((ProtocolError, AmbiguousOutcome) if not self.sees_connections else ProtocolError):
                await make().request(post(server))

    async def test_the_timeouts_of_the_head_and_between_pieces(self, make: Any) -> None:
        async def silent(_: RawRequest, writer: Writer) -> None:
            await asyncio.Event().wait()

        async def stalled(_: RawRequest, writer: Writer) -> None:
            writer.write(answer_bytes(200, b"3\r\none\r\n", transfer_encoding="chunked"))
            await writer.drain()
            await asyncio.Event().wait()

        for answer, limit, told in (
            (silent, {"first_byte_timeout": 0.2}, "no response"),
            (stalled, {"chunk_timeout": 0.05}, "stood still"),
        ):
            async with RawServer(answer) as server:
                pool = make(**limit)
                with pytest.raises(UpstreamTimeout, match=told):
                    await _whole(pool, post(server))
                assert pool.gauges()["in_flight"] == 0

    async def test_closing_waits_for_requests_in_flight_and_refuses_new_ones(self, make: Any) -> None:
        go = asyncio.Event()

        async def waits(_: RawRequest, writer: Writer) -> None:
            await go.wait()
            writer.write(answer_bytes())

        async with RawServer(waits) as server:
            pool = make()
            running = asyncio.create_task(_whole(pool, post(server)))
            while not server.requests:
                await asyncio.sleep(0.001)
            closing = [asyncio.create_task(pool.aclose()) for _ in range(2)]
            await asyncio.sleep(0)
            with pytest.raises(Closed):
                await pool.request(post(server))
            assert not running.done()
            go.set()
            assert (await running)[1] == b"{}"
            await asyncio.gather(*closing)
            await pool.aclose()

    async def test_closing_breaks_off_what_outlasts_the_drain_timeout(self, make: Any) -> None:
        async def never(_: RawRequest, writer: Writer) -> None:
            await asyncio.Event().wait()

        async with RawServer(never) as server:
            pool = make(drain_timeout=0.02, max_connections=1)
            running = asyncio.create_task(pool.request(post(server)))
            queued = asyncio.create_task(pool.request(post(server)))
            while not server.requests:
                await asyncio.sleep(0.001)
            await pool.aclose()
            with pytest.raises((AmbiguousOutcome, Closed)):
                await running
            with pytest.raises(Closed):
                await queued


class TestAiohttp(PoolContract):
    engine = "aiohttp"


class TestHttpx(PoolContract):
    engine = "httpx"


class TestHttpx2(PoolContract):
    engine = "httpx2"

    @pytest.fixture(autouse=True)
    def _needs(self):
        pytest.importorskip("httpcore2")


class TestPyreqwest(PoolContract):
    engine = "pyreqwest"
    sees_connections = False

    @pytest.fixture(autouse=True)
    def _needs(self):
        pytest.importorskip("pyreqwest")

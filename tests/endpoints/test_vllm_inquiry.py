"""`VLLMEndpoint`, what the server says about itself: asked once, in the background, and never in a call's way."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import threading
import weakref
from contextvars import ContextVar

import pytest

from llmmw.algo.load import NO_LOAD, Load
from llmmw.endpoints import inquiry
from llmmw.endpoints.inquiry import About, Model
from llmmw.endpoints.vllm import VLLMEndpoint
from llmmw.env import Env
from llmmw.errors import ConfigError, ConnectionFailed, StatusError, UpstreamError, UpstreamTimeout
from llmmw.events import ConnectionOpened
from llmmw.pool import ConnectionPool
from llmmw.pool.response import Response
from llmmw.testing.clock import ManualClock
from llmmw.testing.fake import chat_body, chat_call
from llmmw.testing.rawserver import RawServer, answer_bytes, hang_up
from llmmw.testing.server import ServerConfig, running_server
from llmmw.wire import HTTPRequest

MODEL = "llmmw-embedded"
MODELS = {"data": [{"id": "big", "max_model_len": 4096}, {"id": "lora", "max_model_len": None, "parent": "big"}]}
ALL = frozenset({"idempotent", "n", "batch:chat", "batch:complete"})


def chat(**fields):
    return chat_call("hi", **{"model": MODEL, **fields})


def told(body, status=200):
    return answer_bytes(status, json.dumps(body).encode())


PAGES = {
    "/v1/models": told(MODELS),
    "/version": told({"version": "0.24.0"}),
    "/v1/chat/completions/batch": told({"detail": "Method Not Allowed"}, 405),
    "/health": answer_bytes(200, b""),
}


class Server(RawServer):
    """vLLM's GET routes with answers of the test's choice; a callable answers by itself."""

    def __init__(self, **pages):
        super().__init__(self._answer)
        self.pages = {**PAGES, **{name.replace("__", "/"): page for name, page in pages.items()}}

    async def _answer(self, request, writer):
        if request.method == "POST":
            writer.write(answer_bytes(200, chat_body("ok")))
            return
        page = self.pages.get(request.target, told({"detail": "Not Found"}, 404))
        if callable(page):
            await page(request, writer)
        else:
            writer.write(page)

    @property
    def asked(self):
        return [request.target for request in self.requests if request.method == "GET"]


async def never(_request, _writer):
    await asyncio.Event().wait()


class Opened:
    """An endpoint there, with a clock that stands still."""

    def __init__(self, server, **options):
        self.clock, self.events = ManualClock(), []
        self.endpoint = VLLMEndpoint(server.origin, **options)
        self.endpoint.start(Env(clock=self.clock, sinks=(self.events.append,)))

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        await self.endpoint.aclose()

    async def ask(self):
        assert (await self.endpoint(chat())).ok

    async def over(self):
        """The inquiry under way has ended."""
        task = self.endpoint._inquiry._task
        assert task is not None
        await asyncio.wait([task])
        await asyncio.sleep(0)  # its callback


async def test_a_call_begins_it_once():
    async with Server() as server, Opened(server) as at:
        assert (at.endpoint.about, at.endpoint.capabilities) == (None, ALL)
        await asyncio.gather(*(at.ask() for _ in range(20)))
        await at.over()
        assert sum(isinstance(event, ConnectionOpened) for event in at.events) <= 20, "those of the calls only"
        for _ in range(3):
            at.clock.advance(1e6)
            await at.ask()
        assert at.endpoint.about == About(
            (Model("big", 4096), Model("lora", None, "big")), "0.24.0", has_batch_chat=True
        )
        assert at.endpoint.about.model("big").max_model_len == 4096
        assert at.endpoint.about.model("nobody") is None
        assert server.asked == ["/v1/models", "/version", "/v1/chat/completions/batch"]


@pytest.mark.parametrize(
    ("status", "has", "batch"), [(405, True, True), (404, False, False), (401, None, True), (200, None, True)]
)
async def test_a_server_says_whether_it_takes_batches(status, has, batch):
    async with Server(__v1__chat__completions__batch=told({}, status)) as server, Opened(server) as at:
        about = await at.endpoint.discover()
        assert about.has_batch_chat is has
        assert at.endpoint.capabilities == (ALL if batch else ALL - {"batch:chat"})


async def test_a_newer_server_in_its_place_may_take_batches_again():
    async with Server(__v1__chat__completions__batch=told({}, 404)) as server, Opened(server) as at:
        await at.endpoint.discover()
        server.pages["/v1/chat/completions/batch"] = told({}, 405)
        await at.endpoint.discover()
        assert at.endpoint.capabilities == ALL


@pytest.mark.parametrize("page", [never, hang_up(), told({}, 500), told({}, 429)], ids=["hangs", "dies", "500", "429"])
@pytest.mark.parametrize("path", ["__v1__models", "__version", "__v1__chat__completions__batch"])
async def test_whatever_becomes_of_it_no_call_waits_or_fails(page, path):
    async with Server(**{path: page}) as server, Opened(server, pool=ConnectionPool(max_connections=1)) as at:
        for _ in range(5):
            await at.ask()
        assert at.endpoint.about is None
        assert at.endpoint.capabilities == ALL


async def test_what_fails_is_tried_again_later_and_later():
    async with Server(__v1__models=told({}, 503)) as server, Opened(server) as at:
        await at.ask()
        await at.over()
        for number, pause_s in enumerate((5, 10, 20, 40, 80, 160, 300, 300), 1):
            at.clock.advance(pause_s - 1)
            await at.ask()
            assert len(server.asked) == number
            at.clock.advance(1)
            await at.ask()
            await at.over()
            assert len(server.asked) == number + 1
        server.pages["/v1/models"] = told(MODELS)
        at.clock.advance(300.0)
        await at.ask()
        await at.over()
        assert at.endpoint.about.version == "0.24.0"


@pytest.mark.parametrize(
    "page",
    [
        answer_bytes(200, b""), answer_bytes(200, b"<html>"), told([1]), told({"data": {"id": "x"}}), told({}, 403),
        told({"data": [1, {"id": 5}, {"id": ""}, {"id": "x" * 300}, {"id": "y", "max_model_len": -1, "parent": 1}]}),
        answer_bytes(200, b"[" * 100_000),
    ],
)  # fmt: skip
async def test_what_is_no_list_of_models_is_none(page):
    async with Server(__v1__models=page, __version=page) as server, Opened(server) as at:
        about = await at.endpoint.discover()
        assert about.version is None
        assert about.models in {(), (Model("y"),)}
        await at.ask()


async def test_who_asks_at_the_same_time_shares_the_answer():
    async with Server() as server, Opened(server) as at:
        found = await asyncio.gather(*(at.endpoint.discover() for _ in range(10)), at.ask())
        assert len({id(about) for about in found[:10]}) == 1
        assert len(server.asked) == 3


async def test_who_stops_waiting_does_not_end_it_for_the_others():
    async with Server() as server, Opened(server) as at:
        first, second = (asyncio.create_task(at.endpoint.discover()) for _ in range(2))
        await asyncio.sleep(0)
        first.cancel()
        assert (await second).version == "0.24.0"


async def test_who_asks_hears_why_not():
    async with Server(__v1__models=told({"error": "busy"}, 503)) as server, Opened(server, api_key="sk-very") as at:
        with pytest.raises(StatusError, match="503"):
            await at.endpoint.discover()
        server.pages["/v1/models"] = hang_up()
        with pytest.raises(UpstreamError) as caught:
            await at.endpoint.discover()
        assert "sk-very" not in repr(caught.value)
        assert server.requests[0].headers["authorization"] == "Bearer sk-very"


async def half(_request, writer):
    writer.write(answer_bytes(200, b"x", content_length="9"))
    writer.close()


def held_by(error):
    """What the frames of an error and of what led to it hold: error trackers send that."""
    found = []
    while error is not None:
        frame = error.__traceback__
        while frame is not None:
            found += frame.tb_frame.f_locals.values()
            frame = frame.tb_next
        error = error.__cause__ or error.__context__
    return found


@pytest.mark.parametrize("page", [hang_up(), never, half, told({}, 503)])
async def test_an_error_that_is_kept_holds_no_request_with_its_key(page, monkeypatch):
    monkeypatch.setattr(inquiry, "_LIMIT_S", 0.05 if page is never else 10.0)
    async with Server(__v1__models=page, __metrics=page) as server, Opened(server, api_key="sk-very") as at:
        for ask in (at.endpoint.discover, at.endpoint.read_load):
            try:
                await ask()
            except UpstreamError as error:
                held = held_by(error)
                assert not [value for value in held if isinstance(value, HTTPRequest | Response)]
            else:
                assert ask == at.endpoint.read_load
                assert page == told({}, 503)


async def test_a_server_that_says_nothing_is_not_waited_for_for_ever(monkeypatch):
    async def listed(_request, writer):
        monkeypatch.setattr(inquiry, "_LIMIT_S", 0.05)  # only now: a busy machine must get as far as the next page
        writer.write(PAGES["/v1/models"])

    async with Server(__v1__models=listed, __version=never) as server, Opened(server) as at:
        with pytest.raises(UpstreamTimeout, match="GET /version"):
            await at.endpoint.discover()


async def test_after_an_outage_the_server_is_asked_anew():
    async with running_server() as server:
        port = server.port
        at = Opened(server_at(server))
        await at.ask()
        await at.over()
        at.endpoint._takes_priority = False
        assert at.endpoint.about.models == (Model(MODEL, 32_768),)
    with pytest.raises(UpstreamError):
        await at.endpoint(chat())
    with pytest.raises(ConnectionFailed):
        await at.endpoint(chat())
    async with running_server(ServerConfig(port=port, max_model_len=1024)):
        await at.ask()
        assert at.endpoint.about.models == (Model(MODEL, 32_768),), "not before a pause: it may be down again"
        at.clock.advance(10.0)
        await at.ask()
        await at.over()
        assert at.endpoint.about.models == (Model(MODEL, 1024),)
        assert at.endpoint.takes_priority, "the new server may take what the old one refused"
        await at.endpoint.aclose()


def server_at(server):
    class Place:
        origin = server.url

    return Place


# ── health and load ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("page", "healthy"),
    [
        (answer_bytes(200, b""), True),
        (told({}, 503), False),
        (told({}, 500), False),
        (hang_up(), False),
        (never, False),
    ],
    ids=["well", "engine dead", "error", "dies", "hangs"],
)
async def test_health_is_what_the_server_says(page, healthy):
    async with Server(__health=page) as server, Opened(server) as at:
        for seconds in (0.2, 5, 60) if page is never else (120,):
            assert await at.endpoint.health(within=seconds) is healthy
            if server.asked:
                break  # else the machine was too busy to ask
        assert server.asked[-1] == "/health"


async def test_behind_a_gateway_the_list_of_models_stands_for_health():
    async with Server(__health=told({}, 404)) as server, Opened(server) as at:
        assert await at.endpoint.health()
        server.pages["/v1/models"] = told({}, 502)
        assert not await at.endpoint.health()


async def test_nobody_there_is_not_healthy():
    endpoint = VLLMEndpoint("http://127.0.0.1:1")
    assert not await endpoint.health()
    with pytest.raises(ConfigError, match="within"):
        await endpoint.health(within=0)
    await endpoint.aclose()


async def test_health_is_answered_while_every_connection_of_the_calls_is_busy():
    async with running_server(ServerConfig(latency="engine", paused=True)) as server:
        at = Opened(server_at(server), pool=ConnectionPool(max_connections=2))
        calls = [asyncio.create_task(at.endpoint(chat())) for _ in range(5)]
        await server.wait(at_least={"engine.waiting": 2})
        assert await at.endpoint.health()
        load = await at.endpoint.read_load()
        assert load == at.endpoint.load == Load(0, 2, 0.0, 0, 0)
        assert at.endpoint.gauges()["server_waiting"] == 2
        server.configure(paused=False)
        assert all(reply.ok for reply in await asyncio.gather(*calls))
        await at.endpoint.aclose()


async def test_a_server_without_metrics_has_no_load():
    async with Server() as server, Opened(server) as at:
        assert await at.endpoint.read_load() == NO_LOAD
        assert "server_waiting" not in at.endpoint.gauges()


# ── loops and ends ──────────────────────────────────────────────────────────────────────────────────────────────────


async def test_closing_breaks_it_off():
    async with Server(__v1__models=never) as server:
        at = Opened(server)
        await at.ask()
        task = at.endpoint._inquiry._task
        await at.endpoint.aclose()
        await at.endpoint.aclose()
        assert task.cancelled()


async def test_a_dead_loop_takes_its_inquiry_along():
    async with Server(__v1__models=never) as server:
        at = Opened(server)
        await at.ask()
        left = at.endpoint._inquiry._task
        at.endpoint.rehome()
        server.pages["/v1/models"] = PAGES["/v1/models"]
        await at.ask()
        await at.over()
        assert at.endpoint.about.version == "0.24.0"
        left.cancel()
        await asyncio.wait([left])
        assert at.endpoint.about.version == "0.24.0"
        await at.endpoint.aclose()


async def test_nobody_waits_for_a_question_that_a_loop_left_when_it_stopped():
    async with Server(__v1__models=never) as server:
        endpoint = VLLMEndpoint(server.origin)
        loop = asyncio.new_event_loop()

        def ask_and_stop():  # as notebooks and other frameworks do; `asyncio.run` would cancel it
            asked = loop.create_task(endpoint.discover())
            while "/v1/models" not in server.asked:
                loop.run_until_complete(asyncio.sleep(0.001))
            return asked

        def end(*tasks):
            for task in tasks:
                task.cancel()
            loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.close()

        asked = await asyncio.to_thread(ask_and_stop)
        left = endpoint._inquiry._task
        assert not left.done()
        server.pages["/v1/models"] = PAGES["/v1/models"]
        assert (await endpoint.discover()).version == "0.24.0"
        assert endpoint.about.version == "0.24.0"
        await asyncio.to_thread(end, asked, left)
        await endpoint.aclose()


async def test_the_inquiry_keeps_nothing_of_the_caller():
    class Held:
        pass

    variable = ContextVar("variable")

    async def caller(at):
        held = Held()
        variable.set(held)
        at.endpoint._inquiry.begin()  # alone: asyncio's transports keep the context of whoever opened a connection
        return weakref.ref(held)

    async with Server(__v1__models=never) as server, Opened(server) as at:
        gone = await asyncio.create_task(caller(at))
        while "/v1/models" not in server.asked:
            await asyncio.sleep(0)
        gc.collect()
        assert gone() is None
        assert not at.endpoint._inquiry._task.done()


async def test_a_forked_child_asks_on_a_loop_of_its_own():
    async with running_server() as server:
        endpoint = VLLMEndpoint(server.url)
        await endpoint(chat())
        assert await endpoint.health()
        pid = os.getpid()
        endpoint._inquiry._pid = pid + 1  # as in a child: the loop seems to run, but not here
        found = []
        thread = threading.Thread(target=lambda: found.append(asyncio.run(endpoint.health())))
        thread.start()
        await asyncio.to_thread(thread.join)
        assert found == [True]
        await endpoint.aclose()


async def test_a_question_from_another_loop_is_asked_on_the_connections_own():
    async with Server() as server, Opened(server) as at:
        await at.ask()
        await at.over()
        found = []

        def elsewhere():
            found.append(asyncio.run(at.endpoint.health()))
            found.append(asyncio.run(at.endpoint.discover()).version)

        thread = threading.Thread(target=elsewhere)
        thread.start()
        await asyncio.to_thread(thread.join)
        assert found == [True, "0.24.0"]
        own = {request.connection for request in server.requests if request.target == "/health"}
        assert own <= {request.connection for request in server.requests if request.target == "/v1/models"}


def test_one_endpoint_lives_through_several_loops():
    # The server's own loop is not theirs.
    ready, done = threading.Event(), threading.Event()
    place = []

    async def serve():
        async with running_server() as server:
            place.append(server.url)
            ready.set()
            await asyncio.to_thread(done.wait)

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    try:
        assert ready.wait(120)
        endpoint = VLLMEndpoint(place[0])

        async def step():
            assert (await endpoint(chat())).ok
            assert await endpoint.health()

        for _ in range(3):
            asyncio.run(step())
            endpoint.rehome()
        assert asyncio.run(endpoint.discover()).models[0].id == MODEL
        endpoint.rehome()
        asyncio.run(endpoint.aclose())
    finally:
        done.set()
        thread.join()


async def test_a_forgotten_endpoint_is_freed():
    async with Server() as server:
        at = Opened(server)
        await at.ask()
        await at.over()
        gone = weakref.ref(at.endpoint)
        await at.endpoint.aclose()
        del at
        async with asyncio.timeout(120):
            while gone() is not None:
                await asyncio.sleep(0)
                gc.collect()

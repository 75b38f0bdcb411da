"""`AppEngine` behind a pool: an application on this loop or on another thread's, asked without a socket."""

import asyncio
import threading
from contextlib import asynccontextmanager
from contextvars import ContextVar

import pytest

from llmmw.endpoints.hosting import Hosted, Hosting
from llmmw.env import Env
from llmmw.errors import AmbiguousOutcome, ConnectionFailed
from llmmw.events import ConnectionOpened, ConnectionReused
from llmmw.pool import BoundPool, ConnectionPool
from llmmw.pool.engine import Exchange
from llmmw.pool.engines.asgi import AppEngine
from llmmw.pool.guard import Guard
from llmmw.wire import HTTPRequest

PATIENCE_S = 120
VARIABLE = ContextVar("variable", default="nobody's")


def start(status=200, **headers):
    pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
    return {"type": "http.response.start", "status": status, "headers": pairs}


def body(data=b"", *, more=False):
    return {"type": "http.response.body", "body": data, "more_body": more}


class Site:
    """An application that is a function, and how to ask it."""

    def __init__(self, app, *, loop=None):
        self.dead = None
        self.hosting = Hosting(self._opening, loop=loop)
        self.app = app
        self.seen = []
        self.pool = BoundPool(
            ConnectionPool(max_connection_age=None),
            Env(sinks=(self.seen.append,)),
            Guard(),
            lambda _: AppEngine(self.hosting),
        )

    @asynccontextmanager
    async def _opening(self):
        yield Hosted(self.app, lambda: self.dead, lambda: 0)

    async def ask(self, method="POST", url="http://app.invalid/v1/x", data=b"", **headers):
        await self.hosting.ready()
        return await self.pool.request(HTTPRequest(method, url, tuple(headers.items()), data))

    async def aclose(self):
        await self.pool.aclose()
        await self.hosting.aclose()


@pytest.fixture(params=["another thread", "this loop"])
async def sites(request):
    opened = []

    def make(app):
        loop = asyncio.get_running_loop() if request.param == "this loop" else None
        opened.append(Site(app, loop=loop))
        return opened[-1]

    yield make
    for site in opened:
        await site.aclose()


async def until(event):
    """A threading.Event, awaited."""
    assert await asyncio.to_thread(event.wait, PATIENCE_S)


async def test_the_application_gets_the_request_and_the_caller_its_answer(sites):
    got = {}

    async def app(scope, receive, send):
        got.update(scope, message=await receive())
        await send(start(201, **{"X-Thing": "Ä"}))
        await send(body(b"an answer"))

    response = await sites(app).ask("PUT", "http://app.invalid:81/a%20b?c=d", b"a question", **{"X-Own": "é"})
    assert (response.status, response.header("x-thing"), await response.body.read()) == (201, "Ã\x84", b"an answer")
    assert (got["method"], got["path"], got["raw_path"], got["query_string"]) == ("PUT", "/a b", b"/a%20b", b"c=d")
    assert got["message"] == {"type": "http.request", "body": b"a question", "more_body": False}
    assert {(b"x-own", "é".encode("latin-1")), (b"content-length", b"10")} <= set(got["headers"])
    assert (got["server"], got["type"]) == (("app.invalid", 81), "http")


async def test_pieces_arrive_as_they_are_sent_before_the_answer_ends(sites):
    go = threading.Event()

    async def app(scope, receive, send):
        await send(start())
        await send(body(b"one", more=True))
        await asyncio.to_thread(go.wait, PATIENCE_S)
        await send(body(b"two", more=True))
        await send(body())

    response = await sites(app).ask()
    assert await anext(response.body) == b"one"
    go.set()
    assert [piece async for piece in response.body] == [b"two"]


async def test_an_application_far_ahead_of_its_reader_waits_for_it(sites):
    sent = []

    async def app(scope, receive, send):
        await send(start())
        for number in range(1000):
            await send(body(b"%03d" % number, more=True))
            sent.append(number)
        await send(body())

    response = await sites(app).ask()
    first = await anext(response.body)
    for _ in range(100):
        await asyncio.sleep(0)  # turns in which it could run on
    assert len(sent) <= 65
    pieces = [first, *[piece async for piece in response.body]]
    assert pieces == [b"%03d" % number for number in range(1000)]


async def test_closing_an_answer_tells_the_application_that_its_client_has_left(sites):
    left = threading.Event()

    async def app(scope, receive, send):
        await receive()
        await send(start())
        await send(body(b"one", more=True))
        assert (await receive())["type"] == "http.disconnect"
        await send(body(b"to nobody", more=True))
        left.set()

    response = await sites(app).ask()
    assert await anext(response.body) == b"one"
    await response.body.aclose()
    await response.body.aclose()
    await until(left)
    assert response.body.was_cut


async def test_closing_an_answer_also_frees_an_application_that_waits_for_its_reader(sites):
    left = threading.Event()

    async def app(scope, receive, send):
        await send(start())
        for _ in range(1000):
            await send(body(b"x", more=True))
        left.set()

    response = await sites(app).ask()
    await anext(response.body)
    await response.body.aclose()
    await until(left)


async def test_a_cancelled_request_is_a_client_that_has_left(sites):
    asked, left = threading.Event(), threading.Event()

    async def app(scope, receive, send):
        await receive()
        asked.set()
        await receive()
        left.set()

    task = asyncio.create_task(sites(app).ask())
    await until(asked)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(left)


async def test_a_dropped_answer_is_a_client_that_has_left(sites):
    left = threading.Event()

    async def app(scope, receive, send):
        await receive()
        await send(start())
        await receive()
        left.set()

    kept = [await sites(app).ask()]
    with pytest.warns(ResourceWarning, match="neither read"):
        kept.clear()
    await until(left)


async def test_an_application_that_fails_before_its_answer_leaves_an_ambiguous_outcome_without_its_words(sites):
    async def app(scope, receive, send):
        raise ValueError("the prompt was: secret")

    with pytest.raises(AmbiguousOutcome, match="ValueError") as caught:
        await sites(app).ask()
    assert "secret" not in str(caught.value)


async def test_an_application_that_ends_without_an_answer_leaves_an_ambiguous_outcome(sites):
    async def app(scope, receive, send):
        pass

    with pytest.raises(AmbiguousOutcome, match="ended before"):
        await sites(app).ask()


async def test_an_application_that_fails_within_its_answer_breaks_it_off(sites):
    async def app(scope, receive, send):
        await send(start())
        await send(body(b"a part", more=True))
        raise ValueError

    response = await sites(app).ask()
    assert await anext(response.body) == b"a part"
    with pytest.raises(AmbiguousOutcome, match="ValueError"):
        await anext(response.body)


async def test_a_reader_that_waits_is_told_of_the_end(sites):
    go = threading.Event()

    async def app(scope, receive, send):
        await send(start())
        await asyncio.to_thread(go.wait, PATIENCE_S)
        raise ValueError

    response = await sites(app).ask()
    reading = asyncio.create_task(response.body.read())
    await asyncio.sleep(0)
    go.set()
    with pytest.raises(AmbiguousOutcome):
        await reading


async def test_what_an_application_raises_behind_a_whole_answer_is_no_news(sites):
    async def app(scope, receive, send):
        await send(start(500))
        await send(body(b"sorry"))
        raise ValueError

    response = await sites(app).ask()
    assert (response.status, await response.body.read()) == (500, b"sorry")


async def test_messages_that_http_does_not_know_are_read_over(sites):
    async def app(scope, receive, send):
        await send({"type": "http.response.debug"})
        await send({"type": "http.response.start", "status": 204})
        await send({"type": "http.response.body"})

    response = await sites(app).ask()
    assert (response.status, await response.body.read()) == (204, b"")


async def test_of_a_broken_application_nothing_is_asked(sites):
    async def app(scope, receive, send):
        raise AssertionError

    site = sites(app)
    await site.hosting.ready()
    site.dead = "it is dead"
    with pytest.raises(ConnectionFailed, match="it is dead"):
        await site.ask()


async def test_an_application_that_dies_of_a_request_has_not_judged_it(sites):
    async def app(scope, receive, send):
        site.dead = "it has died"
        await send(start(500))
        await send(body(b"EngineDeadError"))

    site = sites(app)
    with pytest.raises(AmbiguousOutcome, match="it has died"):
        await site.ask()


async def test_the_application_sees_nothing_of_its_callers_context(sites):
    found = []

    async def app(scope, receive, send):
        found.append(VARIABLE.get())
        await send(start())
        await send(body())

    VARIABLE.set("the caller's")
    await (await sites(app).ask()).body.read()
    assert found == ["nobody's"]


async def test_no_connection_is_counted(sites):
    async def app(scope, receive, send):
        await send(start())
        await send(body(b"ok"))

    site = sites(app)
    for _ in range(3):
        await (await site.ask()).body.read()
    assert [event for event in site.seen if isinstance(event, ConnectionOpened | ConnectionReused)] == []
    assert site.pool.gauges()["in_flight"] == 0


async def test_closing_the_application_breaks_off_what_is_under_way(sites):
    async def app(scope, receive, send):
        await send(start())
        await receive()
        await receive()

    site = sites(app)
    response = await site.ask()
    await site.hosting.aclose()
    with pytest.raises(AmbiguousOutcome, match="stopped"):
        await response.body.read()
    with pytest.raises(ConnectionFailed, match="closed"):
        await site.pool.request(HTTPRequest("GET", "http://app.invalid/"))


async def test_closing_the_pool_breaks_off_what_is_not_read(sites):
    left = threading.Event()

    async def app(scope, receive, send):
        await receive()
        await send(start())
        await receive()
        left.set()

    site = sites(app)
    site.pool._drain_s = 0
    response = await site.ask()
    await site.pool.aclose()
    await until(left)
    with pytest.raises(AmbiguousOutcome, match="closed"):
        await response.body.read()


@pytest.mark.parametrize("begun", [False, True])
async def test_closing_the_pool_waits_for_no_application_that_is_deaf(sites, begun):
    asked, deaf = threading.Event(), asyncio.Event()

    async def app(scope, receive, send):
        await receive()
        if begun:
            await send(start())
        asked.set()
        await deaf.wait()

    async def ask():
        await (await site.ask()).body.read()

    site = sites(app)
    site.pool._drain_s = 0
    call = asyncio.create_task(ask())
    await until(asked)
    await site.pool.aclose()
    with pytest.raises(AmbiguousOutcome, match="the pool was closed"):
        await asyncio.wait_for(call, PATIENCE_S)


def test_a_reader_whose_loop_has_ended_is_a_client_that_has_left():
    go, left = threading.Event(), threading.Event()

    async def app(scope, receive, send):
        await receive()
        await send(start())
        await asyncio.to_thread(go.wait, PATIENCE_S)
        await send(body(b"to nobody", more=True))
        await receive()
        left.set()

    site = Site(app)
    loop = asyncio.new_event_loop()
    response = loop.run_until_complete(site.ask())
    loop.close()  # and nobody has told the application
    go.set()
    assert left.wait(PATIENCE_S)
    site.pool.rehome()
    asyncio.run(site.aclose())
    del response


class Loop:
    """A host whose loop may be closed abruptly, with its tasks in the middle of their work."""

    def __init__(self, app):
        self.app, self.loop, self.tasks = app, asyncio.new_event_loop(), []
        self.broken, self.is_here, self.add = (lambda: None), (lambda: True), self.tasks.append

    def close(self):
        self.loop.close()
        for task in self.tasks:
            task._log_destroy_pending = False
            task.get_coro().close()


def test_an_application_that_has_ended_with_its_callers_loop_is_forgotten():
    async def app(scope, receive, send):
        await receive()
        await send(start())
        await receive()

    host = Loop(app)
    engine = AppEngine(host)
    request = HTTPRequest("GET", "http://app.invalid/")
    answer = host.loop.run_until_complete(engine.send(request, Exchange(None)))
    host.loop.close()
    engine.drop()
    host.close()
    del answer


def test_an_application_whose_loop_has_ended_is_not_reached():
    async def app(scope, receive, send):
        raise AssertionError

    host = Loop(app)
    host.close()

    async def ask():
        engine = AppEngine(host)
        assert engine.held() is None
        with pytest.raises(ConnectionFailed, match="loop"):
            await engine.send(HTTPRequest("GET", "http://app.invalid/"), Exchange(None))
        await engine.aclose()

    asyncio.run(ask())


async def test_a_forked_child_leaves_its_parents_application_alone(sites):
    left = threading.Event()

    async def app(scope, receive, send):
        await receive()
        await send(start())
        await receive()
        left.set()

    site = sites(app)
    response = await site.ask()
    pid = site.hosting._pid
    site.hosting._pid = -1
    with pytest.raises(ConnectionFailed, match="fork"):
        await site.pool.request(HTTPRequest("GET", "http://app.invalid/"))
    site.pool.rehome()
    assert not left.is_set()
    site.hosting._pid = pid
    response.body._raw.abandon()
    await until(left)

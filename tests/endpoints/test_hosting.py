"""`Hosting`: one application, opened once and closed once, whatever becomes of the loops of its callers."""

import asyncio
import contextlib
import importlib
import threading
from contextlib import asynccontextmanager

import pytest

from llmmw.endpoints import hosting as hosting_module
from llmmw.endpoints.hosting import Hosted, Hosting
from llmmw.errors import Closed, ConfigError, ConnectionFailed
from llmmw.interrupt import is_unsent

PATIENCE_S = 120


class Life:
    """Counts openings and closings, on which thread, and may be held up or fail."""

    def __init__(self, *, error=None, at_end=None, held=False):
        self.opened, self.closed, self.threads = 0, 0, set()
        self.begun, self.go = threading.Event(), threading.Event()
        self.error, self.at_end = error, at_end
        if not held:
            self.go.set()

    @asynccontextmanager
    async def __call__(self):
        self.opened += 1
        self.threads.add(threading.current_thread())
        self.begun.set()
        await asyncio.to_thread(self.go.wait, PATIENCE_S)
        if self.error is not None:
            raise self.error
        try:
            yield Hosted(None, lambda: None, lambda: 0)
        finally:
            self.closed += 1
            if self.at_end is not None:
                raise self.at_end


async def begun(life):
    assert await asyncio.to_thread(life.begun.wait, PATIENCE_S)


def is_alone():
    return not [thread for thread in threading.enumerate() if thread.name.startswith("llmmw application")]


def test_callers_on_two_threads_open_it_once(monkeypatch):
    meeting, first, life = threading.Barrier(2), hosting_module.Future, Life()

    def meet():  # where both would be past the look whether it was opened
        with contextlib.suppress(threading.BrokenBarrierError):
            meeting.wait(0.2)
        return first()

    host = Hosting(life)
    monkeypatch.setattr(hosting_module, "Future", meet)
    threads = [threading.Thread(target=asyncio.run, args=(host.ready(),)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert (life.opened, host.state) == (1, "running")
    asyncio.run(host.aclose())
    assert (life.closed, is_alone()) == (1, True)


async def test_many_callers_open_it_once_on_a_thread_of_its_own():
    life = Life()
    host = Hosting(life)
    assert host.state == "new"
    await asyncio.gather(*(host.ready() for _ in range(20)))
    assert (life.opened, host.state, host.broken(), host.unfinished()) == (1, "running", None, 0)
    assert threading.current_thread() not in life.threads
    await asyncio.gather(*(host.aclose() for _ in range(3)))
    await host.aclose()
    assert (life.closed, host.state, host.unfinished()) == (1, "closed", None)
    assert is_alone()
    with pytest.raises(Closed):
        await host.ready()


def test_it_stays_open_from_one_loop_of_its_callers_to_the_next():
    life = Life()
    host = Hosting(life)
    for _ in range(3):
        asyncio.run(host.ready())
    assert (life.opened, life.closed) == (1, 0)
    asyncio.run(host.aclose())
    assert life.closed == 1
    assert is_alone()


async def test_who_stops_waiting_for_the_start_does_not_stop_it():
    life = Life(held=True)
    host = Hosting(life)
    waiting = asyncio.create_task(host.ready())
    await begun(life)
    assert (host.state, "being started" in host.broken()) == ("starting", True)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError) as caught:
        await waiting
    assert is_unsent(caught.value)
    life.go.set()
    await host.ready()
    assert life.opened == 1
    await host.aclose()


def test_the_loop_of_who_waited_for_the_start_may_end_before_it():
    life = Life(held=True)
    host = Hosting(life)

    async def impatient():
        task = asyncio.create_task(host.ready())
        await begun(life)
        task.cancel()

    asyncio.run(impatient())
    life.go.set()
    asyncio.run(host.aclose())
    assert (life.opened, life.closed) == (1, 1)


async def test_closed_while_it_starts_it_is_closed_when_it_has_started():
    life = Life(held=True)
    host = Hosting(life)
    waiting = asyncio.create_task(host.ready())
    await begun(life)
    closing = asyncio.create_task(host.aclose())
    await asyncio.sleep(0)
    life.go.set()
    await closing
    await waiting
    assert (life.opened, life.closed) == (1, 1)
    assert is_alone()


@pytest.mark.parametrize(
    ("error", "raised", "words"),
    [
        (ConfigError("no such option"), ConfigError, "^no such option$"),
        (ConnectionFailed("no memory"), ConnectionFailed, "^no memory$"),
        (OSError("disk"), ConnectionFailed, "the application did not start: OSError: disk"),
    ],
)
async def test_why_it_did_not_start_is_told_to_everybody_each_in_an_error_of_their_own(error, raised, words):
    host = Hosting(life := Life(error=error))
    errors = []
    for _ in range(2):
        with pytest.raises(raised, match=words) as caught:
            await host.ready()
        errors.append(caught.value)
    assert errors[0] is not errors[1]
    assert (life.opened, host.state, host.broken()) == (1, "failed", errors[0].message)
    with pytest.raises(ConnectionFailed):
        _ = host.app
    await host.aclose()
    assert is_alone()


async def test_before_the_start_there_is_nothing_to_ask_or_to_close():
    host = Hosting(Life())
    for ask in (lambda: host.app, lambda: host.loop):
        with pytest.raises(ConnectionFailed, match="not been started"):
            ask()
    await host.aclose()
    assert host.state == "closed"


async def test_what_goes_wrong_at_the_end_is_a_warning_and_the_thread_ends(monkeypatch):
    warned = []
    monkeypatch.setattr(hosting_module.warnings, "warn", lambda *told, **_: warned.append(told))
    host = Hosting(Life(at_end=OSError("busy")))
    await host.ready()
    await host.aclose()
    assert [kind for _, kind in warned] == [RuntimeWarning]
    assert is_alone()


async def test_its_tasks_end_with_it():
    host = Hosting(Life())
    await host.ready()
    added = threading.Event()

    def begin():
        host.add(host.loop.create_task(asyncio.Event().wait()))
        added.set()

    host.loop.call_soon_threadsafe(begin)
    assert await asyncio.to_thread(added.wait, PATIENCE_S)
    assert len(host._tasks) == 1
    await host.aclose()
    assert not host._tasks


async def test_on_a_loop_that_is_given_it_lives_and_ends_there():
    life = Life()
    host = Hosting(life, loop=asyncio.get_running_loop())
    await host.ready()
    assert life.threads == {threading.current_thread()}
    assert host.loop is asyncio.get_running_loop()
    await host.aclose()
    assert life.closed == 1


def test_when_the_loop_that_was_given_ends_it_ends_too():
    life = Life()
    loop = asyncio.new_event_loop()
    host = Hosting(life, loop=loop)
    loop.run_until_complete(host.ready())
    asyncio.run(host.aclose())  # that loop does not run now, and nobody knows whether it ever will again
    host = Hosting(life, loop=loop)
    loop.run_until_complete(host.ready())
    tasks = asyncio.all_tasks(loop)
    for task in tasks:
        task.cancel()
    loop.run_until_complete(asyncio.wait(tasks))
    loop.close()
    assert host.state == "failed"
    assert "has ended" in host.broken()
    asyncio.run(host.aclose())


def test_a_loop_that_has_ended_already_hosts_nothing():
    loop = asyncio.new_event_loop()
    loop.close()
    host = Hosting(Life(), loop=loop)
    with pytest.raises(ConnectionFailed, match="has ended"):
        asyncio.run(host.ready())


async def test_interrupted_in_its_start_it_says_so():
    loop = asyncio.get_running_loop()
    life = Life(held=True)
    host = Hosting(life, loop=loop)
    waiting = asyncio.create_task(host.ready())
    await begun(life)
    host._main.cancel()
    with pytest.raises(ConnectionFailed, match="interrupted"):
        await waiting
    life.go.set()


async def test_in_a_forked_child_it_is_the_parents():
    host = Hosting(Life())
    await host.ready()
    pid, host._pid = host._pid, -1
    with pytest.raises(ConnectionFailed, match="fork"):
        await host.ready()
    await host.aclose()
    host._pid, host._closed = pid, False
    assert host.state == "running"
    await host.aclose()
    assert is_alone()


async def test_without_uvloop_it_lives_on_asyncios_own_loop(monkeypatch):
    def refuse(name, *args, **kwargs):
        if name == "uvloop":
            raise ImportError(name)
        return importlib.import_module(name)

    monkeypatch.setattr(hosting_module, "import_module", refuse)
    host = Hosting(Life())
    await host.ready()
    assert isinstance(host.loop, asyncio.SelectorEventLoop)
    await host.aclose()

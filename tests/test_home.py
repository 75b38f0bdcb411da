"""The home loop's harder cases: one that only pauses, and tasks that a stranger cancels."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from llmmw.call import Reply
from llmmw.stack import Stack
from llmmw.testing import FakeUpstream, chat_call
from llmmw.testing.fake import ScriptedChunks, chat_chunks


def make_engine(**options):
    upstream = FakeUpstream(**options)
    return Stack().bind(upstream), upstream


def own_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("llmmw")]


def elsewhere(work):
    """Run it on a thread of its own that ends."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result(120)


@pytest.mark.parametrize("guest", ["plain", "with a loop"])
def test_a_home_that_only_pauses_on_another_thread_is_left_after_a_moment(guest):
    engine, upstream = make_engine()
    loop = asyncio.new_event_loop()
    with ThreadPoolExecutor(1) as pool:  # the thread lives on, so its loop might too
        run = lambda text: pool.submit(loop.run_until_complete, engine.call(chat_call(text))).result(120)  # noqa: E731
        assert run("home").text == "echo: home"
        call = chat_call("guest")
        if guest == "plain":
            assert engine.call_sync(call).text == "echo: guest"
        else:
            assert asyncio.run(engine.call(call)).text == "echo: guest"
        assert run("back").text == "echo: back"
    assert len(upstream.calls) == 3  # what waited for the pause to end was not sent twice
    loop.close()
    engine.close()
    assert own_threads() == []


@pytest.mark.parametrize("when", ["in the same run", "in a later run"])
def test_a_guests_task_that_a_stranger_cancels_is_begun_again(when):
    engine, upstream = make_engine(latency_s=0.05)

    async def home():
        await engine.call(chat_call("home"))

    async def ask(pool):
        future = pool.submit(engine.call_sync, chat_call("guest"))
        while not upstream.in_flight:
            await asyncio.sleep(0)
        return future

    async def cancel_all():
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()

    async def answer_of(future):
        return await asyncio.wrap_future(future)

    async def at_once(pool):
        future = await ask(pool)
        await cancel_all()
        return await answer_of(future)

    with ThreadPoolExecutor(1) as pool, asyncio.Runner() as runner:
        runner.run(home())
        if when == "in the same run":
            found = runner.run(at_once(pool))
        else:
            future = runner.run(ask(pool))
            runner.run(cancel_all())
            found = runner.run(answer_of(future))
        runner.run(engine.aclose())
    assert found.text == "echo: guest"
    assert len(upstream.calls) == 3
    assert own_threads() == []


def test_an_interrupt_raised_by_a_guest_on_the_main_threads_loop_is_the_users():
    async def endpoint(call):
        raise KeyboardInterrupt

    engine = Stack().bind(endpoint)

    async def main():
        engine._home.adopt()
        await asyncio.to_thread(engine.call_sync, chat_call())

    with pytest.raises(KeyboardInterrupt):
        asyncio.run(main())
    engine.close()
    assert own_threads() == []


def test_a_close_that_begins_while_its_home_ends_leaves_no_task_behind(caplog):
    chunks = ScriptedChunks(chat_chunks("one two"), gap_s=100)
    engine = Stack().bind(FakeUpstream([Reply(chunks=chunks)]))
    closer = threading.Thread(target=engine.close)
    kept = []

    async def last_act():
        try:
            await asyncio.Event().wait()
        finally:  # the run cancels its tasks, and with that begins to end
            closer.start()
            while engine._closing is None:
                await asyncio.sleep(0)

    async def main():
        kept.append(await engine.call(chat_call(stream=True)))  # what the close waits for
        kept.append(asyncio.create_task(last_act()))
        await asyncio.sleep(0)

    asyncio.run(main())
    closer.join(120)
    assert not closer.is_alive()
    assert engine._released
    kept.clear()
    gc.collect()
    assert [record.message for record in caplog.records] == []
    assert own_threads() == []


def test_a_call_that_reaches_its_home_while_that_says_goodbye_is_begun_elsewhere(caplog):
    """It was sent while the loop lived, and arrives when the sockets are being closed: nothing is begun there."""
    loops, threads, found = [], [], []

    class Noting(FakeUpstream):
        async def __call__(self, call):
            loops.append(asyncio.get_running_loop())
            return await super().__call__(call)

        def rehome(self):
            """The last thing that happens on a home."""
            if not threads:
                thread = threading.Thread(target=lambda: found.append(engine.call_sync(chat_call("late")).text))
                threads.append(thread)
                bridged = len(engine._home._bridged)
                engine._home._dying, dying = None, engine._home._dying  # as the caller saw it a moment ago
                thread.start()
                while len(engine._home._bridged) == bridged:
                    pass
                engine._home._dying = dying

    upstream = Noting(latency_s=0.01)
    engine = Stack().bind(upstream)

    async def main():
        loops.append(asyncio.get_running_loop())
        await engine.call(chat_call("home"))

    asyncio.run(main())
    threads[0].join(120)
    assert found == ["echo: late"]
    assert [loop is loops[0] for loop in loops] == [True, True, False]
    engine.close()
    gc.collect()
    assert [record.message for record in caplog.records] == []
    assert own_threads() == []


@pytest.mark.parametrize("kind", [asyncio.CancelledError, KeyboardInterrupt])
def test_a_guest_that_goes_as_its_chunk_arrives_leaves_no_stream_open(monkeypatch, kind):
    """Nobody else would tell: the chunk was delivered, and a close would wait for the stream to be collected."""
    engine = Stack().bind(FakeUpstream([Reply(chunks=ScriptedChunks(chat_chunks("one two")))]))
    home, kept = engine._home, []

    async def delivered(make, *, repeat=True):
        await type(home).run(home, make, repeat=repeat)
        raise kind

    def delivered_sync(make, *, repeat=True):
        type(home).run_sync(home, make, repeat=repeat)
        raise kind

    async def guest():
        kept.append(await engine.call(chat_call(stream=True)))
        monkeypatch.setattr(home, "run", delivered)
        with pytest.raises(kind):
            await kept[0].chunks.__anext__()

    with engine:
        if kind is KeyboardInterrupt:
            kept.append(engine.call_sync(chat_call(stream=True)))
            monkeypatch.setattr(home, "run_sync", delivered_sync)
            with pytest.raises(kind):
                kept[0].chunks.next_sync()
        else:
            asyncio.run(guest())
        monkeypatch.undo()
        until = time.monotonic() + 120
        while engine.get_performance_stats()["in_flight"]:
            assert time.monotonic() < until
            time.sleep(0.001)
    assert engine.get_performance_stats()["cancelled"] == 1
    assert own_threads() == []

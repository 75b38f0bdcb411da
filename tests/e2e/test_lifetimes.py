"""One engine from threads, loops and plain code; afterwards nothing is left. Real sockets, disk, recommended stack."""

from __future__ import annotations

import asyncio
import gc
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import count
from pathlib import Path

import openai
import pytest

import llmmw
from llmmw import Client, Stack, SyncClient

MODEL = "llmmw-embedded"
THREADS, RUNS = 8, 5
numbers = count()


def holdings(directory) -> dict[str, list[str]]:
    """What this process holds: llmmw's threads, sockets (with whatever asyncio has), files of the cache."""
    links = []
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # the listing's own
            links.append(str(entry.readlink()))
    return {
        "threads": sorted(t.name for t in threading.enumerate() if t.name.startswith("llmmw")),
        "sockets": sorted(link for link in links if link.startswith(("socket:", "anon_inode:[eventpoll]"))),
        "files": sorted(link for link in links if link.startswith(str(directory))),
    }


@pytest.fixture
def books(server, tmp_path):
    """Before and after the test the process holds the same, and the server has no connection but the asker's."""
    before = holdings(tmp_path)
    yield
    assert holdings(tmp_path) == before
    server.wait(at_most={"connections.open": 1, "in_flight": 0})


@pytest.fixture
def stack(tmp_path, books):
    return Stack.recommended(cache_ttl=300, cache_directory=str(tmp_path / "cache"))


def question(text) -> dict:
    return {"model": MODEL, "messages": [{"role": "user", "content": str(text)}], "temperature": 0}


def text_of(answer) -> str:
    return answer["choices"][0]["message"]["content"]


# ── the six ways in: each gives an `ask` for texts, and what closes it ─────────────────────────────────────────────


class Way:
    def __init__(self, ask, aclose=None, close=None, *, plain=False, enter=None):
        self.ask, self.aclose, self.close, self.plain, self.enter = ask, aclose, close, plain, enter

    async def a(self, text):
        """From a running loop, whichever kind of way it is."""
        return self.ask(text) if self.plain else await self.ask(text)


def async_function(server, stack):
    client = Client(server.base_url, stack=Stack())  # what the user's function sends with is his own affair

    @stack.wrap
    async def ask(prompt: str) -> str:
        return (await client.chat(**question(prompt))).text

    async def aclose():
        await ask.aclose()
        await client.aclose()

    return Way(ask, aclose)


def sync_function(server, stack):
    client = SyncClient(server.base_url, stack=Stack())

    @stack.wrap
    def ask(prompt: str) -> str:
        return client.chat(**question(prompt)).text

    def close():
        ask.close()
        client.close()

    return Way(ask, close=close, plain=True)


def client(server, stack):
    found = Client(server.base_url, stack=stack)

    async def ask(text):
        return (await found.chat(**question(text))).text

    return Way(ask, found.aclose, enter=found)


def sync_client(server, stack):
    found = SyncClient(server.base_url, stack=stack)
    return Way(lambda text: found.chat(**question(text)).text, close=found.close, plain=True, enter=found)


def transport(server, stack):
    found = llmmw.httpx2_client(stack)

    async def ask(text):
        response = await found.post(f"{server.base_url}/chat/completions", json=question(text))
        return text_of(response.json())

    return Way(ask, found.aclose)


def wrapped_sdk(server, stack):
    sdk = llmmw.wrap_client(openai.AsyncOpenAI(base_url=server.base_url, api_key="k"), stack)

    async def ask(text):
        return (await sdk.chat.completions.create(**question(text))).choices[0].message.content

    return Way(ask, sdk.close)


WAYS = [async_function, sync_function, client, sync_client, transport, wrapped_sdk]


@pytest.fixture(params=WAYS, ids=lambda way: way.__name__)
def way(request, server, stack):
    return request.param(server, stack)


def end(way):
    """Close it from plain code, twice."""
    for _ in range(2):
        if way.close is not None:
            way.close()
        else:
            asyncio.run(way.aclose())


def alone():
    """Nothing else runs on this loop."""
    return asyncio.all_tasks() == {asyncio.current_task()}


# ── where calls come from ──────────────────────────────────────────────────────────────────────────────────────────


def test_async_eight_threads_each_with_its_own_loop_or_none(way):
    async def several(name):
        return [await way.a(f"question {name} {number}") for number in range(3)]

    def work(name):
        if way.plain:
            return [way.ask(f"question {name} {number}") for number in range(3)]
        return asyncio.run(several(name))

    with ThreadPoolExecutor(THREADS) as pool:
        first = list(pool.map(work, range(THREADS)))
        assert len({text for texts in first for text in texts}) == 3 * THREADS
        assert list(pool.map(work, range(THREADS))) == first  # from the cache, on any thread
    end(way)


def test_async_five_consecutive_runs(way):
    async def one(number):
        same, own = await asyncio.gather(way.a("the same"), way.a(f"run {number}"))
        return same, own

    found = [asyncio.run(one(number)) for number in range(RUNS)]
    assert len({same for same, _ in found}) == 1
    assert len({own for _, own in found}) == RUNS
    end(way)


async def test_async_inside_a_running_loop_as_in_a_notebook(way):
    cells = [await way.a(f"cell {number}") for number in range(3)]
    assert [await way.a(f"cell {number}") for number in range(3)] == cells
    if way.close is not None:
        way.close()
    else:
        await way.aclose()
        await way.aclose()
    await asyncio.sleep(0)
    assert alone()


@pytest.mark.parametrize(
    "error", [ValueError("the body's"), asyncio.CancelledError(), KeyboardInterrupt()], ids=lambda e: type(e).__name__
)
@pytest.mark.parametrize("make", [client, transport, wrapped_sdk, async_function], ids=lambda way: way.__name__)
def test_async_with_keeps_the_bodys_exception_and_leaves_nothing(make, error, server, stack):
    way = make(server, stack)

    async def main():
        try:
            async with asyncio.TaskGroup() as group:  # calls in flight when the body ends
                for number in range(4):
                    group.create_task(way.a(f"{next(numbers)} {number}"))
                await way.a("one")
                raise error
        finally:
            await way.aclose()
            assert alone()

    with pytest.raises(BaseException) as caught:
        asyncio.run(main())
    found = caught.value.exceptions[0] if isinstance(caught.value, BaseExceptionGroup) else caught.value
    assert isinstance(found, type(error))


@pytest.mark.parametrize("make", [client, sync_client], ids=lambda way: way.__name__)
def test_async_the_body_of_with_raises(make, server, stack):
    way, error = make(server, stack), ValueError("the body's")

    async def main():
        async with way.enter:
            await way.a("one")
            raise error

    with pytest.raises(ValueError, match="the body's") as caught:
        if way.plain:
            with way.enter:
                way.ask("one")
                raise error
        else:
            asyncio.run(main())
    assert caught.value is error


async def test_async_a_body_cancelled_again_while_it_closes_leaves_nothing(server, stack):
    """A time-out around the whole, then an impatient second cancellation during the close."""
    server.configure(latency_s=3600)
    inside = Client(server.base_url, stack=stack)

    async def main():
        async with inside:
            await inside.chat(**question(next(numbers)))

    task = asyncio.create_task(main())
    await asyncio.to_thread(server.wait, at_least={"in_flight": 1})
    task.cancel()
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    server.configure(latency_s=0.005)
    await inside.aclose()
    assert alone()


def test_async_a_close_that_was_cancelled_with_its_loop_is_made_up_for(server, stack):
    inside = Client(server.base_url, stack=stack)

    async def main():
        await inside.chat(**question("one"))
        closing = asyncio.create_task(inside.aclose())
        await asyncio.sleep(0)
        closing.cancel()  # and the loop ends at once

    asyncio.run(main())
    gc.collect()
    assert inside.engine.closed

"""CPU time that llmmw adds to a call in one process: hits from memory and disk, misses, hits under an SDK.

Each case is an async context manager that takes how many calls will come and yields `ask(number)`; it is opened anew
for every repeat. Floors do the least that the job needs: canonical JSON, sha256, a dict (or diskcache), JSON back.
"""

from __future__ import annotations

import asyncio
import gc
import hashlib
import inspect
import random
import tempfile
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from client_cpu import FILLER, FULL_SPEED, MODEL, body, messages
from fast_server import BODY

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable
    from contextlib import AbstractAsyncContextManager

    Ask = Callable[[int], Any]

NOWHERE = "http://127.0.0.1:9/v1"
ANSWER = "word " * 40
TOGETHER = 64
WARM_UP = 50
"""Calls before the clock starts, numbered from 0."""
MEMORY_FLOOR = "dict + json + sha256"
DISK_FLOOR = "diskcache + json + sha256"
THREAD_FLOOR = "the same in asyncio.to_thread"
BARE = "bare function"
SDK_FLOOR = "openai SDK, answered in process"


@dataclass(frozen=True)
class Case:
    """One thing to measure."""

    name: str
    open: Callable[[int], AbstractAsyncContextManager[Ask]]
    floor: str = ""
    budget_us: float | None = None
    less_floor: bool = False
    """The figure is what comes on top of the floor."""
    at_once: int = 1
    """Calls made concurrently, each in a task of its own."""
    fewer: int = 1
    """By how much fewer calls are enough, because each takes so long."""


def prompt(number: int) -> str:
    """A prompt of 1 KB."""
    return f"{number} {FILLER}"


def _key(payload: dict[str, Any]) -> bytes:
    import msgspec

    return hashlib.sha256(msgspec.json.encode(payload, order="deterministic")).digest()


async def _ask_nobody(prompt: str) -> str:
    await asyncio.sleep(0)  # as a real upstream does: the caller is suspended
    return ANSWER if prompt else ""


def _check(stats: dict[str, Any], upstream: int) -> None:
    """A hit that was none would be measured in vain."""
    if stats["upstream_requests"] != upstream:
        raise RuntimeError(f"{stats['upstream_requests']} upstream requests where {upstream} were expected")


# ── memory ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@asynccontextmanager
async def memory_floor(_: int) -> AsyncGenerator[Ask]:
    import msgspec

    stored = {_key({"prompt": prompt(0)}): msgspec.json.encode(ANSWER)}

    async def ask(_: int) -> object:
        return msgspec.json.decode(stored[_key({"prompt": prompt(0)})])

    yield ask


@asynccontextmanager
async def async_function(_: int) -> AsyncGenerator[Ask]:
    import llmmw

    cached = llmmw.middleware(cache_ttl=300)(_ask_nobody)
    yield lambda _number: cached(prompt(0))
    _check(cached.get_performance_stats(), 1)
    await cached.aclose()


@asynccontextmanager
async def sync_function(_: int) -> AsyncGenerator[Ask]:
    import llmmw

    @llmmw.middleware(cache_ttl=300)
    def cached(prompt: str) -> str:
        return ANSWER if prompt else ""

    yield lambda _number: cached(prompt(0))
    _check(cached.get_performance_stats(), 1)
    await cached.aclose()


@asynccontextmanager
async def client_in_memory(_: int) -> AsyncGenerator[Ask]:
    import llmmw
    from llmmw.testing.fake import FakeUpstream

    stack = llmmw.Stack.recommended(cache_ttl=300)
    async with (
        llmmw.Client(NOWHERE, stack=stack, model=MODEL) as client,
        stack.bind(FakeUpstream(name=NOWHERE)) as fake,
    ):
        client.engine = fake

        async def ask(_: int) -> object:
            return (await client.chat(messages(prompt(0)))).text

        yield ask
        _check(client.get_performance_stats(), 1)


# ── disk ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@asynccontextmanager
async def disk_floor(calls: int, *, in_thread: bool = False) -> AsyncGenerator[Ask]:
    import diskcache
    import msgspec

    with tempfile.TemporaryDirectory() as directory, diskcache.Cache(directory) as stored:
        for number in range(calls):
            stored.set(_key({"prompt": prompt(number)}), msgspec.json.encode(ANSWER))

        async def ask(number: int) -> object:
            key = _key({"prompt": prompt(number)})
            return msgspec.json.decode(await asyncio.to_thread(stored.get, key) if in_thread else stored.get(key))

        yield ask


@asynccontextmanager
async def disk_hit(calls: int, *, shuffled: bool = False) -> AsyncGenerator[Ask]:
    """Answers stored by one engine and read, each for the first time, by another: as they were stored, or shuffled."""
    import llmmw

    with tempfile.TemporaryDirectory() as directory:
        decorate = llmmw.middleware(cache_ttl=300, cache_directory=directory, concurrency=FULL_SPEED)
        writer, reader = decorate(_ask_nobody), decorate(_ask_nobody)
        for number in range(calls):
            await writer(prompt(number))
        await writer.aclose()
        order = list(range(calls))
        if shuffled:
            random.Random(1).shuffle(order)
        yield lambda number: reader(prompt(order[number]))
        _check(reader.get_performance_stats(), 0)
        await reader.aclose()


# ── uncached ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@asynccontextmanager
async def bare_function(_: int) -> AsyncGenerator[Ask]:
    yield lambda number: _ask_nobody(prompt(number))


@asynccontextmanager
async def _uncached(calls: int, **options: Any) -> AsyncGenerator[Ask]:
    import llmmw

    wrapped = llmmw.middleware(**options)(_ask_nobody)
    yield lambda number: wrapped(prompt(number))
    _check(wrapped.get_performance_stats(), calls)
    await wrapped.aclose()


@asynccontextmanager
async def uncached_recommended(calls: int) -> AsyncGenerator[Ask]:
    async with _uncached(calls, cache_ttl=300, concurrency=FULL_SPEED) as ask:
        yield ask


@asynccontextmanager
async def uncached_no_cache(calls: int) -> AsyncGenerator[Ask]:
    async with _uncached(calls, concurrency=FULL_SPEED) as ask:
        yield ask


@asynccontextmanager
async def uncached_with_limits(calls: int) -> AsyncGenerator[Ask]:
    async with _uncached(calls, cache_ttl=300, rpm=100_000_000, tpm=100_000_000_000, deadline=60) as ask:
        yield ask


# ── under and above an SDK ───────────────────────────────────────────────────────────────────────────────────────────


@asynccontextmanager
async def openai_client(**options: Any) -> AsyncGenerator[Any]:
    import openai

    async with openai.AsyncOpenAI(base_url=NOWHERE, api_key="benchmark", max_retries=0, **options) as client:
        yield client


async def _text_of(client: Any) -> str:
    made = await client.chat.completions.create(**body(prompt(0)))
    return str(made.choices[0].message.content)


@asynccontextmanager
async def sdk_floor(_: int) -> AsyncGenerator[Ask]:
    import httpx2

    def answer(_: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(200, content=BODY, headers={"content-type": "application/json"})

    http = httpx2.AsyncClient(transport=httpx2.MockTransport(answer))
    async with openai_client(http_client=http) as client:
        yield lambda _number: _text_of(client)


@asynccontextmanager
async def transport_hit(_: int) -> AsyncGenerator[Ask]:
    import llmmw
    from llmmw.testing.fake import FakeUpstream

    stack = llmmw.Stack.recommended(cache_ttl=300)
    http = llmmw.httpx2_client(stack, endpoint=FakeUpstream(name=NOWHERE))
    async with openai_client(http_client=http) as client:
        yield lambda _number: _text_of(client)
        _check(http.get_performance_stats(), 1)


@asynccontextmanager
async def wrapped_client_hit(_: int) -> AsyncGenerator[Ask]:
    import httpx2

    import llmmw

    def answer(_: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(200, content=BODY, headers={"content-type": "application/json"})

    http = httpx2.AsyncClient(transport=httpx2.MockTransport(answer))
    async with openai_client(http_client=http) as inner:
        client: Any = llmmw.wrap_client(inner, llmmw.Stack.recommended(cache_ttl=300))
        yield lambda _number: _text_of(client)
        _check(client.get_performance_stats(), 1)


CASES = (
    Case(MEMORY_FLOOR, memory_floor),
    Case("memory hit, async function", async_function, MEMORY_FLOOR, 6),
    Case("memory hit, sync function", sync_function, MEMORY_FLOOR, 6),
    Case("memory hit, Client.chat().text", client_in_memory, MEMORY_FLOOR, 12),
    Case(DISK_FLOOR, disk_floor),
    Case(THREAD_FLOOR, partial(disk_floor, in_thread=True)),
    Case("disk hit, in the order of storing", disk_hit, THREAD_FLOOR, 25),
    Case("disk hit, in any order", partial(disk_hit, shuffled=True), THREAD_FLOOR),
    Case(f"disk hit, {TOGETHER} at once", disk_hit, THREAD_FLOOR, at_once=TOGETHER),
    Case(BARE, bare_function),
    Case("uncached call, added by cache stack", uncached_recommended, BARE, 30, less_floor=True),
    Case("uncached call, added, no cache", uncached_no_cache, BARE, less_floor=True),
    Case("uncached call, added, + rpm, tpm, deadline", uncached_with_limits, BARE, less_floor=True),
    Case(SDK_FLOOR, sdk_floor, fewer=5),
    Case("hit under the openai SDK (httpx2_client)", transport_hit, SDK_FLOOR, fewer=5),
    Case("hit above the openai SDK (wrap_client)", wrapped_client_hit, SDK_FLOOR, 15),
)


async def cost_of(case: Case, calls: int) -> tuple[float, list[float]]:
    """CPU µs per call over `calls` calls, and the wall µs of as many more, clocked one by one.

    Raises:
        Exception: whatever keeps the case from working here.
    """
    calls = max(1, calls // case.fewer)
    async with case.open(WARM_UP + 2 * calls) as ask:
        answers = [ask(number) for number in range(WARM_UP)]
        waits = inspect.isawaitable(answers[0])
        if waits:
            await asyncio.gather(*answers)
        gc.collect()
        began = time.process_time_ns()
        if case.at_once > 1:
            await _together(ask, range(WARM_UP, WARM_UP + calls), case.at_once)
        elif waits:
            for number in range(WARM_UP, WARM_UP + calls):
                await ask(number)
        else:
            for number in range(WARM_UP, WARM_UP + calls):
                ask(number)
        cpu_us = (time.process_time_ns() - began) / calls / 1000
        walls: list[float] = []
        for number in range(WARM_UP + calls, WARM_UP + 2 * calls) if case.at_once == 1 else ():
            start = time.perf_counter_ns()
            if waits:
                await ask(number)
            else:
                ask(number)
            walls.append((time.perf_counter_ns() - start) / 1000)
    return cpu_us, walls


async def _together(ask: Ask, numbers: range, at_once: int) -> None:
    for first in range(0, len(numbers), at_once):
        await asyncio.gather(*map(ask, numbers[first : first + at_once]))

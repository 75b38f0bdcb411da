"""CPU time that an HTTP client costs per call, at a given number of concurrent calls.

Each client runs in a process of its own, which holds nothing but that client, against a server in another process:
process CPU time is then the client's alone. The parent keeps all of them open and asks them in turn.

As a program it is such a process: it reads lines "CONCURRENCY CALLS" and answers each with one line of JSON.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import json
import statistics
import sys
import time
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from line_process import LineProcess

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator

    Ask = Callable[..., Awaitable[object]]

MODEL = "m"
FILLER = "In one short paragraph, say what you would do next and why. " * 16
"""Makes a request of about 1 KB."""
FULL_SPEED = "512-512-512"
"""Concurrency of the llmmw stacks: above every level measured, and told as floor, start and ceiling, so that the
limiter does not start gently as it does at a server it knows nothing about."""


def messages(prompt: str) -> list[dict[str, str]]:
    """The conversation that every client sends."""
    return [{"role": "system", "content": FILLER}, {"role": "user", "content": prompt}]


def body(prompt: str) -> dict[str, Any]:
    """The request body that every client sends."""
    return {"model": MODEL, "messages": messages(prompt), "temperature": 0.7}


# ── the clients: each yields `ask(prompt)`, which makes one call and reads the answer's text ─────────────────────────


class _Exchange(asyncio.Protocol):
    """One connection of the floor client: one request, one answer, counted by content-length."""

    def __init__(self) -> None:
        self.transport: Any = None
        self._answer: asyncio.Future[bytes] | None = None
        self._buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def ask(self, request: bytes) -> asyncio.Future[bytes]:
        self._answer = asyncio.get_running_loop().create_future()
        self.transport.write(request)
        return self._answer

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head, mark, rest = self._buffer.partition(b"\r\n\r\n")
        at = head.find(b"content-length: ")
        if mark and len(rest) >= int(head[at + 16 :].partition(b"\r\n")[0]):
            self._buffer = b""
            if self._answer is not None:
                self._answer.set_result(rest)


@asynccontextmanager
async def bare_protocol(url: str) -> AsyncGenerator[Ask]:
    """The floor: an asyncio protocol that knows just enough HTTP for this server."""
    parts = urlsplit(url)
    idle: list[_Exchange] = []
    opened: list[_Exchange] = []
    head = f"POST {parts.path}/chat/completions HTTP/1.1\r\nhost: {parts.netloc}\r\ncontent-type: application/json\r\n"

    async def ask(prompt: str) -> object:
        data = json.dumps(body(prompt)).encode()
        if idle:
            exchange = idle.pop()
        else:
            _, exchange = await asyncio.get_running_loop().create_connection(
                _Exchange, parts.hostname or "", parts.port or 80
            )
            opened.append(exchange)
        answer = await exchange.ask(f"{head}content-length: {len(data)}\r\n\r\n".encode() + data)
        idle.append(exchange)
        return json.loads(answer)["choices"][0]["message"]["content"]

    yield ask
    for exchange in opened:
        exchange.transport.close()


@asynccontextmanager
async def aiohttp_client(url: str) -> AsyncGenerator[Ask]:
    """Bare aiohttp, without its limit of 100 connections, so that all calls are in flight."""
    import aiohttp

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def ask(prompt: str, base_url: str = url, api_key: str = "benchmark", **fields: Any) -> str:
            async with session.post(
                f"{base_url}/chat/completions",
                json=body(prompt) | fields,
                headers={"authorization": f"Bearer {api_key}"},
                raise_for_status=True,
            ) as response:
                text: str = (await response.json())["choices"][0]["message"]["content"]
                return text

        yield ask


@asynccontextmanager
async def _httpx_like(library: Any, url: str) -> AsyncGenerator[Ask]:
    headers = {"authorization": "Bearer benchmark"}
    async with library.AsyncClient(timeout=60) as client:

        async def ask(prompt: str) -> object:
            response = await client.post(f"{url}/chat/completions", json=body(prompt), headers=headers)
            return response.json()["choices"][0]["message"]["content"]

        yield ask


@asynccontextmanager
async def httpx_client(url: str) -> AsyncGenerator[Ask]:
    """Bare httpx at its default limits (100 connections, 20 of them kept alive)."""
    import httpx

    async with _httpx_like(httpx, url) as ask:
        yield ask


@asynccontextmanager
async def httpx2_client(url: str) -> AsyncGenerator[Ask]:
    """Bare httpx2 at its default limits."""
    import httpx2

    async with _httpx_like(httpx2, url) as ask:
        yield ask


@asynccontextmanager
async def openai_client(
    url: str, max_retries: int = 0, wrap: Callable[[Any], Any] | None = None, **options: Any
) -> AsyncGenerator[Ask]:
    """The openai SDK as it comes, but for its retries."""
    import openai

    async with openai.AsyncOpenAI(base_url=url, api_key="benchmark", max_retries=max_retries, **options) as made:
        client: Any = made if wrap is None else wrap(made)

        async def ask(prompt: str, **changes: Any) -> object:
            others = {name: changes.pop(name) for name in ("base_url", "api_key") if name in changes}
            asked = client.with_options(**others) if others else client
            completion = await asked.chat.completions.create(**(body(prompt) | changes))
            return completion.choices[0].message.content

        yield ask


@asynccontextmanager
async def openai_over_llmmw(url: str) -> AsyncGenerator[Ask]:
    """The openai SDK with llmmw as its transport."""
    import llmmw

    stack = llmmw.Stack.recommended(concurrency=FULL_SPEED)
    async with openai_client(url, http_client=llmmw.httpx2_client(stack)) as ask:
        yield ask


@asynccontextmanager
async def _llmmw(url: str, **options: Any) -> AsyncGenerator[Ask]:
    import llmmw

    async with llmmw.Client(url, stack=llmmw.Stack.recommended(**options)) as client:

        async def ask(prompt: str) -> object:
            return (await client.chat(messages(prompt), model=MODEL, temperature=0.7)).text

        yield ask


@asynccontextmanager
async def llmmw_client(url: str) -> AsyncGenerator[Ask]:
    """llmmw's Client; its limiter lets all calls through, so that they are in flight."""
    async with _llmmw(url, concurrency=FULL_SPEED) as ask:
        yield ask


@asynccontextmanager
async def llmmw_client_queueing(url: str) -> AsyncGenerator[Ask]:
    """llmmw's Client as it comes: at most 64 calls in flight, the others wait in the limiter's queue."""
    async with _llmmw(url) as ask:
        yield ask


@asynccontextmanager
async def llmmw_client_caching(url: str) -> AsyncGenerator[Ask]:
    """llmmw's Client with a cache that never has the answer: every prompt is new."""
    async with _llmmw(url, concurrency=FULL_SPEED, cache_ttl=300) as ask:
        yield ask


CLIENTS: dict[str, Callable[[str], contextlib.AbstractAsyncContextManager[Ask]]] = {
    "bare asyncio protocol": bare_protocol,
    "aiohttp": aiohttp_client,
    "httpx": httpx_client,
    "httpx2": httpx2_client,
    "openai SDK": openai_client,
    "llmmw Client": llmmw_client,
    "llmmw Client + cache, all misses": llmmw_client_caching,
    "llmmw Client, 64 slots": llmmw_client_queueing,
    "openai SDK over llmmw": openai_over_llmmw,
}


# ── the process that runs one of them ────────────────────────────────────────────────────────────────────────────────


async def measure(ask: Ask, prompts: Iterator[str], concurrency: int, calls: int) -> dict[str, float]:
    """CPU and median wall seconds per call, and calls per second, of `calls` calls by `concurrency` workers."""
    walls: list[float] = []
    left = calls

    async def work() -> None:
        nonlocal left
        while left > 0:
            left -= 1
            began = time.perf_counter()
            text = await ask(next(prompts))
            walls.append(time.perf_counter() - began)
            if not text:
                raise RuntimeError("an empty answer")

    cpu, wall = time.process_time(), time.perf_counter()
    await asyncio.gather(*(work() for _ in range(concurrency)))
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return {"cpu_s": cpu / calls, "p50_s": statistics.median(walls), "calls_per_s": calls / wall}


async def crowd(ask: Callable[[int], Awaitable[object]], calls: int) -> tuple[list[BaseException], float]:
    """What failed, and the seconds it took, of calls 0, 1, 2 ... made all at once."""
    began = time.perf_counter()
    found = await asyncio.gather(*(ask(number) for number in range(calls)), return_exceptions=True)
    return [one for one in found if isinstance(one, BaseException)], time.perf_counter() - began


def _serve(name: str, url: str) -> None:
    numbers = itertools.count()
    prompts = (f"question {number}" for number in numbers)
    with asyncio.Runner() as runner:
        client = CLIENTS[name](url)
        ask = runner.run(client.__aenter__())
        for line in sys.stdin:
            concurrency, calls = map(int, line.split())
            runner.run(measure(ask, prompts, concurrency, concurrency))  # opens the connections
            gc.collect()
            print(json.dumps(runner.run(measure(ask, prompts, concurrency, calls))), flush=True)
        runner.run(client.__aexit__(None, None, None))


class ClientProcess:
    """A process that runs one client; ask it to `measure` as often as you like."""

    def __init__(self, name: str, url: str) -> None:
        self.name = name
        self._process = LineProcess([sys.executable, str(Path(__file__).resolve()), name, url])

    def measure(self, concurrency: int, calls: int) -> dict[str, float]:
        """CPU and median wall seconds per call, and calls per second.

        Raises:
            RuntimeError: the client does not work here; the message is the last line it wrote.
        """
        found: dict[str, float] = json.loads(self._process.ask(f"{concurrency} {calls}"))
        return found

    def close(self) -> None:
        """End the process."""
        self._process.close()


if __name__ == "__main__":
    _serve(sys.argv[1], sys.argv[2])

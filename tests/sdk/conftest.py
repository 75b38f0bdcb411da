"""One set of scenarios for every SDK and edge: each `Driver` makes one kind of client behave like the others."""

from __future__ import annotations

import asyncio
import functools
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import anthropic
import openai
import pytest

import llmmw
from llmmw.testing.server import ServerConfig, ServerProcess, server_process

MODEL = "llmmw-embedded"
IS_OPENAI_2 = openai.__version__.startswith("2.")

EDGES = {
    "httpx": (llmmw.httpx_client, llmmw.httpx_sync_client),
    "httpx2": (llmmw.httpx2_client, llmmw.httpx2_sync_client),
}
CLIENTS = {
    "openai": (openai.AsyncOpenAI, openai.OpenAI),
    "anthropic": (anthropic.AsyncAnthropic, anthropic.Anthropic),
}
KINDS = [
    f"{sdk}-{mode}-{edge}"
    for sdk in CLIENTS
    for mode in ("async", "sync")
    for edge in ("httpx", "httpx2", "wrap")
    if not (sdk == "anthropic" and edge == "httpx") and not (IS_OPENAI_2 and sdk == "openai" and edge == "httpx2")
]


class Driver:
    """A client of one SDK, sync or async, over one edge, with one stack."""

    def __init__(self, kind: str, server: ServerProcess, stack: llmmw.Stack, **options: Any) -> None:
        self.sdk, self.mode, self.edge = kind.split("-")
        self.errors: Any = {"openai": openai, "anthropic": anthropic}[self.sdk]
        self.is_async = self.mode == "async"
        options.setdefault("base_url", server.base_url if self.sdk == "openai" else server.url)
        options.setdefault("api_key", "test-key")
        make = CLIENTS[self.sdk][0 if self.is_async else 1]
        if self.edge == "wrap":
            self.client = llmmw.wrap_client(make(**options), stack)
            self.engine = self.client.engine
        else:
            http = EDGES[self.edge][0 if self.is_async else 1](stack)
            self.client = make(http_client=http, **options)
            self.engine = http.engine
        self._threads = ThreadPoolExecutor(64)

    @property
    def stats(self) -> dict[str, Any]:
        return self.engine.get_performance_stats()

    @property
    def resource(self) -> Any:
        return self.client.chat.completions if self.sdk == "openai" else self.client.messages

    def arguments(self, prompt: str = "hello", **fields: Any) -> dict[str, Any]:
        found = {"model": MODEL, "messages": [{"role": "user", "content": prompt}], **fields}
        if self.sdk == "anthropic":
            found.setdefault("max_tokens", 200)
        return found

    async def run(self, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call a method of the SDK: awaited, or on a thread."""
        work = functools.partial(function, *args, **kwargs)
        if self.is_async:
            return await work()
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    async def ask(self, prompt: str = "hello", **fields: Any) -> Any:
        return await self.run(self.resource.create, **self.arguments(prompt, **fields))

    async def stream(self, prompt: str = "hello", **fields: Any) -> list[Any]:
        """All chunks of a streamed answer."""
        arguments = self.arguments(prompt, stream=True, **fields)
        if self.is_async:
            return [chunk async for chunk in await self.resource.create(**arguments)]
        return await self.run(lambda: list(self.resource.create(**arguments)))

    async def entered(self, manager: Any, read: str) -> Any:
        """What a stream helper's `read` method tells, called inside its `with`."""
        if self.is_async:
            async with manager as stream:
                return await getattr(stream, read)()

        def within() -> Any:
            with manager as stream:
                return getattr(stream, read)()

        return await self.run(within)

    def text(self, answer: Any) -> str:
        return answer.choices[0].message.content if self.sdk == "openai" else answer.content[0].text

    def streamed_text(self, chunks: list[Any]) -> str:
        if self.sdk == "openai":
            return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        return "".join(chunk.delta.text for chunk in chunks if chunk.type == "content_block_delta")

    def without_sleeps(self) -> None:
        """The SDK's own back-off takes no time."""
        self.client._calculate_retry_timeout = lambda *_, **__: 0.0

    async def close(self) -> None:
        await self.run(self.client.close)
        self._threads.shutdown()


@pytest.fixture(scope="session")
def process():
    with server_process(ServerConfig(log_headers=True)) as found:
        yield found


@pytest.fixture
def server(process):
    process.clear_faults()
    process.configure(api_keys=[])
    process.reset()
    return process


def pytest_configure(config):
    about = "only(*tags): the scenario makes sense for these drivers alone (an SDK, a mode, an edge, transport)"
    config.addinivalue_line("markers", about)


def pytest_generate_tests(metafunc):
    """Every kind of driver, or those that have all the tags which the test's `only` mark names."""
    if "kind" in metafunc.fixturenames:
        mark = metafunc.definition.get_closest_marker("only")
        tags = mark.args if mark else ()
        metafunc.parametrize("kind", [kind for kind in KINDS if all(tag in tags_of(kind) for tag in tags)])


def tags_of(kind: str) -> set[str]:
    sdk, mode, edge = kind.split("-")
    return {sdk, mode, edge} | ({"transport"} if edge != "wrap" else set())


@pytest.fixture
async def connect(kind, server):
    """Makes drivers of the parametrised kind and closes them."""
    made = []

    def make(stack: llmmw.Stack | None = None, **options: Any) -> Driver:
        options.setdefault("max_retries", 0)
        driver = Driver(kind, server, stack or llmmw.Stack(), **options)
        made.append(driver)
        return driver

    yield make
    for driver in made:
        await driver.close()


@pytest.fixture
def connect_in_run(kind, server):
    """Makes a driver outside any loop; the test closes it."""
    return lambda: Driver(kind, server, llmmw.Stack(llmmw.TTLCache(300)), max_retries=0)


def pytest_report_header() -> str:
    return f"openai {openai.__version__}, anthropic {anthropic.__version__}, python {sys.version.split()[0]}"

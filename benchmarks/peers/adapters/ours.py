"""llmmw: by decorator, by Client, as a transport under the openai SDK and above it (`wrap_client`)."""

from __future__ import annotations

from contextlib import AsyncExitStack, asynccontextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any

from client_cpu import MODEL, body, openai_client

from peers.adapters.function import asking
from peers.protocol import KEY, CannotError, Job, Peer

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from peers.protocol import Ask


def _options(job: Job) -> dict[str, Any]:
    """Of `Stack.recommended`."""
    if job.purpose == "defaults":
        raise CannotError("as in the storm: it has no other setting")
    options: dict[str, Any] = {}
    if job.caches:
        options["cache_ttl"] = 300
    if job.purpose in {"disk", "probe"}:
        options["cache_directory"] = job.directory
    if job.purpose == "told":
        options["rpm"] = round(job.rate * 60)
    elif job.purpose != "storm":
        # Told as floor, start and ceiling: nothing waits for a limiter that starts gently.
        options["concurrency"] = f"{job.at_once}-{job.at_once}-{job.at_once}"
    return options


def _stack(job: Job) -> Any:
    return import_module("llmmw").Stack.recommended(**_options(job))


@asynccontextmanager
async def decorator(job: Job) -> AsyncGenerator[Ask]:
    """@middleware(cache_ttl=300) around a function over bare aiohttp; told the rate, rpm=12000; in storms as it is."""
    llmmw = import_module("llmmw")
    async with asking(job) as ask:
        # `post` is the connection, not part of the question; said so, its answers are shared on disk.
        wrapped = llmmw.middleware(**_options(job), ignore=("post",))(ask)
        try:
            yield wrapped
        finally:
            await wrapped.aclose()


@asynccontextmanager
async def client(job: Job) -> AsyncGenerator[Ask]:
    """Client(url, stack=Stack.recommended(...)); told the rate, rpm=12000; in storms as it comes."""
    llmmw = import_module("llmmw")
    stack, opened = _stack(job), dict[tuple[str, str], Any]()
    pool = llmmw.ConnectionPool(max_connections=job.at_once)
    async with AsyncExitStack() as exits:

        async def client_of(base_url: str, api_key: str) -> Any:
            made = opened.get((base_url, api_key))
            if made is None:
                made = await exits.enter_async_context(llmmw.Client(base_url, api_key, stack=stack, pool=pool))
                opened[base_url, api_key] = made
            return made

        usual = await client_of(job.url, KEY)
        plain = body("")

        async def ask(prompt: str, **changes: Any) -> object:
            if not changes:
                sent = body(prompt)
                reply = await usual.chat(sent["messages"], model=MODEL, temperature=plain["temperature"])
                return reply.text
            other = await client_of(changes.pop("base_url", job.url), changes.pop("api_key", KEY))
            return (await other.chat(**(body(prompt) | changes))).text

        yield ask


@asynccontextmanager
async def transport(job: Job) -> AsyncGenerator[Ask]:
    """AsyncOpenAI(http_client=httpx2_client(Stack.recommended(...)), max_retries=0)."""
    llmmw = import_module("llmmw")
    pool = llmmw.ConnectionPool(max_connections=job.at_once)
    async with openai_client(job.url, http_client=llmmw.httpx2_client(_stack(job), pool=pool)) as ask:
        yield ask


@asynccontextmanager
async def wrapping(job: Job) -> AsyncGenerator[Ask]:
    """wrap_client(AsyncOpenAI(), Stack.recommended(...)): typed answers; uncached calls are the SDK's own."""
    llmmw = import_module("llmmw")
    async with openai_client(job.url, wrap=lambda sdk: llmmw.wrap_client(sdk, _stack(job))) as ask:
        yield ask


PEER = Peer(
    "llmmw",
    ("llmmw", "aiohttp", "msgspec"),
    "from llmmw import Client",
    {"llmmw decorator": decorator, "llmmw Client": client},
    ours=True,
)
SDK = Peer(
    "llmmw_sdk",
    ("llmmw", "openai", "httpx2"),
    "",
    {"llmmw transport under openai": transport, "llmmw wrap_client above openai": wrapping},
    ours=True,
)

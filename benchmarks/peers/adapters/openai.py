"""The openai SDK, as it comes and with what people build around it by hand."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any

from client_cpu import body, openai_client

from peers.protocol import KEY, PATIENT, CannotError, Job, Peer, without_cache

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable

    from peers.protocol import Ask

IN_FLIGHT = 64


@asynccontextmanager
async def alone(job: Job) -> AsyncGenerator[Ask]:
    """AsyncOpenAI; max_retries=20 in storms (its default is 2), 0 elsewhere."""
    without_cache(job)
    async with openai_client(job.url, max_retries=job.retries(2)) as ask:
        yield ask


@asynccontextmanager
async def by_hand(job: Job) -> AsyncGenerator[Ask]:
    """AsyncOpenAI(max_retries=0) in a Semaphore(64), repeated by tenacity (random exponential waits up to 20 s, 20
    times); told the rate, an aiolimiter before each attempt."""
    if job.purpose not in {"storm", "told"}:
        raise CannotError("see openai SDK")
    openai, tenacity = import_module("openai"), import_module("tenacity")
    slots = asyncio.Semaphore(IN_FLIGHT)
    limiter = None
    if job.purpose == "told":
        limiter = import_module("aiolimiter").AsyncLimiter(job.burst, job.burst / job.rate)
    again: Callable[[Any], Any] = tenacity.retry(
        retry=tenacity.retry_if_exception_type(openai.RateLimitError),
        wait=tenacity.wait_random_exponential(multiplier=0.5, max=20),
        stop=tenacity.stop_after_attempt(PATIENT + 1),
        reraise=True,
    )
    async with openai.AsyncOpenAI(base_url=job.url, api_key=KEY, max_retries=0) as client:

        @again
        async def attempt(prompt: str) -> object:
            if limiter is not None:
                await limiter.acquire()
            made = await client.chat.completions.create(**body(prompt))
            return made.choices[0].message.content

        async def ask(prompt: str) -> object:
            async with slots:
                answer: Awaitable[object] = attempt(prompt)
                return await answer

        yield ask


PEER = Peer("openai", ("openai",), "import openai", {"openai SDK": alone})
BY_HAND = Peer("by_hand", ("tenacity", "aiolimiter"), "", {"openai SDK, tuned by hand": by_hand})

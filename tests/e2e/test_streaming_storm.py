"""A storm of streams that end in every way at random moments leaves nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter

import pytest

from llmmw import (
    CircuitBreaker,
    Client,
    Coalescer,
    Deadline,
    RateLimiter,
    Retry,
    Stack,
    Timeout,
    TTLCache,
    using,
)
from llmmw.errors import LLMMWError

STREAMS = 400
ENDINGS = ("finish", "finish", "reset", "no_done", "no_finish", "error_first", "error_later", "stall")
READERS = ("to the end", "to the end", "some", "dropped", "cancelled", "deadline", "another task closes")


def stack():
    return Stack(
        Deadline(20),
        TTLCache(60),
        Coalescer(),
        Retry(attempts=2, backoff=0.001),
        CircuitBreaker(consecutive=10_000, min_calls=10_000),
        RateLimiter(tpm=10_000_000, concurrency=16),
        Timeout(20, between_chunks=0.2),
    )


async def take(chunks, most=None):
    got = []
    async for chunk in chunks:
        got.append(chunk)
        if len(got) == most:
            break
    return got


async def one(client, rng, server, ends):
    """One reader of one stream; whatever ended whole was whole."""
    prompt = f"{rng.choice(ENDINGS)}:{rng.randrange(40)}"
    how = rng.choice(READERS)
    with using(deadline=rng.random() * 0.05) if how == "deadline" else contextlib.nullcontext():
        call = client.requests.chat(None, prompt, {"temperature": 0}, stream=True)
    try:
        chunks = (await client.engine.call(call)).chunks
        if how == "another task closes":
            asyncio.get_running_loop().call_later(rng.random() * 0.02, lambda: asyncio.ensure_future(chunks.aclose()))
        got = await take(chunks, rng.randrange(1, 4) if how in {"some", "dropped"} else None)
    except LLMMWError as error:
        ends[type(error).__name__] += 1
        return
    if how == "some":
        await chunks.aclose()
    elif how != "dropped":
        ends[how] += 1
        whole = server.CHAT
        assert got == whole if how != "another task closes" else got == whole[: len(got)]


@pytest.mark.parametrize("seed", range(2))
async def test_a_storm_of_streams_leaves_nothing_behind(stream_server, books, seed):
    rng, ends = random.Random(seed), Counter()
    async with stream_server() as server, Client(f"{server.origin}/v1", stack=stack(), model="m") as client:
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(120):
            for _ in range(STREAMS // 50):
                tasks = [asyncio.ensure_future(one(client, rng, server, ends)) for _ in range(50)]
                for task in rng.sample(tasks, 8):
                    loop.call_later(rng.random() * 0.05, task.cancel)
                for outcome in await asyncio.gather(*tasks, return_exceptions=True):
                    assert outcome is None or isinstance(outcome, asyncio.CancelledError), repr(outcome)
                stats = await books.settled(client.engine)
        del tasks
        assert stats["request_count"] <= STREAMS
        assert stats["cache_hits"] > 0
        assert stats["coalesced"] > 0
        assert stats["cancelled"] > 0
        assert books.counts["record"] >= books.counts["grant"] >= stats["upstream_requests"]  # some never got so far
        assert set(ends) >= {"to the end", "StreamInterrupted", "TruncatedStream"}
        assert stats["layers"]["limit"]["usage_estimated"] > 0
        # Nothing is worn out: the next stream comes whole over the same engine.
        call = client.requests.chat(None, "finish:new", {"temperature": 0}, stream=True)
        assert await take((await client.engine.call(call)).chunks) == server.CHAT

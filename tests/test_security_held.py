"""security-8: an exception that somebody keeps for hours keeps nothing of its call: no body, no stream, no socket."""

from __future__ import annotations

import asyncio
import gc
import pickle
import types
import weakref

import pytest

from llmmw import CircuitBreaker, Client, Coalescer, ConnectionPool, ErrorRouter, RateLimiter, Retry, Stack, Timeout
from llmmw.endpoints import answers
from llmmw.errors import LLMMWError
from llmmw.pool import body as body_module
from llmmw.pool import bound
from llmmw.testing.fake import chat_body, chat_chunks, sse
from llmmw.testing.rawserver import RawServer, answer_bytes, chunked, hang_up, say

ENGINES = ["aiohttp", "httpx", "httpx2", "pyreqwest"]


def streamed(*events, end=True):
    body = chunked(*events) if end else chunked(*events)[:-5]
    return answer_bytes(200, body, transfer_encoding="chunked", content_type="text/event-stream")


async def cut(_, writer):
    writer.write(streamed(chat_chunks("one two")[0], end=False))
    await writer.drain()
    writer.close()


async def half(_, writer):
    writer.write(answer_bytes(200, b'{"choices"', content_length="1000"))
    await writer.drain()
    writer.close()


async def silent(_, __):
    await asyncio.Event().wait()


FAILURES = {
    "refused": say(answer_bytes(500, b'{"error":{"message":"' + b"x" * 10_000 + b'"}}')),
    "no answer": say(answer_bytes(200, b"<html>" + b"x" * 10_000)),
    "not HTTP": say(b"SSH-2.0\r\n\r\n"),
    "lost": hang_up(),
    "cut body": half,
    "too large": say(answer_bytes(200, chunked(*[b"x" * 10_000] * 50), transfer_encoding="chunked")),
    "timeout": silent,
}
STREAM_FAILURES = {
    "error at once": say(streamed(sse({"error": {"message": "no", "code": 500}}))),
    "error later": say(streamed(chat_chunks("one two")[0], sse({"error": {"message": "no"}}))),
    "cut stream": cut,
    "truncated": say(streamed(*chat_chunks("one two")[:-1])),
}


@pytest.fixture
def watched(monkeypatch):
    """Weak references to all that belongs to one call on the wire."""
    found: list[weakref.ref] = []

    def watch(module, name):
        original = getattr(module, name)

        class Watched(original):
            if not hasattr(original, "__weakref__"):
                __slots__ = ("__weakref__",)

            def __init__(self, *args, **kwargs):
                found.append(weakref.ref(self))
                super().__init__(*args, **kwargs)

        Watched.__name__ = Watched.__qualname__ = name
        monkeypatch.setattr(module, name, Watched)

    watch(bound, "Body")
    watch(answers, "AnswerStream")
    import llmmw.endpoints.openai as endpoint

    monkeypatch.setattr(endpoint, "AnswerStream", answers.AnswerStream)
    assert body_module.Body is not bound.Body
    return found


def reachable(error):
    """Every object that the exception keeps alive, but for modules, classes and the engine's own long life."""
    found, waiting = {}, [error]
    while waiting:
        one = waiting.pop()
        if id(one) in found or isinstance(one, types.ModuleType | type):
            continue
        found[id(one)] = one
        if isinstance(one, types.FunctionType | types.MethodType | types.BuiltinMethodType):
            continue
        waiting += gc.get_referents(one)
    return found.values()


async def fail(server, engine, *, stream, **limits):
    """A call through every layer that ends in an error, which alone is left."""
    stack = Stack(
        Coalescer(),
        ErrorRouter(),
        Retry(attempts=2, backoff=0.001),
        CircuitBreaker(),
        RateLimiter(rpm=6000),
        Timeout(300),
    )
    pool = ConnectionPool(engine=engine, max_response_bytes=100_000, drain_timeout=0, **limits)
    async with Client(server.origin + "/v1", api_key="k" * 20, stack=stack, pool=pool) as client:
        asked = {"model": "m", "messages": [{"role": "user", "content": "q"}], "temperature": 0}
        with pytest.raises(LLMMWError) as caught:
            if stream:
                async for _ in client.stream(**asked):
                    pass
            else:
                await client.chat(**asked)
        return caught.value


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("failure", [*FAILURES, *STREAM_FAILURES])
async def test_security_08_a_kept_exception_holds_no_body_stream_or_socket(engine, failure, watched):
    pytest.importorskip(engine)
    stream = failure in STREAM_FAILURES
    async with RawServer(STREAM_FAILURES[failure] if stream else FAILURES[failure]) as server:
        limits = {"first_byte_timeout": 0.1} if failure == "timeout" else {}
        error = await fail(server, engine, stream=stream, **limits)
        for _ in range(3):
            await asyncio.sleep(0)
        gc.collect()
        assert watched or failure in {"not HTTP", "lost", "timeout"}
        left = [ref() for ref in watched if ref() is not None]
        # The wrappers of a stream are in the frames, and in their midst an empty shell.
        assert [one for one in left if not (stream and type(one).__name__ == "AnswerStream")] == []
        assert [one for one in left if hasattr(one, "_body") or one._watch is not None] == []
        held = pickle.dumps(error)
        assert len(held) < 5000
        # Not even in what error trackers walk: causes, contexts, and the variables of the frames.
        chain, link = [], error
        while link is not None:
            chain.append(link)
            link = link.__cause__ or link.__context__
        assert all(isinstance(link, LLMMWError) for link in chain)


@pytest.mark.parametrize("engine", ENGINES)
async def test_security_08_after_the_engine_is_closed_no_transport_is_reachable(engine, watched):
    """The traceback's frames lead to the engine, as to whatever the caller holds; a closed engine holds no socket."""
    pytest.importorskip(engine)
    async with RawServer(say(answer_bytes(200, chat_body("x"))), FAILURES["cut body"]) as server:
        stack = Stack(Retry(attempts=1))
        pool = ConnectionPool(engine=engine)
        client = Client(server.origin + "/v1", stack=stack, pool=pool)
        await client.chat(model="m", messages="q")
        with pytest.raises(LLMMWError) as caught:
            await client.chat(model="m", messages="q")
        error = caught.value
        del caught
        await client.aclose()
        for _ in range(5):
            await asyncio.sleep(0)
        names = {type(one).__name__ for one in reachable(error)}
        assert "Body" not in names
        assert "AnswerStream" not in names
        error.__traceback__ = None
        after = {type(one).__name__ for one in reachable(error)}
        assert not {name for name in after if "Transport" in name or "Protocol" in name or "socket" in name.lower()}

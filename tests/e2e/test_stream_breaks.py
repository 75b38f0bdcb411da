"""A stream that breaks, in each API's shape: repeated unseen while nothing was handed on, told exactly afterwards."""

from __future__ import annotations

import asyncio
import pickle

import msgspec
import pytest

from llmmw import Retry, Stack
from llmmw.call import Call
from llmmw.endpoints.openai import HTTPEndpoint
from llmmw.errors import StatusError, StreamInterrupted
from llmmw.testing.rawserver import RawServer, answer_bytes


def event(body, kind=""):
    head = f"event: {kind}\n".encode() if kind else b""
    return head + b"data: " + msgspec.json.encode(body) + b"\n\n"


DONE = b"data: [DONE]\n\n"


def chat(text, finish=None):
    return event({"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": finish}], "usage": USED})


USED = {"prompt_tokens": 7, "completion_tokens": 2}
STARTED = {"type": "message_start", "message": {"usage": {"input_tokens": 7, "output_tokens": 2}}}
SHAPES = {
    "chat": (chat("one"), chat(" two", "stop") + DONE, event({"error": {"message": "engine died", "code": 500}})),
    "complete": (
        event({"choices": [{"index": 0, "text": "one"}], "usage": USED}),
        event({"choices": [{"index": 0, "text": " two", "finish_reason": "stop"}]}) + DONE,
        event({"object": "error", "message": "engine died", "type": "InternalServerError", "code": 500}),
    ),
    "messages": (
        event(STARTED, "message_start")
        + event({"type": "content_block_delta", "delta": {"type": "text_delta", "text": "one"}}),
        event({"type": "content_block_delta", "delta": {"type": "text_delta", "text": " two"}})
        + event({"type": "message_stop"}),
        event({"type": "error", "error": {"type": "overloaded_error", "message": "engine died"}}, "error"),
    ),
    "responses": (
        event({"type": "response.created", "response": {"usage": {"input_tokens": 7, "output_tokens": 2}}})
        + event({"type": "response.output_text.delta", "delta": "one"}),
        event({"type": "response.output_text.delta", "delta": " two"}) + event({"type": "response.completed"}),
        event({"type": "response.failed", "response": {"error": {"code": "server_error", "message": "engine died"}}}),
    ),
}
SSE = {"content_type": "text/event-stream", "transfer_encoding": "chunked"}
every_shape = pytest.mark.parametrize("op", SHAPES)


def piece(data):
    return b"%x\r\n%s\r\n" % (len(data), data)


def stream_of(*pieces, reset_after=None):
    """The first piece at once, then the others when `reset_after` (or nothing) was waited for."""

    async def answer(_, writer):
        writer.write(answer_bytes(body=piece(pieces[0]), **SSE))
        await writer.drain()
        if reset_after is not None:
            await reset_after.wait()
        for data in pieces[1:]:
            writer.write(piece(data))
        if reset_after is not None and len(pieces) == 1:
            writer.transport.abort()
        writer.write(b"0\r\n\r\n")

    return answer


async def asked(server, op, *layers):
    endpoint = HTTPEndpoint(f"{server.origin}/v1", duplicate_ok=False)
    engine = Stack(*layers).bind(endpoint)
    call = Call(op, "m", {"model": "m", "stream": True, "max_tokens": 9}, stream=True, target=endpoint.name)
    return engine, await engine.call(call)


@every_shape
async def test_route_09_an_error_beside_the_first_token_is_repeated_unseen(op):
    token, rest, error = SHAPES[op]
    async with RawServer(stream_of(token + error), stream_of(token, rest)) as server:
        engine, reply = await asked(server, op, Retry(backoff=0.001))
        got = b"".join([chunk async for chunk in reply.chunks])
        assert got == token + rest
        assert len(server.requests) == 2
        assert [attempt.status for attempt in reply.attempts] == [500]
        await engine.aclose()


@every_shape
async def test_route_09_a_first_token_beside_an_error_for_ever_is_the_refusal(op):
    token, _, error = SHAPES[op]
    async with RawServer(stream_of(token + error)) as server:
        with pytest.raises(StatusError, match="engine died") as caught:
            await asked(server, op, Retry(attempts=2, backoff=0.001))
        assert [attempt.fault for attempt in caught.value.attempts] == ["server"] * 2
        assert len(server.requests) == 2


@every_shape
@pytest.mark.parametrize("end", ["reset", "error", "cut"])
async def test_route_09_a_break_after_the_first_token_tells_part_usage_and_attempts(op, end):
    token, _, error = SHAPES[op]
    seen = asyncio.Event()
    pieces = {"reset": (token,), "error": (token, error), "cut": (token, b": no more\n\n")}[end]
    refusal = answer_bytes(503, b'{"error":{"message":"busy"}}')

    async def busy(_, writer):
        writer.write(refusal)

    async with RawServer(busy, stream_of(*pieces, reset_after=seen)) as server:
        engine, reply = await asked(server, op, Retry(backoff=0.001))
        got = []
        with pytest.raises(StreamInterrupted) as caught:
            async for chunk in reply.chunks:
                got.append(chunk)
                seen.set()
        found = pickle.loads(pickle.dumps(caught.value))
        assert b"".join(got).startswith(token)
        assert found.partial == "one"
        assert (found.usage.input_tokens, found.usage.output_tokens) == (7, 2)
        assert found.attempts[0].status == 503
        assert len(found.attempts) == len(server.requests) == 2
        assert found.endpoint == f"{server.origin}/v1"
        await engine.aclose()

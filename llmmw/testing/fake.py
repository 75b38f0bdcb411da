"""A scripted endpoint for deterministic tests of layers: no sockets, no threads."""

from __future__ import annotations

import asyncio
import inspect
from typing import TYPE_CHECKING, Any

import msgspec

from llmmw.answer import NO_USAGE, Usage, usage_of
from llmmw.call import Call, Context, Reply
from llmmw.endpoints.base import counted
from llmmw.env import Env

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from llmmw.call import Chunk

    Answer = Reply | BaseException | Callable[[Call], Reply | Awaitable[Reply]]


def chat_call(prompt: str = "hello", *, context: Context | None = None, stream: bool = False, **fields: Any) -> Call:
    """A chat call as an edge would make it; `fields` are added to the body (temperature=0, ...)."""
    body = {"model": "m", "messages": [{"role": "user", "content": prompt}], **fields}
    return Call("chat", str(body["model"]), body, stream, context or Context(), target="http://fake.test/v1")


def chat_body(text: str, *, prompt_tokens: int = 3, completion_tokens: int = 2, finish: str = "stop") -> bytes:
    """A chat completion as an OpenAI-shaped server would send it."""
    usage = {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
    choice = {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text}}
    return msgspec.json.encode({"object": "chat.completion", "model": "m", "choices": [choice], "usage": usage})


def error_reply(status: int, *, message: str = "no", code: str | None = None, **headers: str) -> Reply:
    """A refusal as an OpenAI-shaped server would send it; header names are given with underscores."""
    body = {"error": {"message": message, "type": "error", "param": None, "code": code}}
    found = tuple((name.replace("_", "-"), value) for name, value in headers.items())
    return Reply(data=msgspec.json.encode(body), status=status, headers=(("content-type", "application/json"), *found))


def sse(event: object) -> bytes:
    """One server-sent event."""
    return b"data: " + msgspec.json.encode(event) + b"\n\n"


def chat_chunks(text: str, *, prompt_tokens: int = 3) -> list[bytes]:
    """A streamed chat completion, a chunk per word, with usage and terminator."""
    words = text.split(" ")
    pieces = [word if index == 0 else " " + word for index, word in enumerate(words)]
    chunks = [sse({"choices": [{"index": 0, "delta": {"content": piece}}]}) for piece in pieces]
    chunks.append(b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n')
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": len(words)}
    chunks.append(b'data: {"choices":[],"usage":' + msgspec.json.encode(usage) + b"}\n\n")
    chunks.append(b"data: [DONE]\n\n")
    return chunks


class ScriptedChunks:
    """A stream of given chunks; an exception among them is raised in its place."""

    def __init__(self, chunks: Iterable[Chunk | BaseException], *, gap_s: float = 0.0) -> None:
        self._chunks = iter(list(chunks))
        self._gap_s = gap_s
        self.usage: Usage = NO_USAGE
        self.closed = False

    def __aiter__(self) -> ScriptedChunks:
        return self

    async def __anext__(self) -> Chunk:
        if self.closed:
            raise StopAsyncIteration
        await asyncio.sleep(self._gap_s)
        found = next(self._chunks, None)
        if found is None:
            raise StopAsyncIteration
        if isinstance(found, BaseException):
            raise found
        if isinstance(found, bytes) and b'"usage"' in found:
            self.usage = usage_of(msgspec.json.decode(found.removeprefix(b"data: ").strip()))
        return found

    async def aclose(self) -> None:
        """Note that the reader is gone."""
        self.closed = True


class FakeUpstream:
    """An endpoint that answers from a script, then with a default, and remembers what it was asked.

    Args:
        script: answers in order: a Reply, an exception to raise, or a callable of the call.
        latency_s: waited before each answer (on the running loop).
        name: the endpoint's identity.

    Without a script entry a chat call gets "echo: <last message>", distinct per call when `numbered`.
    """

    def __init__(
        self,
        script: Iterable[Answer] = (),
        *,
        latency_s: float = 0.0,
        numbered: bool = False,
        name: str = "http://fake.test/v1",
    ) -> None:
        self._script = list(script)
        self._numbered = numbered
        self.latency_s = latency_s
        self.name = name
        self.calls: list[Call] = []
        self.in_flight = 0
        self.peak = 0
        self.cancelled = 0
        self.closed = False
        self._env = Env()

    def start(self, env: Env) -> None:
        """Remember the engine's env, to emit events."""
        self._env = env

    async def __call__(self, call: Call, /) -> Reply:
        """Answer from the script."""
        self.calls.append(call)
        number = len(self.calls)
        return await counted(self._env, self.name, call, lambda call: self._serve(call, number))

    async def _serve(self, call: Call, number: int) -> Reply:
        self.in_flight += 1
        self.peak = max(self.peak, self.in_flight)
        try:
            await asyncio.sleep(self.latency_s)
            return await self._answer(call, number)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.in_flight -= 1

    async def _answer(self, call: Call, number: int) -> Reply:
        answer = self._script.pop(0) if self._script else None
        if isinstance(answer, BaseException):
            raise answer
        if isinstance(answer, Reply):
            return answer
        if answer is not None:
            found = answer(call)
            return await found if inspect.isawaitable(found) else found
        messages = call.payload.get("messages") or [{"content": call.payload.get("prompt", "")}]
        text = f"echo: {messages[-1]['content']}" + (f" #{number}" if self._numbered else "")
        if call.stream:
            return Reply(chunks=ScriptedChunks(chat_chunks(text)), headers=(("content-type", "text/event-stream"),))
        body = chat_body(text)
        return Reply(data=body, usage=Usage(3, 2, reported=True), headers=(("content-type", "application/json"),))

    def rehome(self) -> None:
        """Nothing to drop."""

    async def aclose(self) -> None:
        """Note that the engine let go."""
        self.closed = True

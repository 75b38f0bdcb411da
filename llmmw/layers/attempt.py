"""One attempt at an inner handler: its outcome as a value, and the history of attempts on whoever is told.

A stream is an outcome only with its first token: until then nothing was delivered, so it may be repeated or sent
elsewhere. What comes before (a role, a ping) is held back for that long; the reader, who waits for the token, loses
nothing.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING

from llmmw.call import Attempt, Item, Reply
from llmmw.errors import (
    LLMMWError,
    ResponseTooLarge,
    StreamInterrupted,
    TruncatedStream,
    UpstreamError,
)
from llmmw.wire.sse import StreamWatch

if TYPE_CHECKING:
    from llmmw.answer import Usage
    from llmmw.call import Call, Chunk, Chunks, Handler
    from llmmw.fault import Fault

_TELLS_ENOUGH = (StreamInterrupted, TruncatedStream, ResponseTooLarge)
"""Errors of a stream under way that are handed on as they are."""


async def make_attempt(inner: Handler, call: Call) -> Reply | Exception:
    """Ask once. A cancellation is raised; every other failure is returned."""
    try:
        reply = await inner(call)
        if reply.chunks is None or not reply.ok or isinstance(reply.chunks, Delivery):
            return reply
        return reply.replace(chunks=await Delivery.begin(reply.chunks, call.op, reply.endpoint))
    except Exception as error:  # noqa: BLE001 — what a user's function raises is classified by the caller
        return error


def attempt_of(outcome: Reply | Exception, fault: Fault, endpoint: str, wait_s: float = 0.0) -> Attempt:
    """The history entry of a failed attempt."""
    if isinstance(outcome, Reply):
        return Attempt(outcome.endpoint or endpoint, fault.kind.value, outcome.status, "", wait_s)
    return Attempt(endpoint, fault.kind.value, fault.status, type(outcome).__name__, wait_s)


def exchange_of(outcome: Reply | BaseException) -> int:
    """The number of the request that carried several calls; 0 for a request of its own."""
    found = getattr(outcome, "exchange", 0)
    return found if isinstance(found, int) else 0


def annotate(error: Exception, attempts: tuple[Attempt, ...]) -> None:
    """Tell an exception which attempts led to it: `attempts` on ours, a note on the user's own after repetitions."""
    if isinstance(error, LLMMWError):
        error.attempts = attempts
    elif len(attempts) > 1:
        error.add_note("llmmw: " + "; ".join(map(_told, attempts)))


def _told(attempt: Attempt) -> str:
    what = attempt.error if attempt.status is None else f"{attempt.status} {attempt.error}".rstrip()
    then = f", waited {attempt.wait_s:.2f} s" if attempt.wait_s else ""
    return f"{attempt.endpoint or 'the endpoint'} failed ({attempt.fault}: {what}){then}"


_HAVE_TOKENS = frozenset({"chat", "complete", "messages", "responses"})
"""Operations whose streams begin with chunks that say nothing yet."""

_MAX_HELD = 16
"""A stream that says nothing for so many chunks is handed over as it is."""


class Delivery:
    """A stream whose first token is here. If it breaks from now on, the reader gets StreamInterrupted.

    The delivered chunks are kept (by reference) for the error's `partial`. A user generator's own exception and a
    cancellation pass unchanged.
    """

    def __init__(self, inner: Chunks, held: deque[Chunk], op: str, endpoint: str) -> None:
        self._inner = inner
        self._held = held
        self._op = op
        self._endpoint = endpoint
        self._kept: list[Chunk] = []

    @classmethod
    async def begin(cls, chunks: Chunks, op: str, endpoint: str) -> Delivery:
        """Wait for the first token; whatever prevents it is raised, with the stream closed."""
        held: deque[Chunk] = deque()
        watch = StreamWatch(op)
        try:
            async for chunk in chunks:
                held.append(chunk)
                if isinstance(chunk, Item) or op not in _HAVE_TOKENS or len(held) >= _MAX_HELD:
                    break
                watch.feed(chunk)
                if watch.has_token:
                    break
        except (asyncio.CancelledError, ResponseTooLarge):
            await chunks.aclose()
            raise
        return cls(chunks, held, op, endpoint)

    @property
    def usage(self) -> Usage:
        """What the stream reported so far."""
        return self._inner.usage

    def __aiter__(self) -> Delivery:
        return self

    async def __anext__(self) -> Chunk:
        if self._held:
            chunk = self._held.popleft()
        else:
            try:
                chunk = await self._inner.__anext__()
            except UpstreamError as error:
                if isinstance(error, _TELLS_ENOUGH):
                    raise
                raise self._interrupted(error) from error
        self._kept.append(chunk)
        return chunk

    async def aclose(self) -> None:
        """Stop reading."""
        self._held.clear()
        await self._inner.aclose()

    def _interrupted(self, error: UpstreamError) -> StreamInterrupted:
        found = StreamInterrupted(
            f"the stream broke after {len(self._kept)} chunks: {error.message or type(error).__name__}",
            endpoint=error.endpoint or self._endpoint,
            partial=_text(self._kept, self._op),
            usage=self._inner.usage,
        )
        self._kept = []
        return found


def _text(chunks: list[Chunk], op: str) -> str:
    watch, values = StreamWatch(op), list[str]()
    for chunk in chunks:
        if isinstance(chunk, Item):
            values.append(chunk.value if isinstance(chunk.value, str) else "")
        else:
            watch.feed(chunk)
    return watch.text + "".join(values)

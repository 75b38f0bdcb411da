"""One attempt at an inner handler: its outcome as a value, and the history of attempts on whoever is told.

A stream is an outcome only with its first token: until then nothing was delivered, so it may be repeated or sent
elsewhere. What comes before (a role, a ping) is held back for that long; the reader, who waits for the token, loses
nothing.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING

from llmmw.answer import items
from llmmw.call import Attempt, Item, Reply
from llmmw.errors import DeadlineExceeded, LLMMWError, ResponseTooLarge, StreamInterrupted, UpstreamError
from llmmw.fault import Fault, FaultKind, classify
from llmmw.layers.firsttoken import HAVE_TOKENS, MAX_SILENT
from llmmw.stream import Tap, at_end
from llmmw.wire.sse import StreamWatch

if TYPE_CHECKING:
    from collections.abc import Callable

    from llmmw.answer import Usage
    from llmmw.call import Call, Chunk, Chunks, Handler
    from llmmw.env import Clock
    from llmmw.stream import End

_TELLS_ENOUGH = (StreamInterrupted, ResponseTooLarge)
"""Errors of a stream under way that are handed on as they are."""

_SLACK_S = 0.001
"""A loop may fire a deadline's timer this much early."""


async def make_attempt(inner: Handler, call: Call, clock: Clock) -> Reply | Exception:
    """Ask once. A cancellation is raised; every other failure is returned.

    A Deadline layer outside interrupts what its call waits for. That is a failure like others, so that the error the
    caller gets can list the attempts; whoever cancels the task itself is obeyed.
    """
    try:
        reply = await inner(call)
        return reply if reply.chunks is None else await begun(reply, call)
    except (asyncio.CancelledError, Exception) as error:  # noqa: BLE001 — what a function raises is classified outside
        return failure_of(error, call, clock)


async def begun(reply: Reply, call: Call) -> Reply:
    """The reply with the first token of its stream at hand; whatever prevents that is raised."""
    if reply.chunks is None or not reply.ok or isinstance(reply.chunks, Delivery):
        return reply
    return reply.replace(chunks=await Delivery.begin(reply.chunks, call.op, reply.endpoint))


def at_delivered_end(reply: Reply, on_end: Callable[[End], object]) -> Reply:
    """As `at_end`, of a reply that has begun: its stream stays the `Delivery` that layers outside know."""
    if isinstance(reply.chunks, Delivery):
        reply.chunks.watch(on_end)
        return reply
    return at_end(reply, on_end)


def failure_of(error: asyncio.CancelledError | Exception, call: Call, clock: Clock) -> Exception:
    """What an attempt failed of. A cancellation goes on, unless the call's deadline caused it."""
    if not isinstance(error, asyncio.CancelledError):
        return error
    late = passed_deadline(call, clock)
    if late is None:
        raise error
    return late


def is_late(error: BaseException, call: Call, clock: Clock) -> bool:
    """Whether the call was given up because its deadline has passed, by whoever it was."""
    return isinstance(error, asyncio.CancelledError | DeadlineExceeded) and _has_passed(call, clock)


def _has_passed(call: Call, clock: Clock) -> bool:
    return call.deadline is not None and clock.monotonic() >= call.deadline - _SLACK_S


def passed_deadline(call: Call, clock: Clock) -> DeadlineExceeded | None:
    """The failure behind a cancellation that the call's deadline caused; None if it is a cancellation."""
    task = asyncio.current_task()
    if task is None or task.cancelling() or not _has_passed(call, clock):
        return None
    return DeadlineExceeded("the deadline passed before the answer was complete", sent=True)


def attempt_of(outcome: Reply | Exception, fault: Fault, endpoint: str, wait_s: float = 0.0) -> Attempt:
    """The history entry of a failed attempt."""
    if isinstance(outcome, Reply):
        return Attempt(outcome.endpoint or endpoint, fault.kind.value, outcome.status, "", wait_s)
    return Attempt(endpoint, fault.kind.value, fault.status, type(outcome).__name__, wait_s)


def exchange_of(outcome: Reply | BaseException) -> int:
    """The number of the request that carried several calls; 0 for a request of its own."""
    found = getattr(outcome, "exchange", 0)
    return found if isinstance(found, int) else 0


def after(reply: Reply, attempts: tuple[Attempt, ...]) -> Reply:
    """The reply with the failed tries before it; an error of its stream will list them too."""
    if isinstance(reply.chunks, Delivery):
        reply.chunks.before = attempts
    return reply.replace(attempts=attempts)


def annotate(error: Exception, attempts: tuple[Attempt, ...]) -> None:
    """Tell an exception which attempts led to it: `attempts` on ours, one note on the user's own after repetitions."""
    if isinstance(error, LLMMWError):
        error.attempts = attempts
        return
    found = getattr(error, "__notes__", [])
    if not isinstance(found, list):
        return  # a class with notes of its own
    notes = items(found)  # pyright: ignore[reportUnknownArgumentType]  # somebody else's
    notes[:] = [note for note in notes if not str(note).startswith(_MARK)]  # of an object that is raised for ever
    if len(attempts) > 1:
        told = [*map(_told, attempts)]
        if len(told) > _MAX_TOLD:
            half = _MAX_TOLD // 2
            told[half:-half] = [f"{len(told) - 2 * half} more attempts"]
        error.add_note(_MARK + "; ".join(told))


_MARK = "llmmw: "
_MAX_TOLD = 12
"""A note names so many attempts; all of them are too much to read."""


def _told(attempt: Attempt) -> str:
    what = attempt.error if attempt.status is None else f"{attempt.status} {attempt.error}".rstrip()
    then = f", waited {attempt.wait_s:.2f} s" if attempt.wait_s else ""
    return f"{attempt.endpoint or 'the endpoint'} failed ({attempt.fault}: {what}){then}"


class Delivery:
    """A stream whose first token is here. If it breaks from now on, the reader gets StreamInterrupted.

    The delivered chunks are kept (by reference) for the error's `partial`. A user generator's own exception and a
    cancellation pass unchanged. `before` holds the failed tries before this stream.
    """

    def __init__(self, inner: Chunks, held: deque[Chunk], op: str, endpoint: str) -> None:
        self._inner = inner
        self._held = held
        self._op = op
        self._endpoint = endpoint
        self._kept: list[Chunk] = []
        self.before: tuple[Attempt, ...] = ()

    @classmethod
    async def begin(cls, chunks: Chunks, op: str, endpoint: str) -> Delivery:
        """Wait for the first token; whatever prevents it is raised, with the stream closed."""
        held: deque[Chunk] = deque()
        watch = StreamWatch(op)
        try:
            async for chunk in chunks:
                held.append(chunk)
                if isinstance(chunk, Item) or op not in HAVE_TOKENS or len(held) >= MAX_SILENT:
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
            except StopAsyncIteration:
                raise
            except Exception as error:
                fault = classify(error, wall=0.0) or Fault(FaultKind.INVALID)
                attempts = (*self.before, attempt_of(error, fault, self._endpoint))
                if isinstance(error, UpstreamError) and not isinstance(error, _TELLS_ENOUGH):
                    raise self._interrupted(error, attempts) from error
                annotate(error, attempts)
                raise
        self._kept.append(chunk)
        return chunk

    def watch(self, on_end: Callable[[End], object]) -> None:
        """Call `on_end` once when the stream is over."""
        self._inner = Tap(self._inner, on_end)

    async def aclose(self) -> None:
        """Stop reading."""
        self._held.clear()
        await self._inner.aclose()

    def _interrupted(self, error: UpstreamError, attempts: tuple[Attempt, ...]) -> StreamInterrupted:
        found = StreamInterrupted(
            f"the stream broke after {len(self._kept)} chunks: {error.message or type(error).__name__}",
            endpoint=error.endpoint or self._endpoint,
            partial=_text(self._kept, self._op),
            usage=self._inner.usage,
            attempts=attempts,
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

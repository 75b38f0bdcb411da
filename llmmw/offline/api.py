"""Questions to a batch API: past the stack's layers, repeated where that cannot do harm."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

from llmmw.algo.headers import moment
from llmmw.answer import mapping
from llmmw.call import Call, Reply
from llmmw.errors import ConfigError, LLMMWError, ProtocolError
from llmmw.fault import Fault, FaultKind, classify, error_of
from llmmw.wire import decode_json
from llmmw.wire.strict import read_json

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterable, Mapping

    from llmmw.env import Env
    from llmmw.wire import HTTPRequest

T = TypeVar("T")

_AT_ONCE = 500
_NOTHING_DONE = frozenset({FaultKind.NOT_SENT, FaultKind.RATE})
"""The server did nothing with the request."""
_PASSING = _NOTHING_DONE | {FaultKind.SERVER, FaultKind.AMBIGUOUS, FaultKind.MALFORMED}
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 60.0
_MAX_RESULT_BYTES = 4 * 1024 * 1024 * 1024
"""Results are read line by line, so what bounds an ordinary answer need not bound them."""
_MAX_LINE_BYTES = 64 * 1024 * 1024


class Caller(Protocol):
    """What makes calls: an Engine."""

    env: Env

    async def call(self, call: Call) -> Reply:
        """Answer a call."""
        ...


@runtime_checkable
class Server(Protocol):
    """What builds requests with the right address and credential: an HTTPEndpoint."""

    @property
    def name(self) -> str:
        """Its identity."""
        ...

    def request(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        headers: Mapping[str, str] | None = None,
        *,
        once: bool = False,
        max_bytes: int = 0,
    ) -> HTTPRequest:
        """A request in its own name."""
        ...


def server_of(endpoint: object) -> Server:
    """The client's endpoint, if batches can be handed over there.

    Raises:
        ConfigError: it is no HTTP server.
    """
    if not isinstance(endpoint, Server):
        raise ConfigError(f"offline: {endpoint!r} cannot take batches; use a client with a base URL")
    return endpoint


class TooLate(Exception):
    """The deadline of a run passed while it waited."""


class Api:
    """A batch API at one endpoint.

    Args:
        caller: makes the calls.
        server: builds the requests.
        tries: how often in a row one question may fail.
        deadline: on the env clock's monotonic scale; no wait goes beyond it.
    """

    def __init__(self, caller: Caller, server: Server, *, tries: int, deadline: float | None = None) -> None:
        self._deadline = deadline
        self._caller = caller
        self._server = server
        self._tries = tries
        self.env = caller.env
        self.ahead_s = 0.0
        """How far the server's clock is ahead of ours, by the date of its last answer."""

    @property
    def name(self) -> str:
        """The endpoint's identity."""
        return self._server.name

    async def ask(
        self, method: str, path: str, body: bytes = b"", *, kind: str = "application/json", harmless: bool = True
    ) -> dict[str, Any]:
        """The JSON object that the server answers.

        Args:
            method: HTTP method.
            path: below the base URL, with its query.
            body: as it is sent.
            kind: its media type.
            harmless: whether the request may arrive twice.

        Raises:
            LLMMWError: no answer after all tries, or a refusal.
        """
        for number in range(self._tries):
            try:
                return self._read(await self._send(method, path, body, kind, once=not harmless))
            except LLMMWError as error:
                await self._back_off(error, number, _PASSING if harmless else _NOTHING_DONE)
        raise AssertionError("the last pause raises")  # pragma: no cover — for the type checkers

    async def lines(self, path: str) -> list[Any]:
        """The objects of a JSON-lines file, whole or not at all; a line that is no object is left out.

        Raises:
            LLMMWError: it could not be read to its end after all tries.
        """
        for number in range(self._tries):
            try:
                return [found async for found in self._lines(path)]
            except LLMMWError as error:
                await self._back_off(error, number, _PASSING)
        raise AssertionError("the last pause raises")  # pragma: no cover — for the type checkers

    async def _lines(self, path: str) -> AsyncGenerator[dict[str, Any]]:
        request = self._server.request("GET", path, max_bytes=_MAX_RESULT_BYTES)
        op = path.partition("?")[0]
        reply = await self._caller.call(Call(op, "", {}, stream=True, native=request, direct=True))
        if not reply.ok:
            raise error_of(reply)
        kept = bytearray(reply.data or b"")
        if reply.chunks is not None:
            try:
                async for chunk in reply.chunks:
                    kept += chunk if isinstance(chunk, bytes) else b""
                    if isinstance(chunk, bytes) and b"\n" in chunk:
                        *whole, kept = kept.split(b"\n")
                        for found in map(_object, whole):
                            if found:
                                yield found
                    if len(kept) > _MAX_LINE_BYTES:
                        raise ProtocolError(f"a line of {path} is longer than {_MAX_LINE_BYTES} bytes")
            finally:
                await reply.chunks.aclose()
        for found in map(_object, kept.split(b"\n")):
            if found:
                yield found

    async def _send(self, method: str, path: str, body: bytes, kind: str, *, once: bool) -> Reply:
        request = self._server.request(method, path, body, {"content-type": kind}, once=once)
        reply = await self._caller.call(Call(path.partition("?")[0], "", {}, native=request, direct=True))
        date = moment(reply.header("date") or "")
        if date is not None:
            self.ahead_s = date - self.env.clock.wall()
        if not reply.ok:
            raise error_of(reply)
        return reply

    def _read(self, reply: Reply) -> dict[str, Any]:
        try:
            found = decode_json(reply.data or b"")
        except (ValueError, RecursionError) as error:
            raise ProtocolError(f"{self.name} answered with a success status, but: {error}") from None
        answer = mapping(found)
        if not answer or answer.get("error"):
            raise ProtocolError(f"{self.name} answered with a success status, but with no object")
        return answer

    async def in_turns(self, things: Iterable[T]) -> AsyncGenerator[T]:
        """All of them, with a turn for others on the loop now and then."""
        for number, thing in enumerate(things, 1):
            yield thing
            if number % _AT_ONCE == 0:
                await self.env.clock.sleep(0)

    async def pause(self, wait_s: float) -> None:
        """Wait.

        Raises:
            TooLate: the deadline passed.
        """
        clock = self.env.clock
        left_s = math.inf if self._deadline is None else self._deadline - clock.monotonic()
        await clock.sleep(max(0.0, min(wait_s, left_s)))
        if left_s < wait_s or left_s <= 0:
            raise TooLate

    async def _back_off(self, error: LLMMWError, number: int, passing: frozenset[FaultKind]) -> None:
        """Wait before another try, or raise the error where none helps."""
        fault = self.judge(error)
        if fault.kind not in passing or fault.should_retry is False or number + 1 >= self._tries:
            raise error
        wait_s = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2**number)
        wait_s *= 0.5 + 0.5 * self.env.rng.random()
        await self.pause(max(wait_s, fault.retry_after_s or 0.0))

    def judge(self, error: LLMMWError) -> Fault:
        """The error's class."""
        return classify(error, wall=self.env.clock.wall()) or Fault(FaultKind.INVALID)

    def is_unsure(self, error: LLMMWError) -> bool:
        """Whether the server may have done what it was asked all the same."""
        return self.judge(error).kind in _PASSING - _NOTHING_DONE


def _object(line: bytearray) -> dict[str, Any]:
    try:
        return mapping(read_json(bytes(line)))
    except (ValueError, RecursionError):
        return {}

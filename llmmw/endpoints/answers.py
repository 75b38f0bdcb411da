"""Answers of a server as streams: read as they arrive, or made of one that came whole."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from llmmw.answer import Usage, mapping
from llmmw.call import Call, Reply
from llmmw.errors import ProtocolError, StatusError, StreamInterrupted, TruncatedStream, UpstreamError, bare
from llmmw.fault import Fault, FaultKind, error_of, fault_of_event
from llmmw.stream import Replay
from llmmw.wire.assemble import cut

if TYPE_CHECKING:
    from collections.abc import Callable

    from llmmw.pool.body import Body
    from llmmw.wire import Headers
    from llmmw.wire.secrets import Secrets
    from llmmw.wire.sse import StreamWatch

_ERROR, _NO_STATUS = 400, 600
_OF_THE_BODY = frozenset({"content-type", "content-length", "content-encoding", "etag"})


def as_stream(call: Call, data: bytes, usage: Usage, headers: Headers, endpoint: str) -> Reply:
    """The answer of a server that does not stream, for a caller who reads one.

    Raises:
        ProtocolError: it has a part, such as log probabilities, that its stream would lack.
    """
    asked = mapping(call.payload.get("stream_options")).get("include_usage")
    pieces = cut(call.op, data, usage=bool(asked))
    if pieces is None:
        raise ProtocolError(f"{endpoint} does not stream, and its answer cannot be made a stream without loss")
    kept = tuple(pair for pair in headers if pair[0] not in _OF_THE_BODY)
    return Reply(chunks=Replay(pieces, usage), headers=(*kept, ("content-type", "text/event-stream; charset=utf-8")))


class AnswerStream:
    """The server's bytes as they arrive; read along for usage, errors and completeness.

    Raises, in place of the end: TruncatedStream (it stopped without finish reason or terminator), StatusError (an
    error event before any token was handed on), StreamInterrupted (broke, or an error event, after the first token),
    and before the first token whatever broke the connection.
    """

    def __init__(self, body: Body, watch: StreamWatch, endpoint: str, secrets: Callable[[], Secrets]) -> None:
        self._body = body
        self._watch: StreamWatch | None = watch
        self._endpoint = endpoint
        self._secrets = secrets
        self._usage = watch.usage

    @property
    def usage(self) -> Usage:
        """What the stream reported so far."""
        return self._usage if self._watch is None else self._watch.usage

    def __aiter__(self) -> AnswerStream:
        return self

    async def __anext__(self) -> bytes:
        watch = self._watch
        if watch is None:
            raise StopAsyncIteration
        body = self._body
        delivered = watch.has_token  # a token in the same chunk as an error is handed on to nobody
        try:
            chunk = await body.__anext__()
            watch.feed(chunk)
            if watch.error is not None:
                raise self._told(watch.error)
        except StopAsyncIteration:
            missing = None if body.was_cut else watch.missing()
            self._forget(watch)
            if missing is None:
                raise
        except UpstreamError as error:
            await body.aclose()
            # The variables of this frame stay with the error, and error trackers send them.
            del body
            chunk = b""
            self._forget(watch)
            error.endpoint = error.endpoint or self._endpoint
            if not delivered:
                raise bare(error)  # noqa: B904 — it is the same error, without the frames that hold the connection
            raise StreamInterrupted(
                f"the stream broke after output had arrived: {error.message}",
                endpoint=self._endpoint,
                partial=watch.text,
                usage=watch.usage,
            ) from bare(error)
        else:
            return chunk
        del body  # and out here without a context, for its frames hold the body too
        raise TruncatedStream(
            f"the stream ended early: {missing}", endpoint=self._endpoint, partial=watch.text, usage=watch.usage
        )

    async def aclose(self) -> None:
        """Stop reading; the server sees a closed connection and stops generating."""
        watch = self._watch
        if watch is not None:
            await self._body.aclose()
            self._forget(watch)

    def _forget(self, watch: StreamWatch) -> None:
        # What wraps this stream may be kept with an exception for hours, and this with it: as an empty shell.
        if self._watch is not None:
            self._usage, self._watch = watch.usage, None
            del self._body, self._secrets

    def _told(self, event: dict[str, Any]) -> StatusError:
        event = msgspec.json.decode(self._secrets().hide_bytes(msgspec.json.encode(event)))
        code = mapping(event["error"]).get("code")
        if isinstance(code, int) and _ERROR <= code < _NO_STATUS:
            error = error_of(Reply(data=msgspec.json.encode(event), status=code, endpoint=self._endpoint))
            message, status, label, kind = error.message, code, error.code, error.fault
        else:
            fault = fault_of_event(event, wall=0.0) or Fault(FaultKind.SERVER)
            message, status, label, kind = fault.message, fault.status or 500, fault.code, fault.kind.value
        return StatusError(
            f"{self._endpoint} broke off the stream: {message}",
            endpoint=self._endpoint,
            status=status,
            code=label,
            fault=kind,
        )

"""From an answer to an entry and back: what may be stored, and how a stored answer fits the call that asks now."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import msgspec

from llmmw.call import Item, Reply
from llmmw.codec import json_of
from llmmw.stores.entry import Entry, Header
from llmmw.stores.storable import NOTHING_ASKED, event_shape_of, shape_of, why_not_storable
from llmmw.stream import Replay
from llmmw.wire.assemble import DONE, assemble, cut, without_usage_event
from llmmw.wire.sse import StreamWatch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from llmmw.answer import Usage
    from llmmw.call import Call, Chunk

STORABLE_OPS = frozenset({"chat", "complete", "embed", "messages", "responses", "function"})
"""Operations whose answers can be judged. A batch is stored by its items; what is unknown is not stored."""

NEGATIVE_STATUSES = frozenset({400, 404, 413, 422})
"""Refusals that the same request gets again at once (SPEC 1); kept only where `negative_ttl` says so."""

_SUCCESS = range(200, 300)
_NOTHING = frozenset({b"", b'""', b"null"})
"""Values of a function that are no answer."""
_UNFINISHED = frozenset({
    None, "length", "content_filter", "max_tokens", "refusal", "pause_turn", "incomplete", "failed", "cancelled",
})  # fmt: skip
_COUNTED = frozenset(f"{name} {reason!r}" for name in ("finish_reason", "stop reason") for reason in _UNFINISHED)


class NotStorable(Exception):
    """An answer that must not be stored; `reason` is one of a few texts, so it can be counted."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Making(msgspec.Struct, frozen=True):
    """What an entry is told about its making besides the answer itself."""

    base: bytes
    created: float
    """Wall-clock seconds."""
    ttl_s: float
    cost_s: float


def record_reply(call: Call, reply: Reply, making: Making) -> Entry:
    """An entry for a whole reply; whether a refusal is wanted is the caller's decision.

    Raises:
        NotStorable: partial, broken, refused or without bytes.
    """
    data = reply.data
    if data is None:
        raise NotStorable("no encoded form")
    if reply.status in _SUCCESS:
        _judge_whole(call, data)
    elif reply.status not in NEGATIVE_STATUSES:
        raise NotStorable("refused")
    return Entry(_header(call, reply, making, reply.usage), data)


def record_stream(call: Call, reply: Reply, chunks: Sequence[Chunk], usage: Usage, making: Making) -> Entry:
    """An entry for a stream that was read to its end.

    Raises:
        NotStorable: cut off, unfinished, broken or without bytes.
    """
    if reply.status not in _SUCCESS:
        raise NotStorable("refused")
    of_items = any(isinstance(chunk, Item) for chunk in chunks)
    pieces = [chunk.data if isinstance(chunk, Item) else chunk for chunk in chunks]
    if None in pieces or (of_items and not all(isinstance(chunk, Item) for chunk in chunks)):
        raise NotStorable("no encoded form")
    held = cast("list[bytes]", pieces)
    data = b"".join(held)
    if call.op == "function":
        _judge_items(held)
    else:
        _judge_stream(call.op, data, call.payload)
    header = _header(call, reply, making, usage)
    cuts = tuple(map(len, held))
    return Entry(msgspec.structs.replace(header, cuts=cuts, items=of_items, stream_usage=_asks_usage(call)), data)


def _header(call: Call, reply: Reply, making: Making, usage: Usage) -> Header:
    return Header(
        making.created,
        making.ttl_s,
        making.base,
        call.namespace,
        call.context.tags,
        making.cost_s,
        usage,
        reply.status,
        (reply.header("content-type") or "") if reply.headers else "",
        reply.endpoint,
    )


def _judge_whole(call: Call, data: bytes) -> None:
    if call.op != "function":
        _judge(call.op, _decoded(data), call.payload)
        return
    value = json_of(data)
    if value in _NOTHING:
        raise NotStorable("no content")
    if value[:1] == b"{":  # many functions return what their SDK gave them
        body = _decoded(value)
        _judge(shape_of(body), body)


def _decoded(data: bytes) -> object:
    try:
        return msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        raise NotStorable("not JSON") from None


def _judge(op: str, body: object, asked: Mapping[str, Any] = NOTHING_ASKED) -> None:
    problem = why_not_storable(op, body, asked)
    if problem is not None:
        # A server may invent finish reasons without end, and whoever counts them would keep them all.
        is_invented = " reason" in problem.replace("_", " ")[:14] and problem not in _COUNTED
        raise NotStorable("unknown finish_reason" if is_invented else problem)


def _judge_items(held: Sequence[bytes]) -> None:
    """What a generator gave; many pass on the events of their SDK."""
    if not held:
        raise NotStorable("no content")
    events = [json_of(piece) for piece in held]
    op = event_shape_of(_decoded(events[0]))
    if op:
        end = DONE if op in {"chat", "complete"} else b""  # which SDKs keep to themselves
        _judge_stream(op, b"".join(b"data: " + event + b"\n\n" for event in events) + end, NOTHING_ASKED)


def _judge_stream(op: str, data: bytes, asked: Mapping[str, Any]) -> None:
    watch = StreamWatch(op, max_line_bytes=max(len(data), 1))
    watch.feed(data)
    missing = watch.missing()
    if missing is not None:
        raise NotStorable(missing)
    if watch.error is not None:
        raise NotStorable("an error in the stream")
    found = assemble(op, data)
    if found is None:
        raise NotStorable("a stream that cannot be judged")
    _judge(op, found.body, asked)


def is_whole(op: str, chunks: Sequence[Chunk]) -> bool:
    """Whether a stream that its reader left already had its end (many readers stop at the terminator)."""
    pieces = [chunk for chunk in chunks if isinstance(chunk, bytes)]
    if op == "function" or len(pieces) != len(chunks):
        return False
    watch = StreamWatch(op, max_line_bytes=max(sum(map(len, pieces)), 1))
    for piece in pieces:
        watch.feed(piece)
    return watch.missing() is None


def _asks_usage(call: Call) -> bool:
    options: Any = call.payload.get("stream_options")
    return isinstance(options, dict) and bool(cast("dict[str, Any]", options).get("include_usage"))


def play(entry: Entry, call: Call) -> Reply | None:
    """A fresh reply from an entry, or None where it cannot be had in the form that the call asks for."""
    header = entry.header
    data, pieces = _in_form(entry, call)
    if data is None and pieces is None:
        return None
    content_type = header.content_type
    if call.op != "function" and entry.is_stream == (pieces is None):
        content_type = "application/json" if pieces is None else "text/event-stream; charset=utf-8"
    return Reply(
        data=data,
        chunks=None if pieces is None else Replay(pieces, header.usage),
        usage=header.usage,
        source="cache",
        endpoint=header.endpoint,
        status=header.status,
        headers=(("content-type", content_type),) if content_type else (),
        service_s=header.cost_s,
    )


def _in_form(entry: Entry, call: Call) -> tuple[bytes | None, Sequence[Chunk] | None]:
    """The body, or the chunks, or neither."""
    if call.stream:
        if entry.header.status not in _SUCCESS:
            return entry.data, None
        return None, _as_stream(entry, call)
    if not entry.is_stream:
        return entry.data, None
    found = assemble(call.op, entry.data)
    return (msgspec.json.encode(found.body) if found is not None and found.exact else None), None


def _as_stream(entry: Entry, call: Call) -> Sequence[Chunk] | None:
    header, asks_usage = entry.header, _asks_usage(call)
    if not entry.is_stream:
        return cut(call.op, entry.data, usage=asks_usage)
    if header.items:
        return [Item(None, piece) for piece in entry.pieces()]
    if asks_usage and not header.usage.reported:
        return None
    if header.stream_usage and not asks_usage:
        return list(without_usage_event(call.op, entry.pieces()))
    return list(entry.pieces())

"""The ways to go wrong, applied to a request: instead of an answer, or to the true answer."""

import asyncio
import zlib
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import lru_cache
from typing import Any, Final

import msgspec
from aiohttp import web

from .exchange import DONE, Answer, Plain, Streamed, encode, event
from .faults import FaultRule
from .send import hang_up, opened, plain

REPLACING: Final = frozenset({
    "status", "hang", "reset", "close", "html", "error_200", "garbage", "gzip_bomb",
})  # fmt: skip
HARMLESS: Final = frozenset({"delay", "slow", "close_after", "duplicate_header"})
_PAGE: Final = "<!DOCTYPE html><html><body><h1>502 Bad Gateway</h1></body></html>"
_PHRASES: Final = {
    400: "Bad request (injected).",
    429: "Rate limit reached (injected).",
    503: "Service unavailable (injected).",
    529: "Overloaded (injected).",
}
_FINISH: Final = (b'"finish_reason":"', b"event: message_delta", b"event: response.completed")
_LISTS: Final = ("choices", "content", "data", "output")
_MEBIBYTE: Final = 1 << 20


async def instead(rule: FaultRule, request: web.BaseRequest) -> web.StreamResponse:
    """The response of a rule that replaces the answer."""
    kind = rule.kind
    if kind == "hang":
        if rule.seconds is None:
            await asyncio.get_running_loop().create_future()
        await asyncio.sleep(rule.seconds or 0.0)
    if kind in {"hang", "reset", "close"}:
        hang_up(request, reset=kind == "reset")
        return web.Response()
    if kind == "html":
        return plain(Plain((rule.body or _PAGE).encode(), content_type="text/html"))
    if kind == "garbage":
        return plain(Plain((rule.body or '{"choices": [{"mess\x00').encode()))
    if kind == "error_200":
        error = {"message": "Upstream failed (injected).", "type": "server_error", "param": None, "code": 500}
        return plain(Plain((rule.body or encode({"error": error}).decode()).encode()))
    if kind == "gzip_bomb":
        return plain(Plain(bomb(rule.size), headers={"Content-Encoding": "gzip"}))
    return plain(_status(rule))


def _status(rule: FaultRule) -> Plain:
    text = _PHRASES.get(rule.status, "Internal server error (injected).")
    error = {"message": text, "type": "injected_fault", "param": None, "code": rule.status}
    body = rule.body.encode() if rule.body is not None else encode({"error": error})
    headers = dict(rule.headers)
    if rule.retry_after is not None:
        headers["Retry-After"] = rule.retry_after
    return Plain(body, rule.status, headers=headers)


async def damaged(rule: FaultRule, request: web.BaseRequest, answer: Answer) -> web.StreamResponse:
    """The true answer, made worse."""
    if rule.kind == "delay":
        await asyncio.sleep(1.0 if rule.seconds is None else rule.seconds)
    if isinstance(answer, Streamed):
        return await _stream(rule, request, answer)
    body = answer.body
    keep = len(body) // 2 if rule.after is None else rule.after
    if rule.kind == "truncate":
        return plain(Plain(body[:keep], answer.status, answer.content_type, answer.headers))
    if rule.kind == "empty":
        return plain(Plain(_emptied(body), answer.status, answer.content_type, answer.headers))
    response = opened(answer)
    response.content_length = len(body)
    if rule.kind == "duplicate_header":
        response.headers.add("Content-Type", answer.content_type)
    await response.prepare(request)
    if rule.kind in {"reset_mid", "close_mid"}:
        await response.write(body[:keep])
        hang_up(request, reset=rule.kind == "reset_mid")
        return response
    if rule.kind == "slow":
        await _trickle(rule, response, body)
    else:
        await response.write(body)
    await response.write_eof()
    if rule.kind == "close_after":
        hang_up(request, reset=False)
    return response


def _emptied(body: bytes) -> bytes:
    content: Any = msgspec.json.decode(body)
    for name in _LISTS:
        if name in content:
            content[name] = []
    return encode(content)


async def _trickle(rule: FaultRule, response: web.StreamResponse, body: bytes) -> None:
    size = max(1, -(-len(body) // rule.parts))
    for start in range(0, len(body), size):
        await asyncio.sleep(_pause(rule))
        await response.write(body[start : start + size])


def _pause(rule: FaultRule) -> float:
    return 0.05 if rule.seconds is None else rule.seconds


async def _stream(rule: FaultRule, request: web.BaseRequest, answer: Streamed) -> web.StreamResponse:
    response = opened(answer)
    if rule.kind == "duplicate_header":
        response.headers.add("Content-Type", response.headers["Content-Type"])
    async with aclosing(_events(rule, answer.events)) as events:
        await response.prepare(request)
        async for item in events:
            await response.write(item)
        if rule.kind in {"reset_mid", "close_mid"}:
            hang_up(request, reset=rule.kind == "reset_mid")
            return response
        await response.write_eof()
    if rule.kind == "close_after":
        hang_up(request, reset=False)
    return response


async def _events(rule: FaultRule, source: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    """Single events of the damaged stream."""
    kind = rule.kind
    after = 2 if rule.after is None else rule.after
    sent = 0
    async with aclosing(_single(source)) as events:
        async for item, last in events:
            if kind in {"truncate", "reset_mid", "close_mid"} and sent == after:
                if kind == "truncate":
                    yield item[: len(item) // 2]
                return
            if kind == "sse_error" and sent == after:
                error = {"message": "Engine died (injected).", "type": "InternalServerError", "code": 500}
                yield event({"error": error}) + DONE
                return
            if kind == "no_finish" and any(mark in item for mark in _FINISH):
                return
            if (kind == "no_done" and last) or (kind == "empty" and not last):
                continue
            if kind == "slow":
                await asyncio.sleep(_pause(rule))
            yield item
            sent += 1


async def _single(source: AsyncGenerator[bytes, None]) -> AsyncGenerator[tuple[bytes, bool], None]:
    """(event, is it the last one), one event late."""
    held: bytes | None = None
    async with aclosing(source) as chunks:
        async for chunk in chunks:
            for item in chunk.split(b"\n\n"):
                if item:
                    if held is not None:
                        yield held, False
                    held = item + b"\n\n"
    if held is not None:
        yield held, True


@lru_cache(maxsize=4)
def bomb(size: int) -> bytes:
    """``size`` blanks as one gzip member, about a thousandth of that on the wire.

    A full flush makes the compressed form of equal mebibytes equal, so one is compressed and repeated.
    """
    block = b" " * _MEBIBYTE
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    packed = packer.compress(block) + packer.flush(zlib.Z_FULL_FLUSH)
    rest = block[: size % _MEBIBYTE]
    tail = zlib.compressobj(9, zlib.DEFLATED, -15)
    end = tail.compress(rest) + tail.flush()
    check = 0
    for _ in range(size // _MEBIBYTE):
        check = zlib.crc32(block, check)
    check = zlib.crc32(rest, check)
    head = b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x02\xff"
    trailer = check.to_bytes(4, "little") + (size % 2**32).to_bytes(4, "little")
    return head + packed * (size // _MEBIBYTE) + end + trailer

"""JSON from a stranger: refused where decoding it would cost more than it is worth, or mean two things.

Small documents are decoded and looked at whole. A large one is first walked through in slices, so that another thread
can be given the interpreter in between, and refused before it is decoded.
"""

from __future__ import annotations

import json
import re
from typing import Any

import msgspec

MAX_JSON_DEPTH = 200
MAX_DIGITS = 400
"""The largest float has 309 digits. Converting a longer number takes time that grows with the square of its length."""
MAX_WHOLE = 256 * 1024
"""Bytes that are looked at on the event loop: at worst (many tiny lists) that takes some 30 ms."""
MAX_WORTH = 192 * 1024 * 1024
"""Bytes that a decoded document may take besides its texts. 64 MiB of "[],[],[]" would take 2 GB, of numbers 170 MB."""
_PER_CONTAINER, _PER_ITEM, _PER_TEXT = 200, 32, 30

_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
_NOT_BRACKET = bytes(set(range(256)) - set(b"[]{}"))
_LONG_NUMBER = re.compile(rb"(?<![0-9])[0-9]{%d}" % (MAX_DIGITS + 1))
_members = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


def decode_json(data: bytes) -> Any:
    """Decode JSON, all of it. Takes about 0.1 s per MiB at worst; see `open_json` for large documents.

    Raises:
        ValueError: not JSON, nested deeper than 200, a key twice in one object, a number of more than 400 digits, or
            so many values that they would fill the memory.
    """
    if worth(data) > MAX_WORTH:
        raise ValueError("too many values")
    if data.count(b"[") + data.count(b"{") > MAX_JSON_DEPTH:
        _measure(0, _STRING.sub(b"", data))
    if len(data) > MAX_DIGITS and _LONG_NUMBER.search(_STRING.sub(b"", data)):
        raise ValueError(f"a number of more than {MAX_DIGITS} digits")
    try:
        value = msgspec.json.decode(data)
    except msgspec.DecodeError as error:
        raise ValueError(f"not JSON: {error}") from None
    _refuse_duplicate_keys(data, value)
    return value


def read_json(data: bytes) -> Any:
    """As `decode_json`, for a document of any size; best called on another thread where it is larger than MAX_WHOLE.

    It then keeps the interpreter to itself for the decoding alone, about 5 ms per MiB. Of a large document, keys that
    appear twice are found at the top level only.

    Raises:
        ValueError: as above.
    """
    if len(data) <= MAX_WHOLE:
        return decode_json(data)
    _walk(data)
    try:
        if data.lstrip()[:1] == b"{":
            _refuse_twins_above(data)
        return msgspec.json.decode(data)
    except msgspec.DecodeError as error:
        raise ValueError(f"not JSON: {error}") from None


def _refuse_twins_above(data: bytes) -> None:
    # Raw members keep every colon they came with, so a colon is missing only with a twin that was overwritten.
    members = _members(data)
    inside = sum(bytes(raw).count(b":") + name.count(":") for name, raw in members.items())
    if data.count(b":") != inside + len(members):
        raise ValueError("a key appears twice in one object")


def worth(data: bytes) -> int:
    """About how many bytes the decoded document takes besides its texts; more, where these hold commas or brackets."""
    texts = data.count(b'"') // 2
    return _PER_CONTAINER * (data.count(b"[") + data.count(b"{")) + _PER_ITEM * data.count(b",") + _PER_TEXT * texts


def _walk(data: bytes) -> None:
    """Depth, digits and worth of a large document, slice by slice, without its texts."""
    depth = cost = 0
    in_text, left, tail = False, b"", b""
    for start in range(0, len(data), MAX_WHOLE):
        piece = left + data[start : start + MAX_WHOLE]
        kept = len(piece.rstrip(b"\\"))
        left = piece[kept:] if (len(piece) - kept) % 2 else b""
        piece = piece[: len(piece) - len(left)]
        parts = piece.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')
        outside = b'""'.join(parts[in_text::2])
        in_text ^= len(parts) % 2 == 0
        cost += worth(outside)
        if cost > MAX_WORTH:
            raise ValueError("too many values")
        if _LONG_NUMBER.search(tail + outside):
            raise ValueError(f"a number of more than {MAX_DIGITS} digits")
        tail = outside[-MAX_DIGITS:]
        depth = _measure(depth, outside)


def _measure(depth: int, data: bytes) -> int:
    """The depth after these brackets.

    Raises:
        ValueError: too deep in between.
    """
    for byte in data.translate(None, _NOT_BRACKET):
        depth += 1 if byte in b"[{" else -1
        if depth > MAX_JSON_DEPTH:
            raise ValueError(f"nested deeper than {MAX_JSON_DEPTH} levels")
    return depth


def _refuse_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key appears twice in one object")
    return found


def _refuse_duplicate_keys(data: bytes, value: object) -> None:
    # Parsers disagree about which twin counts, so what we judge could differ from what the caller reads. The exact
    # check costs 20 times the decoding. But a twin is lost when the value is written again, and its colon with it;
    # every other colon comes back, unless one was written as \u003a.
    if data.count(b":") != msgspec.json.encode(value).count(b":") or b"\\u003" in data:
        json.loads(data, object_pairs_hook=_refuse_twins)

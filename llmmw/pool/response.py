"""A response whose head has arrived, and how its headers are read."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from llmmw.errors import ProtocolError, ResponseTooLarge
from llmmw.pool.engine import MAX_HEADER_BYTES
from llmmw.wire import HOP_BY_HOP

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llmmw.pool.body import Body
    from llmmw.wire import Headers

_REMEMBERED = 256


class Response(msgspec.Struct, frozen=True):
    """A response whose head has arrived. Read or close its body; until then it holds a connection."""

    status: int
    headers: Headers
    """Lower-case names; hop-by-hop headers are removed, and content-encoding too, for the body is decoded."""
    body: Body
    reused: bool = False
    """Whether it came over a kept-alive connection."""

    def __repr__(self) -> str:
        return f"Response({self.status})"  # headers may hold cookies

    def header(self, name: str) -> str:
        """The first header of that (lower-case) name, or ""."""
        for key, value in self.headers:
            if key == name:
                return value
        return ""


_names: dict[bytes, str] = {}
"""Header names as seen before, in lower case: servers send the same few, and decoding each costs 0.1 µs."""


def _name(raw: bytes) -> str:
    if len(_names) >= _REMEMBERED:
        _names.clear()
    name = _names[raw] = raw.decode("latin-1").lower()
    return name


def read_headers(raw: Sequence[tuple[bytes, bytes]]) -> tuple[Headers, str | None]:
    """The response's headers as text, without those of the connection; and the coding of the body, if it has one."""
    size = 0
    headers: list[tuple[str, str]] = []
    coding: str | None = None
    for raw_name, raw_value in raw:
        size += len(raw_name) + len(raw_value)
        name = _names.get(raw_name) or _name(raw_name)
        value = raw_value.decode("latin-1")
        if name == "content-encoding":
            coding = value.strip().lower() if coding is None else f"{coding},{value}"
        if name not in HOP_BY_HOP:
            headers.append((name, value))
    if size > MAX_HEADER_BYTES:
        raise ResponseTooLarge(f"the response's headers are larger than {MAX_HEADER_BYTES} bytes")
    if coding is None or coding in {"", "identity"}:
        return tuple(headers), None
    if "," in coding:
        raise ResponseTooLarge("the body is compressed more than once")
    if coding not in {"gzip", "x-gzip", "deflate"}:
        raise ProtocolError(f"the body is encoded as {coding[:40]!r}, which was not asked for")
    # The body is handed over decoded, so what describes its encoded form goes.
    return tuple(pair for pair in headers if pair[0] not in {"content-encoding", "content-length"}), coding

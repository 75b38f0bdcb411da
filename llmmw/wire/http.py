"""HTTP and JSON as LLM servers speak them: a request as a value, op <-> path, strict JSON. `sse.py` reads streams.

Shared by the endpoints (which send) and the edges (which are asked), so it knows neither.
"""

from __future__ import annotations

import json
import re
from typing import Any, NoReturn
from urllib.parse import urlsplit

import msgspec

from llmmw.answer import problem_with
from llmmw.errors import ProtocolError

Headers = tuple[tuple[str, str], ...]

MAX_JSON_DEPTH = 200
MAX_DIGITS = 4300
"""Python's own limit for int(text); a longer number is an attack on whoever converts it."""

HOP_BY_HOP = frozenset({
    "connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te", "trailer",
    "transfer-encoding", "upgrade",
})  # fmt: skip
"""Headers that concern one connection only (RFC 9110, 7.6.1); never passed on."""


class HTTPRequest(msgspec.Struct, frozen=True):
    """One HTTP request. As `Call.native` it is what a transport edge was asked to send."""

    method: str
    url: str
    headers: Headers = ()
    body: bytes = b""

    def __repr__(self) -> str:
        # Headers carry credentials, the query may, and the body is somebody's prompt.
        return f"HTTPRequest({self.method} {without_query(self.url)}, {len(self.body)} bytes)"


def without_query(url: str) -> str:
    """The URL without query, fragment and credentials: what may be shown."""
    head = url.partition("#")[0].partition("?")[0]
    scheme, mark, rest = head.partition("://")
    authority, slash, path = rest.partition("/")
    return f"{scheme}{mark}{authority.rpartition('@')[2]}{slash}{path}"


# op <-> path

PATHS = {
    "chat": "/chat/completions",
    "complete": "/completions",
    "embed": "/embeddings",
    "messages": "/v1/messages",
    "responses": "/responses",
    "chat_batch": "/chat/completions/batch",
}
"""Where an operation is served, below the base URL; any other operation is its own path."""

_OPS = sorted(((path, op) for op, path in PATHS.items()), key=lambda pair: -len(pair[0]))


def op_of(path: str) -> str:
    """The operation a URL path asks for, or the path itself for one we do not know."""
    bare = path.partition("?")[0].rstrip("/")
    for known, op in _OPS:
        if bare.endswith(known):
            return op
    return path


def url_of(base_url: str, op: str) -> str:
    """Where an operation is served below a base URL (whose query, if any, is kept)."""
    path = PATHS.get(op, op if op.startswith("/") else f"/{op}")
    base, mark, query = base_url.partition("?")
    base = base.rstrip("/")
    # Both conventions are in use: Anthropic's base URL has no "/v1", OpenAI's has.
    if path.startswith("/v1/") and urlsplit(base).path.endswith("/v1"):
        path = path.removeprefix("/v1")
    return f"{base}{path}{mark}{query}"


# JSON

_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)
_NOT_BRACKET = bytes(set(range(256)) - set(b"[]{}"))
_LONG_NUMBER = re.compile(rb"[0-9]{%d}" % (MAX_DIGITS + 1))


def _depth(data: bytes) -> int:
    deepest = level = 0
    for byte in _STRING.sub(b"", data).translate(None, _NOT_BRACKET):
        level += 1 if byte in b"[{" else -1
        deepest = max(deepest, level)
    return deepest


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


def decode_json(data: bytes) -> Any:
    """Decode JSON from a stranger.

    Raises:
        ValueError: not JSON, nested deeper than 200, a key twice in one object, a number of more than 4300 digits.
    """
    if data.count(b"[") + data.count(b"{") > MAX_JSON_DEPTH and _depth(data) > MAX_JSON_DEPTH:
        raise ValueError(f"nested deeper than {MAX_JSON_DEPTH} levels")
    if len(data) > MAX_DIGITS and _LONG_NUMBER.search(_STRING.sub(b"", data)):
        raise ValueError(f"a number of more than {MAX_DIGITS} digits")
    try:
        value = msgspec.json.decode(data)
    except msgspec.DecodeError as error:
        raise ValueError(f"not JSON: {error}") from None
    _refuse_duplicate_keys(data, value)
    return value


def read_answer(op: str, data: bytes, *, endpoint: str = "", content_type: str = "") -> Any:
    """The decoded body of a success response to a known operation.

    Raises:
        ProtocolError: the body is no answer (HTML, cut-off JSON, an error object, no choices).
    """
    try:
        value = decode_json(data)
    except (ValueError, RecursionError) as error:
        if data.lstrip()[:1] == b"<":
            _no_answer(f"an HTML or XML page instead of JSON ({content_type or 'no content type'})", endpoint)
        _no_answer(str(error) if data else "an empty body", endpoint)
    problem = problem_with(op, value)
    if problem is not None:
        _no_answer(problem, endpoint)
    return value


def _no_answer(why: str, endpoint: str) -> NoReturn:
    raise ProtocolError(f"{endpoint or 'the server'} answered with a success status, but: {why}", endpoint=endpoint)

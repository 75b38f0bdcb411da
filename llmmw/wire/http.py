"""HTTP as LLM servers speak it: a request as a value, op <-> path, answers.

Shared by the endpoints (which send) and the edges (which are asked), so it knows neither.
"""

from __future__ import annotations

import asyncio
import functools
from typing import Any, NoReturn
from urllib.parse import urlsplit

import msgspec

from llmmw.answer import problem_with
from llmmw.errors import ProtocolError
from llmmw.wire.strict import MAX_WHOLE, read_json

Headers = tuple[tuple[str, str], ...]

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
    once: bool = False
    """It must not arrive twice: the pool never repeats it, whatever its settings."""
    max_bytes: int = 0
    """Bound of the response's decoded body, where the pool's own does not fit; 0: the pool's."""

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


def read_answer(op: str, data: bytes, *, endpoint: str = "", content_type: str = "") -> Any:
    """The decoded body of a success response to a known operation.

    Raises:
        ProtocolError: the body is no answer (HTML, cut-off JSON, an error object, no choices).
    """
    try:
        value = read_json(data)
    except (ValueError, RecursionError) as error:
        if data.lstrip()[:1] == b"<":
            _no_answer(f"an HTML or XML page instead of JSON ({content_type or 'no content type'})", endpoint)
        _no_answer(str(error) if data else "an empty body", endpoint)
    problem = problem_with(op, value)
    if problem is not None:
        _no_answer(problem, endpoint)
    return value


async def read_any_answer(op: str, data: bytes, *, endpoint: str = "", content_type: str = "") -> Any:
    """The same without holding up the event loop: a large body is read on another thread."""
    read = functools.partial(read_answer, op, data, endpoint=endpoint, content_type=content_type)
    return read() if len(data) <= MAX_WHOLE else await asyncio.get_running_loop().run_in_executor(None, read)


def _no_answer(why: str, endpoint: str) -> NoReturn:
    raise ProtocolError(f"{endpoint or 'the server'} answered with a success status, but: {why}", endpoint=endpoint)

"""HTTP requests of somebody else's SDK become calls, replies become responses; knows no HTTP library.

What goes through the layers: POSTs of a JSON object to a path of `wire.PATHS`. Everything else (model lists, files,
audio, multipart) is `Call.direct`: sent over the same pool, counted, otherwise untouched.

Failures (SPEC 7, transport edge), chosen by reading the retry loops of openai 2 and 3 and anthropic 2:

- Both obey `x-should-retry: false` on a response and then raise the exception class of its status. So a refusal by
  llmmw is a 429 or 503, an answer that is no answer a 502, each with that header; a refusal by the server keeps its
  status, body and headers and gets it too where the stack has a Retry layer.
- Both turn the HTTP library's time-out and connection errors into APITimeoutError and APIConnectionError, which is
  what their users catch, but only after `max_retries` further attempts, and no exception of the library can ask
  them not to. So the library's own exception is raised, and where the stack has a Retry layer the SDK's repetition
  (same context, same request, `x-stainless-retry-count` > 0) gets the same exception again without anything being
  sent. The SDK still sleeps between its attempts: `max_retries=0` saves that second.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, urlsplit

import msgspec

from llmmw.call import Call, current_context
from llmmw.edges.outcome import Answer, answer_of, failure_of
from llmmw.endpoints.anywhere import Patient, TimedRequest
from llmmw.env import disabled
from llmmw.events import Warned
from llmmw.keys.identity import Namespaces, asker_of
from llmmw.order import Role
from llmmw.pool.guard import origin_of
from llmmw.wire import HOP_BY_HOP, PATHS, op_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from llmmw.call import Reply
    from llmmw.edges.outcome import Failure
    from llmmw.endpoints.base import Endpoint
    from llmmw.engine import Engine
    from llmmw.env import Env
    from llmmw.errors import LLMMWError
    from llmmw.stack import Stack
    from llmmw.wire import Headers


_NOT_FORWARDED = HOP_BY_HOP | {"host", "content-length", "accept-encoding"}
"""The pool writes its own."""
_DECODER = msgspec.json.Decoder(dict[str, Any])
_REMEMBERED = 1024
"""URLs and sets of headers whose reading is kept: a client has a handful of each."""


class Place(msgspec.Struct, frozen=True):
    """What a URL says about a call."""

    op: str
    known: bool
    target: str
    variant: tuple[tuple[str, str], ...]
    credential: str

    def __repr__(self) -> str:
        return f"Place({self.op!r}, target={self.target!r})"


class Head(msgspec.Struct, frozen=True):
    """What the headers of a request say about it."""

    headers: Headers
    """Those that are sent on, with lower-case names."""
    variant: Headers
    credential: str
    repeated: bool
    """Whether the SDK says that it has sent this request before."""

    def __repr__(self) -> str:
        return "Head(***)"  # it is made of credentials


class Repeated(Exception):
    """The SDK repeats a request that llmmw has given up; `kind` is the exception to raise again."""

    def __init__(self, kind: Failure, message: str) -> None:
        super().__init__(message)
        self.kind: Failure = kind


class _GivenUp(msgspec.Struct, frozen=True):
    """The last failure in a context, without the exception (which would keep frames alive)."""

    edge: int
    url: str
    body: int
    kind: Failure
    message: str


_given_up: ContextVar[_GivenUp | None] = ContextVar("llmmw_given_up", default=None)


class HTTPEdge:
    """One engine under one HTTP client.

    Args:
        stack: the layers.
        endpoint: where requests go.
        env: clock, randomness and sinks, for tests.
    """

    def __init__(self, stack: Stack, endpoint: Endpoint, env: Env | None = None) -> None:
        self.engine: Engine = stack.bind(Patient(endpoint), env=env)
        self._retries = Role.RETRY in stack and not disabled()
        self._namespaces = Namespaces(stack.cache_directory)
        self._places: dict[str, Place] = {}
        self._heads: dict[tuple[tuple[bytes, bytes], ...], Head] = {}
        self._warned = False

    # ── request → call ──────────────────────────────────────────────────────────────────────────────────────────

    def call(
        self, method: str, url: str, headers: Sequence[tuple[bytes, bytes]], body: bytes, timeout: Mapping[str, Any]
    ) -> Call:
        """The call for a request.

        Args:
            method: in upper case.
            url: absolute.
            headers: as the library would send them.
            body: encoded.
            timeout: the library's extension: "connect" and "read" in seconds.

        Raises:
            Repeated: the SDK repeats what was given up.
        """
        place = self._places.get(url) or self._learn(url)
        # An SDK sends the same headers with every request, but for the length.
        sent = tuple([pair for pair in headers if pair[0] != b"Content-Length"])
        head = self._heads.get(sent) or self._read(sent)
        if head.repeated:
            self._repeated(url, body)
        variant = tuple(sorted(place.variant + head.variant)) if place.variant else head.variant
        payload = _payload(body) if place.known and method == "POST" else None
        context = current_context()
        model = None if payload is None else payload.get("model")
        return Call(
            place.op,
            model if isinstance(model, str) else "",
            {} if payload is None else payload,
            payload is not None and payload.get("stream") is True,
            context,
            TimedRequest(method, url, head.headers, body, read_s=timeout.get("read")),
            place.target,
            self._namespaces.of(place.credential + head.credential, context.tenant),
            variant,
            connect_s=timeout.get("connect"),
            direct=payload is None,
        )

    def _read(self, sent: tuple[tuple[bytes, bytes], ...]) -> Head:
        decoded = [(name.decode("latin-1").lower(), value.decode("latin-1")) for name, value in sent]
        asker = asker_of(decoded)
        head = Head(
            tuple(pair for pair in decoded if pair[0] not in _NOT_FORWARDED),
            asker.variant,
            asker.credential,
            any(name == "x-stainless-retry-count" and value != "0" for name, value in decoded),
        )
        if len(self._heads) >= _REMEMBERED:
            self._heads.clear()
        self._heads[sent] = head
        return head

    def _learn(self, url: str) -> Place:
        if len(self._places) >= _REMEMBERED:
            self._places.clear()
        parts = urlsplit(url)
        op = op_of(parts.path)
        known = op in PATHS
        prefix = parts.path.rstrip("/").removesuffix(PATHS[op]) if known else ""
        asker = asker_of(query=parse_qsl(parts.query, keep_blank_values=True))
        place = Place(op, known, origin_of(parts) + prefix, asker.variant, asker.credential)
        self._places[url] = place
        return place

    def _repeated(self, url: str, body: bytes) -> None:
        if not self._retries:
            return
        if not self._warned:
            self._warned = True
            message = (
                "the SDK repeats failed requests by itself, on top of this stack's Retry layer; "
                "make its client with max_retries=0"
            )
            self.engine.env.emit(Warned("doubled-retries", message))
        last = _given_up.get()
        if last is not None and (last.edge, last.url, last.body) == (id(self), url, hash(body)):
            raise Repeated(last.kind, last.message)

    # ── reply → response ────────────────────────────────────────────────────────────────────────────────────────

    def answer(self, reply: Reply) -> Answer:
        """The response to a reply; of a stream without its body."""
        return answer_of(reply, final=self._retries)

    def failure(self, error: LLMMWError, url: str, body: bytes) -> Answer | Failure:
        """What to make of an error: a response, or the name of the library's exception."""
        found = failure_of(error)
        if isinstance(found, Answer):
            return found
        if self._retries:
            _given_up.set(_GivenUp(id(self), url, hash(body), found, error.message))
        return found


def _payload(body: bytes) -> dict[str, Any] | None:
    try:
        return _DECODER.decode(body)
    except (msgspec.DecodeError, msgspec.ValidationError, UnicodeError, RecursionError):
        return None

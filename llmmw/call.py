"""What is asked and what is answered: `Call`, `Reply` and the values they carry. All frozen.

Neighbours: `context.py` holds who asks (its names are here too), `answer.py` reads the bodies, `stream/` works on
`Reply.chunks`, `errors.py` says what went wrong.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping  # noqa: TC003 — help() and signature() evaluate them
from typing import Any, Literal, Protocol

import msgspec

from llmmw.answer import NO_USAGE, Usage, text_in
from llmmw.context import NO_CONTEXT, Context, Party, Place, Urgency, current_context, using
from llmmw.errors import LLMMWError  # noqa: TC001 — likewise

__all__ = [
    "NO_CONTEXT", "Attempt", "Call", "Chunk", "Chunks", "Context", "Filling", "Handler", "Item", "Outcome",
    "Party", "Place", "Reply", "Source", "Urgency", "Usage", "current_context", "using",
]  # fmt: skip

Source = Literal["upstream", "cache", "coalesced", "batch"]
"""Where a reply came from."""


class Call(msgspec.Struct, frozen=True, weakref=True):
    """One completion call on its way to an endpoint."""

    op: str
    """"chat", "complete", "embed", "messages", "responses", "chat_batch", "function" or the path of an unknown one."""
    model: str
    payload: Mapping[str, Any]
    """The request's body (JSON-shaped); for a function its bound arguments. Layers never change it in place."""
    stream: bool = False
    context: Context = NO_CONTEXT
    native: Any = None
    """The edge's own request; only the edge and its endpoint read it."""
    target: str = ""
    """Identity of the endpoint that is asked: "scheme://host:port/prefix", or a function's qualified name."""
    namespace: str = ""
    """Fingerprint of the credential or the tenant: answers are shared within one namespace only."""
    variant: tuple[tuple[str, str], ...] = ()
    """What else changes the answer: request headers (API version, beta flags), lower-case and sorted; a function's
    code."""
    inherits_context: bool = False
    """True where the endpoint must run with the caller's context variables (a user's function)."""
    key: bytes = b""
    """Sharing key set by the cache layer: calls of one key may have one answer; b"" means not shared."""
    fill: Filling | None = None
    """Set by the cache: whoever owns the upstream answer goes by it."""
    urgency: Urgency | None = None
    """Set by the coalescer on a flight's call; read it through `priority` and `deadline`."""
    connect_s: float | None = None
    """Set by Timeout(connect=): the endpoint may spend that long on making a connection."""
    tries_left: int | None = None
    """Set by the router: how many attempts the layers inside may still make (None: as many as they like)."""
    rate_wait_s: float | None = None
    """Set by the router while another endpoint could answer: a longer wait for a rate limit is not worth it."""
    on_sent: Callable[[], None] | None = None
    """Set by Retry(hedge=True): called when the attempt goes out to the endpoint, with its permits."""
    beside: Handler | None = None
    """Set by the balancer: asks another replica, for a second request that Retry(hedge=True) makes."""
    alone: bool = False
    """Set by the router: this endpoint was well last and no other is, so an open circuit there is probed at a pace."""
    place: Place | None = None
    """Set by `generate_batch`: this call is one of a party, whose others may travel with it."""
    width: int = 1
    """How many callers' calls this one carries; they take as many of the slots for calls under way."""
    direct: bool = False
    """Straight to the engine's endpoint, past every layer: for what is no completion (files, model lists, audio)."""

    @property
    def priority(self) -> int:
        """The call's priority now; smaller runs earlier. A flight's may change, see `Urgency.subscribe`."""
        return self.context.priority if self.urgency is None else self.urgency.priority

    @property
    def deadline(self) -> float | None:
        """The call's deadline now, on the env clock's monotonic scale. A flight's may move later."""
        return self.context.deadline if self.urgency is None else self.urgency.deadline

    def replace(self, **changes: Any) -> Call:
        """A copy with some fields changed."""
        return msgspec.structs.replace(self, **changes)

    def within(self, **changes: Any) -> Call:
        """A copy with some fields of its context changed."""
        return msgspec.structs.replace(self, context=msgspec.structs.replace(self.context, **changes))

    def __repr__(self) -> str:
        # The payload is somebody's prompt, and `native` may hold headers: neither belongs into a log.
        kind = f"{self.op}{', stream' if self.stream else ''}"
        return f"Call({kind}, model={self.model[:80]!r}, target={self.target!r}, context={self.context!r})"


class Item(msgspec.Struct, frozen=True):
    """A piece of a user's async generator: the object itself and, where a codec knows it, its encoded form."""

    value: Any
    data: bytes | None = None


Chunk = bytes | Item
"""A piece of a stream: raw bytes from HTTP (never re-cut), or an Item from a function."""


class Chunks(Protocol):
    """A stream of chunks. `aclose()` is idempotent, and a stream that ended has released everything."""

    @property
    def usage(self) -> Usage:
        """What the stream reported so far; final once it ended."""
        ...

    def __aiter__(self) -> AsyncIterator[Chunk]: ...

    async def __anext__(self) -> Chunk: ...

    async def aclose(self) -> None:
        """Stop reading and release what the stream holds."""
        ...


class Attempt(msgspec.Struct, frozen=True):
    """One try at one endpoint, kept on replies and errors as history."""

    endpoint: str
    fault: str = ""
    """Fault class (SPEC 7), or "" for success."""
    status: int | None = None
    error: str = ""
    """Type name of the exception, if there was one."""
    wait_s: float = 0.0
    """Back-off slept before the next attempt."""


class Reply(msgspec.Struct, frozen=True):
    """What came back. A status of 400 or more is a refusal by the server, carried as a value."""

    data: bytes | None = None
    """The body (JSON for HTTP, the codec's form for a function); None while only `native` or `chunks` holds it."""
    chunks: Chunks | None = None
    """The body as a stream, where the call asked for one."""
    usage: Usage = NO_USAGE
    """Of a stream: what is known when the reply is made, usually nothing."""
    source: Source = "upstream"
    endpoint: str = ""
    native: Any = None
    """The endpoint's own answer object (a function's return value)."""
    status: int = 200
    headers: tuple[tuple[str, str], ...] = ()
    """Response headers with lower-case names; hop-by-hop headers removed."""
    service_s: float = 0.0
    """Seconds of service at the endpoint, without queueing or back-off; of a cached answer, what it once took. 0 until
    known."""
    stale: bool = False
    """True where an expired answer was served on purpose (stale-while-revalidate, stale-if-error)."""
    attempts: tuple[Attempt, ...] = ()
    """The failed tries before this reply; of a refusal also the one that it answers."""
    fallback: bool = False
    """True where another endpoint than the call's own answered, so the answer is not the primary's (SPEC route-18)."""
    exchange: int = 0
    """Number of the request that carried several calls: outcomes of one exchange are judged once. 0: its own."""

    @property
    def ok(self) -> bool:
        """Whether the server accepted the call (status below 400)."""
        return self.status < 400  # noqa: PLR2004 — HTTP's own boundary

    @property
    def body(self) -> Any:
        """The decoded JSON body, a fresh object each time (so changing it reaches nobody else); a function's value."""
        if self.data is None:
            return self.native
        return msgspec.json.decode(self.data)

    @property
    def text(self) -> str:
        """The text of the first choice ("" for a pure tool call or an embedding)."""
        return text_in(self.data) if self.data is not None else ""

    def header(self, name: str) -> str | None:
        """The first response header of that (lower-case) name."""
        for key, value in self.headers:
            if key == name:
                return value
        return None

    def replace(self, **changes: Any) -> Reply:
        """A copy with some fields changed."""
        return msgspec.structs.replace(self, **changes)

    def __repr__(self) -> str:
        # A server may put into its headers (and body) what a log must not hold: cookies, the key it was sent.
        held = "a stream" if self.chunks is not None else f"{len(self.data or b'')} bytes"
        return f"Reply({self.status}, {held}, source={self.source!r}, endpoint={self.endpoint!r}, usage={self.usage!r})"


class Filling(Protocol):
    """The cache's half of one shared call; driven by whoever makes the call, and out of sight further inside."""

    def look(self) -> Reply | None:
        """Before the call is made: an answer that turned up since the caller looked, or None."""
        ...

    async def claim(self, lease_s: float) -> Reply | None:
        """Then: an answer by another process on the cache directory, or None under a lease of so many seconds."""
        ...

    def answered(self, reply: Reply) -> Reply:
        """Store what came, or record a stream while it is read; never raises. Exactly one of this and `failed`."""
        ...

    def failed(self) -> None:
        """Nothing came."""
        ...


class Handler(Protocol):
    """Anything that answers a call: a layer bound to what is inside it, or an endpoint."""

    async def __call__(self, call: Call, /) -> Reply:
        """Answer one call."""
        ...


class Outcome(msgspec.Struct, frozen=True):
    """What became of one item of a batch: exactly one of `reply` and `error` is set."""

    reply: Reply | None = None
    error: Exception | LLMMWError | None = None

    @property
    def ok(self) -> bool:
        """Whether the item has an answer."""
        return self.error is None

    @property
    def text(self) -> str:
        """The answer's text; "" for a failed item."""
        return "" if self.reply is None else self.reply.text

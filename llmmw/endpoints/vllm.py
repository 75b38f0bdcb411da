"""`VLLMEndpoint`: an HTTPEndpoint that knows vLLM. What it asks the server about itself: `inquiry.py`."""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING, Any, ClassVar

from llmmw.algo.load import ASKING_HEADER, LOAD_HEADER, NO_LOAD, Load, load_of_header, load_of_metrics
from llmmw.endpoints.inquiry import About, Inquiry
from llmmw.endpoints.openai import POOL_EXAMPLE, HTTPEndpoint
from llmmw.endpoints.salts import Salts
from llmmw.errors import ConnectionFailed, LLMMWError
from llmmw.fault.bodies import decode_error
from llmmw.pool import ConnectionPool
from llmmw.settings import accepting, instance, positive_seconds, seconds
from llmmw.wire import HTTPRequest

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from llmmw.call import Call, Reply
    from llmmw.env import Env

KEEPALIVE_S = 3.0
"""vLLM closes connections that were idle for 5 s, and a request sent in that moment is lost."""
LOAD_INTERVAL_S = 0.1
"""A reading costs the server's event loop 1 to 4 ms (vLLM collects all of its metrics for it; measured with 0.32 on a
CPU: 3.8 ms per call without, 7.3 with), so not every call asks for one."""
LOAD_CALLS = 32
"""But of a burst one in so many: who asks stands in the queue himself, and the answers must tell while it empties."""
RECOMMENDED_CONCURRENCY = "8-256-512"
"""256 sequences at once are what vLLM runs on a GPU unless told otherwise (1024 on the largest). To start with 64
costs a third more time for a burst of 256; a server with fewer places tells so by its queue, and the limit follows."""

_ASKING = (ASKING_HEADER, "JSON")
_BATCH_CHAT = "batch:chat"
_PRIORITY = frozenset({"chat", "complete", "chat_batch", "responses", "embed"})
_SALTED = _PRIORITY | {"messages"}
_TELLS_LOAD = frozenset({"chat", "complete"})
"""Streams and batches of conversations are answered without the header."""
_UNTOLD = 3
"""So many answers without the header that was asked for, one after the other: nobody there knows it."""
_LOWEST, _HIGHEST = -(2**31), 2**31 - 1
_NOT_THE_FIELD = frozenset({401, 403, 404, 429})
_NOT_PASSED_ON = frozenset({404, 405})
"""/health behind a gateway that passes on nothing but the API."""
_REDIRECT = 300


class VLLMEndpoint(HTTPEndpoint):
    """A vLLM server (or one that speaks as it does), on this machine or another.

        async with Client(VLLMEndpoint("http://127.0.0.1:8000"), model="m") as client:
            with using(agent="alice", priority=-5):
                reply = await client.chat("hello", seed=7, structured_outputs={"regex": "[a-z ]+"})

    Every field of the request goes to the server as it is given. On top of what HTTPEndpoint does,

    - the call's priority (`using(priority=)`) goes along, for servers with `--scheduling-policy priority`. Where it is
      refused the call is sent again without it, and later ones go without;
    - `cache_salt` keeps one tenant from finding out by the time of its answers what another has asked;
    - with the first call the server is asked in the background which models, limits and version it has (`about`) and
      whether it takes batches (`capabilities`); what fails is tried again later and no call ever waits for it;
    - now and then an answer is asked to tell the length of the server's queue, by which `RateLimiter` sets the number
      of calls under way;
    - a call that is cancelled, or runs into its time-out, is broken off at the server, whose place is free at once;
    - a call on a kept connection that the server has just closed is sent again at once, over a new one.

    Args:
        base_url: "http(s)://host[:port][/prefix]/v1"; of a URL without any path "/v1" is added.
        api_key: as the server's `--api-key`.
        cache_salt: None shares the server's prefix cache among all. A text (long and secret) makes one salt for each
            tenant (`using(tenant=)`, `Client(tenant=)`), the same in every process that has the text, else for each
            credential; True takes a random text for this endpoint. A call's own `cache_salt` goes before it.
        load_interval: time between two readings of the server's queue (seconds or text), or 32 calls; None: none.
        headers: sent with every call.
        pool: settings of its connections; by default idle ones are kept for 3 s, less than the server's 5.
        allow_hosts: hosts exempt from the ban on link-local and metadata addresses.
        duplicate_ok: a call may safely arrive twice: at a server of one's own that costs computing time only.

    Raises:
        ConfigError: a value that cannot work; the message holds no secret.
    """

    recommended: ClassVar[Mapping[str, Any]] = {"concurrency": RECOMMENDED_CONCURRENCY}
    """Options of `Stack.recommended` for a client that is given no stack."""

    @accepting
    def __init__(
        self,
        base_url: str,
        api_key: str | None = None,
        *,
        cache_salt: str | bool | None = None,
        load_interval: float | str | None = LOAD_INTERVAL_S,
        headers: Mapping[str, str] | None = None,
        pool: ConnectionPool | None = None,
        allow_hosts: Iterable[str] = (),
        duplicate_ok: bool = True,
    ) -> None:
        settings = ConnectionPool(keepalive_expiry=KEEPALIVE_S) if pool is None else pool
        instance("pool", settings, ConnectionPool, POOL_EXAMPLE)
        super().__init__(
            _with_version(base_url),
            api_key,
            headers=headers,
            pool=settings,
            allow_hosts=allow_hosts,
            duplicate_ok=duplicate_ok,
        )
        self._salts = Salts(cache_salt)
        self._load_every_s = None if load_interval is None else seconds("load_interval", load_interval)
        self._load_due_at = 0.0
        self._load_unasked = self._load_untold = 0
        self._load = NO_LOAD
        self._asking = (*self._headers, _ASKING)
        self._can = super().capabilities | {_BATCH_CHAT, "batch:complete"}
        self._about: About | None = None
        self._takes_priority = True
        self._inquiry = Inquiry(
            self._base_url,
            self._headers,
            settings,
            allow_hosts=self._allow_hosts,
            secrets_of=self._secrets_of,
            told=self._told,
        )

    # ── what is known ───────────────────────────────────────────────────────────────────────────────────────────

    @property
    def capabilities(self) -> frozenset[str]:
        """What the server can do: "n", "batch:complete", "batch:chat" until it says that it cannot, "idempotent"."""
        return self._can

    @property
    def about(self) -> About | None:
        """What the server has said about itself; None until it has (`discover()` waits for it)."""
        return self._about

    @property
    def takes_priority(self) -> bool:
        """Whether it has not refused priorities; a server that schedules first come, first served may ignore them."""
        return self._takes_priority

    @property
    def load(self) -> Load:
        """The latest reading of how busy the server is; without figures before the first (`read_load()` asks)."""
        return self._load

    async def discover(self) -> About:
        """Ask the server about itself now; whoever asks at the same time shares the answer.

        Raises:
            UpstreamError: it could not be reached, or is too busy to tell.
        """
        return await self._inquiry.about()

    async def health(self, within: float | str = 5.0) -> bool:
        """Whether the server answers and its engine works.

        Args:
            within: seconds (or text) that the answer may take.
        """
        limit_s = positive_seconds("health(within=)", within)
        try:
            status, _ = await self._inquiry.get("/health", limit_s)
            if status in _NOT_PASSED_ON:
                status, _ = await self._inquiry.get("/v1/models", limit_s)
        except LLMMWError:
            return False
        return status < _REDIRECT

    async def read_load(self) -> Load:
        """Read the server's /metrics page: running and waiting sequences, use and hits of its caches.

        That costs the server tens of milliseconds; nothing here does it unasked.

        Raises:
            UpstreamError: no answer.
        """
        status, page = await self._inquiry.get("/metrics")
        self._load = load_of_metrics(page.decode("utf-8", "replace")) if status < _REDIRECT else NO_LOAD
        return self._load

    def gauges(self) -> dict[str, object]:
        """Readings of the connections and of the server, from any thread."""
        load = self._load
        told: dict[str, object] = {"server_waiting": load.waiting, "server_kv_cache_usage": load.kv_cache_usage}
        return {**super().gauges(), **{name: value for name, value in told.items() if value is not None}}

    # ── a call's way ────────────────────────────────────────────────────────────────────────────────────────────

    def start(self, env: Env) -> None:
        """The engine's env.

        Raises:
            ConfigError: the endpoint already works for another engine.
        """
        super().start(env)
        self._inquiry.start(env.clock)

    async def __call__(self, call: Call, /) -> Reply:
        """Make one attempt; a second one where the server has refused nothing but the priority.

        Raises:
            UpstreamError: no answer could be obtained, or what came is none.
        """
        due_at = self._inquiry.due_at
        if due_at != inf and self._env.clock.monotonic() >= due_at:
            self._inquiry.begin()
        call = dressed(call, self._salts, by_priority=self._takes_priority)
        try:
            reply = await super().__call__(call)
        except ConnectionFailed:
            self._inquiry.doubt()
            raise
        if reply.ok or not _refuses_priority(call, reply):
            return reply
        again = await super().__call__(_without(call, "priority").replace(on_sent=None))
        if again.ok:
            self._takes_priority = False
        return again

    async def _attempt(self, call: Call) -> Reply:
        request = self._request_for(call)
        if not self._wants_load(call):
            return await self._sent(call, request)
        headers = self._asking if request.headers is self._headers else (*request.headers, _ASKING)
        reply = await self._sent(call, HTTPRequest(request.method, request.url, headers, request.body))
        if reply.ok:
            self._hear(reply.header(LOAD_HEADER))
        return reply

    def _wants_load(self, call: Call) -> bool:
        every = self._load_every_s
        if every is None or call.stream or call.op not in _TELLS_LOAD or isinstance(call.native, HTTPRequest):
            return False
        now = self._env.clock.monotonic()
        self._load_unasked += 1
        if now < self._load_due_at and self._load_unasked < LOAD_CALLS:
            return False
        self._load_due_at, self._load_unasked = now + every, 0
        return True

    def _hear(self, told: str | None) -> None:
        if told is not None:
            self._load, self._load_untold = load_of_header(told), 0
            return
        self._load_untold += 1
        if self._load_untold >= _UNTOLD:
            self._load_every_s = None

    def _told(self, about: About) -> None:
        if about.has_batch_chat is not None:
            self._can = self._can | {_BATCH_CHAT} if about.has_batch_chat else self._can - {_BATCH_CHAT}
        if self._about is not None:  # it was away since: what it refused then it may take now
            self._takes_priority = True
        self._about = about

    # ── lifetime ────────────────────────────────────────────────────────────────────────────────────────────────

    def rehome(self) -> None:
        """Drop the sockets without waiting."""
        super().rehome()
        self._inquiry.rehome()

    async def aclose(self) -> None:
        """Wait for calls in flight (at most the pool's `drain_timeout`) and close the connections. Idempotent."""
        await self._inquiry.aclose()
        await super().aclose()


def dressed(call: Call, salts: Salts, *, by_priority: bool) -> Call:
    """The call with what vLLM is told about it, its priority and its salt; the caller's own fields stay.

    Args:
        call: as it came.
        salts: of the endpoint.
        by_priority: whether priorities are taken; else it goes without, even where the caller gave one.
    """
    op, payload = call.op, call.payload
    if op not in _SALTED or isinstance(call.native, HTTPRequest):
        return call
    if not by_priority:
        call = _without(call, "priority")
    elif call.priority and op in _PRIORITY and "priority" not in payload:
        call = _with(call, "priority", max(_LOWEST, min(call.priority, _HIGHEST)))
    salt = salts.of(call.namespace)
    return call if salt is None or "cache_salt" in payload else _with(call, "cache_salt", salt)


def _refuses_priority(call: Call, reply: Reply) -> bool:
    """Whether the server minds the field itself: there is nothing wrong with the value, and the refusal names it."""
    priority = call.payload.get("priority")
    if not isinstance(priority, int) or isinstance(priority, bool) or not _LOWEST <= priority <= _HIGHEST:
        return False
    if reply.status in _NOT_THE_FIELD:
        return False
    said, _ = decode_error(reply.data)
    return said.param in {"priority", "body.priority"} or "priority" in said.message.lower()


def _with(call: Call, field: str, value: Any) -> Call:
    return call.replace(payload={**call.payload, field: value})


def _without(call: Call, field: str) -> Call:
    if field not in call.payload:
        return call
    return call.replace(payload={name: value for name, value in call.payload.items() if name != field})


def _with_version(base_url: Any) -> Any:
    """The URL, with "/v1" where it names a host only. What is none is refused elsewhere."""
    if not isinstance(base_url, str):
        return base_url
    place, mark, query = base_url.partition("?")
    host = place.partition("://")[2].rstrip("/")
    return f"{place.rstrip('/')}/v1{mark}{query}" if host and "/" not in host else base_url

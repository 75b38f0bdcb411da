"""`HTTPEndpoint`: a server that speaks OpenAI's (or Anthropic's) HTTP, reached through a ConnectionPool."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, cast
from urllib.parse import parse_qsl, urlsplit

import msgspec

from llmmw.answer import NO_USAGE, usage_of
from llmmw.call import Call, Outcome, Reply
from llmmw.endpoints.answers import AnswerStream, as_stream
from llmmw.endpoints.base import counted
from llmmw.endpoints.batching import generate_batch
from llmmw.env import Env
from llmmw.errors import ConfigError, ProtocolError, UpstreamError, bare
from llmmw.keys.identity import Asker, asker_of
from llmmw.pool import ConnectionPool
from llmmw.pool.guard import Guard, check_headers, check_url, host_names, is_loopback, origin_of
from llmmw.settings import accepting, instance, switch, text
from llmmw.wire import HOP_BY_HOP, PATHS, HTTPRequest, read_any_answer, url_of, without_query
from llmmw.wire.secrets import Secrets, secrets_of
from llmmw.wire.sse import StreamWatch

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from llmmw.pool import BoundPool, Response
    from llmmw.wire import Headers

MAX_ERROR_BYTES = 64 * 1024
"""A refusal is read up to here; what is longer is no message."""
_REDIRECT, _ERROR = 300, 400
_REMEMBERED = 256
_SALT = 8
"""A shorter cache_salt hides nothing: anybody can guess it."""
POOL_EXAMPLE = "ConnectionPool(max_connections=100)"


class HTTPEndpoint:
    """One base URL and one credential.

    Args:
        base_url: "http(s)://host[:port][/prefix]", such as "http://127.0.0.1:8000/v1"; a query is kept and never shown.
        api_key: sent in `key_header`, as a bearer token when that is "authorization".
        key_header: where the server looks for the key ("authorization", "x-api-key", "api-key").
        headers: sent with every call.
        pool: settings of its connections.
        allow_hosts: hosts exempt from the ban on link-local and metadata addresses.
        duplicate_ok: a call may safely arrive twice; default: where the server is this machine.

    A call whose `native` is an HTTPRequest for this endpoint's origin is sent exactly as it is (so whoever changes a
    call's payload must clear `native`). Any other is built from `op` and `payload` with this endpoint's own headers;
    a tuple of headers in `native` is added where the call was meant for this endpoint.

    Raises:
        ConfigError: a URL or header that cannot or must not be used; the message holds no secret.
    """

    @accepting
    def __init__(
        self,
        base_url: str,
        api_key: str | None = None,
        *,
        key_header: str = "authorization",
        headers: Mapping[str, str] | None = None,
        pool: ConnectionPool | None = None,
        allow_hosts: Iterable[str] = (),
        duplicate_ok: bool | None = None,
    ) -> None:
        self._allow_hosts = host_names(allow_hosts)
        self._base_url = base_url
        self._origin, self._name, host = _located(base_url, self._allow_hosts)
        self._secret = "" if api_key is None else text("api_key", api_key, secret=True)
        self._headers = _own_headers(api_key, text("key_header", key_header), headers)
        self._settings = ConnectionPool() if pool is None else instance("pool", pool, ConnectionPool, POOL_EXAMPLE)
        self._duplicate_ok = is_loopback(host) if duplicate_ok is None else switch("duplicate_ok", duplicate_ok)
        self._pool: BoundPool | None = None
        self._env: Env = Env()
        self._urls: dict[str, str] = {}
        self._secrets: dict[int, tuple[Headers, str, Secrets]] = {}

    @property
    def name(self) -> str:
        """scheme://host:port/prefix."""
        return self._name

    @property
    def asker(self) -> Asker:
        """Who asks by its own headers and query, and what of these changes the answer."""
        return asker_of(self._headers, parse_qsl(urlsplit(self._base_url).query, keep_blank_values=True))

    @property
    def capabilities(self) -> frozenset[str]:
        """What layers may rely on: "n" (samples in one request), "idempotent" where a duplicate does no harm."""
        return frozenset({"n", "idempotent"}) if self._duplicate_ok else frozenset({"n"})

    def start(self, env: Env) -> None:
        """The engine's env.

        Raises:
            ConfigError: the endpoint already works for another engine.
        """
        if self._pool is not None and self._env is not env:
            raise ConfigError(f"{self!r} already belongs to another engine; make one HTTPEndpoint for each")
        self._env = env

    async def __call__(self, call: Call, /) -> Reply:
        """Make one attempt.

        Raises:
            UpstreamError: no answer could be obtained, or what came is none.
        """
        try:
            return await counted(self._env, self._name, call, self._attempt)
        except UpstreamError as error:
            # Raised anew from here: the frames below hold the request with its key, and what there was of the answer.
            raise bare(error)  # noqa: B904 — it is the same error

    async def generate_batch(self, calls: Sequence[Call]) -> list[Outcome]:
        """The outcome of each call, in order; jointly where this endpoint says that it takes that (`capabilities`)."""
        return await generate_batch(self, calls, self._env)

    async def _attempt(self, call: Call) -> Reply:
        return await self._sent(call, self._request_for(call))

    async def _sent(self, call: Call, request: HTTPRequest) -> Reply:
        try:
            response = await self._open().request(request, duplicate_ok=self._duplicate_ok, connect_s=call.connect_s)
            if _is_stream(call, response):
                if not call.stream and call.op in PATHS:
                    await response.body.aclose()
                    raise ProtocolError(f"{self._name} answered with a stream where none was asked for")
                watch = StreamWatch(call.op, max_line_bytes=self._settings.max_line_bytes)
                chunks = AnswerStream(response.body, watch, self._name, lambda: self._secrets_of(request))
                return Reply(chunks=chunks, status=response.status, headers=response.headers)
            return await self._whole(call, response, request)
        except UpstreamError as error:
            error.endpoint = error.endpoint or self._name
            error.args = (self._secrets_of(request).hide(error.message),)
            raise

    def _secrets_of(self, request: HTTPRequest) -> Secrets:
        known = self._secrets.get(id(request.headers))
        if known is None or known[0] is not request.headers or known[1] != request.url:
            if len(self._secrets) >= _REMEMBERED:
                self._secrets.clear()
            known = request.headers, request.url, secrets_of(request, self._secret)
            self._secrets[id(request.headers)] = known
        return known[2]

    def _open(self) -> BoundPool:
        pool = self._pool
        if pool is None:
            pool = self._pool = self._settings.open(self._env, allow_hosts=self._allow_hosts)
            pool.warm_up(HTTPRequest("GET", url_of(self._base_url, "/models"), self._headers))
        return pool

    def _request_for(self, call: Call) -> HTTPRequest:
        native = call.native
        # Elsewhere (a fallback asked in place of the caller's server) neither its URL nor its headers belong.
        if isinstance(native, HTTPRequest) and self._is_mine(native.url):
            return native
        url = self._urls.get(call.op)
        if url is None:
            url = url_of(self._base_url, call.op)
            if call.op in PATHS:
                self._urls[call.op] = url
        headers = self._headers
        if isinstance(native, tuple) and native and call.target == self._name:
            added = dict(cast("Headers", native))
            headers = (*(pair for pair in headers if pair[0] not in added), *added.items())
        return HTTPRequest("POST", url, headers, _encoded(call))

    def request(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        headers: Mapping[str, str] | None = None,
        *,
        once: bool = False,
        max_bytes: int = 0,
    ) -> HTTPRequest:
        """A request in this endpoint's own name, to be sent as the `native` of a `direct` call.

        Args:
            method: HTTP method.
            path: below the base URL, with its query.
            body: as it is sent.
            headers: in place of this endpoint's own of the same (lower-case) name.
            once: it must not arrive twice.
            max_bytes: bound of the answer, in place of the pool's.
        """
        where, _, query = path.partition("?")
        url = url_of(self._base_url, where)
        if query:
            url = f"{url}{'&' if '?' in url else '?'}{query}"
        found = tuple({**dict(self._headers), **(headers or {})}.items())
        return HTTPRequest(method, url, found, body, once, max_bytes)

    def _is_mine(self, url: str) -> bool:
        try:
            return origin_of(urlsplit(url)) == self._origin
        except (ValueError, KeyError):
            return False

    async def _whole(self, call: Call, response: Response, request: HTTPRequest) -> Reply:
        status, headers = response.status, response.headers
        if status >= _ERROR:
            # Hidden here, because what a refusal says ends up in messages, attempts and logs.
            hidden = self._secrets_of(request)
            data = hidden.hide_bytes(await response.body.read(MAX_ERROR_BYTES))
            salt = call.payload.get("cache_salt")  # servers quote the whole body that they refuse
            if isinstance(salt, str) and len(salt) >= _SALT:
                data = Secrets(frozenset({salt})).hide_bytes(data)
            return Reply(data=data, status=status, headers=hidden.hide_headers(headers), endpoint=self._name)
        if status >= _REDIRECT and not isinstance(call.native, HTTPRequest):
            await response.body.aclose()
            where = without_query(response.header("location")) or "nowhere"
            raise ProtocolError(f"{self._name} redirects ({status}) to {where}; redirects are not followed")
        data = await response.body.read()
        usage = NO_USAGE
        if call.op in PATHS and status < _REDIRECT:
            found = await read_any_answer(
                call.op, data, endpoint=self._name, content_type=response.header("content-type")
            )
            usage = usage_of(found)
            if call.stream:
                return as_stream(call, data, usage, headers, self._name)
        return Reply(data=data, usage=usage, status=status, headers=headers, endpoint=self._name)

    def rehome(self) -> None:
        """Drop the sockets without waiting."""
        if self._pool is not None:
            self._pool.rehome()

    async def aclose(self) -> None:
        """Wait for calls in flight (at most the pool's `drain_timeout`) and close the connections. Idempotent."""
        if self._pool is not None:
            await self._pool.aclose()

    def gauges(self) -> dict[str, object]:
        """Readings of the connections, from any thread."""
        return {} if self._pool is None else self._pool.gauges()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._name!r})"


def _located(base_url: str, allow_hosts: frozenset[str]) -> tuple[str, str, str]:
    parts = check_url("base_url", base_url, Guard(allow_hosts))
    if parts.fragment:
        raise ConfigError("base_url: a fragment (#...) has no meaning here")
    origin = origin_of(parts)
    return origin, origin + parts.path.rstrip("/"), parts.hostname or ""


def _own_headers(api_key: str | None, key_header: str, extra: Mapping[str, str] | None) -> Headers:
    if extra is not None and not isinstance(extra, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]  # a user's value
        raise ConfigError(f"headers: must be a mapping from names to texts, got a {type(extra).__name__}")
    found = {"content-type": "application/json", "accept": "application/json, text/event-stream"}
    if api_key is not None:
        found[key_header.lower()] = f"Bearer {api_key}" if key_header.lower() == "authorization" else api_key
    check_headers(tuple((extra or {}).items()))
    found.update({name.lower(): value for name, value in (extra or {}).items()})
    headers = tuple(found.items())
    check_headers(headers)
    forbidden = [name for name in found if name in HOP_BY_HOP or name == "content-length"]
    if forbidden:
        raise ConfigError(f"headers: {', '.join(forbidden)} cannot be set; the connection owns it")
    return headers


def _encoded(call: Call) -> bytes:
    payload = call.payload
    if bool(payload.get("stream")) is not call.stream:
        payload = {**payload, "stream": call.stream}
    try:
        return msgspec.json.encode(payload)
    except UnicodeEncodeError:
        # A lone surrogate: the standard library escapes it, and it is the server that must judge.
        return json.dumps(payload, separators=(",", ":")).encode("ascii")
    except (TypeError, RecursionError) as error:
        raise ConfigError(f"the call's payload cannot be written as JSON: {type(error).__name__}: {error}") from None


def _is_stream(call: Call, response: Response) -> bool:
    if response.status >= _REDIRECT:
        return False
    kind = response.header("content-type").partition(";")[0].strip().lower()
    return kind == "text/event-stream" or (call.stream and call.op not in PATHS and kind != "application/json")

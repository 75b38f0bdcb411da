"""The server: sockets, routes, and the path of one request."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final

from aiohttp import ClientError, web

from .chat import batch, chat
from .completions import complete
from .config import ServerConfig
from .control import bounds, control
from .core import Core
from .damage import HARMLESS, REPLACING, damaged, instead
from .embeddings import embed, tokenize
from .errors import ApiError, unauthorized
from .exchange import Answer, Exchange, Plain
from .faults import FaultRule
from .messages import messages
from .metrics import load_header
from .offline import offline_route
from .responses import responses
from .send import plain, streamed
from .side import not_allowed, refusal, side
from .stats import Record

Route = Callable[[Exchange], Awaitable[Answer]]

ROUTES: Final[Mapping[str, Route]] = {
    "/v1/chat/completions": chat,
    "/v1/chat/completions/batch": batch,
    "/v1/completions": complete,
    "/v1/embeddings": embed,
    "/v1/messages": messages,
    "/v1/responses": responses,
    "/tokenize": tokenize,
}

TELL_LOAD: Final = frozenset({"/v1/chat/completions", "/v1/completions"})
"""Where vLLM answers with the load header, and only whole answers: no stream, no batch, no refusal."""


class _Listener(web.Server):
    """aiohttp's server, counting connections."""

    def __init__(self, core: Core, handler: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]) -> None:
        limit = core.config.max_body_bytes
        loop = asyncio.get_running_loop()

        def make(message: Any, payload: Any, protocol: Any, writer: Any, task: Any) -> web.BaseRequest:
            return web.BaseRequest(message, payload, protocol, writer, task, loop, client_max_size=limit)

        super().__init__(
            handler,
            request_factory=make,
            handler_cancellation=True,
            access_log=None,
            keepalive_timeout=core.config.keepalive_s,
            lingering_time=0.0,
        )
        self._core = core

    def connection_lost(self, handler: Any, exc: BaseException | None = None) -> None:
        super().connection_lost(handler, exc)
        self._core.stats.disconnected(id(handler))
        self._core.notify()


class ModelServer:
    """An OpenAI-shaped server with made-up, deterministic answers. It is never a model.

    Use ``async with running_server(config) as server``; ``start`` and ``stop`` are for other lifetimes.
    """

    def __init__(self, config: ServerConfig | None = None) -> None:
        self.core = Core(config or ServerConfig())
        self.port = 0
        self._server: asyncio.Server | None = None
        self._listener: _Listener | None = None
        self._tasks: set[asyncio.Task[Any]] = set()

    @property
    def config(self) -> ServerConfig:
        """The settings in force."""
        return self.core.config

    @property
    def url(self) -> str:
        """``http://host:port``, without a slash."""
        host = self.config.host
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"

    @property
    def base_url(self) -> str:
        """What SDKs call ``base_url``: the url with ``/v1``."""
        return self.url + "/v1"

    async def start(self) -> None:
        """Listen; OSError when the port is taken."""
        self._listener = _Listener(self.core, self._handle)
        loop = asyncio.get_running_loop()
        config = self.config
        self._server = await loop.create_server(self._listener, config.host, config.port, backlog=4096)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Stop listening, end requests under way, close connections."""
        server, self._server = self._server, None
        listener, self._listener = self._listener, None
        if server is not None:
            server.close()
        for task in [*self._tasks]:
            task.cancel()
        if self._tasks:
            await asyncio.wait([*self._tasks])
        if listener is not None:
            listener.pre_shutdown()  # idle connections end at once
            await listener.shutdown(0.05)
            await asyncio.sleep(0)  # transports report their end
        await self.core.engine.aclose()

    def stats(self, requests: int = 200) -> dict[str, Any]:
        """The control plane's statistics with at most that many request summaries."""
        return self.core.report(requests)

    def reset(self) -> None:
        """Start counters, draws, limits and prefix cache afresh."""
        self.core.reset()

    def configure(self, **options: Any) -> ServerConfig:
        """Change settings while running; ValueError names what is wrong."""
        return self.core.configure(options)

    def add_fault(self, rule: FaultRule) -> str:
        """Arm a fault rule; its id."""
        return self.core.faults.add(rule)

    def clear_faults(self) -> None:
        """Forget all fault rules."""
        self.core.configure({"faults": []})

    async def wait(
        self,
        *,
        at_least: Mapping[str, float] | None = None,
        at_most: Mapping[str, float] | None = None,
        timeout_s: float = 60.0,
    ) -> dict[str, Any]:
        """Wait until dotted statistics are within bounds (``at_least={"engine.waiting": 3}``), else TimeoutError."""
        if not await self.core.wait(bounds(at_least or {}, at_most or {}), timeout_s):
            raise TimeoutError(f"after {timeout_s} s: {self.core.report(0)}")
        return self.core.report(0)

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        path = request.raw_path.partition("?")[0]
        route = ROUTES.get(path)
        if route is None:
            offline = offline_route(request.method, request.raw_path, request.headers.get("Content-Type", ""))
            if offline is not None:
                name, answer = offline
                return await self._counted(answer, request, name)
            if path.startswith("/_control/"):
                return await control(self.core, request, path)
            return side(self.core, request)
        if request.method != "POST":
            return not_allowed()
        return await self._counted(route, request, path)

    async def _counted(self, route: Route, request: web.BaseRequest, path: str) -> web.StreamResponse:
        """Serve a model call between its first and last entry in the statistics."""
        core = self.core
        record = core.stats.begin(path, id(request.protocol))
        core.notify()
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            return await self._serve(route, request, record)
        except (ConnectionError, ClientError):
            return web.Response()  # the client is gone; aiohttp notices when it writes this
        except Exception:
            record.outcome = "crashed"
            raise
        finally:
            self._tasks.discard(task)
            core.stats.end(record, "aborted" if record.outcome == "open" else record.outcome)
            core.notify()

    async def _serve(self, route: Route, request: web.BaseRequest, record: Record) -> web.StreamResponse:
        """Answer one request and say in the record how that went."""
        core = self.core
        rule: FaultRule | None = None
        try:
            body, key = await self._received(request, record)
            if core.faults:
                rule = core.faults.pick(record.route, body, core.stats.now_s())
            if rule is not None:
                record.fault = rule.id
                if rule.kind in REPLACING:
                    response = await instead(rule, request)
                    record.status = response.status
                    record.outcome = f"http_{rule.status}" if rule.kind == "status" else "broken"
                    return response
            answer = await route(Exchange(core, record, body, key))
        except ApiError as error:
            if error.status == 429:  # noqa: PLR2004 — only limits refuse with it
                core.stats.refused_by_limit += 1
            answer = refusal(core.config, error, record.route)
        record.status = answer.status if isinstance(answer, Plain) else 200
        wanted = request.headers.get("endpoint-load-metrics-format")
        if wanted and isinstance(answer, Plain) and _outcome(record.status) == "ok" and record.route in TELL_LOAD:
            answer.headers = {**answer.headers, **load_header(core, wanted)}
        if rule is not None:
            response = await damaged(rule, request, answer)
            record.outcome = _outcome(record.status) if rule.kind in HARMLESS else "broken"
            return response
        response = plain(answer) if isinstance(answer, Plain) else await streamed(request, answer)
        record.outcome = _outcome(record.status)
        return response

    async def _received(self, request: web.BaseRequest, record: Record) -> tuple[bytes, str]:
        """The body and the API key, both acceptable."""
        config, headers = self.config, request.headers
        record.request_id = headers.get("X-Request-Id", "")
        key = headers.get("Authorization", "").removeprefix("Bearer ") or headers.get("x-api-key", "")
        record.key = key[-4:]
        if config.log_headers:
            record.headers = dict(headers)
        try:
            body = await request.read()
        except web.HTTPRequestEntityTooLarge:
            raise ApiError(413, f"Request body larger than {config.max_body_bytes} bytes.") from None
        if config.log_body_bytes:
            record.body = body[: config.log_body_bytes].decode("utf-8", "replace")
        if config.api_keys and key not in config.api_keys and record.route.startswith("/v1/"):
            raise unauthorized()
        is_json = headers.get("Content-Type", "").startswith("application/json")
        if request.method == "POST" and record.route != "/v1/files" and not is_json:
            raise ApiError(400, "Unsupported Media Type: Only 'application/json' is allowed", kind="Bad Request")
        return body, key


def _outcome(status: int) -> str:
    return "ok" if status < 400 else f"http_{status}"  # noqa: PLR2004 — HTTP errors begin there


@asynccontextmanager
async def running_server(config: ServerConfig | None = None) -> AsyncGenerator[ModelServer]:
    """A server on the running loop, stopped at the end of the block."""
    server = ModelServer(config)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()

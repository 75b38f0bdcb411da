"""`ConnectionPool`: how connections are made and kept, as settings. `bound.py` is what runs."""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING

from llmmw.errors import ConfigError
from llmmw.pool.bound import BoundPool
from llmmw.pool.engines import ENGINES, check_installed
from llmmw.pool.guard import Guard
from llmmw.settings import choice, positive_seconds, seconds, settings, whole

if TYPE_CHECKING:
    from collections.abc import Iterable

    from llmmw.env import Env


_TIMEOUTS = (
    "pool_timeout", "connect_timeout", "write_timeout", "first_byte_timeout", "chunk_timeout", "total_timeout",
)  # fmt: skip


@settings
class ConnectionPool:
    """How connections are made and kept.

    Args:
        engine: "aiohttp" (default), "httpx", "httpx2" or "pyreqwest".
        max_connections: requests on the wire at once; more wait their turn, without a time limit of their own. Keep
            it at or above the limiter's concurrency, so that the limiter queues (by priority) and not the pool.
        keepalive_expiry: seconds an idle connection is kept; below the server's own limit (vLLM: 5 s).
        max_connection_age: seconds after which connections are replaced, so that a changed DNS entry is noticed;
            None: never.
        prewarm: connections opened when the first call comes.
        pool_timeout: seconds to wait for one of `max_connections` to come free; None (as below): only `Timeout` and
            `Deadline` limit. Whoever waits in vain gets PoolTimeout: nothing was sent.
        connect_timeout: seconds for name resolution, TCP and TLS.
        write_timeout: seconds for which the server may take nothing of a request (not with engine "pyreqwest").
        first_byte_timeout: seconds from having a slot to the head of the response.
        chunk_timeout: seconds between two pieces of a body.
        total_timeout: seconds from having a slot to the end of the body.
        drain_timeout: seconds that closing waits for requests in flight.
        retry_on_stale: repeat any request once when its kept-alive connection turns out dead before a byte came back.
            Without it only requests whose duplicate does no harm are repeated (the server is this machine, or GET).
        max_response_bytes: bound of a decoded body.
        max_line_bytes: bound of one server-sent event.
        verify: check TLS certificates, or an `ssl.SSLContext`.
        trust_env: use HTTP_PROXY and its relatives (but no netrc), and SSL_CERT_FILE.
        http2: speak HTTP/2 where the server's TLS offers it; otherwise, and through a proxy, HTTP/1.1.

    Raises:
        ConfigError: a value is out of range, or the engine cannot do what is asked.
    """

    engine: str = "aiohttp"
    max_connections: int = 512
    keepalive_expiry: float | str = 4.0
    max_connection_age: float | str | None = 600.0
    prewarm: int = 0
    pool_timeout: float | str | None = None
    connect_timeout: float | str | None = 10.0
    write_timeout: float | str | None = None
    first_byte_timeout: float | str | None = None
    chunk_timeout: float | str | None = None
    total_timeout: float | str | None = None
    drain_timeout: float | str = 10.0
    retry_on_stale: bool = False
    max_response_bytes: int = 64 * 1024 * 1024
    max_line_bytes: int = 8 * 1024 * 1024
    verify: bool | ssl.SSLContext = True
    trust_env: bool = False
    http2: bool = False

    def __post_init__(self) -> None:
        choice("ConnectionPool(engine=)", self.engine, ENGINES)
        check_installed(self.engine, http2=self.http2)
        for name in ("max_connections", "max_response_bytes", "max_line_bytes"):
            whole(f"ConnectionPool({name}=)", getattr(self, name))
        whole("ConnectionPool(prewarm=)", self.prewarm, low=0, high=self.max_connections)
        seconds("ConnectionPool(drain_timeout=)", self.drain_timeout)
        positive_seconds("ConnectionPool(keepalive_expiry=)", self.keepalive_expiry)
        for name in (*_TIMEOUTS, "max_connection_age"):
            value = getattr(self, name)
            if value is not None:
                positive_seconds(f"ConnectionPool({name}=)", value)
        if not isinstance(self.verify, bool | ssl.SSLContext):  # pyright: ignore[reportUnnecessaryIsInstance]  # a user's value
            raise ConfigError(f"ConnectionPool(verify={self.verify!r}): must be True, False or an ssl.SSLContext")
        if self.write_timeout is not None and self.engine == "pyreqwest":
            raise ConfigError(
                'ConnectionPool(write_timeout=): engine="pyreqwest" cannot bound it; use engine="aiohttp"'
            )
        if not isinstance(self.verify, bool) and self.engine == "pyreqwest":
            raise ConfigError('ConnectionPool(verify=): engine="pyreqwest" takes True or False, no ssl.SSLContext')

    def open(self, env: Env, *, allow_hosts: Iterable[str] = ()) -> BoundPool:
        """Connections for one engine; none is made before the first request.

        Args:
            env: clock and event sinks.
            allow_hosts: names or addresses exempt from the ban on link-local and metadata addresses.
        """
        return BoundPool(self, env, Guard(frozenset(host.lower() for host in allow_hosts)))

"""llmmw: composable caching and pooling middleware for LLM calls.

    import llmmw

    @llmmw.middleware(cache_ttl=300, rpm=600, tpm=200_000, concurrency=64)
    async def ask(prompt: str) -> str: ...

    async with llmmw.Client("http://127.0.0.1:8000/v1") as client:
        reply = await client.chat([{"role": "user", "content": "hi"}], model="m")

The names below load on first use, so `import llmmw` stays light.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "llmmw.answer": ("Usage",),
    "llmmw.call": ("Attempt", "Call", "Context", "Handler", "Outcome", "Reply", "using"),
    "llmmw.edges.client": ("Client",),
    "llmmw.edges.function": ("middleware",),
    "llmmw.edges.httpx": ("httpx_client", "httpx_sync_client"),
    "llmmw.edges.httpx2": ("httpx2_client", "httpx2_sync_client"),
    "llmmw.edges.sdk": ("unwrap_client", "wrap_client"),
    "llmmw.edges.sync": ("SyncClient",),
    "llmmw.endpoints.replicas": ("Replica",),
    "llmmw.endpoints.vllm": ("VLLMEndpoint",),
    "llmmw.endpoints.vllm_engine": ("VLLMEngine",),
    "llmmw.engine": ("Engine",),
    "llmmw.env": ("Env",),
    "llmmw.errors": (
        "AllEndpointsFailed", "AmbiguousOutcome", "CircuitOpen", "Closed", "ConfigError", "ConnectionFailed",
        "DeadlineExceeded", "LLMMWError", "MissingExtra", "OrderError", "ProtocolError", "QueueFull", "RateLimited",
        "Refused", "ResponseTooLarge", "StaleConnection", "StatusError", "StreamInterrupted", "TruncatedStream",
        "UpstreamError", "UpstreamTimeout",
    ),
    "llmmw.layers.balance": ("Balancer",),
    "llmmw.layers.base": ("Bound", "Layer"),
    "llmmw.layers.batch": ("Batcher",),
    "llmmw.layers.breaker": ("CircuitBreaker",),
    "llmmw.layers.cache": ("TTLCache",),
    "llmmw.layers.coalesce": ("Coalescer",),
    "llmmw.layers.deadline": ("Deadline",),
    "llmmw.layers.limit": ("RateLimiter",),
    "llmmw.layers.retry": ("Retry",),
    "llmmw.layers.route": ("ErrorRouter", "Fallback"),
    "llmmw.layers.shared": ("SharedCounter",),
    "llmmw.layers.timeout": ("Timeout",),
    "llmmw.offline": ("OfflineBatch",),
    "llmmw.order": ("Role", "Rule"),
    "llmmw.pool": ("ConnectionPool",),
    "llmmw.stack": ("Stack",),
}  # fmt: skip
_NEED_HTTPX2 = ("httpx2_client", "httpx2_sync_client")
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

if TYPE_CHECKING:
    from llmmw.answer import Usage as Usage
    from llmmw.call import Attempt as Attempt
    from llmmw.call import Call as Call
    from llmmw.call import Context as Context
    from llmmw.call import Handler as Handler
    from llmmw.call import Outcome as Outcome
    from llmmw.call import Reply as Reply
    from llmmw.call import using as using
    from llmmw.edges.client import Client as Client
    from llmmw.edges.function import middleware as middleware
    from llmmw.edges.httpx import httpx_client as httpx_client
    from llmmw.edges.httpx import httpx_sync_client as httpx_sync_client
    from llmmw.edges.httpx2 import httpx2_client as httpx2_client
    from llmmw.edges.httpx2 import httpx2_sync_client as httpx2_sync_client
    from llmmw.edges.sdk import unwrap_client as unwrap_client
    from llmmw.edges.sdk import wrap_client as wrap_client
    from llmmw.edges.sync import SyncClient as SyncClient
    from llmmw.endpoints.replicas import Replica as Replica
    from llmmw.endpoints.vllm import VLLMEndpoint as VLLMEndpoint
    from llmmw.endpoints.vllm_engine import VLLMEngine as VLLMEngine
    from llmmw.engine import Engine as Engine
    from llmmw.env import Env as Env
    from llmmw.errors import AllEndpointsFailed as AllEndpointsFailed
    from llmmw.errors import AmbiguousOutcome as AmbiguousOutcome
    from llmmw.errors import CircuitOpen as CircuitOpen
    from llmmw.errors import Closed as Closed
    from llmmw.errors import ConfigError as ConfigError
    from llmmw.errors import ConnectionFailed as ConnectionFailed
    from llmmw.errors import DeadlineExceeded as DeadlineExceeded
    from llmmw.errors import LLMMWError as LLMMWError
    from llmmw.errors import MissingExtra as MissingExtra
    from llmmw.errors import OrderError as OrderError
    from llmmw.errors import ProtocolError as ProtocolError
    from llmmw.errors import QueueFull as QueueFull
    from llmmw.errors import RateLimited as RateLimited
    from llmmw.errors import Refused as Refused
    from llmmw.errors import ResponseTooLarge as ResponseTooLarge
    from llmmw.errors import StaleConnection as StaleConnection
    from llmmw.errors import StatusError as StatusError
    from llmmw.errors import StreamInterrupted as StreamInterrupted
    from llmmw.errors import TruncatedStream as TruncatedStream
    from llmmw.errors import UpstreamError as UpstreamError
    from llmmw.errors import UpstreamTimeout as UpstreamTimeout
    from llmmw.layers.balance import Balancer as Balancer
    from llmmw.layers.base import Bound as Bound
    from llmmw.layers.base import Layer as Layer
    from llmmw.layers.batch import Batcher as Batcher
    from llmmw.layers.breaker import CircuitBreaker as CircuitBreaker
    from llmmw.layers.cache import TTLCache as TTLCache
    from llmmw.layers.coalesce import Coalescer as Coalescer
    from llmmw.layers.deadline import Deadline as Deadline
    from llmmw.layers.limit import RateLimiter as RateLimiter
    from llmmw.layers.retry import Retry as Retry
    from llmmw.layers.route import ErrorRouter as ErrorRouter
    from llmmw.layers.route import Fallback as Fallback
    from llmmw.layers.shared import SharedCounter as SharedCounter
    from llmmw.layers.timeout import Timeout as Timeout
    from llmmw.offline import OfflineBatch as OfflineBatch
    from llmmw.order import Role as Role
    from llmmw.order import Rule as Rule
    from llmmw.pool import ConnectionPool as ConnectionPool
    from llmmw.stack import Stack as Stack


def __getattr__(name: str) -> Any:
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module 'llmmw' has no attribute {name!r}")
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    # What reads every name, such as help(), must work without the extras too.
    absent = () if find_spec("httpx2") else _NEED_HTTPX2
    return sorted({*globals(), *_HOME_OF} - {*absent})


# `from llmmw import *` must work without the extras, so what needs one is left to its full name.
__all__ = sorted({"__version__", *_HOME_OF} - {*_NEED_HTTPX2})  # noqa: PLE0605 — one table of names  # pyright: ignore[reportUnsupportedDunderAll]  # the table above is the one list

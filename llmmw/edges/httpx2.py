"""The stack as an HTTP client of httpx2, for SDKs that take one (`http_client=`)."""

from __future__ import annotations

from typing import Any, ClassVar

from llmmw.edges import transport as edge
from llmmw.errors import MissingExtra

try:
    import httpx2
except ImportError as error:
    raise MissingExtra("httpx2 is not installed: pip install 'llmmw[httpx2]'") from error


class AsyncBody(edge.AsyncBody, httpx2.AsyncByteStream):
    """A streamed answer as httpx2 reads it."""


class SyncBody(edge.SyncBody, httpx2.SyncByteStream):
    """The same, read by plain code."""


class _AsyncTransport(edge.AsyncTransport, httpx2.AsyncBaseTransport):
    lib: ClassVar[Any] = httpx2
    body: ClassVar[Any] = AsyncBody


class _SyncTransport(edge.SyncTransport, httpx2.BaseTransport):
    lib: ClassVar[Any] = httpx2
    body: ClassVar[Any] = SyncBody


class AsyncClient(edge.StackClient, httpx2.AsyncClient):
    """httpx2's async client over a stack; see `StackClient`."""

    made_by: ClassVar[str] = "httpx2_client"
    transport_class: ClassVar[type[Any]] = _AsyncTransport


class Client(edge.StackClient, httpx2.Client):
    """httpx2's synchronous client over a stack; see `StackClient`."""

    made_by: ClassVar[str] = "httpx2_sync_client"
    transport_class: ClassVar[type[Any]] = _SyncTransport


httpx2_client = AsyncClient
httpx2_sync_client = Client

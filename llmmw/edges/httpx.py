"""The stack as an HTTP client of httpx, for SDKs that take one (`http_client=`)."""

from __future__ import annotations

from typing import Any, ClassVar

import httpx

from llmmw.edges import transport as edge


class AsyncBody(edge.AsyncBody, httpx.AsyncByteStream):
    """A streamed answer as httpx reads it."""


class SyncBody(edge.SyncBody, httpx.SyncByteStream):
    """The same, read by plain code."""


class _AsyncTransport(edge.AsyncTransport, httpx.AsyncBaseTransport):
    lib: ClassVar[Any] = httpx
    body: ClassVar[Any] = AsyncBody


class _SyncTransport(edge.SyncTransport, httpx.BaseTransport):
    lib: ClassVar[Any] = httpx
    body: ClassVar[Any] = SyncBody


class AsyncClient(edge.StackClient, httpx.AsyncClient):
    """httpx's async client over a stack; see `StackClient`."""

    made_by: ClassVar[str] = "httpx_client"
    transport_class: ClassVar[type[Any]] = _AsyncTransport


class Client(edge.StackClient, httpx.Client):
    """httpx's synchronous client over a stack; see `StackClient`."""

    made_by: ClassVar[str] = "httpx_sync_client"
    transport_class: ClassVar[type[Any]] = _SyncTransport


httpx_client = AsyncClient
httpx_sync_client = Client

"""The stack as an HTTP client of httpx, for SDKs that take one (`http_client=`)."""

from __future__ import annotations

from typing import Any, ClassVar

import httpx

from llmmw.edges import transport as edge


class _AsyncBody(edge.AsyncBody, httpx.AsyncByteStream):
    pass


class _SyncBody(edge.SyncBody, httpx.SyncByteStream):
    pass


class _AsyncTransport(edge.AsyncTransport, httpx.AsyncBaseTransport):
    lib: ClassVar[Any] = httpx
    body: ClassVar[Any] = _AsyncBody


class _SyncTransport(edge.SyncTransport, httpx.BaseTransport):
    lib: ClassVar[Any] = httpx
    body: ClassVar[Any] = _SyncBody


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

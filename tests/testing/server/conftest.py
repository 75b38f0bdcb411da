from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack

import aiohttp
import pytest

from llmmw.testing.server import ModelServer, ServerConfig, running_server

CHAT = "/v1/chat/completions"


def said(text: str, **more: object) -> dict:
    return {"messages": [{"role": "user", "content": text}], "temperature": 0, **more}


@pytest.fixture
async def serve() -> AsyncGenerator[Callable, None]:
    """``server = await serve(rpm=3)``: a server on this loop, stopped at the end."""
    async with AsyncExitStack() as stack:

        async def start(**options: object) -> ModelServer:
            return await stack.enter_async_context(running_server(ServerConfig(**options)))

        yield start


@pytest.fixture
async def http() -> AsyncGenerator[aiohttp.ClientSession, None]:
    async with aiohttp.ClientSession() as session:
        yield session


@pytest.fixture
def post(http: aiohttp.ClientSession) -> Callable:
    """``status, body, headers = await post(server, path, body)``; the body as JSON where it is JSON."""

    async def send(server: ModelServer, path: str, body: object, **options: object) -> tuple:
        async with http.post(server.url + path, json=body, **options) as response:
            kind = response.headers.get("Content-Type", "")
            content = await (response.json() if kind.startswith("application/json") else response.text())
            return response.status, content, response.headers

    return send

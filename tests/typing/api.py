"""The public types, checked by pyright and mypy (`make check`); never run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, assert_type

import llmmw
from llmmw.edges.requests import Piece

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator


@llmmw.middleware(cache_ttl="10m")
async def ask(prompt: str, *, loud: bool = False) -> str:
    return prompt if not loud else prompt.upper()


@llmmw.middleware
def plain(prompt: str) -> int:
    return len(prompt)


@llmmw.middleware(rpm=60)
async def words(text: str) -> AsyncGenerator[str]:
    yield text


@llmmw.Stack().wrap
async def wrapped(prompt: str) -> float:
    return float(len(prompt))


async def decorated_functions_keep_their_signature() -> None:
    assert_type(await ask("x", loud=True), str)
    assert_type(plain("x"), int)
    assert_type(ask.get_performance_stats(), dict[str, Any])
    assert_type(ask.invalidate("x"), int)
    assert_type(ask.invalidate_tag("x"), int)
    assert_type(ask.invalidate_tenant("x"), int)
    assert_type(await wrapped("x"), float)
    async for word in words("x"):
        assert_type(word, str)


async def the_client() -> None:
    stack = llmmw.Stack.recommended(cache_ttl=300)
    assert_type(stack.without(llmmw.Role.CACHE), llmmw.Stack)
    async with llmmw.Client("http://127.0.0.1:8000/v1", stack=stack) as client:
        assert_type(client, llmmw.Client)
        reply = await client.chat([{"role": "user", "content": "hi"}], model="m")
        assert_type(reply, llmmw.Reply)
        assert_type(reply.text, str)
        assert_type(reply.usage, llmmw.Usage)
        assert_type(await client.generate_batch(model="m", prompts=["a"]), list[llmmw.Outcome])
        async for piece in client.stream(model="m", messages="hi"):
            assert_type(piece, Piece)


def the_sync_client() -> None:
    several = llmmw.SyncClient([llmmw.Replica("http://127.0.0.1:8000/v1", weight=2), "http://127.0.0.1:8001/v1"])
    assert_type(several.explain(), str)
    with llmmw.SyncClient("http://127.0.0.1:8000/v1") as client, llmmw.using(agent="a") as context:
        assert_type(context, llmmw.Context)
        assert_type(client.chat("hi", model="m"), llmmw.Reply)

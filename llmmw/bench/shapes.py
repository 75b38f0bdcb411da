"""The shapes in which N questions are asked: by bare clients, by llmmw, one by one, at once, and as one request."""

from __future__ import annotations

import asyncio
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import TYPE_CHECKING, Any

import msgspec

from llmmw.answer import items, usage_of
from llmmw.env import SYSTEM_CLOCK
from llmmw.errors import MissingExtra, ProtocolError, StatusError
from llmmw.stack import Stack
from llmmw.wire.secrets import Secrets

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence

    from llmmw.call import Outcome
    from llmmw.edges.client import Client
    from llmmw.endpoints.openai import HTTPEndpoint

    Ask = Callable[[str, int], Awaitable[int]]
    """Prompt and max_tokens to completion tokens."""
    AskAll = Callable[[Sequence[str], int, "Tally"], Awaitable[None]]
    """Ask all prompts, each bounded by max_tokens, and tell the tally of each."""
    Open = Callable[["Target"], AbstractAsyncContextManager[AskAll]]

_REFUSED = 400
_SAID = 300
"""Characters kept of what a server says about a refusal."""


class Target(msgspec.Struct, frozen=True):
    """Whom to ask, and how."""

    base_url: str
    model: str
    api_key: str | None = None
    max_tokens: int = 64
    timeout_s: float = 120.0
    """For each call."""
    concurrency: int | str | None = None
    """Of llmmw's limiter; None: what is recommended for the server."""
    vllm: bool = False
    """Whether llmmw asks it as a vLLM server."""

    def __repr__(self) -> str:
        return f"Target({self.base_url!r}, {self.model!r})"


class Tally:
    """What became of the calls of one wave.

    Args:
        api_key: not to be in what is said about them; bare clients quote what a server says.
    """

    def __init__(self, api_key: str | None = None) -> None:
        self._secrets = Secrets(frozenset({api_key} if api_key else ()))
        self.latencies_s: list[float] = []
        self.tokens = 0
        self.failures = 0
        self.said = ""
        self.began = SYSTEM_CLOCK.monotonic()

    def answered(self, count: int, tokens: int = 0, *, since: float | None = None) -> None:
        """So many answers are there now."""
        latency = SYSTEM_CLOCK.monotonic() - (self.began if since is None else since)
        self.latencies_s += [latency] * count
        self.tokens += tokens

    def failed(self, error: BaseException, count: int = 1) -> None:
        """So many calls have no answer."""
        self.failures += count
        self.said = self.said or " ".join(self._secrets.hide(f"{type(error).__name__}: {error}").split())[:_SAID]


class Shape(msgspec.Struct, frozen=True):
    """One way to ask."""

    name: str
    text: str
    open: Open
    sequential: bool = False
    """N calls take N times as long as one, so that many need not be measured."""


def _each(ask: Ask, *, sequential: bool = False) -> AskAll:
    async def clocked(prompt: str, max_tokens: int, tally: Tally) -> None:
        began = SYSTEM_CLOCK.monotonic()
        try:
            tokens = await ask(prompt, max_tokens)
        except Exception as error:  # noqa: BLE001 — whichever client it is: a call without an answer is counted
            tally.failed(error)
        else:
            tally.answered(1, tokens, since=began)

    async def ask_all(prompts: Sequence[str], max_tokens: int, tally: Tally) -> None:
        if sequential:
            for prompt in prompts:
                await clocked(prompt, max_tokens, tally)
        else:
            await asyncio.gather(*(clocked(prompt, max_tokens, tally) for prompt in prompts))

    return ask_all


def _whole(ask: Callable[[Sequence[str], int], Awaitable[int]]) -> AskAll:
    """All in one request: they are answered together, or not at all."""

    async def ask_all(prompts: Sequence[str], max_tokens: int, tally: Tally) -> None:
        try:
            tokens = await ask(prompts, max_tokens)
        except Exception as error:  # noqa: BLE001 — as above
            tally.failed(error, len(prompts))
        else:
            tally.answered(len(prompts), tokens)

    return ask_all


# ── bare clients ─────────────────────────────────────────────────────────────────────────────────────────────────────


@asynccontextmanager
async def _posting(target: Target) -> AsyncGenerator[Callable[[str, dict[str, Any]], Awaitable[dict[str, Any]]]]:
    """Bare aiohttp, without its limit of 100 connections, so that all calls are in flight."""
    import aiohttp  # noqa: PLC0415 — heavy, and only here

    from llmmw.endpoints.vllm import KEEPALIVE_S  # noqa: PLC0415 — likewise

    headers = {} if target.api_key is None else {"authorization": f"Bearer {target.api_key}"}
    timeout = aiohttp.ClientTimeout(total=target.timeout_s)
    base = target.base_url.rstrip("/")
    async with aiohttp.ClientSession(
        # Its own 15 s are more than vLLM's 5 s: a wave after a pause would meet connections that are just being closed.
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_S),
        headers=headers,
        timeout=timeout,
    ) as session:

        async def post(path: str, body: dict[str, Any]) -> dict[str, Any]:
            body = {"model": target.model, "temperature": 0, **body}
            async with session.post(f"{base}/{path}", json=body) as response:
                if response.status >= _REFUSED:
                    raise StatusError(f"{response.status}: {await response.text()}", status=response.status)
                found: dict[str, Any] = await response.json()
                return found

        yield post


def _tokens_of(answer: dict[str, Any], expected: int) -> int:
    """Completion tokens.

    Raises:
        ProtocolError: another number of answers.
    """
    count = len(items(answer.get("choices")))
    if count != expected:
        raise ProtocolError(f"{count} answers to {expected} questions")
    return usage_of(answer).output_tokens


def _message(prompt: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}]


def _aiohttp(*, sequential: bool) -> Open:
    @asynccontextmanager
    async def opened(target: Target) -> AsyncGenerator[AskAll]:
        async with _posting(target) as post:

            async def ask(prompt: str, max_tokens: int) -> int:
                return _tokens_of(
                    await post("chat/completions", {"messages": _message(prompt), "max_tokens": max_tokens}), 1
                )

            yield _each(ask, sequential=sequential)

    return opened


@asynccontextmanager
async def _list(target: Target) -> AsyncGenerator[AskAll]:
    async with _posting(target) as post:

        async def ask(prompts: Sequence[str], max_tokens: int) -> int:
            answer = await post("completions", {"prompt": list(prompts), "max_tokens": max_tokens})
            return _tokens_of(answer, len(prompts))

        yield _whole(ask)


@asynccontextmanager
async def _batch(target: Target) -> AsyncGenerator[AskAll]:
    async with _posting(target) as post:

        async def ask(prompts: Sequence[str], max_tokens: int) -> int:
            conversations = [_message(prompt) for prompt in prompts]
            answer = await post("chat/completions/batch", {"messages": conversations, "max_tokens": max_tokens})
            return _tokens_of(answer, len(prompts))

        yield _whole(ask)


@asynccontextmanager
async def _sdk(target: Target) -> AsyncGenerator[AskAll]:
    try:
        import openai  # noqa: PLC0415 — only this comparison needs the SDK
    except ImportError as error:
        raise MissingExtra("the openai SDK is not installed: pip install 'llmmw[demo]'") from error
    key = target.api_key or "none"
    async with openai.AsyncOpenAI(base_url=target.base_url, api_key=key, timeout=target.timeout_s) as client:

        async def ask(prompt: str, max_tokens: int) -> int:
            messages: Any = _message(prompt)
            answer = await client.chat.completions.create(
                model=target.model, messages=messages, max_tokens=max_tokens, temperature=0
            )
            return 0 if answer.usage is None else answer.usage.completion_tokens

        yield _each(ask)


# ── llmmw ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def client_of(target: Target, endpoint: HTTPEndpoint | None = None) -> Client:
    """A client of llmmw with the stack that is recommended; there is no cache, for every prompt is new.

    Args:
        target: as always.
        endpoint: in place of the target's server.

    Raises:
        ConfigError: `concurrency` cannot work.
    """
    from llmmw.edges.client import Client  # noqa: PLC0415 — keeps `--help` quick
    from llmmw.endpoints.openai import HTTPEndpoint  # noqa: PLC0415 — likewise
    from llmmw.endpoints.vllm import VLLMEndpoint  # noqa: PLC0415 — likewise

    if endpoint is None:
        endpoint = (VLLMEndpoint if target.vllm else HTTPEndpoint)(target.base_url, target.api_key)
    options: dict[str, Any] = {"timeout": target.timeout_s, **getattr(endpoint, "recommended", {})}
    if target.concurrency is not None:
        options["concurrency"] = target.concurrency
    return Client(endpoint, model=target.model or None, stack=Stack.recommended(**options))


@asynccontextmanager
async def _client(target: Target) -> AsyncGenerator[AskAll]:
    async with client_of(target) as client:

        async def ask(prompt: str, max_tokens: int) -> int:
            return (await client.chat(_message(prompt), max_tokens=max_tokens, temperature=0)).usage.output_tokens

        yield _each(ask)


@asynccontextmanager
async def _generate_batch(target: Target) -> AsyncGenerator[AskAll]:
    async with client_of(target) as client:
        yield batches(client)


def batches(client: Client) -> AskAll:
    """All prompts as one `generate_batch` of chats."""

    async def ask_all(prompts: Sequence[str], max_tokens: int, tally: Tally) -> None:
        conversations = [_message(prompt) for prompt in prompts]
        outcomes = await client.generate_batch(
            messages=conversations, max_tokens=max_tokens, temperature=0, on_progress=progress_into(tally)
        )
        judge(outcomes, tally)

    return ask_all


def progress_into(tally: Tally) -> Callable[[int, int], None]:
    """For `generate_batch(on_progress=)`: clocks each item."""

    def told(done: int, _: int) -> None:
        tally.answered(done - len(tally.latencies_s))

    return told


def judge(outcomes: Sequence[Outcome], tally: Tally) -> None:
    """Count tokens and failures of a `generate_batch` whose items were clocked."""
    for outcome in outcomes:
        if outcome.error is not None:
            tally.failed(outcome.error)
        elif outcome.reply is not None:
            tally.tokens += outcome.reply.usage.output_tokens


SHAPES: dict[str, Shape] = {
    shape.name: shape
    for shape in (
        Shape("one-by-one", "bare aiohttp, one chat after the other", _aiohttp(sequential=True), sequential=True),
        Shape("sdk", "bare openai SDK, all chats at once", _sdk),
        Shape("aiohttp", "bare aiohttp, all chats at once", _aiohttp(sequential=False)),
        Shape("list", "bare aiohttp, one /completions with a list of prompts", _list),
        Shape("batch", "bare aiohttp, one /chat/completions/batch (vLLM 0.19 and later)", _batch),
        Shape("client", "llmmw Client, all chats at once", _client),
        Shape("generate-batch", "llmmw Client.generate_batch(messages=...)", _generate_batch),
    )
}

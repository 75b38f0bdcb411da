"""The client edge: OpenAI-shaped HTTP against a local vLLM server or a cloud API, through a stack."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Self

from llmmw.call import Outcome, Reply
from llmmw.edges.requests import PieceReader, RequestBuilder, answer_of, prompts_as_requests
from llmmw.endpoints.openai import HTTPEndpoint
from llmmw.errors import ConfigError
from llmmw.settings import accepting, instance, text
from llmmw.stack import Stack
from llmmw.stores.base import Match

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
    from types import TracebackType

    from llmmw.call import Call
    from llmmw.edges.requests import Piece
    from llmmw.engine import Engine
    from llmmw.env import Env
    from llmmw.pool import ConnectionPool

    Progress = Callable[[int, int], object]

MAX_TASKS = 1024
"""Items of a batch in the stack at once; the limiter's `concurrency` is what reaches the server."""


class ClientBase:
    """Settings and lifetime that both clients share.

    Args:
        base_url: such as "http://127.0.0.1:8000/v1".
        api_key: sent as a bearer token; None sends no credential.
        stack: the layers; `Stack.recommended()` by default (no cache: caching is your choice).
        model: used where a call names none.
        headers: sent with every request.
        tenant: whose answers may be shared; by default everybody's with the same credential.
        pool: connection settings.
        allow_hosts: hosts that would otherwise be refused (link-local and cloud metadata addresses).
        env: clock, randomness and sinks, for tests.

    Raises:
        ConfigError: a setting cannot work.
    """

    @accepting
    def __init__(
        self,
        base_url: str,
        api_key: str | None = None,
        *,
        stack: Stack | None = None,
        model: str | None = None,
        headers: Mapping[str, str] | None = None,
        tenant: str | None = None,
        pool: ConnectionPool | None = None,
        allow_hosts: Sequence[str] = (),
        env: Env | None = None,
    ) -> None:
        if stack is not None:
            instance("stack", stack, Stack, "Stack(TTLCache(300), Coalescer())")
        for option, value in (("model", model), ("tenant", tenant)):
            if value is not None:
                text(option, value)
        self.stack = Stack.recommended() if stack is None else stack
        endpoint = HTTPEndpoint(base_url, api_key, headers=headers, allow_hosts=allow_hosts, pool=pool)
        self.engine: Engine = self.stack.bind(endpoint, env=env)
        self.requests = RequestBuilder(
            target=endpoint.name, asker=endpoint.asker, stack=self.stack, model=model, tenant=tenant
        )

    def get_performance_stats(self) -> dict[str, Any]:
        """What the stack did; every key is in the README."""
        return self.engine.get_performance_stats()

    def invalidate(self, *, model: str | None = None, **request: Any) -> int:
        """Forget the stored answer to a request, given as for `chat`, `complete` or `embed`; entries removed."""
        if model is not None:
            request["model"] = model
        return self.engine.invalidate(self.requests.any(request, {}))

    def invalidate_tag(self, tag: str) -> int:
        """Forget every answer stored under `using(tags=tag)`, also one in flight; entries removed from memory."""
        return self.engine.invalidate_tag(tag)

    def invalidate_tenant(self, tenant: str | None = None) -> int:
        """Forget every answer of a tenant; None: of this client's own tenant or credential. Entries removed."""
        if tenant is not None:
            return self.engine.invalidate_tenant(tenant)
        return self.engine.discard(Match("namespace", self.requests.namespace))

    def tick(self) -> None:
        """Every agent of the step has asked: what waits for batch mates goes now."""
        self.engine.tick()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.engine!r})"


class Client(ClientBase):
    """An async client; use it with `async with`, or `await aclose()`.

    Every method takes any further field of the API (tools, response_format, seed, extra_body, ...) and passes it on
    unchanged. `timeout` (seconds or text) is a deadline for the call, as `using(deadline=)`; `extra_headers` are
    added to the request.

    Raises:
        StatusError: the server refused (its message, code and status are on the error).
        Refused: never sent (limit, open circuit, closed), or the deadline passed.
        UpstreamError: no usable answer.
    """

    async def chat(self, messages: object, *, model: str | None = None, **fields: Any) -> Reply:
        """One chat completion; a plain string is one user message."""
        return answer_of(await self.engine.call(self.requests.chat(model, messages, fields)))

    async def complete(self, prompt: object, *, model: str | None = None, **fields: Any) -> Reply:
        """One text completion."""
        return answer_of(await self.engine.call(self.requests.complete(model, prompt, fields)))

    async def embed(self, input: object, *, model: str | None = None, **fields: Any) -> Reply:  # noqa: A002 — the API's own name
        """Embeddings: `reply.body["data"]`."""
        return answer_of(await self.engine.call(self.requests.embed(model, input, fields)))

    async def stream(
        self, messages: object = None, *, model: str | None = None, **request: Any
    ) -> AsyncGenerator[Piece]:
        """A streamed answer to `messages` (or to `prompt=...`), piece by piece as it arrives."""
        if messages is not None:
            request["messages"] = messages
        if model is not None:
            request["model"] = model
        reply = answer_of(await self.engine.call(self.requests.any(request, {}, stream=True)))
        chunks = reply.chunks
        if chunks is None:
            raise RuntimeError("the endpoint answered a stream call without a stream")
        reader = PieceReader()
        try:
            async for chunk in chunks:
                for piece in reader.feed(chunk):
                    yield piece
        finally:
            await chunks.aclose()

    async def generate_batch(
        self,
        *,
        model: str | None = None,
        prompts: Iterable[object] | None = None,
        messages: Iterable[object] | None = None,
        on_progress: Progress | None = None,
        **fields: Any,
    ) -> list[Outcome]:
        """Many completions (or chats, with `messages`) with the same sampling fields.

        Args:
            model: for all of them.
            prompts: texts to complete.
            messages: conversations to answer.
            on_progress: called with (done, total) after each item.
            fields: sampling and other fields, for all of them.

        Returns:
            One Outcome per item, in order; a failed item fails alone.
        """
        if model is not None:
            fields["model"] = model
        requests = prompts_as_requests(prompts, messages)
        return await self._map(requests, None, on_progress, fields)

    async def map(
        self,
        requests: Iterable[Mapping[str, Any]],
        *,
        previous: Sequence[Outcome] | None = None,
        on_progress: Progress | None = None,
        **common: Any,
    ) -> list[Outcome]:
        """Many different requests, each a mapping with `messages`, `prompt` or `input`.

        Args:
            requests: what to ask; keys win over `common`.
            previous: outcomes of an earlier run of the same requests: only what failed is asked again.
            on_progress: called with (done, total) after each item.
            common: fields of all requests.

        Returns:
            One Outcome per request, in order.

        Raises:
            ConfigError: a request is malformed, or `previous` has another length; nothing was sent.
        """
        return await self._map(requests, previous, on_progress, common)

    async def _map(
        self,
        requests: Iterable[Mapping[str, Any]],
        previous: Sequence[Outcome] | None,
        on_progress: Progress | None,
        common: Mapping[str, Any],
    ) -> list[Outcome]:
        calls: list[Call | Outcome] = [self.requests.any(request, common) for request in requests]
        if previous is not None:
            if len(previous) != len(calls):
                raise ConfigError(f"map(previous=): {len(previous)} outcomes for {len(calls)} requests")
            calls = [old if old.ok else call for old, call in zip(previous, calls, strict=True)]
        return await self._gather(calls, on_progress)

    async def _gather(self, calls: Sequence[Call | Outcome], on_progress: Progress | None) -> list[Outcome]:
        outcomes: list[Outcome | None] = [None] * len(calls)
        waiting = iter(enumerate(calls))
        done = 0

        async def work() -> None:
            nonlocal done
            for index, call in waiting:
                outcomes[index] = call if isinstance(call, Outcome) else await self._outcome(call)
                done += 1
                if on_progress is not None:
                    on_progress(done, len(calls))

        async with asyncio.TaskGroup() as group:
            for _ in range(min(MAX_TASKS, len(calls))):
                group.create_task(work())
        return [outcome for outcome in outcomes if outcome is not None]

    async def _outcome(self, call: Call) -> Outcome:
        try:
            return Outcome(reply=answer_of(await self.engine.call(call)))
        except Exception as error:  # noqa: BLE001 — every item's failure is its outcome
            return Outcome(error=error)

    async def aclose(self) -> None:
        """Wait for calls in flight and close every connection. Idempotent, from any loop."""
        await self.engine.aclose()

    async def __aenter__(self) -> Self:
        await self.engine.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.engine.__aexit__(kind, error, traceback)

"""The client edge: OpenAI-shaped HTTP against a local vLLM server or a cloud API, through a stack."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Self, TypeVar

from llmmw.call import Outcome, Reply
from llmmw.edges.many import build_all, outcomes_of, what_failed
from llmmw.edges.requests import PieceReader, RequestBuilder, answer_of, one_of, several
from llmmw.endpoints import endpoint_at
from llmmw.endpoints.replicas import Replica, replicas_of
from llmmw.engine.atwork import AtWork
from llmmw.settings import accepting, instance, text
from llmmw.stack import Stack
from llmmw.stores.base import Match

if TYPE_CHECKING:
    import os
    from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
    from types import TracebackType

    from llmmw.call import Call, Party
    from llmmw.edges.requests import Piece
    from llmmw.endpoints.base import Endpoint
    from llmmw.engine import Engine
    from llmmw.env import Env
    from llmmw.offline import OfflineBatch
    from llmmw.pool import ConnectionPool

    Place = str | Endpoint | Replica
    Progress = Callable[[int, int], object]
    Offline = OfflineBatch | str | os.PathLike[str]

T = TypeVar("T")


class ClientBase(AtWork):
    """Settings and lifetime that both clients share.

    Args:
        base_url: such as "http://127.0.0.1:8000/v1", or an endpoint such as VLLMEndpoint(...), which then has api_key,
            headers, pool and allow_hosts itself. A list of such is a list of replicas (`Replica(url, weight=2)` where
            they are not worth the same): see `Balancer`.
        api_key: sent as a bearer token; None sends no credential.
        stack: the layers; `Stack.recommended()` by default (no cache: caching is your choice), with what the endpoint
            recommends.
        model: used where a call names none.
        headers: sent with every request.
        tenant: whose answers may be shared; by default everybody's with the same credential.
        name: what the cache knows the server or the replicas by, in place of a URL, so that all of them may change. By
            default the first URL by name (numbers by value), in whatever order the replicas are given.
        pool: connection settings.
        allow_hosts: hosts that would otherwise be refused (link-local and cloud metadata addresses).
        env: clock, randomness and sinks, for tests.

    Raises:
        ConfigError: a setting cannot work.
    """

    @accepting
    def __init__(
        self,
        base_url: Place | Sequence[Place],
        api_key: str | None = None,
        *,
        stack: Stack | None = None,
        model: str | None = None,
        headers: Mapping[str, str] | None = None,
        tenant: str | None = None,
        name: str | None = None,
        pool: ConnectionPool | None = None,
        allow_hosts: Sequence[str] = (),
        env: Env | None = None,
    ) -> None:
        if stack is not None:
            instance("stack", stack, Stack, "Stack(TTLCache(300), Coalescer())")
        for option, value in (("model", model), ("tenant", tenant), ("name", name)):
            if value is not None:
                text(option, value)
        at = partial(endpoint_at, api_key=api_key, headers=headers, allow_hosts=allow_hosts, pool=pool)
        self.replicas = found = replicas_of(base_url, at, alias=name or "")
        self.endpoint = found.members[0]
        self.stack = Stack.recommended(**getattr(self.endpoint, "recommended", {})) if stack is None else stack
        self.engine: Engine = self.stack.bind(found, env=env)
        self.requests = RequestBuilder(
            target=found.name, asker=found.asker, stack=self.stack, model=model, tenant=tenant
        )

    def explain(self) -> str:
        """The stack and the endpoints as text."""
        return self.stack.explain(self.replicas)

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
        offline: Offline | None = None,
        **fields: Any,
    ) -> list[Outcome]:
        """Many completions (or chats, with `messages`) with the same sampling fields.

        Each item is a call of its own for the cache, the coalescer and all that judges failures. Where the endpoint
        says that it takes joint requests (`VLLMEndpoint`), those that have to be sent share them, 32 to 128 in each:
        fewer would save nothing. Else, and with tools, n > 1 or seeds that differ, they go side by side.

        Args:
            model: for all of them.
            prompts: texts to complete.
            messages: conversations to answer.
            on_progress: called with (done, total) after each item.
            offline: an OfflineBatch, or the directory of one: handed over as a whole and answered within a day.
            fields: sampling and other fields, for all of them.

        Returns:
            One Outcome per item, in order; a failed item fails alone.

        Raises:
            ConfigError: as `map`.
        """
        if model is not None:
            fields["model"] = model
        name, items = one_of(prompts=prompts, messages=messages)
        return await self._many(items, lambda item: self.requests.any({name: item}, fields), None, on_progress, offline)

    async def map(
        self,
        requests: Iterable[Mapping[str, Any]],
        *,
        previous: Sequence[Outcome] | None = None,
        on_progress: Progress | None = None,
        offline: Offline | None = None,
        **common: Any,
    ) -> list[Outcome]:
        """Many different requests, each a mapping with `messages`, `prompt` or `input`.

        Args:
            requests: what to ask; keys win over `common`. An iterator is read as places become free, so a million
                requests need no more memory than a thousand (their outcomes do).
            previous: outcomes of an earlier run of the same requests: only what failed is asked again.
            on_progress: called with (done, total) after each item; of an iterator, total is how many were read.
            offline: an OfflineBatch, or the directory of one: handed over as a whole and answered within a day.
            common: fields of all requests.

        Returns:
            One Outcome per request, in order.

        Raises:
            ConfigError: a request of a list (with `offline`: any) is malformed, or `previous` has another length;
                nothing was sent. Else a malformed request from an iterator fails alone.
        """
        return await self._many(
            several("map(requests=)", requests, "requests"),
            lambda request: self.requests.any(request, common),
            previous,
            on_progress,
            offline,
        )

    async def _many(
        self,
        items: Iterable[T],
        build: Callable[[T], Call],
        previous: Sequence[Outcome] | None,
        on_progress: Progress | None,
        offline: Offline | None,
    ) -> list[Outcome]:
        if previous is None:
            return await self._ask_all(items, build, on_progress, offline)
        again = what_failed(list(items), previous)
        kept = len(previous) - len(again)

        def told(done: int, _: int) -> None:
            if on_progress is not None:
                on_progress(kept + done, len(previous))

        fresh = iter(await self._ask_all(again, build, told, offline))
        return [old if old.ok else next(fresh) for old in previous]

    async def _ask_all(
        self, items: Iterable[T], build: Callable[[T], Call], on_progress: Progress | None, offline: Offline | None
    ) -> list[Outcome]:
        if offline is None:
            if isinstance(items, Sequence):
                await build_all(items, build, keep=False)
            party = self.engine.party(len(items) if isinstance(items, Sequence) else None)
            if party is None:
                return await outcomes_of(items, lambda item: self._outcome(build(item)), on_progress)
            return await outcomes_of(items, lambda item: self._outcome_in(party, build(item)), on_progress, party.close)
        from llmmw.offline import offline_of  # noqa: PLC0415 — loaded where it is asked for
        from llmmw.offline.api import server_of  # noqa: PLC0415 — as above
        from llmmw.offline.run import run  # noqa: PLC0415 — as above

        settings, server = offline_of(offline), server_of(self.endpoint)
        return await run(self.engine, server, settings, await build_all(items, build, keep=True), on_progress)

    async def _outcome(self, call: Call) -> Outcome:
        return Outcome(reply=answer_of(await self.engine.call(call)))

    async def _outcome_in(self, party: Party, call: Call) -> Outcome:
        """One call of a party: while it is on its way to the endpoint, the others may wait for it there."""
        place = party.join()
        try:
            return await self._outcome(call.replace(place=place))
        finally:
            place.settle()

    async def cancel_offline(self, offline: Offline) -> int:
        """Cancel the offline batches of a directory that are under way; what is answered by then stays answered.

        Who waits for them, here or in another process, gets `Closed` for what was not. One at Anthropic whose
        submission was cut short is left alone: that a batch found there is the same shows only when it has ended.

        Args:
            offline: an OfflineBatch, or the directory of one.

        Returns:
            How many were told to stop.
        """
        from llmmw.offline import offline_of  # noqa: PLC0415 — loaded where it is asked for
        from llmmw.offline.api import server_of  # noqa: PLC0415 — as above
        from llmmw.offline.run import cancel  # noqa: PLC0415 — as above

        return await cancel(self.engine, server_of(self.endpoint), offline_of(offline))

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

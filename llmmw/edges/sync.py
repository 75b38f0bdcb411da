"""The client for plain code: the same calls over the same engine, which then lives on a background thread."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

from llmmw.edges.client import Client
from llmmw.edges.requests import PieceReader, answer_of
from llmmw.engine.atwork import AtWork
from llmmw.engine.readers import BridgedChunks
from llmmw.settings import accepting

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Mapping, Sequence
    from types import TracebackType

    from llmmw.call import Outcome, Reply
    from llmmw.edges.client import Offline, Place, Progress
    from llmmw.edges.requests import Piece


class SyncClient(AtWork):
    """`Client` without `await`; use it with `with`, or `close()`. Safe to share between threads.

    Takes what `Client` takes and raises what it raises; from inside a running event loop use `Client`.
    """

    @accepting
    def __init__(self, base_url: Place | Sequence[Place], api_key: str | None = None, **options: Any) -> None:
        self._client = Client(base_url, api_key, **options)
        self.engine = self._client.engine
        self.stack = self._client.stack
        self.explain = self._client.explain
        self.get_performance_stats = self._client.get_performance_stats
        self.invalidate = self._client.invalidate
        self.invalidate_tag = self._client.invalidate_tag
        self.invalidate_tenant = self._client.invalidate_tenant
        self.tick = self._client.tick
        self.requests = self._client.requests
        self.endpoint = self._client.endpoint

    def chat(self, messages: object, *, model: str | None = None, **fields: Any) -> Reply:
        """One chat completion; a plain string is one user message."""
        return answer_of(self.engine.call_sync(self.requests.chat(model, messages, fields)))

    def complete(self, prompt: object, *, model: str | None = None, **fields: Any) -> Reply:
        """One text completion."""
        return answer_of(self.engine.call_sync(self.requests.complete(model, prompt, fields)))

    def embed(self, input: object, *, model: str | None = None, **fields: Any) -> Reply:  # noqa: A002 — the API's own name
        """Embeddings: `reply.body["data"]`."""
        return answer_of(self.engine.call_sync(self.requests.embed(model, input, fields)))

    def stream(self, messages: object = None, *, model: str | None = None, **request: Any) -> Generator[Piece]:
        """A streamed answer to `messages` (or to `prompt=...`), piece by piece as it arrives."""
        if messages is not None:
            request["messages"] = messages
        if model is not None:
            request["model"] = model
        reply = answer_of(self.engine.call_sync(self.requests.any(request, {}, stream=True)))
        chunks = reply.chunks
        if not isinstance(chunks, BridgedChunks):
            raise RuntimeError("the endpoint answered a stream call without a stream")  # noqa: TRY004 — not the caller's type
        reader = PieceReader()
        try:
            while (chunk := chunks.next_sync()) is not None:
                yield from reader.feed(chunk)
        finally:
            chunks.close_sync()

    def generate_batch(
        self,
        *,
        model: str | None = None,
        prompts: Iterable[object] | None = None,
        messages: Iterable[object] | None = None,
        on_progress: Progress | None = None,
        offline: Offline | None = None,
        **fields: Any,
    ) -> list[Outcome]:
        """As `Client.generate_batch`."""
        return self.engine.run_sync(
            lambda: self._client.generate_batch(
                model=model, prompts=prompts, messages=messages, on_progress=on_progress, offline=offline, **fields
            )
        )

    def map(
        self,
        requests: Iterable[Mapping[str, Any]],
        *,
        previous: Sequence[Outcome] | None = None,
        on_progress: Progress | None = None,
        offline: Offline | None = None,
        **common: Any,
    ) -> list[Outcome]:
        """As `Client.map`."""
        return self.engine.run_sync(
            lambda: self._client.map(requests, previous=previous, on_progress=on_progress, offline=offline, **common)
        )

    def cancel_offline(self, offline: Offline) -> int:
        """As `Client.cancel_offline`."""
        return self.engine.run_sync(lambda: self._client.cancel_offline(offline))

    def close(self) -> None:
        """Wait for calls in flight and close every connection. Idempotent."""
        self.engine.close()

    def __enter__(self) -> Self:
        self.engine.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.engine.__exit__(kind, error, traceback)

    def __repr__(self) -> str:
        return f"SyncClient({self.engine!r})"

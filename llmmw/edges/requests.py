"""What `Client` and `SyncClient` share: keyword arguments become calls, replies become answers or errors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from llmmw.answer import NO_USAGE, Usage, finish_reasons, text_of, usage_of
from llmmw.call import Call, Context, Reply, current_context
from llmmw.env import ambient_clock
from llmmw.errors import ConfigError
from llmmw.fault import error_of
from llmmw.keys.identity import Asker, Namespaces, asker_of
from llmmw.settings import seconds
from llmmw.wire.sse import SSEParser

if TYPE_CHECKING:
    from collections.abc import Iterator

    from llmmw.call import Chunk
    from llmmw.stack import Stack

T = TypeVar("T")

_NO_HEADERS: tuple[tuple[str, str], ...] = ()


class Piece(str):
    """A piece of a streamed answer: a str of the text it adds ("" where it adds none) with the whole event."""

    __slots__ = ("body", "usage")

    body: Any
    """The decoded event."""
    usage: Usage
    """Reported usage, in the event that carries it (usually the last)."""

    @classmethod
    def of(cls, event: Any, usage: Usage = NO_USAGE) -> Piece:
        """The piece for one event."""
        piece = cls(text_of(event))
        piece.body = event
        piece.usage = usage
        return piece

    @property
    def text(self) -> str:
        """The text this piece adds."""
        return str(self)

    @property
    def finish_reason(self) -> str | None:
        """Why the model stopped, in the piece that says so."""
        return next(iter(finish_reasons(self.body)), None)


class PieceReader:
    """Server-sent events, cut anywhere, as pieces."""

    def __init__(self) -> None:
        self._parser = SSEParser()

    def feed(self, chunk: Chunk) -> Iterator[Piece]:
        """The pieces that this chunk completes."""
        if not isinstance(chunk, bytes):
            raise TypeError("an HTTP stream carries bytes")
        for event in self._parser.feed(chunk):
            if event.data != b"[DONE]":
                body = msgspec.json.decode(event.data)
                yield Piece.of(body, usage_of(body))


class RequestBuilder:
    """Builds the calls of one client.

    Args:
        target: the endpoint's identity.
        asker: what the endpoint's own headers and query say about every answer.
        stack: tells where the cache (and so the namespace secret) lives.
        model: used where a call names none.
        tenant: takes the credential's place in the namespace.
    """

    def __init__(self, *, target: str, asker: Asker, stack: Stack, model: str | None, tenant: str | None) -> None:
        self._target = target
        self._asker = asker
        self._model = model
        self._tenant = tenant
        self._namespaces = Namespaces(stack.cache_directory)

    @property
    def namespace(self) -> str:
        """Whose answers the client's calls share where nothing else is said."""
        return self._namespaces.of(self._asker.credential, self._tenant)

    def chat(self, model: str | None, messages: object, fields: dict[str, Any], *, stream: bool = False) -> Call:
        """A chat call; a plain string becomes one user message."""
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        if not messages:
            raise ConfigError(f"chat(messages={messages!r}): expected a text or a non-empty list of messages")
        return self._call("chat", model, {"messages": messages}, fields, stream=stream)

    def complete(self, model: str | None, prompt: object, fields: dict[str, Any], *, stream: bool = False) -> Call:
        """A text completion."""
        return self._call("complete", model, {"prompt": prompt}, fields, stream=stream)

    def embed(self, model: str | None, text: object, fields: dict[str, Any]) -> Call:
        """Embeddings of a text or a list of texts."""
        return self._call("embed", model, {"input": text}, fields)

    def any(self, request: Mapping[str, Any], common: Mapping[str, Any], *, stream: bool = False) -> Call:
        """The call that a request's keys ask for: `messages` chat, `prompt` complete, `input` embed.

        Raises:
            ConfigError: no mapping, or not exactly one of these keys.
        """
        if not isinstance(request, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance] — a caller's mistake
            raise ConfigError(f"a request must be a mapping, not {type(request).__name__}")
        fields = {**common, **request}
        model = fields.pop("model", None)
        kinds = [key for key in ("messages", "prompt", "input") if key in fields]
        if len(kinds) != 1:
            raise ConfigError(f"a request needs exactly one of messages, prompt, input; got {sorted(fields)}")
        value = fields.pop(kinds[0])
        if kinds[0] == "messages":
            return self.chat(model, value, fields, stream=stream)
        if kinds[0] == "prompt":
            return self.complete(model, value, fields, stream=stream)
        return self.embed(model, value, fields)

    def _call(
        self, op: str, model: str | None, body: dict[str, Any], fields: dict[str, Any], *, stream: bool = False
    ) -> Call:
        name = model if model is not None else self._model
        if not isinstance(name, str) or not name:
            raise ConfigError(f"model={name!r}: name the model in the call or in Client(model=...)")
        context, headers = current_context(), _NO_HEADERS
        body = {"model": name, **body}
        if fields:
            context, headers = _add_fields(body, fields, context)
        if stream:
            body["stream"] = True
            body.setdefault("stream_options", {"include_usage": True})
        asker = _with_headers(self._asker, headers) if headers else self._asker
        namespace = self._namespaces.of(asker.credential, context.tenant or self._tenant)
        return Call(op, name, body, stream, context, headers or None, self._target, namespace, asker.variant)


def _with_headers(asker: Asker, headers: tuple[tuple[str, str], ...]) -> Asker:
    """The endpoint's own, with the headers that one call adds or replaces."""
    added = asker_of(headers)
    if not (added.variant or added.credential):
        return asker
    named = {name for name, _ in added.variant}
    kept = (pair for pair in asker.variant if pair[0] not in named)
    return Asker(tuple(sorted((*kept, *added.variant))), asker.credential + added.credential)


def _add_fields(
    body: dict[str, Any], fields: dict[str, Any], context: Context
) -> tuple[Context, tuple[tuple[str, str], ...]]:
    """Put a call's further fields into the body; the context with its deadline, and the headers it adds."""
    if "stream" in fields:
        raise ConfigError("stream is not a field here: iterate client.stream(...) for a stream")
    body.update(fields)
    extra = body.pop("extra_body", None)
    if extra:
        body.update(extra)
    timeout = body.pop("timeout", None)
    if timeout is not None:
        context = _with_deadline(context, timeout)
    added: dict[str, str] | None = body.pop("extra_headers", None)
    return context, tuple((name.lower(), value) for name, value in added.items()) if added else _NO_HEADERS


def _with_deadline(context: Context, timeout: float | str) -> Context:
    until = ambient_clock().monotonic() + seconds("timeout", timeout)
    if context.deadline is not None:
        until = min(until, context.deadline)
    return msgspec.structs.replace(context, deadline=until)


def answer_of(reply: Reply) -> Reply:
    """The reply itself, if the server accepted the call.

    Raises:
        StatusError: it did not.
    """
    if not reply.ok:
        raise error_of(reply)
    return reply


def one_of(*, prompts: Iterable[object] | None, messages: Iterable[object] | None) -> tuple[str, Iterable[object]]:
    """The items of `generate_batch` and the name of the field they go into.

    Raises:
        ConfigError: both, or neither, of the two were given, or a single one.
    """
    if prompts is None and messages is not None:
        return "messages", several("generate_batch(messages=)", messages, "conversations")
    if prompts is None or messages is not None:
        raise ConfigError("generate_batch: give exactly one of prompts=[...] and messages=[[...], ...]")
    return "prompt", several("generate_batch(prompts=)", prompts, "prompts")


def several(option: str, found: Iterable[T], what: str) -> Iterable[T]:
    """The argument, if it is a list or an iterator.

    Raises:
        ConfigError: it is a single item, which can often be iterated over too.
    """
    given: object = found
    if isinstance(given, str | bytes | Mapping) or not isinstance(given, Iterable):  # pyright: ignore[reportUnnecessaryIsInstance] — a caller's mistake
        kind = type(given).__name__  # pyright: ignore[reportUnknownArgumentType] — as above
        raise ConfigError(f"{option}: expected a list of {what}, not {kind}")
    return found

"""Request bodies as typed records. Fields not named here are accepted and ignored, as vLLM does."""

from typing import Any, TypeVar, cast

import msgspec
from msgspec import Struct

from .errors import bad_shape

T = TypeVar("T")
Json = dict[str, Any]


class StreamOptions(Struct):
    """``include_usage`` adds a last event with the usage."""

    include_usage: bool = False


class SamplingFields(Struct, kw_only=True):
    """What chat, completions and batch chat share."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    stop: str | list[str] | None = None
    priority: int | None = None
    cache_salt: str | None = None
    response_format: Json | None = None
    structured_outputs: Json | None = None


class ChatRequest(SamplingFields, kw_only=True):
    """POST /v1/chat/completions."""

    messages: list[Json]
    max_completion_tokens: int | None = None
    tools: list[Json] | None = None
    tool_choice: str | Json | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None


class BatchChatRequest(SamplingFields, kw_only=True):
    """POST /v1/chat/completions/batch: a list of conversations, one set of sampling parameters."""

    messages: list[list[Json]]
    max_completion_tokens: int | None = None


class CompletionRequest(SamplingFields, kw_only=True):
    """POST /v1/completions: text, texts, token ids, or lists of token ids."""

    prompt: str | list[Any]
    echo: bool | None = None
    logprobs: int | None = None
    suffix: str | None = None


class EmbeddingRequest(Struct, kw_only=True):
    """POST /v1/embeddings."""

    input: str | list[Any]
    model: str | None = None
    encoding_format: str | None = None
    dimensions: int | None = None


class MessagesRequest(Struct, kw_only=True):
    """POST /v1/messages, Anthropic's shape; ``output_format`` is the older beta's place of output_config's format."""

    messages: list[Json]
    max_tokens: int
    model: str | None = None
    system: str | list[Json] | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    stop_sequences: list[str] | None = None
    output_config: Json | None = None
    output_format: Json | None = None
    tools: list[Json] | None = None
    tool_choice: Json | None = None


class ResponsesRequest(Struct, kw_only=True):
    """POST /v1/responses, the part agents use."""

    input: str | list[Json]
    model: str | None = None
    instructions: str | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    max_output_tokens: int | None = None
    tools: list[Json] | None = None
    tool_choice: str | Json | None = None
    text: Json | None = None


class TokenizeRequest(Struct, kw_only=True):
    """POST /tokenize: a prompt, or messages."""

    prompt: str | None = None
    messages: list[Json] | None = None
    model: str | None = None


def decode(decoder: msgspec.json.Decoder[T], body: bytes) -> T:
    """The typed body, or vLLM's 400 for a wrong type, a missing field or broken JSON."""
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        text, _, where = str(error).partition(" - at `$")
        field = where.rstrip("`").strip(".")
        if not field and "field `" in text:
            field = text.split("field `", 1)[1].rstrip("`")
        raise bad_shape(text, f"body.{field}" if field else "body") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise bad_shape(f"JSON decode error: {error}", "body") from None


def as_list(value: Any) -> list[Any]:
    """The value when it is a list, else an empty one."""
    return [*value] if isinstance(value, list) else []  # pyright: ignore[reportUnknownVariableType]


def as_dict(value: Any) -> Json:
    """The value when it is an object, else an empty one."""
    return cast("Json", value) if isinstance(value, dict) else {}


def text_of(content: Any) -> str:
    """The text of a message's content: a string, or the parts of a list (other parts by their JSON)."""
    if isinstance(content, str):
        return content
    texts: list[str] = []
    for part in as_list(content):
        item = as_dict(part)
        if "text" in item:
            texts.append(str(item["text"]))
        elif item:
            texts.append(compact(item))
    return "".join(texts)


def compact(value: Any) -> str:
    """Canonical JSON text: no blanks, keys sorted."""
    return msgspec.json.encode(value, order="deterministic").decode()

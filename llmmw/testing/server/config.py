"""The settings of one embedded server: a frozen value, checked before anything starts."""

import functools
import ipaddress
import math
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta, Struct

from llmmw.errors import ConfigError

from .faults import FaultRule

Natural = Annotated[int, Meta(ge=0)]
Positive = Annotated[int, Meta(ge=1)]
Seconds = Annotated[float, Meta(ge=0.0)]
Span = Annotated[float, Meta(gt=0.0)]

FIXED_AT_START: Final = frozenset({"host", "port", "allow_remote", "keepalive_s", "max_body_bytes"})


class ServerConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """What the server pretends. The meaning, unit and range of each field stand beside it."""

    host: Annotated[str, Meta(description="address to listen on; loopback unless allow_remote")] = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535, description="TCP port; 0 picks a free one")] = 0
    allow_remote: Annotated[bool, Meta(description="permit a host that is not loopback")] = False
    models: Annotated[tuple[str, ...], Meta(min_length=1, description="names listed by /v1/models")] = (
        "llmmw-embedded",
    )
    any_model: Annotated[bool, Meta(description="answer unknown model names instead of 404")] = False
    max_model_len: Annotated[Positive, Meta(description="context length, tokens (prompt + output)")] = 32_768
    api_keys: Annotated[tuple[str, ...], Meta(description="accepted keys for /v1/*; none: no check")] = ()
    error_style: Annotated[Literal["vllm", "openai"], Meta(description="shape of error bodies")] = "vllm"
    seed: Annotated[int, Meta(description="changes every text and every seeded fault")] = 0

    reply: Annotated[
        Literal["words", "echo"], Meta(description="text: seeded words, or the last user message again")
    ] = "words"
    reply_text: Annotated[str, Meta(description="this text for every reply (overrides reply)")] = ""
    reply_tokens: Annotated[Positive, Meta(description="mean natural length of a reply, tokens")] = 32
    reply_spread: Annotated[
        float, Meta(ge=0.0, le=1.0, description="natural lengths are spread over mean * (1 +- this)")
    ] = 0.25
    tool_marker: Annotated[
        str, Meta(min_length=1, description="last user text containing this calls the first tool")
    ] = "[tool]"
    embedding_dimensions: Annotated[Positive, Meta(description="length of embedding vectors")] = 64

    latency: Annotated[
        Literal["none", "fixed", "engine"],
        Meta(description="at once; after latency_s; or the continuous-batching model"),
    ] = "none"
    latency_s: Annotated[Seconds, Meta(description="fixed: seconds before the first token")] = 0.0
    latency_spread: Annotated[
        float, Meta(ge=0.0, le=1.0, description="fixed: latency_s * (1 +- this) instead, uniform, by the prompt")
    ] = 0.0
    token_s: Annotated[Seconds, Meta(description="fixed: seconds per further token")] = 0.0
    step_s: Annotated[Seconds, Meta(description="engine: seconds per step, whatever it holds")] = 0.008
    prefill_s_per_token: Annotated[Seconds, Meta(description="engine: seconds per uncached prompt token")] = 25e-6
    seq_s: Annotated[Seconds, Meta(description="engine: seconds per running sequence and step")] = 30e-6
    max_num_seqs: Annotated[Positive, Meta(description="engine: sequences that run at once")] = 256
    max_batched_tokens: Annotated[Positive, Meta(description="engine: tokens per step (prefill in chunks)")] = 8192
    max_queued: Annotated[
        Positive | None, Meta(description="engine: waiting sequences allowed, else 503; none: unbounded")
    ] = None
    prefix_cache: Annotated[bool, Meta(description="engine: prompt blocks seen before cost no prefill")] = True
    block_tokens: Annotated[Positive, Meta(description="engine: tokens per KV block")] = 16
    kv_blocks: Annotated[Positive, Meta(description="engine: KV blocks remembered (least recently used)")] = 65_536
    paused: Annotated[bool, Meta(description="engine: take requests, run no step")] = False

    offline_looks: Annotated[Natural, Meta(description="offline batches end with this look at them; 0: the first")] = 1
    offline_expire: Annotated[
        str, Meta(min_length=1, description="requests of offline batches that contain this expire")
    ] = "[expire]"

    rpm: Annotated[Positive | None, Meta(description="requests per window and API key")] = None
    tpm: Annotated[Positive | None, Meta(description="tokens per window and API key")] = None
    limit_window_s: Annotated[Span, Meta(description="window of rpm and tpm, seconds")] = 60.0
    limit_kind: Annotated[
        Literal["bucket", "sliding"], Meta(description="token bucket, or exact sliding window (stricter)")
    ] = "bucket"
    limit_style: Annotated[
        Literal["openai", "anthropic", "plain", "none"],
        Meta(description="limit headers: a provider's set, only Retry-After, or nothing"),
    ] = "openai"
    quota_requests: Annotated[Natural | None, Meta(description="requests per API key, then 429 insufficient_quota")] = (
        None
    )

    keepalive_s: Annotated[Seconds, Meta(description="idle connections close after this; 0: never")] = 5.0
    max_body_bytes: Annotated[Positive, Meta(description="larger request bodies get 413")] = 64 * 1024 * 1024
    log_requests: Annotated[int, Meta(ge=0, description="request summaries kept (newest)")] = 1000
    log_body_bytes: Annotated[int, Meta(ge=0, description="bytes of each request body kept in its summary")] = 0
    log_headers: Annotated[bool, Meta(description="keep request headers in the summary (secrets too)")] = False
    faults: Annotated[tuple[FaultRule, ...], Meta(description="rules that make requests go wrong")] = ()

    def __post_init__(self) -> None:
        """Refuse what cannot work; building a struct in Python checks nothing by itself."""
        for name, kind in _kinds().items():
            value = getattr(self, name)
            try:
                msgspec.convert(_plain(value), kind)
            except msgspec.ValidationError as error:
                raise _complaint({name: value}, f"{error} - at `$.{name}`") from None
            if isinstance(value, float) and not math.isfinite(value):
                raise _complaint({name: value}, f"Expected a finite number - at `$.{name}`")
        if not self.allow_remote and not _is_loopback(self.host):
            raise ConfigError(
                f"ServerConfig: host: {self.host!r} is not allowed; a loopback address is"
                " (127.0.0.1, ::1, localhost), or set allow_remote (--allow-remote)"
            )


FIELDS: Final = ServerConfig.__struct_fields__


@functools.cache
def _kinds() -> dict[str, Any]:
    return typing.get_type_hints(ServerConfig, include_extras=True)


def _plain(value: object) -> Any:
    """The value as JSON has it; what JSON cannot say is left for validation to refuse."""
    return msgspec.to_builtins(value, enc_hook=repr)


def _complaint(values: Mapping[str, Any], error: str) -> ConfigError:
    """The option, its value and what is allowed, from msgspec's message (``... - at `$.port` ``)."""
    parts = error.split(" - at `$")
    option = "".join(part.rstrip("`") for part in reversed(parts[1:])).removeprefix(".")
    text = parts[0]
    if not option:
        hint = f"; options are: {', '.join(FIELDS)}" if "unknown field" in text else ""
        return ConfigError(f"ServerConfig: {text}{hint}")
    name = option.partition("[")[0].partition(".")[0]
    return ConfigError(f"ServerConfig: {option}: {values.get(name)!r} is not allowed; {text[:1].lower()}{text[1:]}")


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def from_mapping(values: Mapping[str, Any]) -> ServerConfig:
    """A checked config from plain JSON values; ConfigError names option, value and what is allowed."""
    try:
        return msgspec.convert(dict(values), ServerConfig)
    except msgspec.ValidationError as error:
        if isinstance(error.__cause__, ConfigError):
            raise error.__cause__ from None
        raise _complaint(values, str(error)) from None


def plain_options(config: ServerConfig) -> dict[str, Any]:
    """The options as JSON values."""
    return {name: _plain(getattr(config, name)) for name in FIELDS}


def changed(config: ServerConfig, patch: Mapping[str, Any]) -> ServerConfig:
    """The config with some options replaced while the server runs."""
    fixed = sorted(FIXED_AT_START & patch.keys())
    if fixed:
        raise ValueError(f"ServerConfig: {fixed[0]}: cannot change while the server runs; start another server")
    return from_mapping({**plain_options(config), **patch})

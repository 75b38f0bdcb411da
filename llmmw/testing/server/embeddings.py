"""POST /v1/embeddings and /tokenize."""

import array
import base64
import math
import sys
from hashlib import shake_256
from typing import Any, Final

import msgspec

from .errors import bad_value
from .exchange import Answer, Exchange, Plain, encode
from .plan import Prompt, chat_prompt, text_prompts
from .tokens import pieces, token_id
from .wire import EmbeddingRequest, TokenizeRequest, decode

MAX_DIMENSIONS: Final = 65_536
_embedding = msgspec.json.Decoder(EmbeddingRequest)
_tokenize = msgspec.json.Decoder(TokenizeRequest)


def vector(seed: bytes, dimensions: int) -> list[float]:
    """A unit vector, a pure function of the seed; a shorter one is the start of the longer, scaled."""
    raw = shake_256(seed).digest(2 * dimensions)
    values = [int.from_bytes(raw[i : i + 2], "big") - 32_767.5 for i in range(0, len(raw), 2)]
    norm = math.sqrt(math.fsum(value * value for value in values))
    return [value / norm for value in values]


async def embed(exchange: Exchange) -> Answer:
    """One unit vector per input; ``base64`` is little-endian float32, as the OpenAI SDK asks by default."""
    asked = decode(_embedding, exchange.body)
    model = exchange.model(asked.model)
    if asked.encoding_format not in {None, "float", "base64"}:
        raise bad_value(f"encoding_format: {asked.encoding_format!r} is not allowed; float, base64 are")
    size = exchange.core.config.embedding_dimensions if asked.dimensions is None else asked.dimensions
    if not 1 <= size <= MAX_DIMENSIONS:
        raise bad_value(f"dimensions: {size} is not allowed; 1..{MAX_DIMENSIONS} are", "dimensions")
    prompts = text_prompts(asked.input)
    record = exchange.record
    record.sequences, record.text = len(prompts), prompts[-1].last_user[:80]
    tokens = sum(prompt.tokens for prompt in prompts)
    exchange.pay(tokens)
    record.prompt_tokens = tokens
    data: list[dict[str, Any]] = []
    for index, prompt in enumerate(prompts):
        values = vector(_seed(exchange, model, prompt), size)
        shown = _base64(values) if asked.encoding_format == "base64" else values
        data.append({"object": "embedding", "index": index, "embedding": shown})
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    body = {"object": "list", "data": data, "model": model, "usage": usage}
    return Plain(encode(body), headers=exchange.headers)


def _seed(exchange: Exchange, model: str, prompt: Prompt) -> bytes:
    return f"{exchange.core.config.seed}\0{model}\0{prompt.units!r}".encode("utf-8", "surrogatepass")


def _base64(values: list[float]) -> str:
    packed = array.array("f", values)
    if sys.byteorder == "big":
        packed.byteswap()
    return base64.b64encode(packed.tobytes()).decode()


async def tokenize(exchange: Exchange) -> Answer:
    """Token ids of a prompt or a conversation, and their number."""
    asked = decode(_tokenize, exchange.body)
    exchange.model(asked.model)
    text = asked.prompt if asked.prompt is not None else str(chat_prompt(asked.messages or []).units)
    ids = [token_id(piece) for piece in pieces(text)]
    limit = exchange.core.config.max_model_len
    return Plain(encode({"count": len(ids), "max_model_len": limit, "tokens": ids, "token_strs": None}))

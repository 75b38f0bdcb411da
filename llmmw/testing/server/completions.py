"""POST /v1/completions: one or many prompts, index = prompt * n + k."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, Final

import msgspec

from .errors import bad_value
from .exchange import DONE, FINGERPRINT, Answer, Exchange, Plain, Streamed, encode, event
from .plan import MAX_LOGPROBS, Planned, sampling_of, text_prompts
from .tokens import pieces, token_id
from .wire import CompletionRequest, decode

MAX_PROMPTS: Final = 1024
_completion = msgspec.json.Decoder(CompletionRequest)


async def complete(exchange: Exchange) -> Answer:
    """All texts in one answer with one usage total; one bad prompt fails all."""
    asked = decode(_completion, exchange.body)
    model = exchange.model(asked.model)
    prompts = text_prompts(asked.prompt)
    if len(prompts) > MAX_PROMPTS:
        raise bad_value(f"prompt: at most {MAX_PROMPTS} prompts are allowed, got {len(prompts)}.", "prompt")
    if (asked.logprobs or 0) > MAX_LOGPROBS:
        raise bad_value(f"logprobs must be at most {MAX_LOGPROBS}, got {asked.logprobs}.", "logprobs")
    sampling = sampling_of(asked, model, asked.max_tokens or 16)  # 16 is the API's default
    planned = exchange.plan(prompts, sampling, stream=bool(asked.stream))
    echoes = [""] * len(planned)
    if asked.echo:
        echoes = [prompt.last_user for prompt in prompts for _ in range(sampling.n)]
    head = {
        "id": f"cmpl-{exchange.uid}",
        "object": "text_completion",
        "created": exchange.created,
        "model": model,
        "system_fingerprint": FINGERPRINT,
    }
    if asked.stream:
        usage = asked.stream_options is not None and asked.stream_options.include_usage
        return Streamed(_stream(exchange, head, planned, echoes, usage=usage), exchange.headers)
    await exchange.ready(planned)
    choices = [
        {
            "index": index,
            "text": echoes[index] + item.text,
            "logprobs": None if asked.logprobs is None else _logprobs(item.text),
            "finish_reason": item.finish,
        }
        for index, item in enumerate(planned)
    ]
    return Plain(encode({**head, "choices": choices, "usage": exchange.usage()}), headers=exchange.headers)


def _logprobs(text: str) -> dict[str, Any]:
    parts = pieces(text)
    values = [-(token_id(part) % 100) / 100 for part in parts]
    return {
        "tokens": parts,
        "token_logprobs": values,
        "top_logprobs": [{part: value} for part, value in zip(parts, values, strict=True)],
        "text_offset": [4 * number for number in range(len(parts))],
    }


async def _stream(
    exchange: Exchange, head: dict[str, Any], planned: list[Planned], echoes: list[str], *, usage: bool
) -> AsyncGenerator[bytes, None]:
    texts = [pieces(item.text) for item in planned]
    async with aclosing(exchange.progress(planned)) as progress:
        async for news in progress:
            out: list[bytes] = []
            for index, start, stop in news:
                item = planned[index]
                parts = texts[index][start:stop] or [""]
                if start == 0:
                    parts[0] = echoes[index] + parts[0]
                for number, part in enumerate(parts, start=1):
                    ended = stop >= item.tokens and number == len(parts)
                    choice = {
                        "index": index,
                        "text": part,
                        "logprobs": None,
                        "finish_reason": item.finish if ended else None,
                    }
                    out.append(event({**head, "choices": [choice]}))
            yield b"".join(out)
    last = event({**head, "choices": [], "usage": exchange.usage()}) if usage else b""
    yield last + DONE

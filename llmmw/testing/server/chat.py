"""POST /v1/chat/completions and its batch form."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import msgspec

from .errors import bad_value
from .exchange import DONE, FINGERPRINT, Answer, Exchange, Plain, Streamed, encode, event
from .plan import MAX_LOGPROBS, Planned, Sampling, Tool, chat_prompt, chosen_tool, sampling_of
from .tokens import pieces, token_id
from .wire import BatchChatRequest, ChatRequest, Json, as_dict, decode

_chat = msgspec.json.Decoder(ChatRequest)
_batch = msgspec.json.Decoder(BatchChatRequest)


async def chat(exchange: Exchange) -> Answer:
    """One conversation, n answers."""
    asked = decode(_chat, exchange.body)
    model = exchange.model(asked.model)
    sampling = sampling_of(asked, model, asked.max_completion_tokens or asked.max_tokens)
    top = (asked.top_logprobs or 0) if asked.logprobs else None
    if (asked.top_logprobs or 0) > MAX_LOGPROBS:
        raise bad_value(f"top_logprobs must be at most {MAX_LOGPROBS}, got {asked.top_logprobs}.", "logprobs")
    prompt = chat_prompt(asked.messages, asked.tools)
    sampling.tool = chosen_tool(
        [_tool(tool) for tool in asked.tools or []],
        _choice(asked.tool_choice),
        prompt.last_user,
        exchange.core.config.tool_marker,
    )
    planned = exchange.plan([prompt], sampling, stream=bool(asked.stream))
    if asked.stream:
        usage = asked.stream_options is not None and asked.stream_options.include_usage
        return Streamed(_stream(exchange, model, planned, top, usage=usage), exchange.headers)
    await exchange.ready(planned)
    return _complete(exchange, model, planned, top)


async def batch(exchange: Exchange) -> Answer:
    """Many conversations, one answer each; n > 1 is refused and ``stream`` ignored."""
    asked = decode(_batch, exchange.body)
    model = exchange.model(asked.model)
    sampling: Sampling = sampling_of(asked, model, asked.max_completion_tokens or asked.max_tokens)
    if sampling.n > 1:
        raise bad_value(f"n must be 1 for batch chat, got {sampling.n}.", "n")
    if not asked.messages:
        raise bad_value("messages must not be empty", "messages")
    sampling.ignore_eos = False  # silently ignored there, as measured
    planned = exchange.plan([chat_prompt(messages) for messages in asked.messages], sampling)
    await exchange.ready(planned)
    return _complete(exchange, model, planned, None)


def _tool(tool: Json) -> Tool:
    function = as_dict(tool.get("function")) or tool
    name = function.get("name")
    if not isinstance(name, str):
        raise bad_value("tools: each tool needs a function with a name", "tools")
    return Tool(name, as_dict(function.get("parameters")))


def _choice(choice: str | Json | None) -> str:
    """``auto``, ``none``, ``required`` or a function's name."""
    if isinstance(choice, dict):
        name = as_dict(choice.get("function")).get("name")
        if not isinstance(name, str):
            raise bad_value("tool_choice: an object needs function.name", "tool_choice")
        return name
    if choice not in {None, "auto", "none", "required"}:
        raise bad_value(f"tool_choice: {choice!r} is not allowed; auto, none, required are", "tool_choice")
    return choice or "auto"


def _head(exchange: Exchange, model: str, kind: str) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{exchange.uid}",
        "object": kind,
        "created": exchange.created,
        "model": model,
        "system_fingerprint": FINGERPRINT,
    }


def _call(exchange: Exchange, index: int, item: Planned) -> dict[str, Any]:
    function = {"name": item.tool, "arguments": item.text}
    return {"id": f"call_{exchange.uid}_{index}", "type": "function", "function": function}


def logprobs(parts: list[str], top: int) -> dict[str, Any]:
    """Made-up but plausible log probabilities: the chosen token first, then neighbours."""
    content: list[dict[str, Any]] = []
    for part in parts:
        value = -(token_id(part) % 100) / 100
        chosen: dict[str, Any] = {"token": part, "logprob": value, "bytes": list(part.encode())}
        others: list[dict[str, Any]] = [
            {"token": f"{part}{rank}", "logprob": value - rank, "bytes": list(f"{part}{rank}".encode())}
            for rank in range(1, top)
        ]
        content.append({**chosen, "top_logprobs": [chosen, *others] if top else []})
    return {"content": content}


def _complete(exchange: Exchange, model: str, planned: list[Planned], top: int | None) -> Plain:
    choices: list[dict[str, Any]] = []
    for index, item in enumerate(planned):
        message: dict[str, Any] = {"role": "assistant", "content": item.text}
        if item.tool:
            message = {"role": "assistant", "content": None, "tool_calls": [_call(exchange, index, item)]}
        choices.append(
            {
                "index": index,
                "message": message,
                "logprobs": None if top is None else logprobs(pieces(item.text), top),
                "finish_reason": item.finish,
            }
        )
    head = _head(exchange, model, "chat.completion")
    return Plain(encode({**head, "choices": choices, "usage": exchange.usage()}), headers=exchange.headers)


async def _stream(
    exchange: Exchange, model: str, planned: list[Planned], top: int | None, *, usage: bool
) -> AsyncGenerator[bytes, None]:
    head = _head(exchange, model, "chat.completion.chunk")

    def chunk(index: int, delta: dict[str, Any], finish: str | None = None, parts: list[str] | None = None) -> bytes:
        shown = None if top is None or not parts else logprobs(parts, top)
        choice = {"index": index, "delta": delta, "logprobs": shown, "finish_reason": finish}
        return event({**head, "choices": [choice]})

    texts = [pieces(item.text) for item in planned]
    async with aclosing(exchange.progress(planned)) as progress:
        async for news in progress:
            out: list[bytes] = []
            for index, start, stop in news:
                item = planned[index]
                if start == 0:
                    out.append(chunk(index, {"role": "assistant", "content": None if item.tool else ""}))
                    if item.tool:
                        call = _call(exchange, index, item)
                        call["function"] = {"name": item.tool, "arguments": ""}
                        out.append(chunk(index, {"tool_calls": [{"index": 0, **call}]}))
                for part in texts[index][start:stop]:
                    call_part = [{"index": 0, "function": {"arguments": part}}]
                    delta: dict[str, Any] = {"tool_calls": call_part} if item.tool else {"content": part}
                    out.append(chunk(index, delta, None, [part]))
                if stop >= item.tokens:
                    out.append(chunk(index, {}, item.finish))
            yield b"".join(out)
    last = event({**head, "choices": [], "usage": exchange.usage()}) if usage else b""
    yield last + DONE

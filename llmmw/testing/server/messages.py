"""POST /v1/messages: Anthropic's shape, with its event stream."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, Final

import msgspec

from .errors import bad_value
from .exchange import Answer, Exchange, Plain, Streamed, encode, event
from .plan import Planned, Sampling, Tool, chat_prompt, chosen_tool
from .tokens import pieces
from .wire import Json, MessagesRequest, as_dict, decode

_messages = msgspec.json.Decoder(MessagesRequest)
_REASONS: Final = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


async def messages(exchange: Exchange) -> Answer:
    """One conversation, one answer."""
    asked = decode(_messages, exchange.body)
    model = exchange.model(asked.model)
    if asked.max_tokens < 1:
        raise bad_value(f"max_tokens: must be at least 1, got {asked.max_tokens}", "max_tokens")
    system: list[Json] = [{"role": "system", "content": asked.system}] if asked.system else []
    prompt = chat_prompt([*system, *asked.messages], asked.tools)
    tools = [Tool(str(tool.get("name")), as_dict(tool.get("input_schema"))) for tool in asked.tools or []]
    sampling = Sampling(
        model=model,
        temperature=1.0 if asked.temperature is None else asked.temperature,
        top_p=1.0 if asked.top_p is None else asked.top_p,
        max_tokens=asked.max_tokens,
        stop=tuple(asked.stop_sequences or ()),
        schema=_schema(asked),
        tool=chosen_tool(tools, _choice(asked.tool_choice), prompt.last_user, exchange.core.config.tool_marker),
    )
    planned = exchange.plan([prompt], sampling, stream=bool(asked.stream))
    if asked.stream:
        return Streamed(_stream(exchange, model, planned), exchange.headers)
    await exchange.ready(planned)
    item = planned[0]
    body = {**_head(exchange, model), "content": [_block(exchange, item)], "stop_reason": _REASONS[item.finish]}
    return Plain(encode({**body, "usage": _usage(exchange)}), headers=exchange.headers)


def _choice(choice: Json | None) -> str:
    """Anthropic's any/auto/none/tool as ours."""
    kind = (choice or {}).get("type", "auto")
    if kind == "tool":
        return str((choice or {}).get("name"))
    return "required" if kind == "any" else str(kind)


def _schema(asked: MessagesRequest) -> Json | None:
    """The schema the text must satisfy, if any; Anthropic knows json_schema alone."""
    nested = (asked.output_config or {}).get("format")
    if nested is not None and asked.output_format is not None:
        raise bad_value("output_format: not allowed beside output_config.format", "output_format")
    wanted = asked.output_format if nested is None else nested
    if wanted is None:
        return None
    form = as_dict(wanted)
    schema = form.get("schema")
    if form.get("type") != "json_schema" or not isinstance(schema, dict):
        raise bad_value("output_config.format: needs type json_schema and an object under schema", "output_config")
    return as_dict(schema)


def _head(exchange: Exchange, model: str) -> dict[str, Any]:
    return {
        "id": f"msg_{exchange.uid}",
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
    }


def _block(exchange: Exchange, item: Planned, *, empty: bool = False) -> dict[str, Any]:
    if item.tool:
        called: Any = {} if empty else msgspec.json.decode(item.text)
        return {"type": "tool_use", "id": f"toolu_{exchange.uid}", "name": item.tool, "input": called}
    return {"type": "text", "text": "" if empty else item.text}


def _usage(exchange: Exchange) -> dict[str, int]:
    record = exchange.record
    return {
        "input_tokens": record.prompt_tokens - record.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": record.cached_tokens,
        "output_tokens": record.output_tokens,
    }


async def _stream(exchange: Exchange, model: str, planned: list[Planned]) -> AsyncGenerator[bytes, None]:
    item = planned[0]
    parts = pieces(item.text)
    start = {**_head(exchange, model), "usage": _usage(exchange)}
    opening = event({"type": "message_start", "message": start}, "message_start") + event(
        {"type": "content_block_start", "index": 0, "content_block": _block(exchange, item, empty=True)},
        "content_block_start",
    )
    async with aclosing(exchange.progress(planned)) as progress:
        async for news in progress:
            out = [opening]
            opening = b""
            for _, first, last in news:
                for part in parts[first:last]:
                    kind, field = ("input_json_delta", "partial_json") if item.tool else ("text_delta", "text")
                    delta = {"type": kind, field: part}
                    body = {"type": "content_block_delta", "index": 0, "delta": delta}
                    out.append(event(body, "content_block_delta"))
            yield b"".join(out)
    ending = {
        "type": "message_delta",
        "delta": {"stop_reason": _REASONS[item.finish], "stop_sequence": None},
        "usage": _usage(exchange),
    }
    yield (
        event({"type": "content_block_stop", "index": 0}, "content_block_stop")
        + event(ending, "message_delta")
        + event({"type": "message_stop"}, "message_stop")
    )

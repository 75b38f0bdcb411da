"""POST /v1/responses: text and function calls, plain and streamed; stored responses are not modelled."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import msgspec

from .exchange import Answer, Exchange, Plain, Streamed, encode, event
from .plan import Planned, Sampling, Tool, chat_prompt, chosen_tool, wanted_schema
from .tokens import pieces
from .wire import Json, ResponsesRequest, as_dict, decode

_responses = msgspec.json.Decoder(ResponsesRequest)


async def responses(exchange: Exchange) -> Answer:
    """One input, one answer."""
    asked = decode(_responses, exchange.body)
    model = exchange.model(asked.model)
    talk: list[Json] = [{"role": "system", "content": asked.instructions}] if asked.instructions else []
    if isinstance(asked.input, str):
        talk.append({"role": "user", "content": asked.input})
    else:
        talk.extend(_message(item) for item in asked.input)
    prompt = chat_prompt(talk, asked.tools)
    tools = [Tool(str(tool.get("name")), as_dict(tool.get("parameters"))) for tool in asked.tools or []]
    choice = asked.tool_choice
    named = str(choice.get("name")) if isinstance(choice, dict) else choice or "auto"
    sampling = Sampling(
        model=model,
        temperature=1.0 if asked.temperature is None else asked.temperature,
        top_p=1.0 if asked.top_p is None else asked.top_p,
        max_tokens=asked.max_output_tokens,
        schema=wanted_schema(as_dict((asked.text or {}).get("format")) or None),
        tool=chosen_tool(tools, named, prompt.last_user, exchange.core.config.tool_marker),
    )
    planned = exchange.plan([prompt], sampling, stream=bool(asked.stream))
    if asked.stream:
        return Streamed(_stream(exchange, asked, model, planned), exchange.headers)
    await exchange.ready(planned)
    return Plain(encode(_whole(exchange, asked, model, planned[0])), headers=exchange.headers)


def _message(item: Json) -> Json:
    """Function calls and their results become messages too; they carry no role of their own."""
    return item if "role" in item else {"role": str(item.get("type", "item")), **item}


def _whole(exchange: Exchange, asked: ResponsesRequest, model: str, item: Planned | None) -> dict[str, Any]:
    """The response object; without an item, as it looks at the start."""
    record = exchange.record
    cut = item is not None and item.finish == "length"
    usage = {
        "input_tokens": record.prompt_tokens,
        "input_tokens_details": {"cached_tokens": record.cached_tokens},
        "output_tokens": record.output_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": record.prompt_tokens + record.output_tokens,
    }
    return {
        "id": f"resp_{exchange.uid}",
        "object": "response",
        "created_at": exchange.created,
        "status": "in_progress" if item is None else "incomplete" if cut else "completed",
        "error": None,
        "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
        "instructions": asked.instructions,
        "metadata": {},
        "model": model,
        "output": [] if item is None else [_item(exchange, item)],
        "parallel_tool_calls": True,
        "temperature": asked.temperature,
        "top_p": asked.top_p,
        "tool_choice": asked.tool_choice or "auto",
        "tools": asked.tools or [],
        "usage": None if item is None else usage,
    }


def _item(exchange: Exchange, item: Planned, *, empty: bool = False) -> dict[str, Any]:
    status = "in_progress" if empty else "completed"
    if item.tool:
        return {
            "type": "function_call",
            "id": f"fc_{exchange.uid}",
            "call_id": f"call_{exchange.uid}",
            "name": item.tool,
            "arguments": "" if empty else item.text,
            "status": status,
        }
    content = [] if empty else [_part(item.text)]
    return {
        "type": "message",
        "id": f"item_{exchange.uid}",
        "role": "assistant",
        "status": status,
        "content": content,
    }


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


class _Numbered:
    """Events with the running number that the SDK expects."""

    def __init__(self) -> None:
        self._number = -1

    def __call__(self, kind: str, **fields: Any) -> bytes:
        self._number += 1
        return event({"type": kind, "sequence_number": self._number, **fields}, kind)


async def _stream(
    exchange: Exchange, asked: ResponsesRequest, model: str, planned: list[Planned]
) -> AsyncGenerator[bytes, None]:
    item, say = planned[0], _Numbered()
    parts = pieces(item.text)
    named = _item(exchange, item)
    where: dict[str, Any] = {"item_id": named["id"], "output_index": 0}
    if not item.tool:
        where["content_index"] = 0
    start = _whole(exchange, asked, model, None)
    opening = say("response.created", response=start) + say("response.in_progress", response=start)
    opening += say("response.output_item.added", output_index=0, item=_item(exchange, item, empty=True))
    if not item.tool:
        opening += say("response.content_part.added", **where, part=_part(""))
    kind = "response.function_call_arguments" if item.tool else "response.output_text"
    more: dict[str, Any] = {} if item.tool else {"logprobs": []}
    async with aclosing(exchange.progress(planned)) as progress:
        async for news in progress:
            out = [opening]
            opening = b""
            for _, first, last in news:
                out.extend(say(f"{kind}.delta", **where, delta=part, **more) for part in parts[first:last])
            yield b"".join(out)
    if item.tool:
        closing = say(f"{kind}.done", **where, name=item.tool, arguments=item.text)
    else:
        closing = say(f"{kind}.done", **where, text=item.text, **more)
        closing += say("response.content_part.done", **where, part=_part(item.text))
    closing += say("response.output_item.done", output_index=0, item=named)
    whole = _whole(exchange, asked, model, item)
    ended = "response.incomplete" if item.finish == "length" else "response.completed"
    yield closing + say(ended, response=whole)

"""/v1/messages/batches, Anthropic's shape."""

import time
from typing import Final

import msgspec

from .batches import Batch, Item
from .batchrun import MESSAGES, advance, own, page, shuffled
from .errors import ApiError, bad_value
from .exchange import Answer, Exchange, Plain, encode
from .wire import Json, as_dict, as_list

_DAY_S: Final = 24 * 3600


async def create(exchange: Exchange) -> Answer:
    """A batch of the requests in the body."""
    asked = as_dict(msgspec.json.decode(exchange.body))
    book = exchange.core.offline
    entries = [as_dict(entry) for entry in as_list(asked.get("requests"))]
    names = [str(entry.get("custom_id") or "") for entry in entries]
    if not entries or len({*names}) != len(names) or not all(0 < len(name) <= 64 for name in names):  # noqa: PLR2004 — theirs
        raise bad_value("requests: unique custom_ids of 1 to 64 characters are needed", "requests")
    items = [Item(name, MESSAGES, encode(entry.get("params"))) for name, entry in zip(names, entries, strict=True)]
    batch = Batch(book.new_id("msgbatch_"), exchange.key, time.time(), items, {})
    book.batches[batch.id] = batch
    return Plain(encode(_anthropic(batch)))


async def look(exchange: Exchange, name: str) -> Answer:
    """How a batch stands, a look nearer to its end."""
    batch = own(exchange, name)
    await advance(exchange.core, batch)
    return Plain(encode(_anthropic(batch)))


async def listing(exchange: Exchange, query: dict[str, list[str]]) -> Answer:
    """The caller's batches, newest first."""
    found, more = page(exchange, query, "msgbatch_", "after_id")
    shown = [_anthropic(batch) for batch in found]
    ids = {"first_id": shown[0]["id"], "last_id": shown[-1]["id"]} if shown else {"first_id": None, "last_id": None}
    return Plain(encode({"data": shown, "has_more": more, **ids}))


async def results(exchange: Exchange, name: str) -> Answer:
    """One line for each request of an ended batch."""
    batch = own(exchange, name)
    if not batch.ended:
        raise ApiError(404, "Results are not available yet.", kind="NotFoundError")
    lines = [encode({"custom_id": item.custom_id, "result": _result(item)}) + b"\n" for item in shuffled(batch)]
    return Plain(b"".join(lines), content_type="application/x-jsonl")


async def cancel(exchange: Exchange, name: str) -> Answer:
    """No more requests of it are begun."""
    batch = own(exchange, name)
    batch.canceled = batch.canceled or not batch.ended
    return Plain(encode(_anthropic(batch)))


def _result(item: Item) -> Json:
    if item.ending != "answered":
        return {"type": item.ending}
    if item.status < 400:  # noqa: PLR2004 — HTTP
        return {"type": "succeeded", "message": item.answer}
    return {"type": "errored", "error": item.answer}


def _kind(item: Item) -> str:
    return str(_result(item)["type"]) if item.ending else "processing"


def _anthropic(batch: Batch) -> Json:
    kinds = [_kind(item) for item in batch.items]
    counts = {kind: kinds.count(kind) for kind in ("processing", "succeeded", "errored", "canceled", "expired")}
    status = "ended" if batch.ended else "canceling" if batch.canceled else "in_progress"
    return {
        "id": batch.id,
        "type": "message_batch",
        "processing_status": status,
        "request_counts": counts,
        "ended_at": _when(time.time()) if batch.ended else None,
        "created_at": _when(batch.created_at),
        "expires_at": _when(batch.created_at + _DAY_S),
        "results_url": f"https://not-asked.invalid/v1/messages/batches/{batch.id}/results" if batch.ended else None,
    }


def _when(wall: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(wall)) + "Z"

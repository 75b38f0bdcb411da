"""/v1/files and /v1/batches, OpenAI's shape."""

import email
import time
from typing import Final

import msgspec

from .batches import Batch, Book, Item
from .batchrun import OPENAI, advance, own, page, shuffled
from .core import Core
from .errors import ApiError, bad_value
from .exchange import Answer, Exchange, Plain, encode
from .wire import Json, as_dict

_DAY_S: Final = 24 * 3600


async def upload(exchange: Exchange, media_type: str) -> Answer:
    """A JSON-lines file, as multipart/form-data."""
    form = email.message_from_bytes(b"Content-Type: " + media_type.encode() + b"\r\n\r\n" + exchange.body)
    parts = {part.get_param("name", header="content-disposition"): part for part in form.walk()}
    if "file" not in parts or "purpose" not in parts:
        raise bad_value("'file' and 'purpose' are required", "file")
    content = parts["file"].get_payload(decode=True)
    data = content if isinstance(content, bytes) else b""
    name = exchange.core.offline.keep(exchange.key, data)
    shown = {"id": name, "object": "file", "bytes": len(data), "created_at": exchange.created, "purpose": "batch"}
    return Plain(encode({**shown, "filename": parts["file"].get_filename(), "status": "processed"}))


async def content(exchange: Exchange, name: str) -> Answer:
    """A file as it is."""
    key, data = exchange.core.offline.files.get(name, ("", b""))
    if name not in exchange.core.offline.files or key != exchange.key:
        raise ApiError(404, f"No such File object: {name}", kind="NotFoundError", code="not_found")
    return Plain(data, content_type="application/octet-stream")


async def create(exchange: Exchange) -> Answer:
    """A batch of what an uploaded file holds; nothing is checked yet."""
    asked = as_dict(msgspec.json.decode(exchange.body))
    core, book = exchange.core, exchange.core.offline
    key, data = book.files.get(str(asked.get("input_file_id")), ("", b""))
    if key != exchange.key or asked.get("endpoint") not in OPENAI or asked.get("completion_window") != "24h":
        raise bad_value("Invalid batch: input_file_id, endpoint and completion_window '24h' are needed.", "batch")
    batch = Batch(book.new_id("batch_"), exchange.key, time.time(), [], asked)
    seen: dict[str, object] = {}
    for number, line in enumerate(data.splitlines(), 1):
        _take_line(core, batch, seen, number, line)
    book.batches[batch.id] = batch
    return Plain(encode(_openai(batch)))


def _take_line(core: Core, batch: Batch, seen: dict[str, object], number: int, line: bytes) -> None:
    try:
        asked = as_dict(msgspec.json.decode(line))
    except (msgspec.DecodeError, UnicodeDecodeError):
        asked = {}
    body, custom_id = as_dict(asked.get("body")), str(asked.get("custom_id") or "")
    model = body.get("model")
    code = ""
    if not custom_id or not body or asked.get("url") != batch.asked["endpoint"] or asked.get("method") != "POST":
        code = "invalid_line"
    elif custom_id in seen:
        code = "duplicate_custom_id"
    elif model not in core.config.models and not core.config.any_model:
        code = "model_not_found"
    elif next(iter(seen.values()), model) != model:
        code = "mismatched_model"
    if code:
        message = f"Line {number}: {code.replace('_', ' ')}."
        batch.errors = [*batch.errors, {"code": code, "line": number, "message": message, "param": None}]
    seen[custom_id] = model
    batch.items.append(Item(custom_id, batch.asked["endpoint"], encode(body)))


async def look(exchange: Exchange, name: str) -> Answer:
    """How a batch stands, a look nearer to its end."""
    batch = own(exchange, name)
    await advance(exchange.core, batch)
    if batch.ended and not batch.files and not batch.errors:
        _write_files(exchange.core.offline, batch)
    return Plain(encode(_openai(batch)))


def _write_files(book: Book, batch: Batch) -> None:
    lines: dict[str, list[bytes]] = {"output_file_id": [], "error_file_id": []}
    for number, item in enumerate(shuffled(batch)):
        line: Json = {"id": f"batch_req_{number}", "custom_id": item.custom_id, "response": None, "error": None}
        if item.ending == "answered":
            line["response"] = {"status_code": item.status, "request_id": f"req_{number}", "body": item.answer}
        else:
            code = "batch_expired" if item.ending == "expired" else "batch_cancelled"
            line["error"] = {"code": code, "message": f"This request was not executed: {code}."}
        file = "output_file_id" if item.ending == "answered" and item.status < 400 else "error_file_id"  # noqa: PLR2004 — HTTP
        lines[file].append(encode(line) + b"\n")
    batch.files = {name: book.keep(batch.key, b"".join(found)) for name, found in lines.items() if found}


def _openai(batch: Batch) -> Json:
    if not batch.ended:
        status = "cancelling" if batch.canceled else "in_progress"
    elif batch.errors:
        status = "failed"
    elif batch.canceled:
        status = "cancelled"
    else:
        status = "expired" if any(item.ending == "expired" for item in batch.items) else "completed"
    good = sum(item.ending == "answered" and item.status < 400 for item in batch.items)  # noqa: PLR2004 — HTTP
    bad = sum(bool(item.ending) for item in batch.items) - good
    return {
        "id": batch.id,
        "object": "batch",
        "endpoint": batch.asked["endpoint"],
        "errors": {"object": "list", "data": batch.errors} if batch.ended and batch.errors else None,
        "input_file_id": batch.asked["input_file_id"],
        "completion_window": "24h",
        "status": status,
        "output_file_id": batch.files.get("output_file_id"),
        "error_file_id": batch.files.get("error_file_id"),
        "created_at": int(batch.created_at),
        "expires_at": int(batch.created_at) + _DAY_S,
        "request_counts": {"total": len(batch.items), "completed": good, "failed": bad},
        "metadata": batch.asked.get("metadata"),
    }


async def cancel(exchange: Exchange, name: str) -> Answer:
    """No more requests of it are begun."""
    batch = own(exchange, name)
    batch.canceled = batch.canceled or not batch.ended
    return Plain(encode(_openai(batch)))


async def listing(exchange: Exchange, query: dict[str, list[str]]) -> Answer:
    """The caller's batches, newest first."""
    found, more = page(exchange, query, "batch_", "after")
    return Plain(encode({"object": "list", "data": [_openai(batch) for batch in found], "has_more": more}))

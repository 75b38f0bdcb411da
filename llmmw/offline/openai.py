"""OpenAI's batch API: an input file, a batch with our manifest's id as metadata, an output and an error file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import msgspec

from llmmw.answer import items, mapping
from llmmw.errors import ConfigError, ProtocolError
from llmmw.offline.dialect import Ending, Standing, name_of, never_run, refused_whole, reply_of
from llmmw.wire import PATHS

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    from llmmw.call import Call, Reply
    from llmmw.errors import StatusError
    from llmmw.offline.api import Api
    from llmmw.offline.dialect import Save
    from llmmw.offline.shelf import Manifest

METADATA: Final = "llmmw_manifest"
_OPS = ("chat", "complete", "embed", "responses")
_ENDINGS: dict[object, Ending] = {
    "completed": "completed", "expired": "expired", "cancelled": "canceled", "failed": "failed",
}  # fmt: skip
_NEVER_RUN: dict[object, Ending] = {
    "batch_expired": "expired", "batch_cancelled": "canceled", "batch_canceled": "canceled",
}  # fmt: skip
_PAGE, _MAX_PAGES = 100, 1000
_CLOCKS_DIFFER_S = 3600.0
"""A batch that is so much older than its manifest is another one, whatever the two clocks say."""


class OpenAI:
    """/files and /batches below the client's base URL."""

    name = "openai"
    max_requests = 50_000
    max_bytes = 200_000_000
    overhead = 0
    proves = True

    def translated(self, call: Call) -> Call:
        """The call itself."""
        if call.op not in _OPS:
            raise ConfigError(f"an offline batch of OpenAI's takes {', '.join(_OPS)}, not {call.op!r}")
        return call

    def batch_of(self, call: Call) -> Hashable:
        """One endpoint and one model for each file."""
        return call.op, call.model

    def line(self, call: Call, custom_id: str) -> bytes:
        """A line of the input file."""
        body = {name: value for name, value in call.payload.items() if name not in {"stream", "stream_options"}}
        return msgspec.json.encode({"custom_id": custom_id, "method": "POST", "url": _url(call.op), "body": body})

    async def submit(self, api: Api, manifest: Manifest, lines: Sequence[bytes], save: Save) -> str:
        """Upload the input (an upload that is lost costs nothing), then make the batch."""
        if not manifest.file:
            kind, body = _form(manifest.id, lines)
            manifest.file = _id_of(await api.ask("POST", "/files", body, kind=kind), api)
        manifest.sent = api.env.clock.wall()
        await save(manifest)
        wanted = {
            "input_file_id": manifest.file,
            "endpoint": _url(manifest.op),
            "completion_window": "24h",
            "metadata": {METADATA: manifest.id},
        }
        return _id_of(await api.ask("POST", "/batches", msgspec.json.encode(wanted), harmless=False), api)

    async def find(self, api: Api, manifest: Manifest, taken: frozenset[str]) -> str | None:
        """The batch with our manifest's id in its metadata; batches are listed newest first."""
        del taken  # the metadata tells
        after = ""
        for _ in range(_MAX_PAGES):
            page = await api.ask("GET", f"/batches?limit={_PAGE}{after}")
            batches = [mapping(batch) for batch in items(page.get("data"))]
            for batch in batches:
                if mapping(batch.get("metadata")).get(METADATA) == manifest.id:
                    return _id_of(batch, api)
            made = batches[-1].get("created_at") if batches else None
            too_old = isinstance(made, int | float) and made < manifest.created - _CLOCKS_DIFFER_S
            if not batches or not page.get("has_more") or too_old:
                break
            after = f"&after={_id_of(batches[-1], api)}"
        return None

    async def look(self, api: Api, batch: str) -> Standing:
        """How a batch stands; one that was refused whole says which lines are to blame."""
        found = await api.ask("GET", f"/batches/{batch}")
        counts = mapping(found.get("request_counts"))
        finished = [count for name in ("completed", "failed") if isinstance(count := counts.get(name), int)]
        files = [found.get("output_file_id"), found.get("error_file_id")]
        errors = items(mapping(found.get("errors")).get("data"))
        return Standing(
            batch,
            _ENDINGS.get(found.get("status")),
            sum(finished),
            tuple(file for file in files if isinstance(file, str) and file),
            tuple(_spoilt(error, api.name) for error in errors),
        )

    async def results(self, api: Api, standing: Standing) -> list[tuple[str, Reply | Exception]]:
        """What both files say."""
        found: list[tuple[str, Reply | Exception]] = []
        for file in standing.files:
            async for line in api.in_turns(await api.lines(f"/files/{name_of(file)}/content")):
                custom_id = line.get("custom_id")
                if isinstance(custom_id, str):
                    found.append((custom_id, _outcome(line, api.name, standing)))
        return found

    async def cancel(self, api: Api, batch: str) -> None:
        """What is done by then stays."""
        await api.ask("POST", f"/batches/{batch}/cancel", b"{}")


def _outcome(line: dict[str, Any], endpoint: str, standing: Standing) -> Reply | Exception:
    error, response = mapping(line.get("error")), mapping(line.get("response"))
    if response:
        # Which operation it was the body says itself.
        return reply_of(_shape(response.get("body")), response.get("status_code"), response.get("body"), endpoint)
    why = _NEVER_RUN.get(error.get("code"))
    if why is not None:
        return never_run(why, endpoint, batch=standing.batch)
    return refused_whole(error, endpoint) if error else ProtocolError("a result without an answer", endpoint=endpoint)


def _shape(body: object) -> str:
    kind = mapping(body).get("object")
    if kind == "list":
        return "embed"
    return "responses" if kind == "response" else "chat"


def _spoilt(error: object, endpoint: str) -> tuple[int | None, StatusError]:
    line = mapping(error).get("line")
    index = line - 1 if isinstance(line, int) and line > 0 else None
    return index, refused_whole(error, endpoint)


def _url(op: str) -> str:
    return f"/v1{PATHS[op]}"


def _id_of(found: dict[str, Any], api: Api) -> str:
    return name_of(found.get("id"), api.name)


def _form(manifest: str, lines: Sequence[bytes]) -> tuple[str, bytes]:
    """The upload as multipart/form-data: its media type and body."""
    boundary = f"llmmw-{manifest}"  # random, so it stands in nobody's prompt
    head = (
        f'--{boundary}\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
        f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="{boundary}.jsonl"\r\n'
        "Content-Type: application/jsonl\r\n\r\n"
    )
    body = b"".join((head.encode(), b"\n".join(lines), b"\n", f"\r\n--{boundary}--\r\n".encode()))
    return f"multipart/form-data; boundary={boundary}", body

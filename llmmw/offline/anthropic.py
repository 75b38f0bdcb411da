"""Anthropic's Message Batches: the requests themselves in one body, results by custom id.

A batch there carries no metadata, and while it runs nothing tells what is in it. So a submission of unknown outcome
is looked for among the batches that were made at that time with as many requests and that no other manifest has;
once it has ended its custom ids (our keys, which no one else has) prove whether it is the one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from llmmw.algo.headers import moment
from llmmw.answer import items, mapping
from llmmw.errors import ConfigError, ProtocolError
from llmmw.offline.dialect import Ending, Standing, name_of, never_run, reply_of

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    from llmmw.call import Call, Reply
    from llmmw.offline.api import Api
    from llmmw.offline.dialect import Save
    from llmmw.offline.shelf import Manifest

_PATH = "/v1/messages/batches"
_PAGE, _MAX_PAGES = 100, 1000
_BEFORE_S, _AFTER_S = 300.0, 900.0
"""Around the moment of a submission, the difference of the clocks allowed for: a large body takes its time."""
_STATUS = {
    "invalid_request_error": 400, "authentication_error": 401, "billing_error": 402, "permission_error": 403,
    "not_found_error": 404, "request_too_large": 413, "rate_limit_error": 429, "api_error": 500, "timeout_error": 504,
    "overloaded_error": 529,
}  # fmt: skip
"""Statuses of the error types (docs.claude.com, API errors)."""


class Anthropic:
    """/v1/messages/batches at the client's base URL."""

    name = "anthropic"
    max_requests = 100_000
    max_bytes = 256_000_000
    overhead = len(b'{"requests":[]}')
    proves = False

    def translated(self, call: Call) -> Call:
        """Messages instead of a chat."""
        if call.op not in {"chat", "messages"}:
            raise ConfigError(f"an offline batch of Anthropic's takes messages, not {call.op!r}")
        if "max_tokens" not in call.payload:
            raise ConfigError("a request of Anthropic's needs max_tokens")
        return call.replace(op="messages")

    def batch_of(self, call: Call) -> Hashable:
        """Anything goes together."""
        del call
        return None

    def line(self, call: Call, custom_id: str) -> bytes:
        """An element of `requests`."""
        params = {name: value for name, value in call.payload.items() if name != "stream"}
        return msgspec.json.encode({"custom_id": custom_id, "params": params})

    async def submit(self, api: Api, manifest: Manifest, lines: Sequence[bytes], save: Save) -> str:
        """Make the batch."""
        manifest.sent = api.env.clock.wall()
        await save(manifest)
        body = b"".join((b'{"requests":[', b",".join(lines), b"]}"))
        return name_of((await api.ask("POST", _PATH, body, harmless=False)).get("id"), api.name)

    async def find(self, api: Api, manifest: Manifest, taken: frozenset[str]) -> str | None:
        """A batch that may be ours, an ended one only if it is; batches are listed newest first."""
        after = ""
        for _ in range(_MAX_PAGES):
            page = await api.ask("GET", f"{_PATH}?limit={_PAGE}{after}")
            batches = [mapping(batch) for batch in items(page.get("data"))]
            for batch in batches:
                name = name_of(batch.get("id"), api.name)
                if (
                    name not in taken
                    and _may_be(batch, manifest, api.ahead_s)
                    and await self._is_ours(api, batch, manifest)
                ):
                    return name
            too_old = bool(batches) and _made(batches[-1]) - api.ahead_s < manifest.sent - _BEFORE_S
            if not batches or not page.get("has_more") or too_old:
                break
            after = f"&after_id={name_of(batches[-1].get('id'), api.name)}"
        return None

    async def _is_ours(self, api: Api, batch: dict[str, Any], manifest: Manifest) -> bool:
        """Whether an ended batch has our ids; of one under way that is assumed for now."""
        standing = _standing(batch)
        if standing.ended is None:
            return True
        ours = set(manifest.ids)
        return any(custom_id in ours for custom_id, _ in await self.results(api, standing))

    async def look(self, api: Api, batch: str) -> Standing:
        """How a batch stands."""
        return _standing(await api.ask("GET", f"{_PATH}/{batch}"), batch)

    async def results(self, api: Api, standing: Standing) -> list[tuple[str, Reply | Exception]]:
        """One line for each request."""
        found: list[tuple[str, Reply | Exception]] = []
        async for line in api.in_turns(await api.lines(f"{_PATH}/{standing.batch}/results")):
            custom_id = line.get("custom_id")
            if isinstance(custom_id, str):
                found.append((custom_id, _outcome(mapping(line.get("result")), api.name, standing)))
        return found

    async def cancel(self, api: Api, batch: str) -> None:
        """What is done by then stays."""
        await api.ask("POST", f"{_PATH}/{batch}/cancel", b"{}")


def _outcome(result: dict[str, Any], endpoint: str, standing: Standing) -> Reply | Exception:
    kind = result.get("type")
    if kind == "succeeded":
        return reply_of("messages", 200, result.get("message"), endpoint)
    if kind == "errored":
        told = mapping(result.get("error"))
        said = mapping(told.get("error")) or told  # with and without the envelope
        status = _STATUS.get(str(said.get("type")), 500)
        return reply_of("messages", status, {"type": "error", "error": said}, endpoint)
    if kind == "expired" or kind == "canceled":  # noqa: PLR1714 — narrows the type
        return never_run(kind, endpoint, batch=standing.batch)
    return ProtocolError("a result of an unknown type", endpoint=endpoint)


def _standing(batch: dict[str, Any], name: str = "") -> Standing:
    counts = mapping(batch.get("request_counts"))
    finished = [count for key, count in counts.items() if key != "processing" and isinstance(count, int)]
    ended: Ending | None = "completed" if batch.get("processing_status") == "ended" else None
    return Standing(name or name_of(batch.get("id")), ended, sum(finished))


def _may_be(batch: dict[str, Any], manifest: Manifest, ahead_s: float) -> bool:
    counts = mapping(batch.get("request_counts")).values()
    size = sum(count for count in counts if isinstance(count, int))
    made = _made(batch) - ahead_s
    return size == len(manifest.ids) and manifest.sent - _BEFORE_S <= made <= manifest.sent + _AFTER_S


def _made(batch: dict[str, Any]) -> float:
    """Wall-clock seconds of a batch's making; infinite where it does not say."""
    found = moment(str(batch.get("created_at") or ""))
    return float("inf") if found is None else found

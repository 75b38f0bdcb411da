"""What both kinds of offline batches share: how they advance, whose they are, how they are listed."""

from hashlib import sha256
from typing import Final

import msgspec

from .batches import Batch, Item
from .chat import chat
from .completions import complete
from .core import Core
from .embeddings import embed
from .errors import ApiError
from .exchange import Answer, Exchange, Plain
from .messages import messages
from .plan import Planned
from .responses import responses
from .side import refusal
from .stats import Record

OPENAI: Final = {
    "/v1/chat/completions": chat,
    "/v1/completions": complete,
    "/v1/embeddings": embed,
    "/v1/responses": responses,
}
MESSAGES: Final = "/v1/messages"
_PAGE: Final = 20


class _Quiet(Exchange):
    """A request inside a batch: no rate limit, and all at once."""

    def pay(self, tokens: int) -> None:
        """Batches have limits of their own."""

    async def ready(self, planned: list[Planned]) -> None:
        """Nobody waits."""
        self.settle(planned)


async def _run(core: Core, item: Item, key: str) -> None:
    route = messages if item.path == MESSAGES else OPENAI[item.path]
    exchange = _Quiet(core, Record(0, core.stats.now_s(), item.path), item.body, key)
    try:
        answer: Answer = await route(exchange)
    except ApiError as error:
        answer = refusal(core.config, error, item.path)
    if isinstance(answer, Plain):
        item.status, item.answer = answer.status, msgspec.json.decode(answer.body)
    item.ending = "answered"


async def advance(core: Core, batch: Batch) -> None:
    """One look nearer to the end."""
    batch.looks += 1
    if batch.ended or (batch.looks < core.config.offline_looks and not batch.canceled):
        return
    batch.ended = True
    if batch.errors:
        return
    expire = core.config.offline_expire.encode()
    for number, item in enumerate(batch.items):
        if expire in item.body:
            item.ending = "expired"
        elif batch.canceled and number >= len(batch.items) // 2:
            item.ending = "canceled"
        else:
            await _run(core, item, batch.key)


def shuffled(batch: Batch) -> list[Item]:
    """The requests in the order of the results."""
    return sorted(batch.items, key=lambda item: sha256(item.custom_id.encode()).digest())


def own(exchange: Exchange, name: str) -> Batch:
    """The batch of that name, if the caller's key made it."""
    batch = exchange.core.offline.batches.get(name)
    if batch is None or batch.key != exchange.key:
        raise ApiError(404, f"No batch found with id '{name}'.", kind="NotFoundError", code="not_found")
    return batch


def page(exchange: Exchange, query: dict[str, list[str]], kind: str, after: str) -> tuple[list[Batch], bool]:
    """The caller's batches of a kind, newest first, and whether there are more."""
    found = [batch for batch in exchange.core.offline.batches.values() if batch.key == exchange.key]
    found = [batch for batch in reversed(found) if batch.id.startswith(kind)]
    names = [batch.id for batch in found]
    last = query.get(after, [""])[0]
    found = found[names.index(last) + 1 :] if last in names else found
    limit = int(query.get("limit", [str(_PAGE)])[0])
    return found[:limit], len(found) > limit

"""One request under way: what a route gets to work with, and what it hands back."""

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Final

import msgspec
from msgspec import Struct

from .engine import Group
from .errors import overloaded, unknown_model
from .plan import Planned, Prompt, Sampling

if TYPE_CHECKING:
    from .core import Core
    from .stats import Record

FINGERPRINT: Final = "llmmw-embedded-no-model"
DONE: Final = b"data: [DONE]\n\n"
_TEXT_KEPT: Final = 80

encode = msgspec.json.encode


class Plain(Struct):
    """A complete answer: JSON bytes by default."""

    body: bytes
    status: int = 200
    content_type: str = "application/json"
    headers: dict[str, str] = {}


class Streamed(Struct):
    """Server-sent events; each item holds one or more complete events."""

    events: AsyncGenerator[bytes, None]
    headers: dict[str, str] = {}


Answer = Plain | Streamed


def event(data: Any, name: str = "") -> bytes:
    """One server-sent event."""
    head = f"event: {name}\n".encode() if name else b""
    return head + b"data: " + encode(data) + b"\n\n"


class Exchange:
    """A request with the server's parts at hand."""

    def __init__(self, core: "Core", record: "Record", body: bytes, key: str) -> None:
        self.core = core
        self.record = record
        self.body = body
        self.key = key
        self.created = int(time.time())
        self.headers: dict[str, str] = {}

    @property
    def uid(self) -> str:
        """The request's id without a prefix: the client's X-Request-Id, else a number."""
        return self.record.request_id or f"{self.core.uid}{self.record.number:08x}"

    def model(self, asked: str | None) -> str:
        """The model to answer as; none asked means the first one, as in vLLM."""
        config = self.core.config
        if asked is not None and asked not in config.models and not config.any_model:
            raise unknown_model(asked)
        self.record.model = asked or config.models[0]
        return self.record.model

    def plan(self, prompts: list[Prompt], sampling: Sampling, *, stream: bool = False) -> list[Planned]:
        """Decide the texts and pay for them: context, rate limit and queue are checked here."""
        core, record = self.core, self.record
        record.stream = stream
        record.priority = sampling.priority
        record.text = prompts[-1].last_user[:_TEXT_KEPT]
        planned = core.planner.plan(prompts, sampling)
        record.sequences = len(planned)
        prompt_tokens = sum(prompt.tokens for prompt in prompts)
        self.pay(prompt_tokens + sum(item.tokens for item in planned))
        config, engine = core.config, core.engine
        # The cap counts members and is all-or-nothing, as in vLLM.
        cap = config.max_queued if config.latency == "engine" else None
        if cap is not None and engine.waiting + len(planned) > cap:
            raise overloaded()
        record.prompt_tokens = prompt_tokens
        return planned

    def pay(self, tokens: int) -> None:
        """Take one request and these tokens from the key's limits."""
        limits = self.core.limits
        if limits.active:
            self.headers.update(limits.admit(self.key, tokens, time.monotonic()))

    async def ready(self, planned: list[Planned]) -> None:
        """Wait until all texts are complete; cancellation frees their slots."""
        if self.core.config.latency != "none":
            async with aclosing(self.core.pace(Group([item.sequence for item in planned], streaming=False))) as steps:
                async for _ in steps:
                    pass
        self.settle(planned)

    async def progress(self, planned: list[Planned]) -> AsyncGenerator[list[tuple[int, int, int]], None]:
        """Yield what is new, as (index of the text, first new token, one past the last), until all is out."""
        sent = [0] * len(planned)
        group = Group([item.sequence for item in planned], streaming=True)
        async with aclosing(self.core.pace(group)) as steps:
            async for _ in steps:
                news: list[tuple[int, int, int]] = []
                for index, item in enumerate(planned):
                    produced = item.sequence.produced
                    if produced > sent[index]:
                        news.append((index, sent[index], produced))
                        self.record.output_tokens += produced - sent[index]
                        sent[index] = produced
                yield news
        self.settle(planned)

    def settle(self, planned: list[Planned]) -> None:
        """Book what was produced."""
        record = self.record
        record.output_tokens = sum(item.tokens for item in planned)
        record.cached_tokens = sum(item.sequence.cached for item in planned)
        for item in planned:
            self.core.stats.by_finish[item.finish] += 1

    def usage(self) -> dict[str, Any]:
        """OpenAI's usage object for what has been produced so far."""
        record = self.record
        return {
            "prompt_tokens": record.prompt_tokens,
            "completion_tokens": record.output_tokens,
            "total_tokens": record.prompt_tokens + record.output_tokens,
            "prompt_tokens_details": {"cached_tokens": record.cached_tokens},
        }

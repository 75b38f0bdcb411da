"""Offline batches: many requests handed over at once, answered within a day, for about half the price.

`run.py` decides what is submitted, found again and waited for; `shelf.py` keeps the manifests; `openai.py` and
`anthropic.py` speak the two APIs; `api.py` carries their requests.
"""

from __future__ import annotations

import os
from typing import Literal

from llmmw.errors import ConfigError
from llmmw.settings import choice, positive_seconds, seconds, settings, text, whole

APIS = ("openai", "anthropic")


@settings
class OfflineBatch:
    """Where and how `generate_batch` and `map` run their requests as offline batches.

        outcomes = await client.generate_batch(model="m", prompts=[...], offline=OfflineBatch("runs/night"))

    Before anything is sent, a manifest (which requests, by key; no prompt, no secret) is written into the directory.
    Whoever makes the same requests with the same directory again, after a crash or a Ctrl-C, waits on for the batch
    that is under way and pays nothing twice. What was answered is not asked again, what failed is.

    Requests beyond a batch's limits are spread over several. Answers that the client's cache has are not asked for,
    and those that come go into it. The layers that guard single calls (Retry, RateLimiter, ...) have no part in this.

    Args:
        directory: for the manifests; ours alone (made with mode 0700), on a local disk. One run at a time.
        api: "openai" (/files and /batches; also of servers that imitate them) or "anthropic" (/v1/messages/batches:
            requests are then Messages, with `max_tokens`).
        poll: longest time between two looks at a batch (seconds or text); the first come sooner.
        settle: after a submission whose outcome is unknown the batch may still turn up for that long; only then is
            it submitted again.
        max_requests: requests of one batch; default and maximum: the API's (50,000; Anthropic 100,000).
        max_bytes: likewise its size (200 MB; Anthropic 256 MB).
        tries: how often in a row a question to the API may fail; 20 bridge a quarter of an hour.

    Raises:
        ConfigError: a value that cannot work; from a run also a directory that is not ours, or in use.
    """

    directory: str | os.PathLike[str]
    api: Literal["openai", "anthropic"] = "openai"
    poll: float | str = 60.0
    settle: float | str = 30.0
    max_requests: int | None = None
    max_bytes: int | None = None
    tries: int = 20

    def __post_init__(self) -> None:
        if not isinstance(self.directory, os.PathLike):
            text("OfflineBatch(directory=)", self.directory)
        choice("OfflineBatch(api=)", self.api, APIS)
        object.__setattr__(self, "poll", positive_seconds("OfflineBatch(poll=)", self.poll))
        object.__setattr__(self, "settle", seconds("OfflineBatch(settle=)", self.settle))
        for name in ("max_requests", "max_bytes"):
            if getattr(self, name) is not None:
                whole(f"OfflineBatch({name}=)", getattr(self, name))
        whole("OfflineBatch(tries=)", self.tries)


def offline_of(value: object) -> OfflineBatch:
    """The settings in an `offline=` argument: themselves, or a directory.

    Raises:
        ConfigError: neither.
    """
    if isinstance(value, OfflineBatch):
        return value
    if isinstance(value, str | os.PathLike):
        return OfflineBatch(value)  # pyright: ignore[reportUnknownArgumentType]  # checked by it
    raise ConfigError(f"offline={value!r}: must be an OfflineBatch or a directory")

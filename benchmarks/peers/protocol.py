"""What an adapter is. This module, the adapters and the worker run in the peer's environment: standard library only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping
    from contextlib import AbstractAsyncContextManager

    Ask = Callable[..., Awaitable[object]]
    """`ask(prompt, **changes)` makes the call of `client_cpu.body(prompt)` and reads the answer's text. Changes are
    fields of the body (a new `messages` included), `extra_body`, or another `base_url` or `api_key`."""
    Way = Callable[["Job"], AbstractAsyncContextManager[Ask]]

Purpose = Literal["uncached", "miss", "memory", "disk", "stampede", "storm", "defaults", "told", "probe"]
PATIENT = 20
"""Retries of a caller who wants every answer, where a peer lets one say."""
KEY = "benchmark"


@dataclass(frozen=True)
class Job:
    """What a way is opened for.

    Attributes:
        purpose: "uncached": no cache; "miss": a cache in memory that never has the answer; "memory", "stampede" and
            "probe": one that may have it; "disk": answers are kept in `directory` and read from there, not from memory;
            "storm": retries as patient as can be; "defaults": retries as they come; "told": as "storm", and the peer
            is told `rate`.
        url: the server's base URL, ending in /v1.
        directory: an empty folder, or for the second opening of "disk" the one that the first has filled.
        rate: requests per second that the server admits, for "told".
        burst: requests that it admits at once.
        at_once: the most calls in flight.
    """

    purpose: Purpose
    url: str
    directory: str = ""
    rate: float = 0.0
    burst: int = 0
    at_once: int = 1024

    @property
    def caches(self) -> bool:
        """Whether answers are to be kept."""
        return self.purpose in {"miss", "memory", "disk", "stampede", "probe"}

    def retries(self, default: int) -> int:
        """How often to repeat a refused request; `default` is the peer's own setting."""
        return {"storm": PATIENT, "told": PATIENT, "defaults": default}.get(self.purpose, 0)


class CannotError(Exception):
    """The peer has nothing for this job; the message says what is missing."""


@dataclass(frozen=True)
class Peer:
    """One package, or one way to use two together.

    Attributes:
        name: of its environment and its requirements.
        packages: distributions whose versions the table names.
        statement: what a user imports.
        ways: how it is used, by the name in the table.
        beside: another peer whose requirements its ways need too (not counted in its size).
        environment: of another peer, where it needs none of its own.
        ours: whether it is llmmw.
    """

    name: str
    packages: tuple[str, ...]
    statement: str
    ways: Mapping[str, Way] = field(default_factory=dict[str, "Way"])
    beside: str = ""
    environment: str = ""
    ours: bool = False


def without_cache(job: Job) -> None:
    """Refuse what needs a cache or a limit that is told.

    Raises:
        CannotError: the job does.
    """
    if job.caches and job.purpose != "stampede":
        raise CannotError("no cache")
    if job.purpose == "told":
        raise CannotError("no rate limit to set")

"""The time-outs of a pool, and how a wait is held to them."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, TypeVar

import msgspec

from llmmw.errors import UpstreamTimeout
from llmmw.settings import seconds

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from llmmw.pool.pool import ConnectionPool

T = TypeVar("T")


class Limits(msgspec.Struct, frozen=True):
    """In seconds; None: unlimited. What each bounds is told at `ConnectionPool`."""

    pool_s: float | None
    connect_s: float | None
    write_s: float | None
    first_byte_s: float | None
    chunk_s: float | None
    total_s: float | None


def limits_of(settings: ConnectionPool) -> Limits:
    """The limits that the settings, checked already, name."""
    return Limits(
        _optional(settings.pool_timeout),
        _optional(settings.connect_timeout),
        _optional(settings.write_timeout),
        _optional(settings.first_byte_timeout),
        _optional(settings.chunk_timeout),
        _optional(settings.total_timeout),
    )


def _optional(value: float | str | None) -> float | None:
    return None if value is None else seconds("timeout", value)


class Patience:
    """How long one exchange may still take: one limit on each silence, one on the whole."""

    __slots__ = ("_end", "_limits", "_loop")

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._loop = asyncio.get_running_loop()
        self._end = None if limits.total_s is None else self._loop.time() + limits.total_s

    async def head(self, work: Awaitable[T]) -> T:
        """Wait for the head of the response.

        Raises:
            UpstreamTimeout: it did not come in time.
        """
        quiet_s = self._limits.first_byte_s
        return await self._within(work, quiet_s, f"no response within {quiet_s} s")

    async def piece(self, work: Awaitable[T]) -> T:
        """Wait for the next piece of the body.

        Raises:
            UpstreamTimeout: it did not come in time.
        """
        quiet_s = self._limits.chunk_s
        return await self._within(work, quiet_s, f"the body stood still for {quiet_s} s")

    async def _within(self, work: Awaitable[T], quiet_s: float | None, silent: str) -> T:
        end, due = self._end, None if quiet_s is None else self._loop.time() + quiet_s
        if end is not None and (due is None or end < due):
            due, silent = end, f"the exchange was not over within {self._limits.total_s} s"
        try:
            async with asyncio.timeout_at(due):
                return await work
        except TimeoutError:
            raise UpstreamTimeout(silent) from None

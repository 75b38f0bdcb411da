"""Leases: of several processes that share a cache directory one asks upstream, the others wait for its entry.

The holder renews its lease while its call runs. One that stopped past its lease loses it to the next process, and what
it would then store is refused. Losing a lease costs a duplicate call, never wrong data.

SQLite tells no other process of a change, so who waits looks again, after growing pauses of at most 0.2 s.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from llmmw.env import Env
    from llmmw.stores.leasetable import Standing, Table

T = TypeVar("T")

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.01, 0.2
_MAX_BUSY = 8
"""Finding the table locked that often in a row (about 0.4 s) is trouble; then it goes without a lease."""


class IO(Protocol):
    """The I/O thread of the directory."""

    async def ask(self, job: Callable[[], T], /) -> T | None:
        """What the job returns; None if that takes too long."""
        ...

    def soon(self, job: Callable[[], object], /) -> None:
        """Run it before waiting writes."""
        ...

    def later(self, job: Callable[[], bool], /) -> None:
        """Run it after the writes that wait, again if it returns False."""
        ...


class Leases:
    """The home loop's side.

    Args:
        table: what the I/O thread works on.
        io: that thread.
        env: clock and randomness.
    """

    def __init__(self, table: Table, io: IO, env: Env) -> None:
        self._table = table
        self._io = io
        self._env = env

    async def claim(
        self, key: bytes, lease_s: float, find: Callable[[], Awaitable[T | None]]
    ) -> tuple[Lease | None, T | None]:
        """Wait until this process may ask, or has the answer of another that asked.

        Args:
            key: of the entry.
            lease_s: seconds.
            find: looks whether the entry is there.

        Returns:
            The lease, which must be released; or what `find` found; or neither where leases do not work now, or
            the process that asked did not store its answer.
        """
        pause_s, busy, followed = _FIRST_PAUSE_S, 0, False
        while True:
            standing = await self._take(key, lease_s, followed=followed)
            if standing is None:
                return None, None
            if standing.how in {"taken", "over"}:
                return await self._look_once_more(key, lease_s, standing, find)
            followed = followed or standing.how == "held"
            busy = busy + 1 if standing.how == "busy" else 0
            if busy == _MAX_BUSY:
                return None, None
            await self._env.clock.sleep(pause_s * (0.5 + self._env.rng.random() / 2))
            pause_s = min(1.5 * pause_s, _LONGEST_PAUSE_S)
            found = await find()
            if found is not None:
                return None, found

    async def _take(self, key: bytes, lease_s: float, *, followed: bool) -> Standing | None:
        made: list[Standing | None] = []
        table = self._table  # the jobs must not keep the store alive

        def take() -> Standing | None:
            made.append(table.take(key, lease_s, followed=followed))
            return made[0]

        def undo() -> bool:
            standing = made[0] if made else None
            return standing is None or table.release(key, standing.fence)

        try:
            standing = await self._io.ask(take)
        except asyncio.CancelledError:
            self._io.later(undo)
            raise
        if standing is None:
            self._io.later(undo)  # it may have come too late
        return standing

    async def _look_once_more(
        self, key: bytes, lease_s: float, standing: Standing, find: Callable[[], Awaitable[T | None]]
    ) -> tuple[Lease | None, T | None]:
        """The former holder stored its answer before it gave the lease back."""
        lease = Lease(self._table, self._io, key, standing.fence, lease_s) if standing.how == "taken" else None
        try:
            found = await find()
        except BaseException:
            if lease is not None:
                lease.release()
            raise
        if found is not None and lease is not None:
            lease.release()
            lease = None
        return lease, found


class Lease:
    """One that this process holds, renewed three times as often as needed."""

    def __init__(self, table: Table, io: IO, key: bytes, fence: int, lease_s: float) -> None:
        self._table = table
        self._io = io
        self._key = key
        self.fence = fence
        self.write: Callable[[Callable[[], bool]], bool] = partial(table.write, key, fence)
        """Runs a write unless the lease was lost; on the I/O thread. False: not yet. It does not know the store."""
        self._lease_s = lease_s
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._wait()

    def _wait(self) -> None:
        self._timer = self._loop.call_later(self._lease_s / 3, self._renew)

    def _renew(self) -> None:
        self._io.soon(partial(self._table.renew, self._key, self.fence, self._lease_s))
        self._wait()

    def release(self) -> None:
        """Give it back, after what was written under it."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            self._io.later(partial(self._table.release, self._key, self.fence))

"""The other half of the cache: getting an answer that is not there, keeping it, renewing it before it is missed."""

from __future__ import annotations

import asyncio
import contextvars
import math
from typing import TYPE_CHECKING, Literal, cast

from llmmw.events import CacheSkipped, CacheStored, Warned
from llmmw.fault import FaultKind, classify
from llmmw.layers.filling import Fill
from llmmw.stats import cache_hit
from llmmw.stores.record import Making
from llmmw.stores.record import play as play_entry

if TYPE_CHECKING:
    from llmmw.call import Call, Handler, Reply
    from llmmw.env import Env
    from llmmw.keys import Draw, Sharing
    from llmmw.layers.cache import TTLCache
    from llmmw.stores.entry import Entry
    from llmmw.stores.lease import Lease, Leases
    from llmmw.stores.memory import Resident
    from llmmw.stores.tiered import TieredStore

MAX_NEGATIVE_S = 30.0
FIRST_REFUSAL = 400
State = Literal["fresh", "due", "stale", "expired"]

_PASSING = frozenset({
    FaultKind.NOT_SENT, FaultKind.RATE, FaultKind.SERVER, FaultKind.AMBIGUOUS, FaultKind.MALFORMED, FaultKind.REFUSED,
})  # fmt: skip
"""Faults under which an expired answer is better than none; what the caller did wrong is not covered up."""


class Filler:
    """Asks inside and stores what may be stored, under the settings of one cache."""

    def __init__(
        self,
        inner: Handler,
        env: Env,
        settings: TTLCache,
        store: TieredStore,
        sharing: Sharing,
        *,
        reads: bool,
        stores: bool,
    ) -> None:
        self.inner = inner
        self.env = env
        self.settings = settings
        self.store = store
        self.sharing = sharing
        self.reads = reads
        self._stores = stores
        self._early_refresh = settings.early_refresh
        self._ttl_s = cast("float", settings.ttl)
        self._negative_s = cast("float", settings.negative_ttl)
        self._jitter = settings.jitter
        self._revalidate_s = cast("float", settings.stale_while_revalidate)
        self._on_error_s = cast("float", settings.stale_if_error)
        self.shut: set[str] = set()
        """Namespaces that get no hits because their credential was refused."""
        self._told: set[str] = set()
        self._refreshes: dict[bytes, asyncio.Task[None]] = {}

    def state_of(self, resident: Resident, now: float) -> State:
        """What may be done with an entry; "due" is fresh, but worth renewing."""
        fresh = now < resident.expires
        if resident.entry.header.status >= FIRST_REFUSAL and not (fresh and self._negative_s):
            return "expired"  # no refusal is served stale, nor one that another process keeps
        if fresh:
            return "due" if self._early_refresh and self._is_due(resident, now) else "fresh"
        return "stale" if now < resident.expires + self._revalidate_s else "expired"

    def _is_due(self, resident: Resident, now: float) -> bool:
        # XFetch (Vattani, Chierichetti, Lowenstein, VLDB 2015), beta = 1: the costlier, the earlier.
        ahead = -resident.entry.header.cost_s * math.log(1.0 - self.env.rng.random())
        return now + ahead >= resident.expires

    async def fill(self, call: Call, fill: Fill) -> Reply:
        """Ask inside; the answer is stored before the caller gets it.

        Args:
            call: as it goes inside.
            fill: its own; with an entry past its end, for `stale_if_error`.
        """
        try:
            reply = await self.inner(call)
        except BaseException as error:
            self.note_error(call, error)
            found = self._instead(call, fill.stale, error) if isinstance(error, Exception) else None
            if found is None:
                self.sharing.give_back(fill.draw)
                raise
            return found
        if not fill.done and reply.source != "coalesced":
            reply = fill.answered(reply)
        if reply.ok:
            return reply
        found = self._instead(call, fill.stale, reply)
        if found is None:
            self.sharing.give_back(fill.draw)
        return found or reply

    def _instead(self, call: Call, stale: Resident | None, outcome: Reply | Exception) -> Reply | None:
        """The expired answer, where nothing better can be had and `stale_if_error` allows it."""
        clock = self.env.clock
        if stale is None or clock.monotonic() >= stale.expires + self._on_error_s:
            return None
        if stale.entry.header.status >= FIRST_REFUSAL:
            return None
        fault = classify(outcome, wall=clock.wall())
        reply = play_entry(stale.entry, call) if fault is not None and fault.kind in _PASSING else None
        if reply is None:
            return None
        reply = reply.replace(stale=True)
        self.env.emit(cache_hit(reply, call.context.agent))
        return reply

    def note_credential(self, call: Call, reply: Reply) -> None:
        """A refused credential closes its namespace to hits, a success opens it again."""
        if not reply.fallback:  # which has a credential of its own
            if reply.status in {401, 403}:
                self.shut.add(call.namespace)
            elif reply.ok:
                self.shut.discard(call.namespace)

    def note_error(self, call: Call, error: BaseException) -> None:
        """The same for a credential that an SDK within a user's function was refused."""
        if self.settings.auth_check and isinstance(error, Exception):
            fault = classify(error, wall=self.env.clock.wall())
            if fault is not None and fault.status in {401, 403}:
                self.shut.add(call.namespace)

    def why_not(self, reply: Reply) -> str | None:
        """Why an answer is not even looked at, or None."""
        if not self._stores:
            return "mode"
        if reply.fallback and not self.settings.store_fallbacks:
            return "fallback's answer"
        if not reply.ok and not self._negative_s:
            return "refused"
        return None

    def making(self, draw: Draw, reply: Reply, extra_s: float = 0.0) -> Making:
        """Lifetime and cost of a new entry."""
        env, ok, jitter = self.env, reply.ok, self._jitter
        ttl_s = self._ttl_s if ok else self._negative_s
        if jitter:
            ttl_s *= 1.0 + jitter * (2.0 * env.rng.random() - 1.0)
        if not ok:
            ttl_s = min(ttl_s, MAX_NEGATIVE_S)
        return Making(draw.base, env.clock.wall(), ttl_s, reply.service_s + extra_s)

    def leases(self) -> Leases | None:
        """Who of several processes asks upstream, where the cache has a directory and stores."""
        backing = self.store.backing
        if backing is None:
            text = "Coalescer(lease=) does nothing here: processes meet in the cache's directory, TTLCache(directory=)"
            self._warn("coalesce: lease", text)
        return backing.leases if backing is not None and self._stores else None

    def warn_uncacheable(self, call: Call, reason: str) -> None:
        """A function that is never cached is rarely meant."""
        text = f"{call.target}: a call is not cached ({reason}); pass plain values, or name the argument in ignore="
        self._warn("cache: not cacheable", text)

    def _warn(self, kind: str, text: str) -> None:
        if kind not in self._told:
            self._told.add(kind)
            self.env.emit(Warned(kind, text))

    def keep(self, draw: Draw, entry: Entry, since: int, lease: Lease | None) -> None:
        """Store an entry, unless its request was invalidated since the fill began or the lease was lost."""
        if self.store.put(draw.key, entry, since=since, lease=lease):
            self.env.emit(CacheStored(entry.size))
        else:
            self.env.emit(CacheSkipped("too large or invalidated"))

    def refresh(self, call: Call, draw: Draw) -> None:
        """Fetch an answer anew in the background, once per key at a time. What goes wrong leaves the old one."""
        if draw.key in self._refreshes or not self._stores:
            return
        # A user's function needs its caller's context variables; an HTTP call must not keep any alive.
        context = contextvars.copy_context() if call.inherits_context else contextvars.Context()
        loop = asyncio.get_running_loop()
        task = loop.create_task(self._refresh(call.within(deadline=None), draw), context=context)
        self._refreshes[draw.key] = task
        task.add_done_callback(lambda _: self._refreshes.pop(draw.key, None))

    async def _refresh(self, call: Call, draw: Draw) -> None:
        fill = Fill(self, call, draw, renews=True)
        try:
            reply = await self.inner(fill.shared_call())
            if not fill.done and reply.source != "coalesced":
                reply = fill.answered(reply)
            if reply.chunks is not None:
                async for _ in reply.chunks:
                    pass
        except Exception as error:  # noqa: BLE001 — nobody waits for it, and a user's function raises anything
            self.note_error(call, error)
            self.env.emit(CacheSkipped(f"refresh failed: {type(error).__name__}"))

    def rehome(self) -> None:
        """The tasks died with their loop."""
        self._refreshes.clear()

    async def aclose(self) -> None:
        """Stop refreshing."""
        tasks = list(self._refreshes.values())
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

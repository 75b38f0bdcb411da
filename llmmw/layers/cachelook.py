"""The cache at work: looking for an answer. Its other half, getting and keeping one, is in `cachefill.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec.structs import replace

from llmmw.events import CacheMiss, CacheSkipped
from llmmw.keys import Sharing, Uncacheable, is_deterministic
from llmmw.layers.base import Bound
from llmmw.layers.cachefill import Filler
from llmmw.layers.filling import ASIDE, Fill
from llmmw.stats import cache_hit
from llmmw.stores.base import Match
from llmmw.stores.record import STORABLE_OPS, play

if TYPE_CHECKING:
    from llmmw.call import Call, Handler, Reply
    from llmmw.env import Env
    from llmmw.keys import Draw
    from llmmw.layers.cache import TTLCache
    from llmmw.stores.memory import Resident
    from llmmw.stores.tiered import TieredStore

_MISS = CacheMiss()


class BoundCache(Bound):
    """A TTLCache at work."""

    def __init__(self, inner: Handler, env: Env, settings: TTLCache, mode: str, store: TieredStore) -> None:
        super().__init__(inner, env)
        self._settings = settings
        self._mode = mode
        self._reads = mode in {"on", "read"}
        self._store = store
        self._sharing = Sharing(settings.sampling, remote_content=settings.remote_content)
        self._filler = Filler(
            inner, env, settings, store, self._sharing, reads=self._reads, stores=mode in {"on", "write"}
        )

    async def __call__(self, call: Call, /) -> Reply:
        """Answer from the cache, or ask inside and keep the answer."""
        fill = call.fill
        if fill is ASIDE:
            return await self.inner(replace(call, fill=None))
        if not isinstance(fill, Fill) or fill.filler is not self._filler:  # nobody has looked yet
            found = self._at_hand(call)
            if found is None:
                return await self.inner(call)
            if not isinstance(found, Fill):
                return self._told(call, found, "memory")
            call, fill = found.shared_call(), found
        if fill.missed:
            if fill.stale is None and self._store.backing is not None:
                fill.stale = resident = await self._fetch(fill.draw)
                now = self.env.clock.monotonic()
                hit = None if resident is None else self._given(call, fill.draw, resident, now)
                if hit is not None:
                    return self._told(call, hit, "disk")
            self.env.emit(_MISS)
        return await self._filler.fill(call, fill)

    def _told(self, call: Call, hit: Reply, tier: str) -> Reply:
        self.env.emit(cache_hit(hit, call.context.agent, tier))
        return hit

    def look(self, call: Call) -> Reply | Call:
        """The answer in memory; else the call as it goes inside, with which this layer goes on when it is called."""
        found = self._at_hand(call)
        if isinstance(found, Fill):
            return found.shared_call()
        return replace(call, fill=ASIDE) if found is None else found

    def _at_hand(self, call: Call) -> Reply | Fill | None:
        """The answer in memory, or what is to be filled; None where the cache has nothing to do with the call."""
        draw = self._draw(call)
        if draw is None:
            return None
        filler = self._filler
        if not self._reads or call.namespace in filler.shut:
            return Fill(filler, call, draw)
        now = self.env.clock.monotonic()
        resident = self._store.peek(draw.key, now)
        if resident is not None:
            reply = self._given(call, draw, resident, now)
            if reply is not None:
                return reply
        return Fill(filler, call, draw, missed=True, stale=resident)

    def _given(self, call: Call, draw: Draw, resident: Resident, now: float) -> Reply | None:
        """The answer from an entry, where its age allows; one that is due or stale is renewed meanwhile."""
        state = self._filler.state_of(resident, now)
        if state == "expired":
            return None
        reply = (None if call.stream else resident.reply) or _played(call, resident)
        if reply is None or state == "fresh":
            return reply
        self._filler.refresh(call, draw)
        return reply if state == "due" else reply.replace(stale=True)

    def peek(self, call: Call) -> Reply | None:
        """A fresh answer in memory; from any thread."""
        if isinstance(call.fill, Fill) and call.fill.filler is self._filler:  # looked for already
            self._sharing.give_back(call.fill.draw)
            return None
        if not self._reads or call.namespace in self._filler.shut:
            return None
        draw = self._draw(call, told=False)
        if draw is None:
            return None
        now = self.env.clock.monotonic()
        resident = self._store.peek(draw.key, now)
        if resident is not None and self._filler.state_of(resident, now) == "fresh":  # a refresh is the home loop's
            reply = (None if call.stream else resident.reply) or _played(call, resident)
            if reply is not None:
                return reply
        self._sharing.give_back(draw)
        return None

    async def recall(self, call: Call) -> Reply | None:
        """A stored answer, from memory or disk, without asking inside."""
        draw = self._draw(call, told=False) if self._reads and call.namespace not in self._filler.shut else None
        if draw is None:
            return None
        clock = self.env.clock
        tier, resident = "memory", self._store.peek(draw.key, clock.monotonic())
        if resident is None:
            tier, resident = "disk", await self._fetch(draw)
        if resident is not None and self._filler.state_of(resident, clock.monotonic()) in {"fresh", "due"}:
            reply = _played(call, resident)
            if reply is not None:
                return self._told(call, reply, tier)
        self._sharing.give_back(draw)
        return None

    def keep(self, call: Call, reply: Reply) -> None:
        """Store an answer that was obtained another way."""
        draw = self._draw(call)
        if draw is not None:
            Fill(self._filler, call, draw).answered(reply)

    def _draw(self, call: Call, *, told: bool = True) -> Draw | None:
        """The call's place among those that share its answer, or None where the cache has nothing to do with it."""
        if self._mode == "off":
            return None
        reason = "unknown operation"
        if call.op in STORABLE_OPS:
            try:
                draw = self._sharing.draw(call)
            except Uncacheable as error:
                reason = error.reason
                if told and call.op == "function":
                    self._filler.warn_uncacheable(call, reason)
            else:
                if draw.key:
                    return draw
                reason = "not deterministic"
        if told:
            self.env.emit(CacheSkipped(reason))
        return None

    async def _fetch(self, draw: Draw) -> Resident | None:
        """What is stored behind memory."""
        try:
            return await self._store.fetch(draw.key)
        except BaseException:  # the caller has gone
            self._sharing.give_back(draw)
            raise

    def invalidate(self, call: Call) -> int:
        """Forget every stored answer to this request, in all its lanes; a fill in flight does not bring it back.

        Returns how many entries left memory; rows on disk go in the background.
        """
        try:
            base = Sharing("share", remote_content=self._settings.remote_content).draw(call).base
        except Uncacheable:
            return 0
        if self._settings.sampling == "lanes" and not is_deterministic(call):
            return self._store.discard(Match("base", base))
        return self._store.forget(base)

    def discard(self, match: Match) -> int:
        """Forget every answer of a namespace or with a tag, also one in flight; returns how many left memory."""
        return self._store.discard(match)

    def begin_run(self) -> None:
        """Every agent draws from its first sample again."""
        self._sharing.begin_run()

    def rehome(self) -> None:
        """Refreshes under way are dropped; entries stay."""
        self._filler.rehome()
        self._store.rehome()

    async def aclose(self) -> None:
        """Stop refreshes and flush the disk tier."""
        await self._filler.aclose()
        await self._store.aclose()

    def gauges(self) -> dict[str, object]:
        """Mode, and the readings of the store."""
        return {"mode": self._mode} | self._store.gauges()


def _played(call: Call, resident: Resident) -> Reply | None:
    """The answer from an entry, or None where it has not the form that is asked for."""
    reply = play(resident.entry, call)
    if reply is not None and reply.data is resident.entry.data:
        resident.reply = reply  # frozen, so every hit can be given the same object
    return reply

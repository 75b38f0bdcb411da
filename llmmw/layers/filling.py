"""One answer on its way into the cache: what the flight asks before it sends, and what becomes of what comes."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from msgspec.structs import replace

from llmmw.events import CacheSkipped
from llmmw.stats import cache_hit
from llmmw.stores.record import NotStorable, is_whole, record_reply, record_stream
from llmmw.stores.record import play as play_entry
from llmmw.stream import Tap, at_end

if TYPE_CHECKING:
    from llmmw.call import Call, Chunk, Filling, Reply
    from llmmw.keys import Draw
    from llmmw.layers.cachefill import Filler
    from llmmw.stores.lease import Lease
    from llmmw.stores.memory import Resident
    from llmmw.stream import End

_CHANGED = "request changed meanwhile"
"""A list or mapping of it: the answer is to the request as it was sent, the key to the request as it was made."""


class Fill:
    """One answer on its way into the cache.

    Args:
        filler: stores it.
        call: as the caller made it.
        draw: its place in the cache.
        renews: an entry is there, which a refusal must not replace.
        missed: it was looked for in memory.
        stale: the entry past its end that was found there.
    """

    __slots__ = ("_call", "_lease", "_renews", "_since", "done", "draw", "filler", "missed", "stale")

    def __init__(
        self,
        filler: Filler,
        call: Call,
        draw: Draw,
        *,
        renews: bool = False,
        missed: bool = False,
        stale: Resident | None = None,
    ) -> None:
        self.filler = filler
        self._call = call
        self.draw = draw
        self._renews = renews
        self.missed = missed
        self.stale = stale
        self._since = filler.store.generation
        self._lease: Lease | None = None
        self.done = False

    def shared_call(self) -> Call:
        """The call as it goes inside. Who comes after an invalidation does not join a flight from before it."""
        key, since = self.draw.key, self._since
        return replace(self._call, key=key if not since else b"%b %d" % (key, since), fill=self)

    def look(self) -> Reply | None:
        """The answer, where another flight stored it meanwhile."""
        if self._renews or not self.filler.reads:
            return None
        resident = self.filler.store.peek(self.draw.key, self.filler.env.clock.monotonic())
        return self._found(resident, "memory")

    async def claim(self, lease_s: float) -> Reply | None:
        """The answer, where under a lease another process stored it meanwhile."""
        if self._renews or not self.filler.reads:
            return None
        leases = self.filler.leases()
        if leases is None:
            return None
        half_life_s = cast("float", self.filler.settings.ttl) / 2
        self._lease, found = await leases.claim(self.draw.key, min(lease_s, half_life_s), self._look_on_disk)
        return found

    async def _look_on_disk(self) -> Reply | None:
        return self._found(await self.filler.store.fetch(self.draw.key), "disk")

    def _found(self, resident: Resident | None, tier: str) -> Reply | None:
        filler, call = self.filler, self._call
        if resident is None or call.namespace in filler.shut:
            return None
        if filler.state_of(resident, filler.env.clock.monotonic()) not in {"fresh", "due"}:
            return None
        reply = play_entry(resident.entry, call)
        if reply is not None:
            self.done = True
            filler.env.emit(cache_hit(reply, call.context.agent, tier))
        return reply

    def failed(self) -> None:
        """Nothing came: another process may try."""
        lease, self._lease = self._lease, None
        if lease is not None:
            lease.release()

    def answered(self, reply: Reply) -> Reply:
        """Store a whole answer, or record a stream while it is read. Called once, by whoever owns the answer."""
        self.done = True
        if self._lease is None:
            return self._kept(reply)
        return at_end(self._kept(reply), lambda _: self.failed())

    def _kept(self, reply: Reply) -> Reply:
        filler, call = self.filler, self._call
        if filler.settings.auth_check:
            filler.note_credential(call, reply)
        reason = "refused" if self._renews and not reply.ok else filler.why_not(reply)
        if reason is not None:
            if reason != "mode":
                filler.env.emit(CacheSkipped(reason))
            return reply
        if reply.chunks is not None:
            recorder = Recorder(filler, call, reply, self.draw, self._since, self._lease)
            return reply.replace(chunks=Tap(reply.chunks, recorder.ended, recorder.add))
        try:
            if not filler.sharing.is_still(call, self.draw):
                raise NotStorable(_CHANGED)  # noqa: TRY301 — one place that tells why
            entry = record_reply(call, reply, filler.making(self.draw, reply))
        except NotStorable as error:
            filler.env.emit(CacheSkipped(error.reason))
        else:
            filler.keep(self.draw, entry, self._since, self._lease)
        return reply


class _Aside:
    """Instead of a Fill on a call that the cache has looked at and has nothing to do with; it takes that off."""


ASIDE: Filling = cast("Filling", _Aside())


class Recorder:
    """Keeps the chunks of a passing stream, and stores them if it ended well."""

    def __init__(self, filler: Filler, call: Call, reply: Reply, draw: Draw, since: int, lease: Lease | None) -> None:
        self._filler = filler
        self._call = call
        self._reply = reply
        self._draw = draw
        self._since = since
        self._lease = lease
        self._began = filler.env.clock.monotonic()
        self._chunks: list[Chunk] | None = []
        self._room = filler.store.max_item_bytes

    def add(self, chunk: Chunk) -> None:
        """One more chunk; a stream too large to be stored is not kept in memory either."""
        if self._chunks is None:
            return
        data = chunk if isinstance(chunk, bytes) else chunk.data
        self._room -= len(data) if data is not None else 0
        if self._room < 0 or data is None:
            self._chunks = None
            self._filler.env.emit(CacheSkipped("no encoded form" if data is None else "too large"))
        else:
            self._chunks.append(chunk)

    def ended(self, end: End) -> None:
        """The stream is over."""
        filler, chunks, self._chunks = self._filler, self._chunks, None
        if end.how == "failed":
            filler.sharing.give_back(self._draw)
        if chunks is None:
            return
        finished = end.how == "finished" or (end.how != "failed" and is_whole(self._call.op, chunks))
        took = filler.env.clock.monotonic() - self._began
        try:
            if not finished:
                raise NotStorable(f"stream {end.how}")  # noqa: TRY301 — one place that tells why
            if not filler.sharing.is_still(self._call, self._draw):
                raise NotStorable(_CHANGED)  # noqa: TRY301 — as above
            making = filler.making(self._draw, self._reply, took)
            entry = record_stream(self._call, self._reply, chunks, end.usage, making)
        except NotStorable as error:
            filler.env.emit(CacheSkipped(error.reason))
        else:
            filler.keep(self._draw, entry, self._since, self._lease)

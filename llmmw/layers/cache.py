"""TTLCache: the same question is not paid for twice while its answer lives. Rules and reasons: SPEC 1."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, cast

from msgspec.structs import replace

from llmmw.env import variable
from llmmw.errors import ConfigError
from llmmw.events import CacheHit, CacheMiss, CacheSkipped
from llmmw.keys import Sharing, Uncacheable, is_deterministic
from llmmw.layers.base import Bound, Positioned
from llmmw.layers.cachefill import MAX_NEGATIVE_S, Filler
from llmmw.layers.filling import ASIDE, Fill
from llmmw.order import Role
from llmmw.settings import choice, number, positive_seconds, seconds, settings, text, whole
from llmmw.stores.base import Match
from llmmw.stores.memory import MemoryStore
from llmmw.stores.record import STORABLE_OPS, play
from llmmw.stores.tiered import TieredStore

if TYPE_CHECKING:
    from llmmw.call import Call, Handler, Reply
    from llmmw.env import Env
    from llmmw.keys import Draw, Sampling
    from llmmw.stores.base import Backing, Codec
    from llmmw.stores.memory import Resident

_MAX_CODEC_NAME_BYTES = 255
MODES = ("on", "off", "read", "write")

_MISS = CacheMiss()


@settings
class TTLCache(Positioned):
    """Answers from memory, and from disk where there is a directory, while they live.

    Args:
        ttl: lifetime of an answer in seconds, or text ("10m", "12h"); it also holds for what another program stored.
        directory: keeps answers on disk too, shared by processes; default $LLMMW_CACHE_DIR, else memory only.
        sampling: "share": the same request, the same answer. "lanes": each agent has its own k-th sample, so a rerun
            replays the same diversity. "deterministic": only temperature 0 or seeded requests.
        mode: "on"; "read": nothing is stored; "write": nothing is looked up, so answers are renewed; "off".
            $LLMMW_CACHE overrides it.
        max_bytes: memory for answers; no answer takes more than a tenth of it.
        max_entries: answers in memory.
        disk_bytes: size of the database on disk.
        jitter: lifetimes vary by up to this share, so that what was stored together does not expire together.
        negative_ttl: keeps refusals 400, 404, 413 and 422 that long (at most 30 s); 0 keeps none.
        stale_while_revalidate: for that long after its end an answer is served while a new one is fetched.
        stale_if_error: for that long after its end an answer is served if no new one can be had.
        early_refresh: popular answers are fetched anew shortly before they expire (XFetch), one fetch per answer.
        auth_check: a 401 or 403 closes its namespace to hits until a call of it succeeds again.
        store_fallbacks: stores answers of another endpoint than the one that was asked.
        remote_content: caches requests whose answers depend on content elsewhere that can change: links to images or
            files, tools with which the server searches, stored prompts without a version.
        network_directory: allows a directory on a network file system (locks there are unreliable).
        codec: transforms entries on their way to disk, such as encryption.

    Raises:
        ConfigError: an unknown option or a value that cannot work; also when bound under a wrong $LLMMW_CACHE.
    """

    role: ClassVar[Role] = Role.CACHE
    ttl: float | str
    directory: str | os.PathLike[str] | None = None
    sampling: Sampling = "share"
    mode: Literal["on", "off", "read", "write"] = "on"
    max_bytes: int = 256 * 1024 * 1024
    max_entries: int = 1_000_000
    disk_bytes: int = 1024 * 1024 * 1024
    jitter: float = 0.1
    negative_ttl: float | str = 0.0
    stale_while_revalidate: float | str = 0.0
    stale_if_error: float | str = 0.0
    early_refresh: bool = False
    auth_check: bool = False
    store_fallbacks: bool = False
    remote_content: bool = False
    network_directory: bool = False
    codec: Codec | None = dataclasses.field(default=None, repr=False)  # it may print its key

    def __post_init__(self) -> None:
        keep = object.__setattr__
        _check_places(self.directory, self.codec)
        keep(self, "ttl", positive_seconds("TTLCache(ttl=)", self.ttl))
        for name in ("negative_ttl", "stale_while_revalidate", "stale_if_error"):
            keep(self, name, seconds(f"TTLCache({name}=)", getattr(self, name)))
        number("TTLCache(negative_ttl=)", cast("float", self.negative_ttl), high=MAX_NEGATIVE_S)
        choice("TTLCache(sampling=)", self.sampling, ("share", "lanes", "deterministic"))
        choice("TTLCache(mode=)", self.mode, MODES)
        whole("TTLCache(max_bytes=)", self.max_bytes)
        whole("TTLCache(max_entries=)", self.max_entries)
        whole("TTLCache(disk_bytes=)", self.disk_bytes, low=1024 * 1024)
        number("TTLCache(jitter=)", self.jitter, high=0.5)

    def bind(self, inner: Handler, env: Env) -> BoundCache:
        """Running state; the directory is opened on first use.

        Raises:
            ConfigError: $LLMMW_CACHE is none of the modes.
        """
        mode = self._mode_now()
        choice("$LLMMW_CACHE", mode, MODES)
        grace_s = max(cast("float", self.stale_while_revalidate), cast("float", self.stale_if_error))
        memory = MemoryStore(self.max_bytes, self.max_entries)
        backing = self._backing(env)
        longest_s = cast("float", self.ttl) * (1 + self.jitter)
        store = TieredStore(memory, backing, env.clock, grace_s=grace_s, longest_s=longest_s)
        return BoundCache(inner, env, self, mode, store)

    def _mode_now(self) -> str:
        return variable("LLMMW_CACHE").lower() or self.mode

    @property
    def place(self) -> Path | None:
        """The directory that is used: its own or $LLMMW_CACHE_DIR; None in memory only and where the cache is off."""
        directory = self.directory if self.directory is not None else variable("LLMMW_CACHE_DIR")
        return None if directory == "" or self._mode_now() == "off" else Path(directory).expanduser()

    def _backing(self, env: Env) -> Backing | None:
        place = self.place
        if place is None:
            return None
        from llmmw.stores.disk import DiskStore  # noqa: PLC0415 — diskcache and sqlite only where they are used

        return DiskStore(
            place,
            env,
            max_bytes=self.disk_bytes,
            codec=self.codec,
            network=self.network_directory,
        )


def _check_places(directory: object, codec: object) -> None:
    if directory is not None and not isinstance(directory, os.PathLike):
        text("TTLCache(directory=)", directory)
    if codec is None:
        return
    if not all(hasattr(codec, name) for name in ("name", "seal", "open")):
        raise ConfigError(f"TTLCache(codec={codec!r}): must have a name and the methods seal and open")
    name = getattr(codec, "name", None)
    if not isinstance(name, str) or not 0 < len(name.encode(errors="replace")) <= _MAX_CODEC_NAME_BYTES:
        # Not its repr, which may hold the key.
        raise ConfigError(f"TTLCache(codec=<{type(codec).__name__}>): its name {name!r} must be 1 to 255 bytes of text")


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
            if not isinstance(found, Fill):
                return await self.inner(call) if found is None else found
            call, fill = found.shared_call(), found
        if fill.missed:
            if fill.stale is None and self._store.backing is not None:
                fill.stale = resident = await self._fetch(fill.draw)
                hit = None if resident is None else self._given(call, fill.draw, resident, "disk")
                if hit is not None:
                    return hit
            self.env.emit(_MISS)
        return await self._filler.fill(call, fill)

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
        if not self._reads or filler.is_shut(call.namespace):
            return Fill(filler, call, draw)
        resident = self._store.peek(draw.key)
        if resident is not None:
            reply = self._given(call, draw, resident, "memory")
            if reply is not None:
                return reply
        return Fill(filler, call, draw, missed=True, stale=resident)

    def _given(self, call: Call, draw: Draw, resident: Resident, tier: str) -> Reply | None:
        """The answer from an entry, where its age allows; one that is due or stale is renewed meanwhile."""
        state = self._filler.state_of(resident)
        if state == "fresh":
            return self._hit(call, resident, tier)
        if state == "expired":
            return None
        reply = self._hit(call, resident, tier, is_stale=state == "stale")
        if reply is not None:
            self._filler.refresh(call, draw)
        return reply

    def peek(self, call: Call) -> Reply | None:
        """A fresh answer in memory; from any thread."""
        if isinstance(call.fill, Fill) and call.fill.filler is self._filler:  # looked for already
            self._sharing.give_back(call.fill.draw)
            return None
        if not self._reads or self._filler.is_shut(call.namespace):
            return None
        draw = self._draw(call, told=False)
        if draw is None:
            return None
        resident = self._store.peek(draw.key)
        if resident is not None and self._filler.state_of(resident) == "fresh":  # a refresh is the home loop's
            reply = self._hit(call, resident, "memory")
            if reply is not None:
                return reply
        self._sharing.give_back(draw)
        return None

    async def recall(self, call: Call) -> Reply | None:
        """A stored answer, from memory or disk, without asking inside."""
        draw = self._draw(call, told=False) if self._reads and not self._filler.is_shut(call.namespace) else None
        if draw is None:
            return None
        tier, resident = "memory", self._store.peek(draw.key)
        if resident is None:
            tier, resident = "disk", await self._fetch(draw)
        if resident is not None and self._filler.state_of(resident) in {"fresh", "due"}:
            reply = self._hit(call, resident, tier)
            if reply is not None:
                return reply
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

    def _hit(self, call: Call, resident: Resident, tier: str, *, is_stale: bool = False) -> Reply | None:
        """The answer from an entry, or None where it has not the form that is asked for."""
        entry = resident.entry
        reply = None if call.stream else resident.reply
        if reply is None:
            reply = play(entry, call)
            if reply is None:
                return None
            if reply.data is entry.data:
                resident.reply = reply  # frozen, so every hit can be given the same object
        if is_stale:
            reply = reply.replace(stale=True)
        header = entry.header
        self.env.emit(CacheHit(tier, header.usage, header.cost_s, is_stale, call.context.agent))
        return reply

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

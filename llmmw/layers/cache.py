"""TTLCache: the same question is not paid for twice while its answer lives. Rules and reasons: SPEC 1."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, cast

from llmmw.env import variable
from llmmw.errors import ConfigError
from llmmw.layers.base import Positioned
from llmmw.layers.cachefill import MAX_NEGATIVE_S
from llmmw.layers.cachelook import BoundCache
from llmmw.order import Role
from llmmw.settings import choice, number, positive_seconds, seconds, settings, text, whole
from llmmw.stores.memory import MemoryStore
from llmmw.stores.tiered import TieredStore

if TYPE_CHECKING:
    from llmmw.call import Handler
    from llmmw.env import Env
    from llmmw.keys import Sampling
    from llmmw.stores.base import Backing, Codec

_MAX_CODEC_NAME_BYTES = 255
MODES = ("on", "off", "read", "write")


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

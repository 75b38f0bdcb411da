"""Manifests of offline batches, kept so that no crash loses a batch and none is submitted twice."""

from __future__ import annotations

import contextlib
import os
import secrets
import weakref
from pathlib import Path
from typing import IO, TYPE_CHECKING

import msgspec

from llmmw.errors import ConfigError
from llmmw.stores.place import Refused, private_directory

try:
    import fcntl
except ImportError:  # pragma: no cover — no POSIX
    fcntl = None  # type: ignore[assignment]  # checked where it is used

if TYPE_CHECKING:
    from collections.abc import Sequence

_PRIVATE_FILE = 0o600
_PREFIX, _SUFFIX, _DRAFT = "batch-", ".json", ".draft"
_MAX_BYTES = 64 * 1024 * 1024


class Manifest(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """One batch: what is in it and how far it got. Holds no prompt, no answer, no credential."""

    id: str
    """Random; sent along where the API takes it."""
    api: str
    target: str
    """The endpoint's identity."""
    created: float
    """Wall-clock seconds."""
    ids: list[str]
    """The custom id of every request, in the order of the file: keys as in the cache, in hexadecimal."""
    op: str = ""
    file: str = ""
    """The uploaded input, where the API has files."""
    sent: float = 0.0
    """When the submission began (wall clock): from then on the batch may exist. 0: not yet."""
    batch: str = ""
    """The server's name for the batch."""
    assumed: bool = False
    """Its batch was found by time and size, which prove nothing until the results are there."""
    foreign: list[str] = []
    """Batches that looked like this one and turned out to be somebody else's."""
    done: bool = False
    """Its results have been handed to a caller."""


def new_manifest(api: str, target: str, op: str, ids: Sequence[str], wall: float) -> Manifest:
    """A manifest that is on no disk yet."""
    return Manifest(id=secrets.token_hex(16), api=api, target=target, created=wall, ids=list(ids), op=op)


_locked: weakref.WeakSet[Shelf] = weakref.WeakSet()


def _forked() -> None:
    """In a forked child: the run is the parent's, and its lock must not outlive the parent in ours."""
    for shelf in list(_locked):
        shelf.unlock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


class Shelf:
    """The manifests in one directory; all methods block.

    Args:
        directory: made if it is missing.

    Raises:
        ConfigError: the directory cannot be used.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self._directory = Path(directory).expanduser()
        self._lock: IO[bytes] | None = None
        try:
            private_directory(self._directory)
        except (Refused, OSError) as error:
            raise ConfigError(f"OfflineBatch(directory={str(directory)!r}): {error}") from None

    @property
    def directory(self) -> Path:
        """Where the manifests are."""
        return self._directory

    def lock(self) -> None:
        """Keep other runs out until `unlock`, or until this process is gone, however it ends.

        Raises:
            ConfigError: another run is at work here, or the lock cannot be opened.
        """
        path = self._directory / "lock"
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, _PRIVATE_FILE)
        except OSError as error:
            raise ConfigError(f"OfflineBatch: {path} cannot be opened ({error})") from None
        self._lock = os.fdopen(descriptor, "rb+")
        _locked.add(self)
        if fcntl is not None:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                self.unlock()
                raise ConfigError(f"OfflineBatch: another run is at work in {self._directory}") from None
        for draft in self._directory.glob(f"{_PREFIX}*{_DRAFT}"):
            draft.unlink(missing_ok=True)  # of a run that was killed while it wrote

    def unlock(self) -> None:
        """Let others in. Idempotent."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def load(self) -> list[Manifest]:
        """All manifests, oldest first.

        Raises:
            ConfigError: a file is no manifest; to go on without it might pay twice.
        """
        found = [self._read(path) for path in self._directory.glob(f"{_PREFIX}*{_SUFFIX}")]
        return sorted(found, key=lambda manifest: (manifest.created, manifest.id))

    def _read(self, path: Path) -> Manifest:
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            with os.fdopen(descriptor, "rb") as file:
                data = file.read(_MAX_BYTES)
            found = msgspec.json.decode(data, type=Manifest)
        except (OSError, msgspec.MsgspecError, UnicodeError) as error:
            raise ConfigError(f"OfflineBatch: {path} cannot be read ({error}); move it if its batch is over") from None
        if path != self.path(found):
            raise ConfigError(f"OfflineBatch: {path} holds another batch's manifest; move it away")
        return found

    def save(self, manifest: Manifest) -> None:
        """Write it so that after a crash there is the old one or the new one, whole.

        Raises:
            ConfigError: it cannot be written; nothing may be submitted then.
        """
        path = self.path(manifest)
        draft = path.with_suffix(_DRAFT)
        try:
            descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, _PRIVATE_FILE)
            with os.fdopen(descriptor, "wb") as file:
                file.write(msgspec.json.encode(manifest))
                file.flush()
                os.fsync(file.fileno())
            draft.rename(path)
            self._sync()
        except OSError as error:
            with contextlib.suppress(OSError):
                draft.unlink(missing_ok=True)
            raise ConfigError(f"OfflineBatch: the manifest cannot be written: {error}") from None

    def drop(self, manifest: Manifest) -> None:
        """Forget a batch that does not exist (any more).

        Raises:
            ConfigError: it cannot be removed.
        """
        try:
            self.path(manifest).unlink(missing_ok=True)
            self._sync()
        except OSError as error:
            raise ConfigError(f"OfflineBatch: the manifest cannot be removed: {error}") from None

    def path(self, manifest: Manifest) -> Path:
        """The manifest's file."""
        return self._directory / f"{_PREFIX}{manifest.id}{_SUFFIX}"

    def _sync(self) -> None:
        """Make renames and removals in the directory last."""
        descriptor = os.open(self._directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

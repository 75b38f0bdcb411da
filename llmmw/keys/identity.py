"""Who may share answers: a credential becomes a namespace that tells nothing about it.

The namespace is an HMAC of the credential under a secret of this installation (SPEC 1). With a cache directory the
secret lives there, readable by its owner only, so processes agree; without one it is random and dies with the
process. A configured tenant takes the credential's place, so that a rotated key keeps its cache.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import re
import secrets
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterable

VARIANT_HEADERS = frozenset({"api-version", "anthropic-version", "anthropic-beta", "openai-beta"})
"""Request headers that choose another behaviour of the server."""

_ACCOUNTS = frozenset({"authorization", "openai-organization", "openai-project"})
_CREDENTIAL_ENDINGS = ("-key", "-token", "-secret", "-auth", "-authorization", "apikey")
ACCOUNT_FIELDS = ("api_key", "auth_token", "organization", "project")
PROVIDERS = ("_api_key_provider", "_azure_ad_token_provider", "credentials")
_NO_CREDENTIAL = "idempotency-key"
_MAX_KNOWN = 4096
"""Credentials whose namespace is remembered; a gateway sees any number of them."""
_SECRET_FILE = "namespace.secret"  # noqa: S105 — a file name
_SECRET_BYTES = 32
_PLAIN = re.compile(r"[\w@.+-]{1,64}", re.ASCII)
_process_secret = secrets.token_bytes(_SECRET_BYTES)


class Asker(msgspec.Struct, frozen=True):
    """What headers and query of a request say about its answer, besides the body."""

    variant: tuple[tuple[str, str], ...] = ()
    """What chooses another behaviour of the server: sorted; names in lower case, parameters of the query with "?"."""
    credential: str = ""
    """What says who asks; "" where nothing does."""

    def __repr__(self) -> str:
        return f"Asker(variant={self.variant!r}, credential={'***' if self.credential else ''!r})"


def asker_of(headers: Iterable[tuple[str, str]] = (), query: Iterable[tuple[str, str]] = ()) -> Asker:
    """Sort out what may change the answer and who asks.

    Args:
        headers: names in any case. A header that looks like a credential is taken for one: a needless miss is cheap.
        query: every parameter counts; `key` is a credential.
    """
    variant: list[tuple[str, str]] = []
    credential: list[str] = []
    for name, value in headers:
        lower = name.lower()
        if lower in VARIANT_HEADERS:
            variant.append((lower, value))
        elif is_credential(lower):
            credential.append(f"\n{lower}: {value}")
    for name, value in query:
        if name == "key":
            credential.append(f"\n?key={value}")
        else:
            variant.append((f"?{name}", value))
    return Asker(tuple(sorted(variant)), "".join(sorted(credential)))


def is_credential(name: str) -> bool:
    """Whether a header of that (lower-case) name says who asks, or on whose account."""
    return name in _ACCOUNTS or (name.endswith(_CREDENTIAL_ENDINGS) and not name.endswith(_NO_CREDENTIAL))


def account_of(client: Any) -> dict[str, str]:
    """Credential and account of an SDK's client, by name.

    What is no text is no setting: Anthropic's clients have an `organization` with methods.
    """
    held = {name: getattr(client, name, None) for name in ACCOUNT_FIELDS}
    return {name: value for name, value in held.items() if isinstance(value, str) and value}


def has_provider(client: Any) -> bool:
    """Whether the credential of an SDK's client changes by itself."""
    return any(getattr(client, name, None) is not None for name in PROVIDERS)


class Namespaces:
    """Namespaces under one secret.

    Args:
        directory: the cache directory, or None for memory only.
    """

    def __init__(self, directory: str | os.PathLike[str] | None = None) -> None:
        self._directory = None if directory is None else Path(directory).expanduser()
        self._secret: bytes | None = None
        self._known: dict[str, str] = {}

    def of(self, credential: str | None, tenant: str | None = None) -> str:
        """The namespace of a call.

        Args:
            credential: API key or whole authorization header; None or "" where there is none.
            tenant: takes the credential's place.
        """
        if tenant is not None:
            return namespace_of(tenant)
        if not credential:
            return ""
        found = self._known.get(credential)
        if found is None:
            if self._secret is None:
                self._secret = self._read_secret()
            found = hmac.new(self._secret, credential.encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()[:32]
            if len(self._known) >= _MAX_KNOWN:
                self._known.clear()
            self._known[credential] = found
        return found

    def _read_secret(self) -> bytes:
        """The directory's secret, made on first use; the process's own where the directory does not work."""
        if self._directory is None:
            return _process_secret
        path = self._directory / _SECRET_FILE
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not os.path.lexists(path):
                _make_secret(path)
            secret = _read_own(path)
        except OSError:
            return _process_secret
        return secret if len(secret) == _SECRET_BYTES else _process_secret

    def __repr__(self) -> str:
        return f"Namespaces({len(self._known)} known)"


def namespace_of(tenant: str) -> str:
    """The namespace of a tenant."""
    if _PLAIN.fullmatch(tenant):
        return f"tenant:{tenant}"
    # Of any length and with anything inside: stores keep a namespace with every entry, and people read it.
    return f"tenant#{hashlib.sha256(tenant.encode('utf-8', 'surrogatepass')).hexdigest()[:32]}"


def _make_secret(path: Path) -> None:
    """A link of a finished file never overwrites: of several processes one wins and all read the winner."""
    draft = path.with_name(f"{_SECRET_FILE}.{os.getpid()}.{secrets.token_hex(4)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    try:
        try:
            os.write(descriptor, secrets.token_bytes(_SECRET_BYTES))
        finally:
            os.close(descriptor)
        with contextlib.suppress(FileExistsError):
            os.link(draft, path)
    finally:
        draft.unlink()


def _read_own(path: Path) -> bytes:
    """A plain file of ours, made private; b"" for anything else. Neither a link is followed nor a pipe waited for."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.getuid():
            return b""
        if found.st_mode & 0o077:
            os.fchmod(descriptor, 0o600)
        return os.read(descriptor, _SECRET_BYTES + 1)
    finally:
        os.close(descriptor)

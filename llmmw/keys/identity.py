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
import secrets
from pathlib import Path

_SECRET_FILE = "namespace.secret"  # noqa: S105 — a file name
_SECRET_BYTES = 32
_process_secret = secrets.token_bytes(_SECRET_BYTES)


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
            return f"tenant:{tenant}"
        if not credential:
            return ""
        found = self._known.get(credential)
        if found is None:
            if self._secret is None:
                self._secret = self._read_secret()
            found = hmac.new(self._secret, credential.encode(), hashlib.sha256).hexdigest()[:32]
            self._known[credential] = found
        return found

    def _read_secret(self) -> bytes:
        """The directory's secret, made on first use; the process's own where the directory does not work."""
        if self._directory is None:
            return _process_secret
        path = self._directory / _SECRET_FILE
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            # A link of a finished file never overwrites: of several processes one wins and all read the winner.
            draft = path.with_name(f"{_SECRET_FILE}.{os.getpid()}.{secrets.token_hex(4)}")
            if not path.exists():
                descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
                try:
                    os.write(descriptor, secrets.token_bytes(_SECRET_BYTES))
                finally:
                    os.close(descriptor)
                with contextlib.suppress(FileExistsError):
                    os.link(draft, path)
                draft.unlink()
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                secret = os.read(descriptor, _SECRET_BYTES)
            finally:
                os.close(descriptor)
        except OSError:
            return _process_secret
        return secret if len(secret) == _SECRET_BYTES else _process_secret

    def __repr__(self) -> str:
        return f"Namespaces({len(self._known)} known)"

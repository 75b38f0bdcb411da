"""Salts for a server's prefix cache: one for each tenant, so that none can tell by time what another has asked."""

from __future__ import annotations

import hmac
import secrets
from base64 import urlsafe_b64encode
from hashlib import sha256

from llmmw.errors import ConfigError
from llmmw.settings import text

_LEAST = 16
_REMEMBERED = 4096


class Salts:
    """Salts under one secret.

    Args:
        cache_salt: the secret; True: a random one; None or False: no salts.

    Raises:
        ConfigError: a secret that could be guessed. It is not shown.
    """

    def __init__(self, cache_salt: object) -> None:
        self._key: bytes | None = None
        self._known: dict[str, str] = {}
        if cache_salt is True:
            self._key = secrets.token_bytes(32)
        elif cache_salt is not None and cache_salt is not False:
            found = text("cache_salt", cache_salt, secret=True)
            if len(found) < _LEAST:
                raise ConfigError(f"cache_salt: must have at least {_LEAST} characters, so that nobody guesses it")
            self._key = sha256(found.encode("utf-8", "surrogatepass")).digest()

    def of(self, namespace: str) -> str | None:
        """The salt of a namespace, 43 characters as vLLM takes them; None where there are to be none."""
        if self._key is None:
            return None
        salt = self._known.get(namespace)
        if salt is None:
            if len(self._known) >= _REMEMBERED:
                self._known.clear()
            digest = hmac.digest(self._key, namespace.encode("utf-8", "surrogatepass"), "sha256")
            salt = self._known[namespace] = urlsafe_b64encode(digest).rstrip(b"=").decode("ascii")
        return salt

    def __repr__(self) -> str:
        return "Salts()" if self._key is None else "Salts(***)"

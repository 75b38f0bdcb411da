"""What a request holds that nobody may be told, and taking it out of what a server says.

Servers echo keys: in an error's message, a header, the target of a redirect. Patterns (`fault.bodies.redact`) know
the keys of the big providers; here the literal values are known, because they were sent.
"""

from __future__ import annotations

import base64
import binascii
import re
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from llmmw.keys.identity import is_credential

if TYPE_CHECKING:
    from collections.abc import Iterator

    from llmmw.wire.http import Headers, HTTPRequest

HIDDEN = "***"
_SHORT = 8
"""A shorter secret (a dummy such as "EMPTY") counts only as a word of its own, else it would eat ordinary text."""
_COOKIES = frozenset({"cookie", "cookie2"})
_PARAMETERS = frozenset({"-sig", "-signature", "-code"})
"""Parameters of a query that are secret, besides those that are named like a header with a credential."""
_SCHEME = re.compile(r"(?i)^(?:bearer|basic|token|key|apikey)\s+")


class Secrets:
    """Values that are taken out of texts and bodies; `hide` leaves what holds none as it is."""

    __slots__ = ("_in_bytes", "_in_text")

    def __init__(self, values: frozenset[str]) -> None:
        spellings = {form for value in values for form in (value, quote(value, safe=""), _in_json(value)) if form}
        patterns = [_pattern(spelling) for spelling in sorted(spellings, key=len, reverse=True)]
        joined = "|".join(patterns)
        self._in_text = re.compile(joined) if joined else None
        self._in_bytes = re.compile(joined.encode("utf-8", "surrogateescape")) if joined else None

    def hide(self, text: str) -> str:
        """The text with *** for every secret."""
        return text if self._in_text is None else self._in_text.sub(HIDDEN, text)

    def hide_bytes(self, data: bytes) -> bytes:
        """The same for a body."""
        return data if self._in_bytes is None else self._in_bytes.sub(HIDDEN.encode(), data)

    def hide_headers(self, headers: Headers) -> Headers:
        """The same for the values of headers."""
        return headers if self._in_text is None else tuple((name, self.hide(value)) for name, value in headers)

    def __repr__(self) -> str:
        return "Secrets(***)"


NO_SECRETS = Secrets(frozenset())


def secrets_of(request: HTTPRequest, *also: str) -> Secrets:
    """The secrets that a request carries in its headers and its query, and some that are known anyway."""
    found = set(also)
    for name, value in request.headers:
        lower = name.lower()
        if lower in _COOKIES:
            found.update(part.partition("=")[2].strip() for part in value.split(";"))
        elif is_credential(lower):
            found.update(_credentials(value))
    for name, value in parse_qsl(urlsplit(request.url).query):
        lower = "-" + name.lower().replace("_", "-")
        if lower in _PARAMETERS or is_credential(lower):
            found.add(value)
    return Secrets(frozenset(value for value in found if len(value) > 1))


def _credentials(value: str) -> Iterator[str]:
    yield value
    bare = _SCHEME.sub("", value, count=1)
    yield bare
    if value[:5].lower() == "basic":
        try:
            decoded = base64.b64decode(bare, validate=True).decode("utf-8", "replace")
        except binascii.Error:
            return
        yield decoded
        yield unquote(decoded.partition(":")[2])


def _pattern(value: str) -> str:
    found = re.escape(value)
    return found if len(value) >= _SHORT else rf"(?<!\w){found}(?!\w)"


def _in_json(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("/", "\\/")

"""What stands between us and a host: its addresses, each judged; the environment's proxy; the certificates we trust."""

from __future__ import annotations

import asyncio
import functools
import ssl
import sys
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

import msgspec

from llmmw.errors import ConnectionFailed

if TYPE_CHECKING:
    from llmmw.pool.engine import EngineOptions
    from llmmw.pool.guard import Guard


async def addresses_of(host: str, port: int | None, guard: Guard) -> list[str]:
    """The addresses that a name resolves to, in the resolver's order, at least one.

    Raises:
        ConnectionFailed: it does not resolve.
        ConfigError: one of them is refused by the guard.
    """
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=1)
    except (OSError, UnicodeError) as error:  # UnicodeError: a label that is empty or too long
        raise ConnectionFailed(f"no connection: the name {host!r} does not resolve ({error})") from None
    addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
    for address in addresses:
        guard.refuse_address(host, address)
    return addresses


class Proxy(msgspec.Struct, frozen=True):
    """A proxy that the environment names."""

    url: str
    """Without credentials."""
    user: str = ""
    password: str = ""

    def __repr__(self) -> str:
        return f"Proxy({self.url!r})"


def proxy_for(options: EngineOptions, scheme: str, host: str) -> Proxy | None:
    """What HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and NO_PROXY say about a host, where the pool may listen to them."""
    if not options.trust_env or urllib.request.proxy_bypass(host):
        return None
    settings = urllib.request.getproxies()
    found = settings.get(scheme) or settings.get("all")
    if not found:
        return None
    parts = urlsplit(found if "://" in found else f"http://{found}")
    place = parts.netloc.rpartition("@")[2]
    return Proxy(f"{parts.scheme}://{place}", unquote(parts.username or ""), unquote(parts.password or ""))


def tls_context(options: EngineOptions) -> ssl.SSLContext:
    """The TLS settings of a pool: its own context, or one with the certificates that this machine trusts."""
    verify = options.verify
    return verify if isinstance(verify, ssl.SSLContext) else _context(verify, options.trust_env, options.http2)


@functools.cache
def _context(verify: bool, trust_env: bool, http2: bool) -> ssl.SSLContext:  # noqa: FBT001 — settings' values
    # Kept, because reading the trusted certificates costs 20 ms and more; apart, because each offers another protocol.
    del http2
    if verify and trust_env:
        context = ssl.create_default_context()
        if not context.cert_store_stats()["x509_ca"]:
            _trust_compiled_paths(context)
        return context
    # `create_default_context` would listen to SSL_CERT_FILE, and write the keys of all traffic to SSLKEYLOGFILE.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if verify:
        _trust_compiled_paths(context)
    else:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _trust_compiled_paths(context: ssl.SSLContext) -> None:
    if sys.platform == "win32":
        context.load_default_certs()
        return
    paths = ssl.get_default_verify_paths()
    file = paths.openssl_cafile if Path(paths.openssl_cafile).is_file() else None
    folder = paths.openssl_capath if Path(paths.openssl_capath).is_dir() else None
    if file or folder:
        context.load_verify_locations(file, folder)
    if file is None:  # a slim image, or a Python whose OpenSSL was built elsewhere
        import certifi  # noqa: PLC0415 — httpx brings it; most machines have certificates of their own

        context.load_verify_locations(certifi.where())

"""Where a host is: its addresses, each judged, and the environment's proxy for it."""

from __future__ import annotations

import asyncio
import urllib.request
from typing import TYPE_CHECKING

from llmmw.errors import ConnectionFailed

if TYPE_CHECKING:
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


def proxy_for(scheme: str, host: str) -> str | None:
    """What HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and NO_PROXY say about a host."""
    if urllib.request.proxy_bypass(host):
        return None
    found = urllib.request.getproxies()
    return found.get(scheme) or found.get("all")

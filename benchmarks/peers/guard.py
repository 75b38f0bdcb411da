"""Keeps a peer's process on this machine: whatever it tries to reach besides loopback is refused and remembered."""

from __future__ import annotations

import sys
from typing import Any

OUTSIDE: set[str] = set()
"""Hosts that the process tried to reach."""


def stay_inside() -> None:
    """Refuse connections and look-ups that leave the machine, from now on and for good."""
    sys.addaudithook(_check)


def _check(event: str, args: tuple[Any, ...]) -> None:
    if not event.startswith("socket."):
        return
    host, address = None, args[1] if event in {"socket.connect", "socket.sendto"} else ""
    if not isinstance(address, str | bytes):  # those are Unix sockets
        host = address[0]
    elif event in {"socket.getaddrinfo", "socket.gethostbyname"}:
        host = args[0]
    if host in {None, "", "localhost", "::1", b"localhost"} or str(host).startswith(("127.", "b'127.")):
        return
    OUTSIDE.add(str(host))
    raise OSError(f"the benchmark reaches nothing outside this machine, and {host} is outside")

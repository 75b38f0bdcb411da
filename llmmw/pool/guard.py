"""Where requests may go, and what their headers may hold (SPEC 10).

A base URL is http(s) without credentials. Link-local and cloud metadata addresses are refused, as literals here and
again after every name resolution (DNS rebinding), because a prompt or a key must not end there by mistake.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from typing import TYPE_CHECKING
from urllib.parse import SplitResult, urlsplit

import msgspec

from llmmw.errors import ConfigError
from llmmw.settings import texts

if TYPE_CHECKING:
    from collections.abc import Iterable

    from llmmw.wire import Headers

_METADATA_NAMES = frozenset({
    "metadata", "metadata.google.internal", "metadata.goog", "instance-data", "instance-data.ec2.internal",
})  # fmt: skip
_METADATA_ADDRESSES = frozenset({
    ipaddress.ip_address("169.254.169.254"),  # AWS, Azure, GCP, OpenStack
    ipaddress.ip_address("100.100.100.200"),  # Alibaba
    ipaddress.ip_address("168.63.129.16"),  # Azure's wire server
    ipaddress.ip_address("192.0.0.192"),  # Oracle
    ipaddress.ip_address("fd00:ec2::254"),  # AWS
    ipaddress.ip_address("fd20:ce::254"),  # GCP
})  # fmt: skip
_DEFAULT_PORTS = {"http": 80, "https": 443}
_HOST = re.compile(r"[a-z0-9._-]+|[0-9a-f:.]+(?:%[a-z0-9%._-]+)?")
_NAT64 = (ipaddress.ip_network("64:ff9b::/96"), ipaddress.ip_network("64:ff9b:1::/48"))

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class Guard(msgspec.Struct, frozen=True):
    """Judges hosts and the addresses they resolve to; `allow_hosts` are exempt."""

    allow_hosts: frozenset[str] = frozenset()

    def refuse_host(self, host: str) -> None:
        """Judge a host as written in a URL, including every spelling of an address that the resolver understands.

        Raises:
            ConfigError: the host is a metadata service or a link-local address.
        """
        name = host.lower().rstrip(".")
        if name in self.allow_hosts:
            return
        if name in _METADATA_NAMES:
            raise ConfigError(f"host {host!r} is a cloud metadata service; allow_hosts=({host!r},) permits it")
        address = _literal(name)
        if address is not None:
            self.refuse_address(host, str(address))

    def refuse_address(self, host: str, address: str) -> None:
        """Judge an address that `host` resolved to.

        Raises:
            ConfigError: link-local, metadata, multicast or unspecified.
        """
        if host.lower().rstrip(".") in self.allow_hosts or address in self.allow_hosts:
            return
        found = _plain(ipaddress.ip_address(address.partition("%")[0]))
        if found in _METADATA_ADDRESSES or found.is_link_local or found.is_multicast or found.is_unspecified:
            kind = "a metadata" if found in _METADATA_ADDRESSES else "a link-local or otherwise unusable"
            raise ConfigError(f"host {host!r} is {kind} address ({found}); allow_hosts=({host!r},) permits it")


def _literal(host: str) -> Address | None:
    try:
        return ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        pass
    if not re.fullmatch(r"[0-9a-fx.]+", host):
        return None
    try:
        # The old spellings: one decimal number, hexadecimal or octal parts, fewer than four parts.
        return ipaddress.IPv4Address(socket.inet_aton(host))
    except OSError:
        return None


def _plain(address: Address) -> Address:
    """The IPv4 address inside an IPv6 one (mapped, 6to4, NAT64), else the address itself."""
    if isinstance(address, ipaddress.IPv4Address):
        return address
    inner = address.ipv4_mapped or address.sixtofour
    if inner is None and (any(address in net for net in _NAT64) or int(address) >> 32 == 0):
        inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address if inner is None or int(address) <= 1 else inner


def host_names(hosts: Iterable[str]) -> frozenset[str]:
    """The value of an `allow_hosts` option.

    Raises:
        ConfigError: not a list of names.
    """
    return frozenset(host.lower() for host in texts("allow_hosts", hosts))


def check_url(option: str, url: str, guard: Guard) -> SplitResult:
    """A URL that requests may be sent to, split.

    Raises:
        ConfigError: not http(s), no host, credentials inside, control characters, or a host that is refused. The
            message shows nothing but scheme and host, because the rest may be secret.
    """
    if not isinstance(url, str) or re.search(r"[\x00-\x20\x7f]", url):  # pyright: ignore[reportUnnecessaryIsInstance]  # a user's value
        raise ConfigError(
            f"{option}: must be a URL such as http://127.0.0.1:8000/v1, a text without spaces or control characters"
        )
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise ConfigError(f"{option}: not a valid URL") from None
    if parts.scheme not in _DEFAULT_PORTS:
        raise ConfigError(
            f"{option}: must start with http:// or https://, such as http://127.0.0.1:8000/v1; "
            f"got {'no scheme' if not parts.scheme else f'scheme {parts.scheme!r}'}"
        )
    if not host or port == 0:
        raise ConfigError(f"{option}: has no usable host and port")
    if "@" in parts.netloc:
        raise ConfigError(f"{option}: credentials in the URL are refused (host {host!r}); use api_key=")
    if not _HOST.fullmatch(host):
        # Libraries disagree about %31, fullwidth digits and backslashes: what one judges, another would connect to.
        raise ConfigError(f"{option}: a host is letters, digits, '-' and '.', or an address; write others as xn--...")
    if not url.isascii():
        raise ConfigError(f"{option}: characters outside ASCII must be percent-encoded")
    guard.refuse_host(host)
    return parts


def origin_of(parts: SplitResult) -> str:
    """scheme://host:port, always with its port, in one spelling."""
    host = (parts.hostname or "").rstrip(".")
    shown = f"[{host}]" if ":" in host else host
    return f"{parts.scheme}://{shown}:{parts.port or _DEFAULT_PORTS[parts.scheme]}"


def is_loopback(host: str) -> bool:
    """Whether the host is this machine (by name or literal address; nothing is resolved)."""
    address = _literal(host.lower())
    if address is None:
        return host.lower() == "localhost" or host.lower().endswith(".localhost")
    return _plain(address).is_loopback


_HEADER_NAME = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_BAD_IN_VALUE = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")


def check_headers(headers: Headers) -> None:
    """Refuse what could smuggle a second header or request into the connection.

    Raises:
        ConfigError: naming the header, never its value.
    """
    for name, value in headers:
        if not isinstance(name, str) or not isinstance(value, str):  # pyright: ignore[reportUnnecessaryIsInstance]  # a user's values
            raise ConfigError(f"header {name!r}: name and value must be texts; the value is a {type(value).__name__}")
        if not _HEADER_NAME.fullmatch(name):
            raise ConfigError("a header name holds a character that is not allowed there")
        if _BAD_IN_VALUE.search(value) or value != value.strip(" \t"):
            raise ConfigError(
                f"header {name!r}: the value holds a newline, a control character or outer spaces "
                "(often a key read from a file without strip()); the value is not shown"
            )
        try:
            value.encode("latin-1")
        except UnicodeEncodeError:
            raise ConfigError(f"header {name!r}: the value holds characters outside Latin-1; it is not shown") from None

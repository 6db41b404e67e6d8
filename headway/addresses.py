"""Which addresses may be dialled on behalf of a user: the public internet, and what the operator allows.

The check sits where a socket is made for one concrete address, after every lookup and on every hop of a redirect, so
it judges what is dialled and not what a name once resolved to. Python's `is_global` is not used: what it answers for
translated, multicast and site-local addresses differs between versions, and is wrong for several.
"""

import errno
import socket
from collections.abc import Callable, Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address

Network = IPv4Network | IPv6Network
AddressInfo = tuple[
    int | socket.AddressFamily, int | socket.SocketKind, int, str, tuple[str, int] | tuple[str, int, int, int]
]

DENIED_V4 = tuple(
    IPv4Network(network)
    for network in (
        "0.0.0.0/8",  # this network; Linux dials the machine itself
        "10.0.0.0/8",  # private
        "100.64.0.0/10",  # behind a provider's NAT; some clouds' metadata
        "127.0.0.0/8",  # loopback
        "168.63.129.16/32",  # Azure's machine agent, on a public number
        "169.254.0.0/16",  # link-local; most clouds' metadata
        "172.16.0.0/12",  # private
        "192.0.0.0/24",  # protocol assignments; Oracle's metadata
        "192.0.2.0/24",  # documentation
        "192.88.99.0/24",  # 6to4 relays
        "192.168.0.0/16",  # private
        "198.18.0.0/15",  # benchmarks
        "198.51.100.0/24",  # documentation
        "203.0.113.0/24",  # documentation
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, broadcast
    )
)
# The only part of IPv6 that is global unicast today. Loopback, compatible (::a.b.c.d), translated (::ffff:0:a.b.c.d),
# local NAT64 (64:ff9b:1::/48), unique local, link-local, site-local and multicast addresses all lie outside.
GLOBAL_V6 = IPv6Network("2000::/3")
# 6to4, Teredo and ISATAP carry an IPv4 address inside. They are denied whole: nothing public is served from them.
DENIED_V6 = tuple(
    IPv6Network(network)
    for network in (
        "2001::/23",  # protocol assignments: Teredo, benchmarks, ORCHID
        "2001:db8::/32",  # documentation
        "2002::/16",  # 6to4
        "3fff::/20",  # documentation
    )
)
ISATAP = 0x5EFE
# Networks without IPv4 reach all of it through this prefix, so its addresses count as the IPv4 inside.
NAT64 = IPv6Network("64:ff9b::/96")


class AddressRefused(OSError):
    """The address is not one that may be dialled. The message never names it."""

    def __init__(self) -> None:
        super().__init__(errno.EACCES, "The address is not public.")


def dialable(address: str, allow: Sequence[Network] = ()) -> bool:
    """Whether a connection to this IP address is permitted: it is public, or in a network of `allow`.

    An address mapped into IPv6 (`::ffff:10.0.0.1`) is the IPv4 address. What is not an IP address is not dialable.
    """
    try:
        ip = ip_address(address)
    except ValueError:
        return False
    if isinstance(ip, IPv6Address) and ip.ipv4_mapped is not None:
        ip = ip.ipv4_mapped
    return any(ip in network for network in allow) or _public(ip)


def guard(allow: Sequence[Network] = ()) -> Callable[[AddressInfo], socket.socket]:
    """A socket factory for aiohttp's TCPConnector that raises AddressRefused before anything is sent."""

    def make(info: AddressInfo) -> socket.socket:
        family, kind, protocol, _, target = info
        if family not in (socket.AF_INET, socket.AF_INET6) or not dialable(target[0], allow):
            raise AddressRefused
        return socket.socket(family, kind, protocol)

    return make


def _public(ip: IPv4Address | IPv6Address) -> bool:
    if isinstance(ip, IPv4Address):
        return not any(ip in network for network in DENIED_V4)
    if ip in NAT64:
        return _public(IPv4Address(int(ip) & 0xFFFF_FFFF))
    return ip in GLOBAL_V6 and not any(ip in network for network in DENIED_V6) and not _isatap(ip)


def _isatap(ip: IPv6Address) -> bool:
    # The two masked bits of the interface identifier say universal and group; either may be set.
    return int(ip) >> 32 & 0xFCFF_FFFF == ISATAP

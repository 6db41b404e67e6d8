"""Which addresses are dialled. Every case is one that has been used, somewhere, to reach what is not public."""

import socket
from ipaddress import IPv4Address, IPv6Address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headway.addresses import DENIED_V4, AddressRefused, dialable, guard

PUBLIC = [
    "1.1.1.1",
    "8.8.8.8",
    "9.255.255.255",
    "11.0.0.0",
    "93.184.216.34",
    "100.63.255.255",
    "100.128.0.0",
    "126.255.255.255",
    "128.0.0.1",
    "168.63.129.15",
    "169.253.255.255",
    "169.255.0.0",
    "172.15.255.255",
    "172.32.0.0",
    "192.0.1.1",
    "192.167.255.255",
    "192.169.0.0",
    "198.17.255.255",
    "198.20.0.0",
    "223.255.255.255",
    "2001:200::1",
    "2001:4860:4860::8888",
    "2606:4700:4700::1111",
    "2a00:1450:4001:830::200e",
    "::ffff:8.8.8.8",
    "64:ff9b::8.8.8.8",
]
DENIED = [
    # IPv4: the edges of each network, and the addresses that matter
    "0.0.0.0",
    "0.255.255.255",
    "10.0.0.0",
    "10.255.255.255",
    "100.64.0.0",
    "100.100.100.200",
    "100.127.255.255",
    "127.0.0.1",
    "127.255.255.255",
    "168.63.129.16",
    "169.254.0.1",
    "169.254.169.254",
    "169.254.170.2",
    "172.16.0.0",
    "172.31.255.255",
    "192.0.0.8",
    "192.0.0.170",
    "192.0.0.192",
    "192.0.2.1",
    "192.88.99.1",
    "192.168.0.0",
    "192.168.255.255",
    "198.18.0.0",
    "198.19.255.255",
    "198.51.100.7",
    "203.0.113.9",
    "224.0.0.1",
    "239.255.255.250",
    "240.0.0.1",
    "255.255.255.255",
    # IPv6 that is not global unicast
    "::",
    "::1",
    "100::1",
    "100:0:0:1::1",
    "5f00::1",
    "fc00::1",
    "fd00:ec2::254",
    "fd20:ce::254",
    "fdff:ffff:ffff:ffff:ffff:ffff:ffff:ffff",
    "fe80::1",
    "fe80::1%lo",
    "fe80::1%25lo",
    "febf::1",
    "fec0::1",
    "feff::1",
    "ff02::1",
    "ff0e::1",
    # inside the global part, but not public
    "2001::1",
    "2001:2::1",
    "2001:10::1",
    "2001:20::1",
    "2001:db8::1",
    "3fff::1",
    # IPv4 inside IPv6
    "::127.0.0.1",
    "::7f00:1",
    "::8.8.8.8",
    "::ffff:127.0.0.1",
    "::ffff:7f00:1",
    "::ffff:169.254.169.254",
    "::ffff:0.0.0.0",
    "0:0:0:0:0:ffff:0a00:0001",
    "::ffff:0:127.0.0.1",
    "64:ff9b::127.0.0.1",
    "64:ff9b::7f00:1",
    "64:ff9b::169.254.169.254",
    "64:ff9b:1::127.0.0.1",
    "64:ff9b:1:7f00:0:100::",
    "64:ff9b:1::8.8.8.8",
    "2002:7f00:1::",
    "2002:a00:1::1",
    "2002:a9fe:a9fe::1",
    "2001:0:4136:e378:8000:63bf:80ff:fffe",
    "fe80::5efe:127.0.0.1",
    "2a00:1450::5efe:10.0.0.1",
    "2a00:1450::200:5efe:10.0.0.1",
    "2a00:1450::300:5efe:10.0.0.1",
    # not an address as a socket is given it
    "",
    "localhost",
    "0x7f.1",
    "127.1",
    "2130706433",
    "017700000001",
    "127.0.0.1.",
    "[::1]",
    "::ffff:127.0.0.1:80",
]


@pytest.mark.parametrize("address", PUBLIC)
def test_a_public_address_is_dialled(address: str) -> None:
    assert dialable(address)


@pytest.mark.parametrize("address", DENIED)
def test_an_address_that_is_not_public_is_refused(address: str) -> None:
    assert not dialable(address)


denied_v4 = st.sampled_from(DENIED_V4).flatmap(
    lambda network: st.integers(int(network[0]), int(network[-1])).map(IPv4Address)
)
low_64 = st.integers(0, 2**64 - 1)
EMBEDDINGS = {
    "compatible": lambda v4, noise: v4,
    "mapped": lambda v4, noise: 0xFFFF << 32 | v4,
    "translated": lambda v4, noise: 0xFFFF << 48 | v4,
    "NAT64": lambda v4, noise: 0x64FF9B << 96 | v4,
    "NAT64, local": lambda v4, noise: 0x64FF9B_0001 << 80 | (noise & 0xFFFF) << 32 | v4,
    "6to4": lambda v4, noise: 0x2002 << 112 | v4 << 80 | noise,
    "Teredo server": lambda v4, noise: 0x2001_0000 << 96 | v4 << 64 | noise,
    "Teredo client": lambda v4, noise: 0x2001_0000 << 96 | (noise & 0xFFFF_FFFF) << 32 | v4 ^ 0xFFFF_FFFF,
    "ISATAP": lambda v4, noise: 0x2A00 << 112 | (noise & 0x0300_0000) << 32 | 0x5EFE << 32 | v4,
}


@pytest.mark.parametrize("embedding", EMBEDDINGS)
@given(v4=denied_v4, noise=low_64)
def test_a_denied_ipv4_address_is_refused_in_every_form_that_ipv6_has_for_it(
    embedding: str, v4: IPv4Address, noise: int
) -> None:
    assert not dialable(str(v4))
    assert not dialable(str(IPv6Address(EMBEDDINGS[embedding](int(v4), noise))))


@given(top=st.integers(2, 7), rest=st.integers(0, 2**125 - 1))
def test_ipv6_outside_the_global_part_is_refused(top: int, rest: int) -> None:
    assert not dialable(str(IPv6Address(top << 125 | rest)))


def test_an_allowed_network_is_dialled_and_nothing_beside_it() -> None:
    allow = (ip_network("10.1.0.0/16"), ip_network("fd00:1::/32"))

    assert dialable("10.1.2.3", allow)
    assert dialable("::ffff:10.1.2.3", allow)
    assert dialable("fd00:1::5", allow)
    assert not dialable("10.2.0.1", allow)
    assert not dialable("fd00:2::5", allow)
    # The well-known NAT64 prefix is for public addresses only; a translator's private side is not what was allowed.
    assert not dialable("64:ff9b::10.1.2.3", allow)


def test_the_guard_makes_sockets_for_public_addresses_only() -> None:
    make = guard()
    with make((socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", ("8.8.8.8", 80))) as made:
        assert made.family == socket.AF_INET
    for family, target in (
        (socket.AF_INET, ("127.0.0.1", 80)),
        (socket.AF_INET6, ("::1", 80, 0, 0)),
        (socket.AF_INET6, ("fe80::1%lo", 80, 0, 1)),
        (socket.AF_UNIX, ("8.8.8.8", 80)),
    ):
        with pytest.raises(AddressRefused) as refused:
            make((family, socket.SOCK_STREAM, 0, "", target))
        assert target[0] not in str(refused.value)


def test_the_guard_lets_allowed_networks_through() -> None:
    with guard((ip_network("127.0.0.0/8"),))((socket.AF_INET, socket.SOCK_STREAM, 0, "", ("127.0.0.1", 80))):
        pass

"""Ways that have been used, somewhere, to make a server dial what is not public; each is refused before any SYN.

Every host is one of a kind of trick, so that a failure says which. `{port}` stands for one where something listens.
"""

from itertools import chain

# As they are written in a URL. Most name loopback, where a connection would be seen; the others are refused all the
# same, and their connection would be seen by the process' own record of what it dials.
HOSTS: dict[str, list[str]] = {
    "loopback": ["127.0.0.1", "127.0.0.0", "127.1.2.3", "127.255.255.254", "localhost", "LOCALHOST", "localhost."],
    "this network": ["0.0.0.0", "0.0.0.1", "0.255.255.255"],
    "private": [
        *("10.0.0.0", "10.0.0.1", "10.255.255.255", "172.16.0.1", "172.31.255.255", "192.168.0.1", "192.168.255.255"),
    ],
    "shared": ["100.64.0.1", "100.100.100.200", "100.127.255.255"],
    "link-local and metadata": [
        *("169.254.0.1", "169.254.169.254", "169.254.170.2", "169.254.169.123", "168.63.129.16", "192.0.0.192"),
    ],
    "special": [
        *("192.0.0.1", "192.0.0.8", "192.0.0.170", "192.0.2.1", "192.88.99.1", "198.18.0.1", "198.19.255.255"),
        *("198.51.100.1", "203.0.113.1"),
    ],
    "multicast, reserved, broadcast": [
        *("224.0.0.1", "239.255.255.250", "240.0.0.1", "255.255.255.254", "255.255.255.255"),
    ],
    "short": ["127.1", "127.0.1", "0", "10.1", "192.168.257", "169.254.43518"],
    "one number": [
        "2130706433",
        "0x7f000001",
        "017700000001",
        "2852039166",
        "0xa9fea9fe",
        "025177524776",
        "4294967295",
    ],
    "octal": ["0177.0.0.1", "0177.0.0.01", "00000177.0.0.1", "0300.0250.0.1", "0251.0376.0251.0376", "012.0.0.1"],
    "hexadecimal": ["0x7f.0.0.1", "0x7f.1", "0x7F.0x0.0x0.0x1", "0xa9.0xfe.0xa9.0xfe", "0x0a.0.0.1", "0xc0.0xa8.0.1"],
    "mixed bases": ["0x7f.0.0.01", "127.0x0.00.1", "0251.0xfe.43518"],
    "too large": ["127.0.0.256", "383.0.0.1", "4294967297", "0x17f000001", "18446744075840258049"],
    "other digits": ["①②⑦.0.0.1", "１２７.０.０.１", "𝟏𝟐𝟕.𝟎.𝟎.𝟏", "¹²⁷.0.0.1", "١٢٧.0.0.1"],
    "other dots and letters": [
        "127。0。0。1",
        "127．0．0．1",
        "127｡0｡0｡1",
        "ⓛⓞⓒⓐⓛⓗⓞⓢⓣ",
        "ｌｏｃａｌｈｏｓｔ",
        "localhoſt",
    ],
    "escapes": ["127%2e0%2e0%2e1", "%31%32%37.0.0.1", "%6cocalhost", "127.0.0.1%00", "127.0.0.1%20", "127.0.0.1%0a"],
    "dots": ["127.0.0.1.", "127.0.0.1..", "127..1", ".127.0.0.1", "169.254.169.254."],
    "IPv6, not global": [
        *("[::]", "[::1]", "[0:0:0:0:0:0:0:1]", "[0000:0000::0001]", "[100::1]", "[5f00::1]", "[fc00::1]"),
        *("[fd00:ec2::254]", "[fd20:ce::254]", "[fe80::1]", "[febf::1]", "[fec0::1]", "[ff02::1]", "[ff0e::1]"),
    ],
    "IPv6, special": ["[2001:db8::1]", "[3fff::1]", "[2001:2::1]", "[2001:10::1]", "[2001:20::1]", "[2001:1::1]"],
    "zones": ["[fe80::1%25lo]", "[fe80::1%lo]", "[::1%25lo]", "[::1%251]", "[::ffff:127.0.0.1%25lo]"],
    "mapped": [
        *("[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[::FFFF:7F00:0001]", "[0:0:0:0:0:ffff:127.0.0.1]"),
        *("[::ffff:0.0.0.0]", "[::ffff:169.254.169.254]", "[::ffff:a9fe:a9fe]", "[::ffff:10.0.0.1]"),
        *("[::ffff:192.168.0.1]", "[::ffff:100.64.0.1]"),
    ],
    "compatible": ["[::127.0.0.1]", "[::7f00:1]", "[::169.254.169.254]", "[::10.0.0.1]", "[::8.8.8.8]"],
    "translated": ["[::ffff:0:127.0.0.1]", "[::ffff:0:a9fe:a9fe]", "[::ffff:0:8.8.8.8]"],
    "NAT64": [
        *("[64:ff9b::127.0.0.1]", "[64:ff9b::7f00:1]", "[64:ff9b::169.254.169.254]", "[64:ff9b::10.0.0.1]"),
        *("[64:ff9b:1::127.0.0.1]", "[64:ff9b:1:7f00:0:100::]", "[64:ff9b:1::8.8.8.8]"),
    ],
    "6to4": ["[2002:7f00:1::]", "[2002:7f00:1::1]", "[2002:a9fe:a9fe::1]", "[2002:a00:1::1]", "[2002:c0a8:1::1]"],
    "Teredo": ["[2001::1]", "[2001:0:4136:e378:8000:63bf:80ff:fffe]", "[2001:0:7f00:1::]"],
    "ISATAP": ["[fe80::5efe:127.0.0.1]", "[2a00:1450::5efe:10.0.0.1]", "[2a00:1450::200:5efe:169.254.169.254]"],
    "not an address": ["[127.0.0.1]", "[::1", "::1", "[::1]]", "[v1.127.0.0.1]", "[]", "[::ffff:127.0.0.1.]"],
    # What they resolve to stands in NAMES.
    "names": [
        *("loopback.test", "metadata.test", "private.test", "mapped.test", "nat64.test", "sixtofour.test", "v6.test"),
        *("mixed.test", "mixed-last.test", "mixed-v6.test", "zero.test", "LoopBack.Test", "loopback.test."),
        *("127.0.0.1.nip.test", "xn--lpback-test.test"),
    ],
}
NAMES: dict[str, list[str]] = {
    "loopback.test": ["127.0.0.1"],
    "metadata.test": ["169.254.169.254"],
    "private.test": ["10.0.0.1"],
    "mapped.test": ["::ffff:127.0.0.1"],
    "nat64.test": ["64:ff9b::7f00:1"],
    "sixtofour.test": ["2002:7f00:1::"],
    "v6.test": ["::1"],
    "mixed.test": ["127.0.0.1", "8.8.8.8"],
    "mixed-last.test": ["8.8.8.8", "127.0.0.1"],
    "mixed-v6.test": ["2606:4700:4700::1111", "::1"],
    "zero.test": ["0.0.0.0"],
    "loopback.test.": ["127.0.0.1"],
    "127.0.0.1.nip.test": ["127.0.0.1"],
    "xn--lpback-test.test": ["127.0.0.1"],
}
# Where the host seems to be another than it is, or there seems to be none.
URLS: dict[str, list[str]] = {
    "user and password": [
        *("http://user@127.0.0.1:{port}/", "http://user:secret@127.0.0.1:{port}/", "http://@127.0.0.1:{port}/"),
        *("http://:@127.0.0.1:{port}/", "http://example.com@127.0.0.1:{port}/", "http://a@b@127.0.0.1:{port}/"),
        *("http://example.com:80@127.0.0.1:{port}/", "http://example.com%40127.0.0.1:{port}/"),
        "http://127.0.0.1:{port}@[::1]:{port}/",
    ],
    "parsers that differ": [
        *("http://127.0.0.1:{port}\\@example.com/", "http://127.0.0.1:{port}#@example.com/"),
        *("http://127.0.0.1:{port}?@example.com/", "http:\\\\127.0.0.1:{port}\\", "http:/127.0.0.1:{port}/"),
        *("http:127.0.0.1:{port}/", "http:///127.0.0.1:{port}/", "http://127.0.0.1:{port};example.com/"),
        *("http://127.0.0.1\t:{port}/", "http://127.0.0.1:{port}:80/", "http://example.com:80:127.0.0.1:{port}/"),
        *("http://127.0.0.1&@127.0.0.1:{port}/", "http://127.0.0.1:+{port}/", "http://127.0.0.1:０/"),
    ],
    "ports": [
        *("http://127.0.0.1/", "https://127.0.0.1:{port}/", "http://127.0.0.1:0/", "http://127.0.0.1:65536/"),
        *("http://127.0.0.1:-1/", "http://127.0.0.1:0{port}/", "http://127.0.0.1:22/", "http://127.0.0.1:6379/"),
    ],
    "schemes": [
        *("HTTP://127.0.0.1:{port}/", "hTtPs://127.0.0.1:{port}/", "file:///etc/passwd", "file://127.0.0.1:{port}/"),
        *(
            "ftp://127.0.0.1:{port}/",
            "gopher://127.0.0.1:{port}/_x",
            "dict://127.0.0.1:{port}/d",
            "//127.0.0.1:{port}/",
        ),
        *("ws://127.0.0.1:{port}/", "wss://127.0.0.1:{port}/", "unix:///run/docker.sock", "data:text/plain,x"),
        *("ldap://127.0.0.1:{port}/", "jar:http://127.0.0.1:{port}!/", "view-source:http://127.0.0.1:{port}/"),
        *(
            "tcp://127.0.0.1:{port}/",
            "http+unix://%2Frun%2Fdocker.sock/info",
            "javascript:alert(1)",
            "127.0.0.1:{port}",
            "",
        ),
    ],
}
DIRECT = [
    *(f"http://{host}:{{port}}/" for host in chain.from_iterable(HOSTS.values())),
    *chain.from_iterable(URLS.values()),
]

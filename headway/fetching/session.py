"""The HTTP session, which dials no address that is refused, and sends nothing that nobody asked it to."""

from collections.abc import Sequence
from importlib.metadata import version
from socket import AF_INET, AddressFamily

import aiohttp
from aiohttp.abc import ResolveResult

from headway.addresses import AddressRefused, Network, dialable, guard


def open_session(allow: Sequence[Network], concurrency: int, per_host: int) -> aiohttp.ClientSession:
    """A session that connects to public addresses and those of `allow` only, and keeps nothing from URL to URL."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(
            limit=concurrency, limit_per_host=per_host, resolver=_Resolver(allow), socket_factory=guard(allow)
        ),
        cookie_jar=aiohttp.DummyCookieJar(),
        headers={"User-Agent": f"Headway/{version('headway')}"},
        # One deadline covers a URL with all its hops; aiohttp's own start anew with each.
        timeout=aiohttp.ClientTimeout(total=None),
        trust_env=False,
    )


class _Resolver(aiohttp.ThreadedResolver):
    """Refuses a name as a whole if any of its addresses is refused; the guard alone would try the others.

    On uvloop, as the services run, it is libuv that looks names up, and no thread of Python's is used.
    """

    def __init__(self, allow: Sequence[Network]) -> None:
        super().__init__()
        self._allow = allow

    async def resolve(self, host: str, port: int = 0, family: AddressFamily = AF_INET) -> list[ResolveResult]:
        try:
            found = await super().resolve(host, port, family)
        except UnicodeError as error:  # a label that is empty or too long
            raise OSError(f"not a host name: {error}") from None
        if not all(dialable(each["host"], self._allow) for each in found):
            raise AddressRefused
        return found

"""Which URL is fetched next."""

import asyncio
import re
from collections import deque
from collections.abc import Container, Sequence

HOST = re.compile(r"[^:]*://([^/?#]*)")


class Turns:
    """Whose URL is next: hosts in turn, none with more than `per_host` under way, so that a slow one holds up no other.

    The places in `done` are passed over. A host stands in the queue once for each request that it may have under way.
    """

    def __init__(self, urls: Sequence[str], per_host: int, done: Container[int] = ()) -> None:
        self._waiting: dict[str, deque[int]] = {}
        self._ready: asyncio.Queue[str] = asyncio.Queue()
        for index, url in enumerate(urls):
            if index not in done:
                self._waiting.setdefault(_host(url), deque()).append(index)
        for nth in range(per_host):
            for host, indexes in self._waiting.items():
                if nth < len(indexes):
                    self._ready.put_nowait(host)

    async def take(self) -> tuple[int, str]:
        """The place of the next URL, and its host, which must be given back."""
        while True:
            host = await self._ready.get()
            if waiting := self._waiting[host]:
                return waiting.popleft(), host

    def give_back(self, host: str) -> None:
        if self._waiting[host]:
            self._ready.put_nowait(host)


def _host(url: str) -> str:
    """Host and port as written: enough to tell hosts apart, at a tenth of the cost of parsing."""
    match = HOST.match(url)
    return match[1].lower() if match else ""

"""Which request is made next."""

import asyncio
import re
from collections import deque
from dataclasses import dataclass, field

from headway.fetching.requests import Request

HOST = re.compile(r"[^:]*://([^/?#]*)")
# So many requests wait for their turn at most; the file is read on as they are made.
WINDOW = 10_000


@dataclass(slots=True)
class Host:
    """Requests to one host and port."""

    name: str
    waiting: deque[Request] = field(default_factory=deque)
    under_way: int = 0
    # Of the loop's clock: no request before this.
    free_at: float = 0.0
    # Whether it stands in the queue of those whose turn it is, or waits for its time.
    listed: bool = False


class Turns:
    """Hosts take turns, none with more than `per_host` under way or `rate` a second, so that none holds up another."""

    def __init__(self, per_host: int, rate: float | None = None, window: int = WINDOW) -> None:
        self._per_host = per_host
        self._interval = 1 / rate if rate else 0.0
        self._window = window
        self._hosts: dict[str, Host] = {}
        self._ready: asyncio.Queue[Host] = asyncio.Queue()
        self._waiting = 0
        self._room = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    async def add(self, request: Request) -> None:
        """Let it wait for its turn. Returns once there is room for another."""
        self._waiting += 1
        self._enter(request)
        while self._waiting >= self._window:
            self._room.clear()
            await self._room.wait()

    async def take(self) -> tuple[Request, Host]:
        """The next request, and the host to which it must be given back."""
        while True:
            host = await self._ready.get()
            host.listed = False
            if host.free_at and host.free_at > self._loop.time():  # it was paused since
                self._list(host)
                continue
            request = host.waiting.popleft()
            host.under_way += 1
            if self._interval:
                host.free_at = max(host.free_at, self._loop.time()) + self._interval
            self._waiting -= 1
            if self._waiting < self._window:
                self._room.set()
            self._list(host)
            return request, host

    def give_back(self, host: Host) -> None:
        """A request to it is done, or is to be made again."""
        host.under_way -= 1
        if host.waiting:
            self._list(host)
        elif host.free_at > self._loop.time():
            self._loop.call_at(host.free_at, self._forget, host)
        else:
            self._forget(host)

    def again(self, request: Request, seconds: float) -> None:
        """Let a request wait for another turn, once so many seconds have passed."""
        self._waiting += 1
        self._loop.call_later(seconds, self._enter, request)

    def pause(self, host: Host, seconds: float) -> None:
        """Begin no request to the host for so many seconds."""
        host.free_at = max(host.free_at, self._loop.time() + seconds)

    def _enter(self, request: Request) -> None:
        name = host_of(request.url)
        host = self._hosts.get(name)
        if host is None:
            host = self._hosts[name] = Host(name)
        host.waiting.append(request)
        self._list(host)

    def _forget(self, host: Host) -> None:
        idle = not host.waiting and not host.under_way and host.free_at <= self._loop.time()
        if idle and self._hosts.get(host.name) is host:
            del self._hosts[host.name]

    def _list(self, host: Host) -> None:
        """Let the host stand in the queue once, if it has a request that may be made, now or when its time comes."""
        if host.listed or not host.waiting or host.under_way >= self._per_host:
            return
        host.listed = True
        if host.free_at and host.free_at > self._loop.time():
            self._loop.call_at(host.free_at, self._ready.put_nowait, host)
        else:
            self._ready.put_nowait(host)


def host_of(url: str) -> str:
    """Host and port as written: enough to tell hosts apart, at a tenth of the cost of parsing."""
    match = HOST.match(url)
    return match[1].lower() if match else ""

"""Which URL is fetched next, and how long it may take."""

import asyncio
import re
import time
from collections import deque
from collections.abc import Container, Sequence
from typing import Any

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


class Deadlines:
    """`with deadlines:` gives the task so many seconds, then raises TimeoutError, as asyncio.timeout does.

    All requests have the same time, so one timer for the oldest does; a timer for each would cost a tenth of a fetch.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._ends: dict[asyncio.Task[Any], float] = {}  # oldest first
        self._late: set[asyncio.Task[Any]] = set()

    def __enter__(self) -> None:
        self._ends[_this_task()] = time.perf_counter() + self._seconds

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        task = _this_task()
        self._ends.pop(task, None)
        if task in self._late:
            self._late.remove(task)
            # Above 0, someone else has cancelled the task as well: then it ends.
            if task.uncancel() == 0 and kind is asyncio.CancelledError:
                raise TimeoutError

    async def watch(self) -> None:
        """Interrupt the late ones, for ever."""
        while True:
            now, wait = time.perf_counter(), self._seconds
            for task, end in list(self._ends.items()):
                if end > now:
                    wait = end - now
                    break
                del self._ends[task]
                self._late.add(task)
                task.cancel()
            await asyncio.sleep(wait)


def _this_task() -> asyncio.Task[Any]:
    task = asyncio.current_task()
    assert task is not None
    return task

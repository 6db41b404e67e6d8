"""Clients that follow jobs, sets and rooms, lose their connection again and again, and go on.

Here is what those of `live_sockets` and `live_streams` have in common. What they receive goes into the checker. They
share no code with the server, nor with Headway's own client.
"""

import asyncio
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from socket import SO_LINGER, SOL_SOCKET
from time import monotonic
from typing import Any

import aiohttp

from tests.faults.live_checker import Checker, Received

RESET_ON_CLOSE = struct.pack("ii", 1, 0)
BROKEN = (aiohttp.ClientError, OSError, TimeoutError)
ANSWERED_WITHIN = 10.0


@dataclass
class Submitted:
    """An accepted job, its tags, and when its submit was sent."""

    job: str
    tag: str
    sent: float


@dataclass
class Scene:
    """Where clients connect, and what has happened so far. `keys` are by tenant, and so is `jobs`."""

    url: str
    keys: dict[str, str]
    checker: Checker
    http: aiohttp.ClientSession
    jobs: dict[str, list[Submitted]] = field(default_factory=dict)
    # Whether nothing more is submitted or said.
    complete: bool = False

    def others(self, tenant: str) -> list[Submitted]:
        """Jobs of other tenants."""
        return [one for other, jobs in self.jobs.items() if other != tenant for one in jobs]


class Follower:
    """One client. It runs until it is stopped; `reconnects` times it loses its connection on purpose within `seconds`.

    A subclass has one connection in `connection`, which ends when that breaks.
    """

    def __init__(
        self, scene: Scene, name: str, tenant: str, *, random: Random, reconnects: int, seconds: float
    ) -> None:
        self.scene = scene
        self.received: Received = scene.checker.client(name, tenant)
        self.random = random
        self.headers = {"Authorization": f"Bearer {scene.keys[tenant]}"}
        self._seconds = seconds
        self._moments = sorted(random.uniform(0, seconds) for _ in range(reconnects))
        self._connected = asyncio.Event()
        self._reading = asyncio.Event()
        self._break: Callable[[bool], None] = lambda reset: None
        self.stopped = False
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def counts(self) -> Any:
        return self.scene.checker.counts

    @property
    def lacks(self) -> str:
        """What the client still has to receive; nothing if it has all."""
        raise NotImplementedError

    @property
    def finished(self) -> bool:
        return not self._moments and not self.lacks

    async def connection(self) -> None:
        raise NotImplementedError

    async def run(self) -> None:
        disturbing = asyncio.create_task(self._disturb())
        while not self.stopped:
            self.received.connected()
            self._reading.set()
            try:
                await self.connection()
            except BROKEN as error:
                self.counts[f"broken by {type(error).__name__}"] += 1
            finally:
                self._connected.clear()
                for task in self._tasks:
                    task.cancel()
                await asyncio.gather(*self._tasks, return_exceptions=True)
                self._tasks.clear()
            if not self.stopped:
                await asyncio.sleep(self.random.uniform(0, 0.5))
        disturbing.cancel()

    def stop(self) -> None:
        self.stopped = True
        self._break(False)

    def beside(self, work: Any) -> None:
        """Do something as long as this connection lasts."""
        self._tasks.append(asyncio.create_task(work))

    def connected(self, break_off: Callable[[bool], None]) -> None:
        """The connection is there, and so is the way to end it: with a TCP reset or as clients do."""
        self.counts["connections"] += 1
        self._break = break_off
        self._connected.set()

    async def reading(self) -> None:
        """Waits while the client is frozen."""
        await self._reading.wait()

    async def _disturb(self) -> None:
        began = monotonic()
        while self._moments:
            await asyncio.sleep(max(0.0, began + self._moments[0] - monotonic()))
            await self._connected.wait()
            how = self.random.choice(("close", "reset", "freeze"))
            if how == "freeze":
                self._reading.clear()
                # Seldom, and only where there is time for it, so long that the server notices.
                long = self._seconds > 60 and self.random.random() < 0.02
                await asyncio.sleep(13 if long else self.random.uniform(0.2, 3))
            self._connected.clear()
            self._break(how != "close")
            self._reading.set()
            self._moments.pop(0)
            self.counts[f"forced: {how}"] += 1

    def _lacks_of_set(self, name: str, fits: Callable[[Submitted], bool], since: float | None) -> str:
        """What is still to come of a set: the ends of jobs it was told of, and of those submitted since a moment.

        `since` is when the client first had a cursor, None if it has none.
        """
        if not self.scene.complete:
            return "jobs that are to come"
        if since is None:
            return "a cursor"
        told = {job for subscription, job in self.received.slices if subscription == name}
        told |= {one.job for one in self.scene.jobs[self.received.tenant] if fits(one) and one.sent > since}
        return " ".join(job for job in told if (name, job) not in self.received.ended)

    async def look(self, jobs: Sequence[Submitted]) -> None:
        """Read one of these jobs, and one of another tenant, as they are now."""
        one = self.random.choice(jobs)
        known = self.received.version(one.job)
        if (shown := await self._get(f"/jobs/{one.job}")) is not None:
            status, body = shown
            if status == 404:
                self.received.missing(one.job)
            elif status == 200:
                self.received.read(one.job, known, body["epoch"], body["seq"], body["state"])
        if others := self.scene.others(self.received.tenant):
            other = self.random.choice(others)
            if (shown := await self._get(f"/jobs/{other.job}")) is not None and shown[0] < 400:
                self.received.let_in(f"job {other.job}")

    async def _get(self, path: str) -> tuple[int, Any] | None:
        """The status and the body of an answer; None if there is none."""
        try:
            async with (
                asyncio.timeout(ANSWERED_WITHIN),
                self.scene.http.get(f"{self.scene.url}/api/v1{path}", headers=self.headers) as answer,
            ):
                self.status(answer.status, path)
                return answer.status, await answer.json(content_type=None)
        except BROKEN:
            return None

    def status(self, status: int, path: str) -> None:
        """Note an answer that no fault excuses."""
        self.counts[f"status {status}"] += 1
        if status not in (101, 200, 201, 202, 204, 404, 503):
            self.received.note(f"was answered {status} to {path}")


def abort(transport: Any) -> None:
    """Break a connection without a goodbye."""
    if not transport.is_closing():
        transport.get_extra_info("socket").setsockopt(SOL_SOCKET, SO_LINGER, RESET_ON_CLOSE)
        transport.abort()

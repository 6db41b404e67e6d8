"""Followers that have a stream of server-sent events: of one job and of sets."""

import asyncio
from collections.abc import Callable
from time import monotonic
from typing import Any

import aiohttp

from tests.faults.live_checker import ALONE, Frame, contents
from tests.faults.live_clients import ANSWERED_WITHIN, Follower, Submitted, abort

# What the server calls the set of a stream.
STREAM = "events"


class StreamFollower(Follower):
    """A client of server-sent events. A subclass says which `path`, and what to go on after."""

    async def stream(self, path: str, last: str | None) -> int:
        """Read a stream to its end; the status of the answer."""
        headers = self.headers | {"Accept": "text/event-stream"} | ({"Last-Event-ID": last} if last else {})
        url = f"{self.scene.url}/api/v1{path}"
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=ANSWERED_WITHIN, sock_read=40)
        async with self.scene.http.get(url, headers=headers, timeout=timeout) as answer:
            self.status(answer.status, path)
            if answer.status != 200:
                return answer.status
            self.connected(lambda reset: self._end(answer, reset))
            fields: dict[str, str] = {}
            while True:
                await self.reading()
                line = (await answer.content.readline()).decode()
                if not line:
                    return 200
                if line == "\n":
                    if "data" in fields:
                        self._event(fields)
                    if "id" in fields:
                        self.remember(fields["id"])
                    fields = {}
                elif not line.startswith(":"):
                    name, _, value = line.rstrip("\n").partition(": ")
                    fields[name] = value

    def _event(self, fields: dict[str, str]) -> None:
        for frame, content in contents(fields["data"]):
            if frame["t"] != fields["event"]:
                self.received.note(f"was sent a {frame['t']} as {fields['event']}")
            self.received.take(frame, content)
            self.took(frame, fields.get("id"))

    def took(self, frame: Frame, id: str | None) -> None:
        """An event was received, with its id."""

    def remember(self, id: str) -> None:
        """An id by which the stream can be resumed from here."""

    def _end(self, answer: aiohttp.ClientResponse, reset: bool) -> None:
        if answer.connection is not None and answer.connection.transport is not None:
            if reset:
                abort(answer.connection.transport)
            else:
                answer.connection.transport.close()


class JobStreamFollower(StreamFollower):
    """Follows one job after the other."""

    def __init__(self, *who: Any, **plan: Any) -> None:
        super().__init__(*who, **plan)
        self._job: str | None = None

    @property
    def lacks(self) -> str:
        return "" if self._job is None or (ALONE, self._job) in self.received.ended else self._job

    @property
    def finished(self) -> bool:
        return not self.lacks and (not self._moments or self.scene.complete)

    async def connection(self) -> None:
        jobs = self.scene.jobs[self.received.tenant]
        if self._job is None or not self.lacks:
            await self._ended()
            open_jobs = [one.job for one in jobs if (ALONE, one.job) not in self.received.ended]
            if not open_jobs:
                await asyncio.sleep(1)
                return
            self._job = self.random.choice(open_jobs)
        # An id that came with the last envelope says no less than what is held.
        status = await self.stream(f"/jobs/{self._job}/events", self.received.resumed_after(self._job))
        if status == 404:
            self.received.missing(self._job)
        if status == 204 and self.lacks:
            self.received.note(f"was told that there is no more of job {self._job}, and lacks its end")
            self._job = None
        if jobs and self.random.random() < 0.05:
            await self.look(jobs)

    async def _ended(self) -> None:
        """Whoever has all is told so."""
        if self._job is not None and self.random.random() < 0.2:
            last = self.received.resumed_after(self._job)
            if await self.stream(f"/jobs/{self._job}/events", last) == 200:
                self.received.note(f"was sent a stream of job {self._job}, of which it has all")

    def took(self, frame: Frame, id: str | None) -> None:
        if frame["t"] == "bye":
            return
        if id != f"{frame['epoch']}-{frame['seq']}":
            self.received.note(f"was sent {frame['t']} {frame['seq']} of job {frame['job']} with the id {id}")


class SetStreamFollower(StreamFollower):
    """Follows a set as a stream."""

    def __init__(self, *who: Any, wanted: Frame, fits: Callable[[Submitted], bool], **plan: Any) -> None:
        super().__init__(*who, **plan)
        self._wanted = wanted
        self._fits = fits
        self._last: str | None = None
        # Since when new jobs must be told.
        self._since: float | None = None

    @property
    def lacks(self) -> str:
        return self._lacks_of_set(STREAM, self._fits, self._since)

    async def connection(self) -> None:
        if self._last is None:
            self._since = self.received.cursor = None
            self.received.after(STREAM)
        query = "&".join(f"{name}={value}" for name, value in self._wanted.items())
        await self.stream(f"/events?{query}", self._last)

    def took(self, frame: Frame, id: str | None) -> None:
        if frame["t"] == "resync":
            self._last = self._since = None

    def remember(self, id: str) -> None:
        self._last = id
        if self._since is None:
            self._since = monotonic()

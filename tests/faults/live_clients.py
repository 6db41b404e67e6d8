"""Clients that follow jobs, sets and rooms over sockets and streams, lose their connection again and again, and go on.

What they receive goes into the checker. They share no code with the server, nor with Headway's own client.
"""

import asyncio
import json
import struct
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from random import Random
from socket import SO_LINGER, SOL_SOCKET
from time import monotonic
from typing import Any
from uuid import UUID

import aiohttp

from tests.faults.live_checker import ALONE, Checker, Frame, Received, contents

RESET_ON_CLOSE = struct.pack("ii", 1, 0)
BROKEN = (aiohttp.ClientError, OSError, TimeoutError)
# What a socket may be closed with while servers come and go: 4008 is for those that do not read.
EXPECTED = (None, 1000, 1001, 1006, 1012, 1013, 4008)
ANSWERED_WITHIN = 10.0
# The names of sets: the client's own, and what the server calls that of a stream.
SET, STREAM = "mine", "events"


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

    def _open(self, name: str, fits: Callable[["Submitted"], bool], since: float) -> str:
        """Jobs of a set whose end is still to come: those it was told of, and those submitted since a moment."""
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


class SocketFollower(Follower):
    """A client of `/ws/v1`."""

    async def connection(self) -> None:
        connecting = self.scene.http.ws_connect(
            f"{self.scene.url}/ws/v1", headers=self.headers, max_msg_size=0, autoping=True
        )
        try:
            async with asyncio.timeout(ANSWERED_WITHIN):
                self._ws = await connecting
        except aiohttp.WSServerHandshakeError as error:
            self.status(error.status, "/ws/v1")
            return
        self._ids = 0
        self._answers: dict[int, asyncio.Future[Frame]] = {}
        self.connected(self._end)
        try:
            self.begin()
            while True:
                await self.reading()
                message = await self._ws.receive()
                if message.type is not aiohttp.WSMsgType.TEXT:
                    break
                for frame, content in contents(message.data):
                    self.received.take(frame, content)
                    self.took(frame)
                    if frame["t"] in ("ack", "error") and (answer := self._answers.get(frame["id"])):
                        if not answer.done():
                            answer.set_result(frame)
                        elif frame["t"] == "error":
                            self.refused(frame)
        finally:
            code = self._ws.close_code
            self.counts[f"closed {code}"] += 1
            if code not in EXPECTED:
                self.received.note(f"was closed with {code}")
            await self._ws.close()

    def begin(self) -> None:
        """Subscribe, in tasks `beside`."""
        raise NotImplementedError

    def took(self, frame: Frame) -> None:
        """A frame was received."""

    def refused(self, frame: Frame) -> None:
        """An error after the answer to a command: an item of it was refused."""
        self.received.note(f"was refused what it may have: {frame}")

    async def ask(self, t: str, **fields: Any) -> Frame:
        """Send a command; its ack or error. Raises one of BROKEN if there is none in time."""
        self._ids += 1
        answer = self._answers[self._ids] = asyncio.get_running_loop().create_future()
        await self._ws.send_str(json.dumps({"t": t, "id": self._ids, **fields}))
        async with asyncio.timeout(ANSWERED_WITHIN):
            frame = await answer
        if frame["t"] == "error":
            self.received.note(f"was refused {t} {fields}: {frame}")
        return frame

    def _end(self, reset: bool) -> None:
        connection = self._ws._response.connection
        if connection is None or connection.transport is None:
            return
        if reset:
            _reset(connection.transport)
        else:
            task = asyncio.create_task(self._ws.close())
            task.add_done_callback(lambda done: done.cancelled() or done.exception())


class JobsFollower(SocketFollower):
    """Follows many jobs on one socket, those whose tag is in `tags`."""

    def __init__(self, *who: Any, tags: frozenset[str], **plan: Any) -> None:
        super().__init__(*who, **plan)
        self._tags = tags
        self._foreign: dict[str, str] = {}

    @property
    def mine(self) -> list[Submitted]:
        return [one for one in self.scene.jobs[self.received.tenant] if one.tag in self._tags]

    @property
    def lacks(self) -> str:
        if not self.scene.complete:
            return "jobs that are to come"
        return " ".join(one.job for one in self.mine if (ALONE, one.job) not in self.received.ended)

    async def connection(self) -> None:
        # Whoever subscribes to nothing for long is not welcome.
        while not self.mine and not self.stopped:
            await asyncio.sleep(0.2)
        await super().connection()

    def begin(self) -> None:
        self._foreign = {}
        self.beside(self._subscribe())

    async def _subscribe(self) -> None:
        """Follow what there is, and what comes later."""
        asked: set[str] = set()
        with suppress(*BROKEN):
            while True:
                new = [one.job for one in self.mine if one.job not in asked]
                if new:
                    foreign = self._strangers() if self.random.random() < 0.1 else []
                    items = [self.received.since(job) for job in new] + [{"job": job} for job in foreign]
                    self.random.shuffle(items)
                    asked |= set(new)
                    held = (await self.ask("subscribe", jobs=items))["d"].get("jobs", ())
                    for job in set(foreign) & set(held):
                        self.received.let_in(f"job {job}")
                if self.mine and self.random.random() < 0.02:
                    await self.look(self.mine)
                await asyncio.sleep(1)

    def _strangers(self) -> list[str]:
        """A job of another tenant, and one that does not exist: the answer is to be the same."""
        others = self.scene.others(self.received.tenant)
        if not others:
            return []
        jobs = [self.random.choice(others).job, str(UUID(int=self.random.getrandbits(128), version=4))]
        self._foreign = dict.fromkeys(jobs, "")
        return jobs

    def refused(self, frame: Frame) -> None:
        job, detail = frame["d"].get("job"), frame["d"]["detail"]
        if job not in self._foreign:
            super().refused(frame)
            return
        self._foreign[job] = detail.replace(job, "")
        if len(set(filter(None, self._foreign.values()))) > 1:
            self.received.note(f"was told a job of another tenant from one that does not exist: {self._foreign}")


class SetFollower(SocketFollower):
    """Follows a set on one socket: `wanted` is a tag, a kind or nothing; `fits` says the same of what was submitted."""

    def __init__(self, *who: Any, wanted: Frame, fits: Callable[[Submitted], bool], **plan: Any) -> None:
        super().__init__(*who, **plan)
        self._wanted = wanted
        self._fits = fits
        # Since when new jobs must be told.
        self._since: float | None = None

    @property
    def lacks(self) -> str:
        if not self.scene.complete:
            return "jobs that are to come"
        if self._since is None:
            return "a cursor"
        return self._open(SET, self._fits, self._since)

    def begin(self) -> None:
        self._note_cursor()
        self.beside(self._subscribe())

    async def _subscribe(self) -> None:
        with suppress(*BROKEN):
            await self.ask("subscribe", sets=[self._wanted | self.received.after(SET)])

    def took(self, frame: Frame) -> None:
        self._note_cursor()

    def _note_cursor(self) -> None:
        if self.received.cursor is None:
            self._since = None
        elif self._since is None:
            self._since = monotonic()


class RoomFollower(SocketFollower):
    """Joins a room, and says so many `messages` there over `seconds`, each until it is acknowledged."""

    def __init__(
        self, *who: Any, room: str, messages: int, told: dict[tuple[str, str], int], seconds: float, **plan: Any
    ) -> None:
        super().__init__(*who, seconds=seconds, **plan)
        self._room = room
        self._messages = messages
        self._pause = seconds / (messages + 1)
        self._next = 0
        # The newest seq of each room that anyone knows of.
        self._told = told

    @property
    def lacks(self) -> str:
        newest = self._told.get((self.received.tenant, self._room), 0)
        if self._next < self._messages:
            return f"acks of {self._messages - self._next} messages"
        if self.received.said_up_to(self._room) < newest:
            return f"messages up to {newest}"
        return ""

    def begin(self) -> None:
        self.beside(self._talk())

    async def _talk(self) -> None:
        with suppress(*BROKEN):
            await self.ask("subscribe", rooms=[{"room": self._room, "since": self.received.said_up_to(self._room)}])
            while self._next < self._messages:
                text = f"{self.received.name} says {self._next}"
                frame = await self.ask("publish", room=self._room, message=text, key=text)
                if frame["t"] == "ack":
                    seq = frame["d"]["seq"]
                    self.received.acknowledged(self._room, seq, text)
                    place = (self.received.tenant, self._room)
                    self._told[place] = max(seq, self._told.get(place, 0))
                    # Now and then it is said once more with the same key.
                    self._next += self.random.random() > 0.1
                await asyncio.sleep(self.random.uniform(0, 2 * self._pause))


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
                _reset(answer.connection.transport)
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
        if not self.scene.complete:
            return "jobs that are to come"
        if self._since is None:
            return "a cursor"
        return self._open(STREAM, self._fits, self._since)

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


def _reset(transport: Any) -> None:
    if not transport.is_closing():
        transport.get_extra_info("socket").setsockopt(SOL_SOCKET, SO_LINGER, RESET_ON_CLOSE)
        transport.abort()

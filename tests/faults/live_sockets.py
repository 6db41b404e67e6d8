"""Followers that have a WebSocket: of one job, of many, of sets, and of rooms."""

import asyncio
import json
from collections.abc import Callable
from contextlib import suppress
from time import monotonic
from typing import Any
from uuid import UUID

import aiohttp

from tests.faults.live_checker import ALONE, Frame, contents
from tests.faults.live_clients import ANSWERED_WITHIN, BROKEN, Follower, Submitted, abort

# What a socket may be closed with while servers come and go: 4008 is for those that do not read.
EXPECTED = (None, 1000, 1001, 1006, 1012, 1013, 4008)
# The client's own name of a set.
SET = "mine"


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
            abort(connection.transport)
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
        return self._lacks_of_set(SET, self._fits, self._since)

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

"""Clients of the live stream: they check what every client may rely on, and share no code with the server."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

Frame = dict[str, Any]
ENVELOPES = ("snapshot", "state", "log", "progress")


class Chains:
    """What was received of each job, in each subscription: no gap, no duplicate, nothing out of order."""

    def __init__(self) -> None:
        self.held: dict[tuple[str, str], tuple[Any, int | None]] = {}
        self.frames: list[Frame] = []

    def take(self, frame: Frame) -> Frame:
        self.frames.append(frame)
        if frame["t"] == "resync":
            for subscription in [key for key in self.held if frame.get("job") == key[1] or frame.get("set") == key[0]]:
                del self.held[subscription]
        if frame["t"] in ENVELOPES:
            for name in frame.get("set", [""]):
                epoch, seq = self.held.get((name, frame["job"]), (None, None))
                if frame["t"] == "snapshot":
                    assert frame["prev"] is None
                elif seq is not None:
                    assert frame["prev"] in (seq, None), f"a gap: {seq} is held, and {frame} came"
                    assert frame["seq"] > seq, f"a duplicate: {seq} is held, and {frame} came"
                    assert frame["epoch"] == epoch
                self.held[name, frame["job"]] = (frame["epoch"], frame["seq"])
        return frame

    def of(self, job: str, *types: str) -> list[Frame]:
        return [frame for frame in self.frames if frame.get("job") == job and (not types or frame["t"] in types)]


class Socket(Chains):
    """A client of `/ws/v1`."""

    def __init__(self, ws: ClientConnection) -> None:
        super().__init__()
        self.ws = ws
        self._waiting: list[Frame] = []
        self._ids = 0

    async def recv(self) -> Frame:
        while not self._waiting:
            read = json.loads(await self.ws.recv())
            self._waiting = read if isinstance(read, list) else [read]
        return self.take(self._waiting.pop(0))

    async def until(self, condition: Any, deadline: float = 10) -> Frame:
        """The first frame from here on that fits."""
        async with asyncio.timeout(deadline):
            while not condition(frame := await self.recv()):
                pass
            return frame

    async def ask(self, t: str, **fields: Any) -> Frame:
        """Send a command; its ack or error."""
        self._ids += 1
        await self.ws.send(json.dumps({"t": t, "id": self._ids, **fields}))
        return await self.until(lambda frame: frame.get("id") == self._ids)

    async def end(self, job: str, deadline: float = 15) -> list[Frame]:
        """All envelopes of a job, once it has said bye."""
        if not self.of(job, "bye"):
            await self.until(lambda frame: frame["t"] == "bye" and frame.get("job") == job, deadline)
        return self.of(job, *ENVELOPES)

    async def closed(self, deadline: float = 15) -> tuple[int, str]:
        """The close code and the reason, once the server has closed."""
        async with asyncio.timeout(deadline):
            try:
                while True:
                    await self.recv()
            except ConnectionClosed as closed:
                return (closed.rcvd.code, closed.rcvd.reason) if closed.rcvd else (1006, "")


@asynccontextmanager
async def live(http: httpx.AsyncClient, **options: Any) -> AsyncIterator[Socket]:
    """A socket of `/ws/v1` with the client's key, welcomed."""
    async with connect(
        f"{str(http.base_url).rstrip('/').replace('http', 'ws', 1)}/ws/v1",
        additional_headers={"Authorization": http.headers["Authorization"]},
        proxy=None,
        **{"max_size": 1 << 24, **options},
    ) as ws:
        socket = Socket(ws)
        assert (await socket.recv())["t"] == "welcome"
        yield socket


class Stream(Chains):
    """A client of server-sent events."""

    def __init__(self, response: httpx.Response) -> None:
        super().__init__()
        self.response = response
        self.last: str | None = None
        self.comments = 0
        self._lines = response.aiter_lines()

    async def recv(self) -> Frame | None:
        """The next event; None once the stream has ended."""
        fields: dict[str, str] = {}
        async for line in self._lines:
            if line.startswith(":"):
                self.comments += 1
            elif line:
                name, _, value = line.partition(": ")
                fields[name] = value
            elif "data" in fields:
                self.last = fields.get("id", self.last)
                frame = json.loads(fields["data"])
                assert frame["t"] == fields["event"]
                return self.take(frame)
        return None

    async def rest(self, deadline: float = 15) -> list[Frame]:
        """Every event until the stream ends."""
        async with asyncio.timeout(deadline):
            frames = []
            while (frame := await self.recv()) is not None:
                frames.append(frame)
            return frames


@asynccontextmanager
async def stream(http: httpx.AsyncClient, path: str, last: str | None = None, **params: Any) -> AsyncIterator[Stream]:
    headers = {"Accept": "text/event-stream"} | ({"Last-Event-ID": last} if last else {})
    async with http.stream("GET", f"/api/v1{path}", headers=headers, params=params, timeout=30) as response:
        assert response.status_code == 200, await response.aread()
        yield Stream(response)

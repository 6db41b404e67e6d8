"""Clients of rooms as people write them: a socket of one room, and one that speaks `jobs.v1`."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed
from websockets.typing import Origin, Subprotocol

Frame = dict[str, Any]


def opening(
    http: httpx.AsyncClient,
    path: str,
    *,
    key: str | None = None,
    ticket: str | None = None,
    origin: str | None = None,
    headers: dict[str, str] | None = None,
) -> connect:
    """A WebSocket with the client's own key, another, or a ticket in its place."""
    protocols = [Subprotocol("jobs.v1")]
    sent = dict(headers or {})
    if ticket is not None:
        protocols.append(Subprotocol(f"ticket.{ticket}"))
    elif key != "":
        sent["Authorization"] = http.headers["Authorization"] if key is None else f"Bearer {key}"
    return connect(
        f"{str(http.base_url).rstrip('/').replace('http', 'ws', 1)}{path}",
        additional_headers=sent,
        subprotocols=protocols if ticket is not None or path == "/ws/v1" else None,
        origin=None if origin is None else Origin(origin),
        proxy=None,
    )


class Client:
    """What a socket received, as single objects, and a way to wait for what comes."""

    def __init__(self, ws: ClientConnection) -> None:
        self.ws = ws
        self.frames: list[Frame] = []
        self.raw: list[str] = []
        self.closed: tuple[int, str] | None = None
        self._arrived = asyncio.Condition()
        self._reading = asyncio.create_task(self._read())

    async def send(self, **frame: Any) -> None:
        await self.ws.send(json.dumps(frame))

    async def wait(self, wanted: Callable[[Frame], Any], deadline: float = 10) -> Frame:
        """The first frame for which `wanted` is true, from the beginning."""
        async with asyncio.timeout(deadline), self._arrived:
            while True:
                for frame in self.frames:
                    if wanted(frame):
                        return frame
                assert self.closed is None, (self.closed, self.frames)
                await self._arrived.wait()

    async def ended(self, deadline: float = 10) -> tuple[int, str]:
        """The close code and the reason."""
        async with asyncio.timeout(deadline), self._arrived:
            await self._arrived.wait_for(lambda: self.closed is not None)
        assert self.closed is not None
        return self.closed

    def said(self, room: str = "lobby") -> list[str]:
        """What was said in the room, in order of arrival."""
        found = []
        for frame in self.frames:
            if frame.get("t") == "message" and frame["room"] == room:
                found.append(frame["d"]["message"])
            elif "t" not in frame and frame.get("room") == room:
                found.append(frame["message"])
        return found

    def seqs(self, room: str = "lobby") -> list[int]:
        return [
            frame["seq"]
            for frame in self.frames
            if frame.get("room") == room and (frame.get("t") == "message" or "message" in frame)
        ]

    def presence(self) -> list[tuple[str, Any]]:
        """`("joined", "ada")` and so on, in order of arrival, of one room."""
        found: list[tuple[str, Any]] = []
        for frame in self.frames:
            d = frame["d"] if frame.get("t") == "presence" else frame
            found += [(key, d[key]) for key in ("here", "joined", "left") if key in d]
        return found

    async def close(self) -> None:
        await self.ws.close()
        await self._reading

    async def _read(self) -> None:
        try:
            while True:
                self.raw.append(raw := str(await self.ws.recv()))
                received = json.loads(raw)
                async with self._arrived:
                    self.frames += received if isinstance(received, list) else [received]
                    self._arrived.notify_all()
        except ConnectionClosed as closed:
            async with self._arrived:
                self.closed = (closed.rcvd.code, closed.rcvd.reason) if closed.rcvd else (1006, "")
                self._arrived.notify_all()


@asynccontextmanager
async def client(http: httpx.AsyncClient, path: str, **options: Any) -> AsyncIterator[Client]:
    async with opening(http, path, **options) as ws:
        made = Client(ws)
        try:
            yield made
        finally:
            await made.close()


async def ticket(http: httpx.AsyncClient, **wanted: Any) -> str:
    """A ticket, for pages of the service itself unless it says otherwise."""
    answer = await http.post("/api/v1/ws-tickets", json={"origin": str(http.base_url).rstrip("/"), **wanted})
    assert answer.status_code == 201, answer.text
    return str(answer.json()["ticket"])


@asynccontextmanager
async def visitor(
    http: httpx.AsyncClient, user: str, path: str = "/ws/rooms/lobby", **wanted: Any
) -> AsyncIterator[Client]:
    """A browser of a user, from a page of the service; on `/ws/rooms/…` once it is told who is there."""
    issued = await ticket(http, user=user, **wanted)
    async with client(http, path, ticket=issued, origin=str(http.base_url).rstrip("/")) as made:
        if path != "/ws/v1":
            await made.wait(lambda frame: "here" in frame)
        yield made

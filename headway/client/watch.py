"""Watching a set of jobs, and a room: by a position that outlasts the connection."""

import asyncio
from collections import OrderedDict
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING
from uuid import uuid4

from headway.client.errors import ConnectionFailed
from headway.client.follow import PATIENCE
from headway.client.subscription import Broken, Json, Lost, Subscription

if TYPE_CHECKING:
    from headway.client.http import Client


# Jobs of a set whose last envelope is remembered.
MOST_KNOWN = 10_000


class SetSubscription(Subscription):
    """Jobs that fit, by the cursor of the envelope that came last.

    A heartbeat's cursor is good for all sets of a socket, and so may lie a little behind what one of them has had.
    """

    section = "sets"

    def __init__(self, fitting: Json, since: str | None) -> None:
        super().__init__(uuid4().hex)
        self._fitting = fitting
        self._cursor = since
        self._known: OrderedDict[str, tuple[int, int]] = OrderedDict()

    def request(self) -> Json:
        resumed = {} if self._cursor is None else {"since": self._cursor}
        return {"set": self.key[1], **self._fitting, **resumed}

    def accept(self, frame: Json) -> bool:
        if frame["t"] == "resync":
            self._cursor = None
            self._known.clear()
            return True
        self._cursor = frame.get("cursor", self._cursor)
        job, epoch, seq = frame["job"], frame["epoch"], frame["seq"]
        known_epoch, known_seq = self._known.get(job, (epoch, -1))
        if known_epoch == epoch and known_seq >= seq:
            return False
        self._known[job] = epoch, seq
        self._known.move_to_end(job)
        if len(self._known) > MOST_KNOWN:
            self._known.popitem(last=False)
        return True

    def mark(self, marks: Json) -> None:
        if self.open and not self.behind:
            self._cursor = marks.get("cursor") or self._cursor


class RoomSubscription(Subscription):
    """A room, by the seq of the message that came last."""

    section = "rooms"

    def __init__(self, name: str, since: int | None) -> None:
        super().__init__(name)
        self._seq = since

    def request(self) -> Json:
        resumed = {} if self._seq is None else {"since": self._seq}
        return {"room": self.key[1], **resumed}

    def accept(self, frame: Json) -> bool:
        if frame["t"] == "resync":
            self._seq = None
        if frame["t"] == "message":
            if self._seq is not None and frame["seq"] <= self._seq:
                return False
            self._seq = frame["seq"]
        return True

    def mark(self, marks: Json) -> None:
        seq = marks.get("rooms", {}).get(self.key[1])
        if not self.open or seq is None:
            return
        if self._seq is not None and seq > self._seq:
            raise Lost("a frame is missing")
        self._seq = seq


class Room:
    """A room: `async for frame in room` gets what is said and who comes and goes, `send` says something."""

    def __init__(self, client: "Client", name: str, since: int | None) -> None:
        self.name = name
        self._client = client
        self._since = since

    def __aiter__(self) -> AsyncGenerator[Json, None]:
        return watch(self._client, RoomSubscription(self.name, self._since))

    async def send(self, message: str) -> Json:
        """Say something to everyone in the room: the message as it is kept. Broken connections say nothing twice."""
        return await self._client.post_message(self.name, message)


async def watch(client: "Client", subscription: Subscription) -> AsyncGenerator[Json, None]:
    """All frames of a subscription. Raises ConnectionFailed if there is no socket for five minutes, or never was."""
    loop = asyncio.get_running_loop()
    async with client.live.subscribed(subscription):
        while True:
            item = await subscription.next()
            if not isinstance(item, Broken):
                yield item
            elif loop.time() - item.heard > PATIENCE:
                raise ConnectionFailed(f"No live connection to {client.url}: {item.reason}.")

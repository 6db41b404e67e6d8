"""Following one job without losing anything."""

import asyncio
import math
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any

from headway.client.errors import ConnectionFailed, Unavailable
from headway.client.subscription import Broken, Json, Lost, Subscription, ended

if TYPE_CHECKING:
    from headway.client.http import Client

PATIENCE = 300.0
# Seconds without a socket after which HTTP is asked: its snapshot takes the place of what a new socket would send.
WITHOUT = 10.0
ENVELOPES = ("snapshot", "state", "progress", "log")


class Position:
    """How much of a job is known."""

    def __init__(self) -> None:
        self.epoch: Any = None
        self.seq = -1

    def advance(self, epoch: Any, seq: int) -> bool:
        """Move to `seq`; False if that is not ahead."""
        if epoch == self.epoch and seq <= self.seq:
            return False
        self.epoch, self.seq = epoch, seq
        return True


class JobSubscription(Subscription):
    section = "jobs"

    def __init__(self, job_id: str) -> None:
        super().__init__(job_id)
        self._position = Position()

    def request(self) -> Json:
        resumed = {} if self._position.epoch is None else {"since": self._position.seq, "epoch": self._position.epoch}
        return {"job": self.key[1], **resumed}

    def accept(self, frame: Json) -> bool:
        if frame["t"] == "resync":
            self._position = Position()
        if frame["t"] not in ENVELOPES:
            return bool(frame["t"] == "bye")
        if frame["t"] != "snapshot" and frame["epoch"] != self._position.epoch:
            raise Lost("there was no snapshot")
        return self._position.advance(frame["epoch"], frame["seq"])

    def mark(self, marks: Json) -> None:
        if self.open and marks.get("jobs", {}).get(self.key[1], -1) > self._position.seq:
            raise Lost("a frame is missing")


async def follow(client: "Client", job_id: str) -> AsyncGenerator[Json, None]:
    """See Client.follow. If no socket can be had, the job is read over HTTP and yielded as a snapshot."""
    loop = asyncio.get_running_loop()
    shown = Position()
    answered = -math.inf
    subscription = JobSubscription(job_id)
    async with client.live.subscribed(subscription):
        while True:
            item = await subscription.next()
            if isinstance(item, Broken):
                heard = item.heard
                if loop.time() - heard < WITHOUT:
                    continue
                try:
                    item = _snapshot(await client.get(job_id))
                except (ConnectionFailed, Unavailable):
                    if loop.time() - max(answered, heard) > PATIENCE:
                        raise
                    continue
                answered = loop.time()
            if item["t"] == "bye":
                return
            if shown.advance(item["epoch"], item["seq"]):
                yield item
            if ended(item):
                return


def _snapshot(job: Json) -> Json:
    return {"t": "snapshot", "job": job["id"], "epoch": job["epoch"], "prev": None, "seq": job["seq"], "d": job}

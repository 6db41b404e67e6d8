"""The hub: one subscription a process and job, however many sockets follow it.

Events from Redis are hints. A follower that hears nothing for a while, or that fell behind, reads Postgres.
"""

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID, uuid4

import structlog
from channels_redis.pubsub import RedisPubSubChannelLayer
from redis.exceptions import RedisError

from headway import metrics
from headway.events import group

MOST_WAITING = 256
PROBE_WAIT = 0.25
PROBES = 4

log = structlog.get_logger(__name__)


class Follower:
    """What one socket has yet to be sent. At most 256 events wait; past that `behind` is set and they are dropped."""

    def __init__(self) -> None:
        self._events: asyncio.Queue[dict[str, Any]] = asyncio.Queue(MOST_WAITING)
        self.behind = False

    def offer(self, event: dict[str, Any]) -> None:
        try:
            self._events.put_nowait(event)
        except asyncio.QueueFull:
            self.behind = True

    async def next(self, wait: float) -> dict[str, Any] | None:
        """The next event, or None after `wait` seconds without one."""
        try:
            async with asyncio.timeout(wait):
                return await self._events.get()
        except TimeoutError:
            return None


class Hub:
    """Spreads what the channel layer brings among the followers in this process."""

    def __init__(self, layer: RedisPubSubChannelLayer) -> None:
        self._layer = layer
        self._followers: defaultdict[str, set[Follower]] = defaultdict(set)
        self._probes: dict[str, asyncio.Event] = {}
        self._channel: str | None = None
        self._reading: asyncio.Task[None] | None = None
        self._changing = asyncio.Lock()

    @asynccontextmanager
    async def follow(self, job_id: UUID) -> AsyncIterator[Follower]:
        """A follower that misses nothing from here on, as far as Redis is there."""
        follower, name = Follower(), str(job_id)
        self._followers[name].add(follower)
        try:
            await self.ensure(job_id)
            yield follower
        finally:
            self._followers[name].discard(follower)
            if not self._followers[name]:
                del self._followers[name]
                await self._leave(job_id)

    async def ensure(self, job_id: UUID) -> bool:
        """Be subscribed to a job's events: True once Redis has been seen to deliver them.

        A subscription is only written, not acknowledged, when the layer returns; so a probe is sent through it.
        """
        try:
            async with asyncio.timeout(3):
                async with self._changing:
                    if self._channel is None:
                        self._channel = await self._layer.new_channel()
                        self._reading = asyncio.create_task(self._read(self._channel))
                    await self._layer.group_add(group(job_id), self._channel)
                return await self._probe(job_id)
        except (RedisError, OSError) as error:
            log.warning("no live events from Redis; followers read Postgres", error=repr(error))
            return False

    async def close(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.gather(self._reading, return_exceptions=True)

    async def _probe(self, job_id: UUID) -> bool:
        nonce = uuid4().hex
        heard = self._probes[nonce] = asyncio.Event()
        try:
            for _ in range(PROBES):
                await self._layer.group_send(group(job_id), {"type": "probe", "nonce": nonce})
                try:
                    async with asyncio.timeout(PROBE_WAIT):
                        await heard.wait()
                except TimeoutError:
                    continue
                return True
            return False
        finally:
            del self._probes[nonce]

    async def _leave(self, job_id: UUID) -> None:
        if self._channel is None:
            return
        try:
            async with self._changing:
                if str(job_id) not in self._followers:
                    await self._layer.group_discard(group(job_id), self._channel)
        except (RedisError, OSError) as error:
            log.warning("could not unsubscribe; further events of the job are ignored", error=repr(error))

    async def _read(self, channel: str) -> None:
        while True:
            try:
                self._spread(await self._layer.receive(channel))
            except Exception:
                metrics.events_dropped.inc()
                log.exception("a live event cannot be read; followers read Postgres")

    def _spread(self, event: dict[str, Any]) -> None:
        if event["type"] == "probe":
            if probe := self._probes.get(event["nonce"]):
                probe.set()
            return
        for follower in self._followers.get(event["job"], ()):
            follower.offer(event)

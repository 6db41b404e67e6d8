"""Live events through the channel layer: published after they are committed, and never the only copy.

A message carries the event's data already encoded as JSON, so that readers build frames without decoding it.
"""

import asyncio
import json
from collections import deque
from collections.abc import Collection, Sequence
from contextlib import suppress
from typing import Any
from uuid import UUID

import structlog
from channels_redis.pubsub import RedisPubSubChannelLayer
from redis.exceptions import RedisError

from headway import metrics
from headway.job import Event
from headway.queue import connect

PREFIX = "headway"
# What channels_redis puts before the name of a group.
CHANNEL = f"{PREFIX}__group__"
MOST_WAITING = 20_000
AT_ONCE = 200
# Seconds that Redis is left alone after it has refused.
PAUSE = 1.0

# ARGV: channel, message, channel, message, …
PUBLISH_ALL = """
for place = 1, #ARGV, 2 do
    redis.call('PUBLISH', ARGV[place], ARGV[place + 1])
end
"""

# A group and a message to it.
Told = tuple[str, dict[str, Any]]

log = structlog.get_logger(__name__)


# The group that whoever follows anything is in, before it is in another.
EVERYONE = "everyone"
# Tells them that events were lost: they are to look at the record.
LOST = {"type": "lost"}
# Tells a tenant's group that there are new durable events.
HINT = {"type": "hint"}


def group(job_id: UUID) -> str:
    """The group that a job's events are sent to."""
    return f"job.{job_id}"


def tenant_group(tenant_id: UUID) -> str:
    """The group that is told of all jobs of a tenant: their progress, and by a HINT that the record has more."""
    return f"tenant.{tenant_id}"


class Layer(RedisPubSubChannelLayer):  # type: ignore[misc]
    """Channels' layer over Redis, and a way to send to many groups in one round trip."""

    def __init__(self, redis_url: str) -> None:
        host = {"address": redis_url, "socket_connect_timeout": 1, "socket_timeout": 5}
        super().__init__(hosts=[host], prefix=PREFIX)
        self.redis = connect(redis_url)
        self._publish_all = self.redis.register_script(PUBLISH_ALL)

    async def heard(self, names: Collection[str]) -> set[str]:
        """Those of the groups that somebody subscribes to."""
        counts = await self.redis.pubsub_numsub(*(CHANNEL + name for name in names))
        return {channel.decode().removeprefix(CHANNEL) for channel, readers in counts if readers}

    async def group_send_all(self, messages: Sequence[tuple[str, dict[str, Any]]]) -> None:
        """Send each message to all subscribers of its group, in order."""
        arguments: list[str | bytes] = []
        encoded, data = None, b""
        for name, sent in messages:
            if sent is not encoded:
                encoded, data = sent, self.serialize(sent)
            arguments += (CHANNEL + name, data)
        await self._publish_all(args=arguments)


def layer(redis_url: str) -> Layer:
    """A channel layer whose every call ends within seconds, also when Redis hangs."""
    return Layer(redis_url)


def message(event: Event) -> dict[str, Any]:
    """An event as it travels: `d` is JSON text, the same as of what Postgres has kept of it."""
    return {
        "type": "job.event",
        "job": str(event.job_id),
        "epoch": event.epoch,
        "seq": event.seq,
        "t": event.type,
        "terminal": event.terminal,
        "d": json.dumps(event.data, separators=(",", ":"), sort_keys=True),
    }


class Events:
    """Publishes in order from a task of its own: callers never wait for Redis."""

    def __init__(self, channel_layer: Layer) -> None:
        self.layer = channel_layer
        self._waiting: deque[Event | Told] = deque()
        self._submitted: set[UUID] = set()
        self._lost = False
        # Whether anybody followed anything when last asked.
        self._followed = False
        self._closing = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def publish(self, event: Event) -> None:
        """Tell whoever follows the job. What Redis does not take, readers read again from Postgres."""
        self._put(event)

    def tell(self, group: str, message: dict[str, Any]) -> None:
        """Send a message to a group that is not a job's, such as a room's."""
        self._put((group, message))

    def submitted(self, tenant_id: UUID) -> None:
        """Tell whoever follows a tenant's jobs that there are new ones; nobody follows these one by one yet."""
        self._submitted.add(tenant_id)
        self._start()

    async def close(self) -> None:
        """Send what waits, then disconnect."""
        self._closing.set()
        if self._task is not None:
            await self._task
        await self.layer.flush()
        await self.layer.redis.aclose()

    def _put(self, waiting: Event | Told) -> None:
        if len(self._waiting) >= MOST_WAITING:
            self._waiting.popleft()
            metrics.events_dropped.inc()
            self._lost = True
        self._waiting.append(waiting)
        self._start()

    def _start(self) -> None:
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._send())

    async def _send(self) -> None:
        while self._waiting or self._submitted or self._lost:
            waiting = [self._waiting.popleft() for _ in range(min(AT_ONCE, len(self._waiting)))]
            try:
                await self._publish(waiting)
            except (RedisError, OSError) as error:
                dropped = len(waiting) + len(self._waiting)
                self._waiting.clear()
                self._submitted.clear()
                self._lost = True
                metrics.events_dropped.inc(dropped)
                log.warning("live events were not sent; readers re-read them", events=dropped, error=str(error))
                if self._closing.is_set():
                    return
                with suppress(TimeoutError):
                    async with asyncio.timeout(PAUSE):
                        await self._closing.wait()

    async def _publish(self, waiting: Sequence[Event | Told]) -> None:
        """Send what somebody follows: most events nobody does, and these are not even encoded.

        Who subscribes after the question reads the record after that, and so finds what is committed by now.
        """
        submitted, self._submitted = self._submitted, set()
        if not self._followed and not await self.layer.heard([EVERYONE]):
            self._lost = False
            return
        events = [one for one in waiting if isinstance(one, Event)]
        told = [one for one in waiting if not isinstance(one, Event)]
        hinted = {tenant_group(tenant_id) for tenant_id in submitted}
        hinted |= {tenant_group(event.tenant_id) for event in events if event.type != "progress"}
        tenants = {tenant_group(event.tenant_id) for event in events}
        heard = await self.layer.heard(
            {*hinted, *tenants, *(group(event.job_id) for event in events), *(name for name, _ in told), EVERYONE}
        )
        self._followed = EVERYONE in heard
        messages: list[tuple[str, dict[str, Any]]] = []
        if self._lost and EVERYONE in heard:
            messages.append((EVERYONE, LOST))
        for event in events:
            names = [group(event.job_id)]
            if event.type == "progress":
                names.append(tenant_group(event.tenant_id))
            if followed := [name for name in names if name in heard]:
                sent = message(event)
                messages += [(name, sent) for name in followed]
        messages += [(name, sent) for name, sent in told if name in heard]
        messages += [(name, HINT) for name in hinted & heard]
        if messages:
            await self.layer.group_send_all(messages)
        self._lost = False

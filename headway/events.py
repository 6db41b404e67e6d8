"""Live events through the channel layer: published after they are committed, and never the only copy.

A message carries the event's data already encoded as JSON, so that readers build frames without decoding it.
"""

import asyncio
import json
from collections import deque
from collections.abc import Collection, Sequence
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

# ARGV: channel, message, channel, message, …
PUBLISH_ALL = """
for place = 1, #ARGV, 2 do
    redis.call('PUBLISH', ARGV[place], ARGV[place + 1])
end
"""

log = structlog.get_logger(__name__)


def group(job_id: UUID) -> str:
    """The group that a job's events are sent to."""
    return f"job.{job_id}"


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
        for name, sent in messages:
            arguments += (CHANNEL + name, self.serialize(sent))
        await self._publish_all(args=arguments)


def layer(redis_url: str) -> Layer:
    """A channel layer whose every call ends within seconds, also when Redis hangs."""
    return Layer(redis_url)


def message(event: Event) -> dict[str, Any]:
    """An event as it travels: `d` is JSON text."""
    return {
        "type": "job.event",
        "job": str(event.job_id),
        "epoch": event.epoch,
        "seq": event.seq,
        "t": event.type,
        "terminal": event.terminal,
        "d": json.dumps(event.data, separators=(",", ":")),
    }


class Events:
    """Publishes in order from a task of its own: callers never wait for Redis."""

    def __init__(self, channel_layer: Layer) -> None:
        self.layer = channel_layer
        self._waiting: deque[Event] = deque()
        self._task: asyncio.Task[None] | None = None

    def publish(self, event: Event) -> None:
        """Tell whoever follows the job. What Redis does not take, readers read again from Postgres."""
        if len(self._waiting) >= MOST_WAITING:
            self._waiting.popleft()
            metrics.events_dropped.inc()
        self._waiting.append(event)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._send())

    async def close(self) -> None:
        """Send what waits, then disconnect."""
        if self._task is not None:
            await self._task
        await self.layer.flush()
        await self.layer.redis.aclose()

    async def _send(self) -> None:
        while self._waiting:
            events = [self._waiting.popleft() for _ in range(min(AT_ONCE, len(self._waiting)))]
            try:
                await self._publish(events)
            except (RedisError, OSError) as error:
                dropped = len(events) + len(self._waiting)
                self._waiting.clear()
                metrics.events_dropped.inc(dropped)
                log.warning("live events were not sent; readers re-read them", events=dropped, error=str(error))

    async def _publish(self, events: Sequence[Event]) -> None:
        """Send what somebody follows: most events nobody does, and these are not even encoded.

        Who subscribes after the question reads the job after that, and so finds what is committed by now.
        """
        heard = await self.layer.heard({group(event.job_id) for event in events})
        if messages := [(name, message(event)) for event in events if (name := group(event.job_id)) in heard]:
            await self.layer.group_send_all(messages)

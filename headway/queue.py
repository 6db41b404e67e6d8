"""Wake-ups through Redis in arq's format: the ids of jobs that are due. A hint, never the record.

The sorted set `headway:queue` holds ids by their position in the queue; `arq:job:<id>` holds arq's call of the function
`run`, as JSON. What Redis loses a worker's scan of Postgres finds.
"""

import asyncio
import json
import time
from collections.abc import Sequence
from typing import Any
from uuid import UUID

import structlog
from arq.constants import job_key_prefix
from redis.asyncio import Redis
from redis.exceptions import RedisError

from headway import metrics

NAME = "headway:queue"
FUNCTION = "run"
EXPIRES_MS = 86_400_000
MOST_WAITING = 100_000

# Queue ids, each with arq's call of it. One script: a command for each would cost the sender four times as much.
# ARGV: prefix of the calls' keys, a call up to its id, and after it, ms that it is kept, then id, position, id, …
WAKE = """
for place = 5, #ARGV, 2 do
    redis.call('SET', ARGV[1] .. ARGV[place], ARGV[2] .. ARGV[place] .. ARGV[3], 'PX', ARGV[4])
    redis.call('ZADD', KEYS[1], ARGV[place + 1], ARGV[place])
end
"""

# Pop ids and forget the calls of these, and of those that were popped before.
# ARGV: how many, prefix of the calls' keys, ids popped before
TAKE = """
for place = 3, #ARGV do
    redis.call('DEL', ARGV[2] .. ARGV[place])
end
local members = {}
for place, member in ipairs(redis.call('ZPOPMIN', KEYS[1], ARGV[1])) do
    if place % 2 == 1 then
        members[#members + 1] = member
        redis.call('DEL', ARGV[2] .. member)
    end
end
return members
"""

log = structlog.get_logger(__name__)


def serialize(call: dict[str, Any]) -> bytes:
    """arq's job serializer: JSON, so that write access to Redis is not code execution."""
    return json.dumps(call, separators=(",", ":")).encode()


def connect(url: str) -> Redis:
    """A client whose every call ends within seconds, also when Redis hangs."""
    client: Redis = Redis.from_url(url, socket_connect_timeout=1, socket_timeout=5, health_check_interval=15)
    return client


class Queue:
    """Sends wake-ups from a task of its own: callers never wait for Redis."""

    def __init__(self, redis: Redis) -> None:
        self.redis = redis
        self._wake = redis.register_script(WAKE)
        self._take = redis.register_script(TAKE)
        self._popped: list[bytes] = []
        self._waiting: list[tuple[UUID, float]] = []
        self._task: asyncio.Task[None] | None = None

    def wake(self, job_id: UUID, position: float) -> None:
        """Tell some worker that this job is due, and whose turn it is."""
        if len(self._waiting) >= MOST_WAITING:
            metrics.wakeups_failed.inc()
            return
        self._waiting.append((job_id, position))
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._send())

    async def close(self) -> None:
        """Send what waits, then disconnect."""
        if self._task is not None:
            await self._task
        await self.redis.aclose()

    async def take(self, count: int, wait: float) -> list[UUID]:
        """Up to `count` due ids; if none is due, the next one within `wait` s. Raises RedisError or OSError."""
        popped, self._popped = self._popped, []
        members = await self._take(keys=[NAME], args=[count, job_key_prefix, *popped])
        if not members:
            first = await self.redis.bzpopmin(NAME, timeout=wait)
            if first is None:
                return []
            # The next call forgets this one's: to wait for that now would delay the job.
            members = [first[1]]
            self._popped += members
        ids = []
        for member in members:
            try:
                ids.append(UUID(member.decode()))
            except ValueError:
                log.warning("not a job id in the queue", member=member[:100])
        return ids

    async def _send(self) -> None:
        while self._waiting:
            due, self._waiting = self._waiting[:1000], self._waiting[1000:]
            try:
                await self._add(due)
            except (RedisError, OSError) as error:
                failed = len(due) + len(self._waiting)
                self._waiting.clear()
                metrics.wakeups_failed.inc(failed)
                log.warning("wake-ups were not sent; a scan finds the jobs", jobs=failed, error=repr(error))

    async def _add(self, due: Sequence[tuple[UUID, float]]) -> None:
        # One call serves all: the script puts each id in the place of the bar.
        call: dict[str, Any] = {"t": None, "f": FUNCTION, "a": ["|"], "k": {}, "et": time.time_ns() // 1_000_000}
        args: list[Any] = [job_key_prefix, *serialize(call).split(b"|"), EXPIRES_MS]
        for job_id, position in due:
            args += (str(job_id), position)
        await self._wake(keys=[NAME], args=args)

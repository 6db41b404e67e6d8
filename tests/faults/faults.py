"""The faults of `chaos`, drawn from a seeded generator, several at a time but never two of one process or server."""

import asyncio
import logging
import os
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import asyncpg
from redis.asyncio import Redis
from redis.exceptions import RedisError

from headway.lifecycle import LEASE
from headway.queue import NAME as QUEUE
from headway.store import OUTAGES
from tests.faults.chaos_stack import Member, Stack

log = logging.getLogger(__name__)

# Parts of replies of Postgres: a finish or a log event; a submit or a claim; a report or a renewal.
REPLIES = (b"INSERT 0 ", b"SELECT ", b"UPDATE ")

# What a fault meets where another one has taken away what it needed.
UNAVAILABLE: tuple[type[BaseException], ...] = (RedisError, *OUTAGES)

Fault = Callable[[], Awaitable[bool]]
# Submits a job of a kind that takes so many milliseconds, for a fault that needs one; its id, if it was accepted.
Submit = Callable[[str, int], Awaitable[str | None]]


class Faults:
    """Injects until cancelled. `injected` counts by name what was really done."""

    def __init__(self, stack: Stack, submit: Submit, random: Random) -> None:
        self.injected: Counter[str] = Counter()
        self._stack = stack
        self._submit = submit
        self._random = random
        self._lease = stack.options.lease or LEASE.total_seconds()
        self._under_way: set[asyncio.Task[None]] = set()
        self._pausing = asyncio.Lock()
        # A handler that blocks its loop ends before anyone can tell it that the lease is lost, so that nothing but
        # fencing can stop what it writes.
        self._paused = ("chaos.block",) if stack.options.unfenced else ("chaos.block", "chaos.sleep", "chaos.steps")
        # How often each is drawn, in proportion. Those that cost a start of a process or a lease are rarer.
        weighted: dict[Fault, int] = {
            self.kill_worker: 5,
            self.stop_worker: 6,
            self.pause_worker: 4,
            self.pause_past_lease: 4,
            self.kill_web: 3,
            self.stop_web: 3,
            self.pause_web: 3,
            self.flush_redis: 8,
            self.kill_redis: 4,
            self.pause_redis: 4,
            self.crash_postgres: 3,
            self.end_connections: 6,
            self.repeat_wakeups: 8,
            self.cut_off: 6,
            self.cut_off_past_lease: 2,
            self.reset: 8,
            self.lose_reply: 12,
            self.slow_down: 4,
        }
        names = {fault.__name__.replace("_", "-"): fault for fault in weighted}
        if unknown := set(stack.options.faults) - names.keys():
            raise SystemExit(f"There is no fault {', '.join(unknown)}; there are: {', '.join(names)}.")
        self._names = {fault: name for name, fault in names.items()}
        self._weighted = {
            fault: weight
            for fault, weight in weighted.items()
            if not stack.options.faults or self._names[fault] in stack.options.faults
        }

    async def run(self) -> None:
        """Inject for ever; what is under way when this is cancelled goes on to its end."""
        while True:
            await asyncio.sleep(self._random.expovariate(1 / self._stack.options.fault_every))
            [fault] = self._random.choices(list(self._weighted), list(self._weighted.values()))
            task = asyncio.create_task(self._inject(fault))
            self._under_way.add(task)
            task.add_done_callback(self._under_way.discard)

    async def end(self) -> None:
        """Wait for what is under way."""
        await asyncio.gather(*self._under_way)

    async def _inject(self, fault: Fault) -> None:
        name = self._names[fault]
        try:
            if await fault():
                self.injected[name] += 1
        except UNAVAILABLE as error:
            log.debug("%s was not possible: %r", name, error)

    def _tell(self, fault: str, **where: Any) -> None:
        self._stack.recorder.write("fault", fault=fault, **where)

    def _pick(self, members: Sequence[Member]) -> Member | None:
        """One that no other fault is busy with."""
        free = [member for member in members if not member.busy.locked() and member.running]
        return self._random.choice(free) if free else None

    async def _restart(self, members: Sequence[Member], number: int) -> bool:
        if (member := self._pick(members)) is None:
            return False
        async with member.busy:
            self._tell("signal", process=member.name, pid=member.process.pid, number=number)
            if how := await member.end(number):
                self._stack.recorder.write("exit", process=member.name, how=how)
            await asyncio.sleep(self._random.uniform(0, 1))
            await member.start()
            try:
                async with asyncio.timeout(10):
                    await member.ready()
            except TimeoutError:
                log.debug("%s is not ready yet", member.name)
        return True

    async def kill_worker(self) -> bool:
        return await self._restart(self._stack.workers, signal.SIGKILL)

    async def stop_worker(self) -> bool:
        return await self._restart(self._stack.workers, signal.SIGTERM)

    async def kill_web(self) -> bool:
        return await self._restart(self._stack.webs, signal.SIGKILL)

    async def stop_web(self) -> bool:
        return await self._restart(self._stack.webs, signal.SIGTERM)

    async def _pause(self, members: Sequence[Member]) -> bool:
        if (member := self._pick(members)) is None:
            return False
        async with member.busy:
            self._tell("pause", process=member.name)
            member.send(signal.SIGSTOP)
            await asyncio.sleep(self._random.uniform(0.3, 4))
            member.send(signal.SIGCONT)
        return True

    async def pause_worker(self) -> bool:
        return await self._pause(self._stack.workers)

    async def pause_web(self) -> bool:
        return await self._pause(self._stack.webs)

    async def pause_past_lease(self) -> bool:
        """Stop a worker while it runs a job, and let it go on at the moment when another one runs that job."""
        if self._pausing.locked():
            return False
        async with self._pausing:
            job = await self._submit(self._random.choice(self._paused), 600)
            if job is None:
                return False
            connection = await asyncpg.connect(self._stack.database_url, timeout=3, command_timeout=3)
            try:
                worker = await _first(connection, self._lease, CLAIMED, job)
                member = next((each for each in self._stack.workers if f":{each.process.pid}:" in worker), None)
                if member is None or member.busy.locked():
                    return False
                async with member.busy:
                    member.send(signal.SIGSTOP)
                    self._tell("pause past the lease", process=member.name, job=job)
                    try:
                        await _first(connection, self._lease + 8, TAKEN, job, worker)
                    finally:
                        member.send(signal.SIGCONT)
            finally:
                connection.terminate()
        return True

    async def flush_redis(self) -> bool:
        async with self._redis() as redis:
            await redis.flushall()
        self._tell("flush redis")
        return True

    async def repeat_wakeups(self) -> bool:
        """Wake up for jobs of all states, most of them long over."""
        connection = await asyncpg.connect(self._stack.database_url, timeout=3, command_timeout=3)
        ids = [str(row["id"]) for row in await connection.fetch(SOME_IDS)]
        connection.terminate()
        if not ids:
            return False
        async with self._redis() as redis:
            await redis.zadd(QUEUE, dict.fromkeys(ids, time.time() * 1000))
        self._tell("repeat wake-ups", jobs=len(ids))
        return True

    async def kill_redis(self) -> bool:
        return await self._crash("redis", self._stack.redis_busy, signal.SIGKILL)

    async def crash_postgres(self) -> bool:
        """An immediate shutdown: connections break, and the start recovers from the log."""
        return await self._crash("postgres", self._stack.postgres_busy, signal.SIGQUIT)

    async def _crash(self, server: str, busy: asyncio.Lock, number: int) -> bool:
        if busy.locked():
            return False
        async with busy:
            pid = self._stack.server_pid(server)
            self._tell("crash", server=server)
            os.kill(pid, number)
            while _runs(pid):
                await asyncio.sleep(0.02)
            await asyncio.sleep(self._random.uniform(0, 3))
            await self._stack.start_servers()
        return True

    async def pause_redis(self) -> bool:
        if self._stack.redis_busy.locked():
            return False
        async with self._stack.redis_busy:
            pid = self._stack.server_pid("redis")
            self._tell("pause", server="redis")
            os.kill(pid, signal.SIGSTOP)
            await asyncio.sleep(self._random.uniform(1, 7))
            os.kill(pid, signal.SIGCONT)
        return True

    async def end_connections(self) -> bool:
        connection = await asyncpg.connect(self._stack.database_url, timeout=3, command_timeout=3)
        ended = await connection.fetchval(END_CONNECTIONS)
        connection.terminate()
        self._tell("end connections", count=ended)
        return bool(ended)

    async def _cut_off(self, seconds: float) -> bool:
        if (member := self._pick(self._stack.members)) is None:
            return False
        async with member.busy:
            self._tell("cut off from postgres", process=member.name, seconds=seconds)
            member.proxy.blackhole()
            await asyncio.sleep(seconds)
            member.proxy.restore()
        return True

    async def cut_off(self) -> bool:
        return await self._cut_off(self._random.uniform(0.5, 6))

    async def cut_off_past_lease(self) -> bool:
        return await self._cut_off(self._lease + self._random.uniform(0, 3))

    async def reset(self) -> bool:
        member = self._random.choice(self._stack.members)
        count = member.proxy.reset()
        self._tell("reset connections to postgres", process=member.name, count=count)
        return bool(count)

    async def lose_reply(self) -> bool:
        """What was asked of Postgres is done, and whoever asked does not hear of it."""
        member, reply = self._random.choice(self._stack.members), self._random.choice(REPLIES)
        lost = member.proxy.cut_reply(reply)
        try:
            async with asyncio.timeout(5):
                await lost
        except TimeoutError:
            return False
        self._tell("lose a reply of postgres", process=member.name, reply=reply.decode())
        return True

    async def slow_down(self) -> bool:
        member = self._random.choice(self._stack.members)
        self._tell("slow down postgres", process=member.name)
        member.proxy.latency = self._random.uniform(0.01, 0.2)
        await asyncio.sleep(self._random.uniform(1, 4))
        member.proxy.latency = 0.0
        return True

    def _redis(self) -> Redis:
        redis: Redis = Redis.from_url(self._stack.servers.redis_url, socket_timeout=2, socket_connect_timeout=2)
        return redis


# Which worker runs the job. $1: id
CLAIMED = "SELECT worker FROM jobs WHERE id = $1 AND state = 'running'"
# Whether another worker runs it now, or it is over. $1: id, $2: the first worker
TAKEN = "SELECT id FROM jobs WHERE id = $1 AND (worker <> $2 OR state IN ('succeeded', 'failed', 'cancelled'))"
SOME_IDS = "SELECT id FROM jobs ORDER BY random() LIMIT 200"
END_CONNECTIONS = """
SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()
"""


async def _first(connection: asyncpg.Connection, seconds: float, query: str, *values: object) -> str:
    """What the query brings once it brings something; nothing after some seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := await connection.fetchval(query, *values):
            return str(found)
        await asyncio.sleep(0.01)
    return ""


def _runs(pid: int) -> bool:
    """Whether the process runs; one that has ended and was not yet waited for has no command line."""
    try:
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())
    except FileNotFoundError:
        return False

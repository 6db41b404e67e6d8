"""Wake-ups through Redis: arq's format on the wire, and what happens when Redis does not do its part."""

import asyncio
import json
import time
from collections.abc import AsyncIterator

import pytest
from arq.connections import ArqRedis
from arq.constants import job_key_prefix
from arq.jobs import Job as ArqJob
from arq.jobs import JobStatus, deserialize_job
from redis.asyncio import Redis
from structlog.testing import capture_logs
from uuid_utils.compat import uuid7

from headway import metrics
from headway.embedded import Embedded
from headway.queue import FUNCTION, NAME, Queue, connect
from tests.conftest import until
from tests.engine import counted
from tests.faults.proxy import Proxy


@pytest.fixture
async def queue(servers: Embedded) -> AsyncIterator[Queue]:
    queue = Queue(connect(servers.redis_url))
    await queue.redis.flushall()
    yield queue
    await queue.close()


async def sent(queue: Queue, count: int) -> None:
    async def there() -> bool:
        return bool(await queue.redis.zcard(NAME) == count)

    await until(there)


async def test_arq_reads_what_is_written(queue: Queue, servers: Embedded) -> None:
    job_id = uuid7()
    before = time.time()
    queue.wake(job_id, 1)
    await sent(queue, 1)

    arq = ArqRedis(connection_pool=queue.redis.connection_pool, job_deserializer=json.loads)
    [job] = await arq.queued_jobs(queue_name=NAME)
    raw = await queue.redis.get(f"{job_key_prefix}{job_id}")
    call = deserialize_job(raw, deserializer=json.loads)
    status = await ArqJob(str(job_id), arq, _queue_name=NAME, _deserializer=json.loads).status()

    assert (job.job_id, job.function, list(job.args), job.kwargs) == (str(job_id), FUNCTION, [str(job_id)], {})
    assert (call.function, tuple(call.args), call.kwargs, call.job_try) == (FUNCTION, (str(job_id),), {}, None)
    assert before - 1 <= call.enqueue_time.timestamp() <= time.time() + 1
    assert status == JobStatus.queued
    assert 0 < await queue.redis.pttl(f"{job_key_prefix}{job_id}") <= 86_400_000


async def test_ids_are_taken_by_position_and_leave_nothing_behind(queue: Queue) -> None:
    ids = [uuid7() for _ in range(10)]
    for position, job_id in reversed(list(enumerate(ids))):
        queue.wake(job_id, position)
    await sent(queue, 10)

    assert await queue.take(1, wait=1) == ids[:1]
    assert await queue.take(4, wait=1) == ids[1:5]
    assert await queue.take(100, wait=1) == ids[5:]
    assert await queue.redis.keys("*") == []


async def test_an_id_that_is_woken_many_times_is_taken_once(queue: Queue) -> None:
    job_id = uuid7()
    for _ in range(100):
        queue.wake(job_id, 1)
    await sent(queue, 1)

    assert await queue.take(10, wait=1) == [job_id]


async def test_taking_waits_for_an_id_but_not_for_ever(queue: Queue) -> None:
    assert await queue.take(5, wait=0.05) == []

    taking = asyncio.create_task(queue.take(5, wait=5))
    await asyncio.sleep(0)
    queue.wake(job_id := uuid7(), 1)

    assert await taking == [job_id]
    assert await queue.take(5, wait=0.05) == []
    assert await queue.redis.keys("*") == []


@pytest.mark.parametrize("member", [b"not an id", b"\x80\x04K*.", b"", "ż".encode(), b"x" * 10_000])
async def test_what_is_no_job_id_is_logged_and_passed_over(queue: Queue, member: bytes) -> None:
    good = uuid7()
    await queue.redis.zadd(NAME, {member: 1, str(good): 2})

    with capture_logs() as logs:
        assert await queue.take(5, wait=1) == [good]

    assert [line["event"] for line in logs] == ["not a job id in the queue"]
    assert len(logs[0]["member"]) <= 100


async def test_pickle_in_redis_is_never_loaded(queue: Queue) -> None:
    """The call beside an id is deleted unread: what a job is, Postgres says."""
    job_id = uuid7()
    await queue.redis.set(f"{job_key_prefix}{job_id}", b"cos\nsystem\n(S'exit 1'\ntR.")
    await queue.redis.zadd(NAME, {str(job_id): 1})

    assert await queue.take(1, wait=1) == [job_id]
    assert await queue.redis.keys("*") == []


async def test_wake_ups_that_redis_does_not_take_are_counted_and_later_ones_are_sent(servers: Embedded) -> None:
    port = int(servers.redis_url.rsplit(":", 1)[1].split("/")[0])
    async with Redis.from_url(servers.redis_url) as redis, Proxy(port) as proxy:
        await redis.flushall()
        queue = Queue(connect(servers.redis_url.replace(str(port), str(proxy.port))))
        await queue.redis.ping()
        failed = counted(metrics.wakeups_failed)
        cut = proxy.cut_reply()
        for _ in range(5000):
            queue.wake(uuid7(), 1)
        await cut
        await until(lambda: counted(metrics.wakeups_failed) > failed)

        assert counted(metrics.wakeups_failed) == failed + 5000
        await redis.flushall()
        queue.wake(job_id := uuid7(), 1)
        assert await until(lambda: queue.take(1, wait=0.1)) == [job_id]
        await queue.close()


async def test_callers_never_wait_and_memory_is_bounded_while_redis_hangs(
    servers: Embedded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headway.queue.MOST_WAITING", 1000)
    port = int(servers.redis_url.rsplit(":", 1)[1].split("/")[0])
    async with Proxy(port) as proxy:
        queue = Queue(connect(servers.redis_url.replace(str(port), str(proxy.port))))
        await queue.redis.ping()
        proxy.blackhole()
        failed, job_id = counted(metrics.wakeups_failed), uuid7()
        for _ in range(1500):
            queue.wake(job_id, 1)

        assert counted(metrics.wakeups_failed) == failed + 500
        proxy.restore()
        await queue.close()

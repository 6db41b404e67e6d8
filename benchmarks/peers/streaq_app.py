"""streaq 5, since 7 does not run on Redis 6, which the wheel has: `Worker.run_sync` with its defaults, on uvloop."""

import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import driver
from streaq import Worker

worker = Worker(redis_url=driver.REDIS, concurrency=driver.SLOTS)


@worker.task()
async def noop() -> None:
    await driver.noop()


@worker.task()
async def sleep() -> None:
    await driver.sleep()


TASKS = {"noop": noop, "sleep": sleep}


@asynccontextmanager
async def connect() -> AsyncIterator[driver.Send]:
    async with worker:

        async def send(kinds: Sequence[str]) -> None:
            await worker.enqueue_many([TASKS[kind].enqueue() for kind in kinds])

        yield send


def work() -> None:
    logging.disable(logging.INFO)
    worker.run_sync()


if __name__ == "__main__":
    driver.main(work, connect)

"""SAQ: `Worker` with its defaults, on uvloop."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import driver
import uvloop
from saq import Queue, Worker


async def noop(ctx: Any) -> None:
    await driver.noop()


async def sleep(ctx: Any) -> None:
    await driver.sleep()


@asynccontextmanager
async def connect() -> AsyncIterator[driver.Send]:
    queue = Queue.from_url(driver.REDIS)
    await queue.connect()

    async def send(kinds: Sequence[str]) -> None:
        await asyncio.gather(*(queue.enqueue(kind) for kind in kinds))

    yield send
    await queue.disconnect()


def work() -> None:
    async def run() -> None:
        worker = Worker(Queue.from_url(driver.REDIS), [noop, sleep], concurrency=driver.SLOTS)
        await worker.queue.connect()
        await worker.start()

    uvloop.run(run())


if __name__ == "__main__":
    driver.main(work, connect)

"""arq: `Worker` with its defaults, on uvloop."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import driver
import uvloop
from arq import create_pool
from arq.connections import RedisSettings
from arq.worker import Worker

REDIS = RedisSettings.from_dsn(driver.REDIS)


async def noop(ctx: dict[str, Any]) -> None:
    await driver.noop()


async def sleep(ctx: dict[str, Any]) -> None:
    await driver.sleep()


@asynccontextmanager
async def connect() -> AsyncIterator[driver.Send]:
    pool = await create_pool(REDIS)

    async def send(kinds: Sequence[str]) -> None:
        await asyncio.gather(*(pool.enqueue_job(kind) for kind in kinds))

    yield send
    await pool.aclose()


def work() -> None:
    asyncio.set_event_loop(uvloop.new_event_loop())
    Worker([noop, sleep], redis_settings=REDIS, max_jobs=driver.SLOTS).run()


if __name__ == "__main__":
    driver.main(work, connect)

"""Headway: its worker with two kinds of this module, and jobs submitted through Lifecycle, committed one by one."""

import os
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from uuid import UUID

import driver

from headway import JobContext, kind, queue, settings
from headway.events import Events, layer
from headway.job import Priority
from headway.lifecycle import Lifecycle
from headway.store import Store
from headway.submission import NewJob

TENANT = UUID(int=1)


@kind("bench.noop")
async def noop(job: JobContext, input: None) -> None:
    await driver.noop()


@kind("bench.sleep")
async def sleep(job: JobContext, input: None) -> None:
    await driver.sleep()


@asynccontextmanager
async def connect() -> AsyncIterator[driver.Send]:
    config = settings.load()
    url = config.redis_url.get_secret_value()
    store = Store(config.database_url.get_secret_value(), pool=2)
    wakeups, events = queue.Queue(queue.connect(url)), Events(layer(url))
    await store.open()
    lifecycle = Lifecycle(store, wakeups, events)

    async def send(kinds: Sequence[str]) -> None:
        await lifecycle.submit_all(
            [NewJob(TENANT, f"bench.{name}", None, (), Priority.NORMAL, timeout=60, max_attempts=1) for name in kinds]
        )

    yield send
    await lifecycle.close()
    await wakeups.close()
    await events.close()
    await store.close()


def work() -> None:
    os.execv(sys.executable, [sys.executable, "-m", "services.worker"])


if __name__ == "__main__":
    driver.main(work, connect)

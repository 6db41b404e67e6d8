"""taskiq: `taskiq worker` with one process and a list in Redis, the quickest of its brokers; it runs on uvloop."""

import asyncio
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import driver
from taskiq.cli.worker.cmd import WorkerCMD
from taskiq_redis import ListQueueBroker

broker = ListQueueBroker(driver.REDIS)
tasks = {name: broker.task(task_name=name)(getattr(driver, name)) for name in ("noop", "sleep")}


@asynccontextmanager
async def connect() -> AsyncIterator[driver.Send]:
    await broker.startup()

    async def send(kinds: Sequence[str]) -> None:
        await asyncio.gather(*(tasks[kind].kiq() for kind in kinds))

    yield send
    await broker.shutdown()


def work() -> None:
    sys.path.insert(0, str(Path(__file__).parent))
    asked = ["taskiq_app:broker", "--workers", "1", "--max-async-tasks", str(driver.SLOTS), "--log-level", "WARNING"]
    WorkerCMD().exec(asked)


if __name__ == "__main__":
    driver.main(work, connect)

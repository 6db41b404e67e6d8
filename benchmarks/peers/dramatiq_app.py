"""Dramatiq: its command line with one process; a thread for each slot, the coroutines on the loop of its middleware."""

import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import dramatiq
import driver
from dramatiq.brokers.redis import RedisBroker
from dramatiq.cli import main, make_argument_parser
from dramatiq.middleware import AsyncIO

broker = RedisBroker(url=driver.REDIS)
broker.add_middleware(AsyncIO())
dramatiq.set_broker(broker)
TASKS = {name: dramatiq.actor(getattr(driver, name)) for name in ("noop", "sleep")}


@asynccontextmanager
async def connect() -> AsyncIterator[driver.Send]:
    async def send(kinds: Sequence[str]) -> None:
        for kind in kinds:
            TASKS[kind].send()

    yield send


def work() -> None:
    asked = ["dramatiq_app", "--processes", "1", "--threads", str(driver.SLOTS), "--path", str(Path(__file__).parent)]
    sys.exit(main(make_argument_parser().parse_args([*asked, "--skip-logging"])))


if __name__ == "__main__":
    driver.main(work, connect)

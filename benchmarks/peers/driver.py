"""What the programs of all queues share: the jobs themselves, and how jobs are sent to them.

Each program is run as `python NAME_app.py work | fill KIND COUNT | pickup COUNT`, in an environment of its own, so this
needs nothing but Python. A job writes when it began and when it ended, 16 bytes, to the file BENCH_RECORD.
"""

import asyncio
import os
import random
import struct
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager

REDIS = os.environ["BENCH_REDIS"]
SLOTS = int(os.environ["BENCH_SLOTS"])
RECORD = os.environ["BENCH_RECORD"]
SLEEP = 0.05
AT_ONCE = 100
WARM_UP = 5

# Sends jobs of a kind, `noop` or `sleep`.
Send = Callable[[Sequence[str]], Awaitable[object]]

_record = os.open(RECORD, os.O_WRONLY | os.O_APPEND | os.O_CREAT)


async def noop() -> None:
    """Do nothing, and write that."""
    began = time.time()
    os.write(_record, struct.pack("dd", began, time.time()))


async def sleep() -> None:
    """Take 50 ms."""
    began = time.time()
    await asyncio.sleep(SLEEP)
    os.write(_record, struct.pack("dd", began, time.time()))


def records() -> list[tuple[float, float]]:
    """When each job began and ended."""
    with open(RECORD, "rb") as file:  # noqa: PTH123
        return list(struct.iter_unpack("dd", file.read()))


async def fill(send: Send, kind: str, count: int) -> None:
    for start in range(0, count, AT_ONCE):
        await send([kind] * min(AT_ONCE, count - start))


async def pickup(send: Send, count: int) -> None:
    """Print the seconds from before each send to the job's begin, one job at a time, on an idle worker."""
    seen = len(records())
    for number in range(WARM_UP + count):
        await asyncio.sleep(random.uniform(0.02, 0.05))
        sent = time.time()
        await send(["noop"])
        while os.path.getsize(RECORD) < 16 * (seen + number + 1):  # noqa: PTH202
            await asyncio.sleep(0.001)
        if number >= WARM_UP:
            print(records()[-1][0] - sent)


def main(work: Callable[[], None], connect: Callable[[], AbstractAsyncContextManager[Send]]) -> None:
    """Do what the command line asks for."""

    async def run() -> None:
        async with connect() as send:
            if sys.argv[1] == "fill":
                await fill(send, sys.argv[2], int(sys.argv[3]))
            else:
                await pickup(send, int(sys.argv[2]))

    if sys.argv[1] == "work":
        work()
    else:
        asyncio.run(run())

"""Kinds whose handlers run in child processes, which import this module."""

import asyncio
import hashlib
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from itertools import repeat
from typing import Any
from uuid import UUID

from pydantic import BaseModel

from headway import Fatal, JobContext, Retry, kind
from headway.errors import NotFound, TooLarge


class Counted(BaseModel):
    pid: int
    seconds: float


async def tell_pid(job: JobContext) -> None:
    """The pid as the job's progress."""
    await job.report(os.getpid())


@kind("child.count", runs="process")
async def count(job: JobContext, input: int) -> Counted:
    await job.log("I count", level="warning")
    began = time.monotonic()
    for done in range(input):
        await job.report(done + 1, input, "counting", unit="rows", counts={"odd": (done + 1) // 2})
    return Counted(pid=os.getpid(), seconds=time.monotonic() - began)


@kind("child.busy", runs="process", max_attempts=1)
async def busy(job: JobContext, input: str) -> None:
    """Holds its event loop, for `loop` the interpreter too; for `listen` until SIGTERM."""
    if input == "listen":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit("told to stop"))
    await tell_pid(job)
    if input == "loop":
        sum(repeat(1, 10**12))
    time.sleep(60)


@kind("child.polite", runs="process")
async def polite(job: JobContext, input: None) -> Any:
    """Goes on from its checkpoint if there is one; ends properly when it is interrupted."""
    if job.checkpoint is not None:
        return job.checkpoint
    # As systemd does, which stops all processes of a service at once.
    os.kill(os.getpid(), signal.SIGTERM)
    try:
        async with job.artifact("half.txt") as out:
            await out.write(b"x" * 3_000_000)
            await tell_pid(job)
            await asyncio.sleep(60)
    finally:
        await job.save_checkpoint({"stopped": job.interruption})
        await job.log(f"cleaned up: {job.interruption}")


@kind("child.die", runs="process", max_attempts=2, backoff="1ms")
async def die(job: JobContext, input: str) -> str:
    """Dies in its first attempt."""
    await tell_pid(job)
    if job.attempt == 2:
        return "lived"
    if input == "fork" and os.fork() == 0:
        # A process that is left behind, and holds all that was open.
        time.sleep(60)
    if input == "exit":
        os._exit(3)
    if input == "sys.exit":
        sys.exit("usage: ...")
    os.kill(os.getpid(), signal.SIGKILL)
    return "not reached"


class Rows(Fatal):
    """A handler's own kind of Fatal."""


@kind("child.raise", runs="process", max_attempts=2, backoff="1h")
async def fail(job: JobContext, input: str) -> int:
    if input == "fatal":
        raise Rows("Row 7 is no row.")
    if input == "retry":
        raise Retry("Not yet.", after=0 if job.attempt == 1 else 60)
    if input == "group":
        async with asyncio.TaskGroup() as group:
            group.create_task(asyncio.sleep(60))
            raise Fatal("Part 7 is empty.")
    if input == "cancel":
        raise asyncio.CancelledError
    if input == "result":
        return "no number"  # type: ignore[return-value]
    raise KeyError("a column \0 \ud800")


class Copied(BaseModel):
    sha256: str
    size: int
    name: str
    part: str


@kind("child.copy", runs="process")
async def copy(job: JobContext, input: UUID) -> Copied:
    """Reads a file of the tenant twice, and writes it as an artifact and as a part."""
    file = await job.open_file(input)
    digest, parts = hashlib.sha256(), []
    async with job.artifact("copy.bin", "application/x-copy") as out:
        async for chunk in file.chunks(100_000):
            await out.write(chunk)
            digest.update(chunk)
    async for chunk in file.chunks(start=file.file.size - 5):
        parts.append(await job.save_part(chunk))
    parts.append(await job.save_part(b""))
    read = [chunk for key in parts async for chunk in job.read_part(key)]
    return Copied(sha256=digest.hexdigest(), size=file.file.size, name=file.file.name, part=b"".join(read).decode())


async def refusal(doing: Any) -> str:
    """What kind of exception comes of it."""
    try:
        await doing
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "none"


@kind("child.refused", runs="process")
async def refused(job: JobContext, input: UUID) -> list[str]:
    """Does what a context refuses."""

    async def too_large() -> None:
        with suppress(TooLarge):
            async with job.artifact("out.bin") as out:
                for _ in range(100):
                    await out.write(b"x" * 1_000_000)
            return
        raise TooLarge("as it should be")

    async def twice() -> None:
        async with job.artifact("out.bin"), job.artifact("out.bin"):
            pass

    async def read(stream: AsyncIterator[bytes]) -> None:
        with suppress(NotFound):
            async for _ in stream:
                pass

    async def source(name: str) -> str:
        return job.source(name)

    return [
        await refusal(job.report(float("nan"))),
        await refusal(job.save_checkpoint({1, 2})),
        await refusal(job.open_file(input)),
        await refusal(too_large()),
        await refusal(twice()),
        await refusal(read(job.read_part("parts/of/another"))),
        await refusal(source("other")),
        await refusal(source("theirs")),
        await source("default"),
    ]

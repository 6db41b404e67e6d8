"""Kinds of every form that a handler may have. Child processes import this module."""

import asyncio
import os
import threading
import time
from collections.abc import AsyncIterator, Generator, Iterator
from uuid import UUID

from pydantic import BaseModel

from headway import Child, JobContext, Progress, SyncJobContext, kind

# Lets handlers in threads of this process end.
release = threading.Event()
started = threading.Event()


class Done(BaseModel):
    size: int
    place: str
    checkpoint: list[str] | None
    part: str
    source: str


def _place() -> str:
    if threading.current_thread() is threading.main_thread():
        return "loop"
    return f"thread of {os.getpid()}"


def _everything(job: SyncJobContext, file_id: UUID) -> Done:
    file = job.open_file(file_id)
    if job.attempt == 1:
        key = job.save_part(b"first ")
        job.save_checkpoint([key])
        raise ValueError("The first attempt fails.")
    size = 0
    with job.artifact("copy.bin", "application/x-copy") as out:
        for chunk in file.chunks(1000):
            out.write(chunk)
            size += len(chunk)
            job.report(size, file.file.size, "copying", unit="bytes", counts={"chunks": size // 1000})
    for _ in file.chunks(1000, start=file.file.size - 1500):
        break
    job.log(f"copied {size} bytes", level="warning")
    part = b"".join(job.read_part(job.checkpoint[0]))
    return Done(size=size, place=_place(), checkpoint=job.checkpoint, part=part.decode(), source=job.source("default"))


@kind("plain.thread", runs="thread", backoff="1ms")
def everything_in_a_thread(job: SyncJobContext, input: UUID) -> Done:
    """Does all that a context offers."""
    return _everything(job, input)


@kind("plain.process", runs="process", backoff="1ms")
def everything_in_a_process(job: SyncJobContext, input: UUID) -> Done:
    return _everything(job, input)


@kind("plain.until", runs="thread", max_attempts=1)
def until_cancelled(job: SyncJobContext, input: str) -> str:
    """Goes on until it feels a cancel in the way that is asked for."""
    try:
        job.report(1)
        started.set()
        while input == "report":
            job.report(2)
        while input == "ask" and not job.cancelled:
            time.sleep(0.001)
        if input == "wait":
            job.children([Child("plain.until", "report")])
    finally:
        if job.interruption != "waiting":
            job.save_checkpoint(job.interruption)
    return "stopped by itself"


@kind("plain.deaf", runs="thread", max_attempts=1)
def deaf(job: SyncJobContext, input: None) -> None:
    """Blocks until it is released."""
    started.set()
    release.wait(60)


@kind("plain.hangs", runs="process", max_attempts=1)
def hangs(job: SyncJobContext, input: None) -> None:
    job.report(os.getpid())
    time.sleep(60)


@kind("plain.raise", runs="thread", max_attempts=1)
def fail(job: SyncJobContext, input: str) -> None:
    raise {"exit": SystemExit, "stop": StopIteration, "value": ValueError}[input]("as it is")


@kind("plain.parent", runs="thread", max_attempts=1)
def parent(job: SyncJobContext, input: list[int]) -> list[int]:
    return [ending.result for ending in job.children(Child("yields.thread", number) for number in input)]


@kind("yields.worker")
async def yields(job: JobContext, input: int) -> AsyncIterator[Progress | int]:
    """Counts."""
    for number in range(input):
        yield Progress(number + 1, input, message="counting", counts={"even": number // 2})
    yield input * input


@kind("yields.thread", runs="thread")
def yields_in_a_thread(job: SyncJobContext, input: int) -> Iterator[Progress | int]:
    for number in range(input):
        yield Progress(number + 1, input, message="counting", counts={"even": number // 2})
    yield input * input


@kind("yields.process", runs="process")
def yields_in_a_process(job: SyncJobContext, input: int) -> Generator[Progress | int, None, None]:
    yield from yields_in_a_thread(job, input)


@kind("yields.nothing")
async def yields_no_result(job: JobContext, input: None) -> AsyncIterator[Progress]:
    yield Progress(1, 1)


@kind("yields.wrong", max_attempts=1)
async def yields_wrong(job: JobContext, input: str) -> AsyncIterator[Progress | int]:
    if input == "number":
        yield Progress(float("nan"))
    yield 1
    yield Progress(2) if input == "progress" else 2


@kind("yields.return", runs="thread", max_attempts=1)
def returns(job: SyncJobContext, input: None) -> Iterator[int]:
    yield 1
    return 2  # type: ignore[return-value]


@kind("yields.until", max_attempts=1)
async def yields_until_cancelled(job: JobContext, input: None) -> AsyncIterator[Progress]:
    number = 0
    try:
        while True:
            yield Progress(number := number + 1)
            started.set()
    except asyncio.CancelledError:
        await job.save_checkpoint(job.interruption)
        raise


@kind("yields.until_thread", runs="thread", max_attempts=1)
def yields_until_cancelled_in_a_thread(job: SyncJobContext, input: None) -> Iterator[Progress]:
    number = 0
    try:
        while True:
            yield Progress(number := number + 1)
            started.set()
    except asyncio.CancelledError:
        job.save_checkpoint(job.interruption)
        raise

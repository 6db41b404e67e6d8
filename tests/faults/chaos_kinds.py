"""Kinds that write down each of their runs, for `chaos`. Workers find them through HEADWAY_KINDS."""

import asyncio
import hashlib
import os
import random
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from uuid import uuid4

from pydantic import BaseModel, ConfigDict
from structlog.contextvars import get_contextvars

from headway import Child, Fatal, JobContext, kind
from tests.faults.history import Line, Recorder

recorder = Recorder(Path(os.environ["CHAOS_HISTORY"]), f"handlers-{os.getpid()}")


class Work(BaseModel):
    """`ms` is how long, `times` how often; each kind says what of."""

    model_config = ConfigDict(extra="forbid")

    ms: int = 0
    times: int = 0


class Done(BaseModel):
    """The run that did it, the digest of the artifact it wrote, and the ids and states of its children."""

    run: str
    sha256: str | None = None
    children: list[tuple[str, str]] | None = None


class Recorded:
    """One run. What it writes anywhere names it, so that the history shows whose writes were kept."""

    def __init__(self, run: str, job: JobContext, ending: Line) -> None:
        self.id = run
        self.ending = ending
        self._job = job
        ending["reports"] = 0

    async def log(self) -> None:
        await self._job.log(f"run {self.id}")

    async def report(self, done: int, total: int) -> None:
        self.ending["reports"] += 1
        await self._job.report(done, total, f"run {self.id}")

    async def save(self, step: int) -> None:
        await self._job.save_checkpoint({"step": step})
        recorder.write("saved", run=self.id, step=step)


@asynccontextmanager
async def recorded(job: JobContext) -> AsyncIterator[Recorded]:
    """Write the run's start and end into the history. The worker binds the claim's token to its log lines."""
    run = uuid4().hex
    with recorder.run(
        run=run,
        job=str(job.id),
        kind=job.kind,
        token=get_contextvars()["token"],
        attempt=job.attempt,
        checkpoint=job.checkpoint,
        pid=os.getpid(),
    ) as ending:
        yield Recorded(run, job, ending)


@kind("chaos.instant", timeout="1m")
async def instant(job: JobContext, input: Work) -> Done:
    """Does nothing."""
    async with recorded(job) as run:
        return Done(run=run.id)


@kind("chaos.sleep", timeout="1m")
async def sleep(job: JobContext, input: Work) -> Done:
    """Waits, between two log events."""
    async with recorded(job) as run:
        await run.log()
        await asyncio.sleep(input.ms / 1000)
        await run.log()
        return Done(run=run.id)


@kind("chaos.report", timeout="1m")
async def report(job: JobContext, input: Work) -> Done:
    """Reports `times` times over `ms`."""
    async with recorded(job) as run:
        for done in range(1, input.times + 1):
            await asyncio.sleep(input.ms / 1000 / input.times)
            await run.report(done, input.times)
        return Done(run=run.id)


@kind("chaos.steps", timeout="1m")
async def steps(job: JobContext, input: Work) -> Done:
    """Takes `times` steps over `ms`, each with a checkpoint, and goes on from the last one."""
    async with recorded(job) as run:
        await run.log()
        for step in range((job.checkpoint or {"step": 0})["step"] + 1, input.times + 1):
            await asyncio.sleep(input.ms / 1000 / input.times)
            await run.save(step)
        await run.log()
        return Done(run=run.id)


@kind("chaos.talk", timeout="10m")
async def talk(job: JobContext, input: Work) -> Done:
    """Logs and reports `times` times over `ms`, and goes on from the last checkpoint."""
    async with recorded(job) as run:
        for step in range((job.checkpoint or {"step": 0})["step"] + 1, input.times + 1):
            await asyncio.sleep(input.ms / 1000 / input.times)
            await job.log(f"step {step} of run {run.id}")
            await run.report(step, input.times)
            await run.save(step)
        return Done(run=run.id)


@kind("chaos.artifact", timeout="1m")
async def artifact(job: JobContext, input: Work) -> Done:
    """Writes an artifact of `times` KiB over `ms`. Each run writes other bytes."""
    async with recorded(job) as run:
        digest, generator = hashlib.sha256(), random.Random(run.id)
        async with job.artifact("bytes.bin") as out:
            for _ in range(input.times):
                await asyncio.sleep(input.ms / 1000 / input.times)
                piece = generator.randbytes(1024)
                digest.update(piece)
                await out.write(piece)
        run.ending["sha256"] = digest.hexdigest()
        await asyncio.sleep(input.ms / 1000)
        return Done(run=run.id, sha256=digest.hexdigest())


@kind("chaos.fail", timeout="1m")
async def fail(job: JobContext, input: Work) -> Done:
    """Fails after `ms`: for good if `times` is 0."""
    async with recorded(job) as run:
        await asyncio.sleep(input.ms / 1000)
        raise RuntimeError(f"run {run.id}") if input.times else Fatal(f"Send other input; run {run.id} failed.")


@kind("chaos.block", timeout="1m")
async def block(job: JobContext, input: Work) -> Done:
    """Holds the event loop for `ms`."""
    async with recorded(job) as run:
        time.sleep(input.ms / 1000)
        return Done(run=run.id)


@kind("chaos.group", timeout="1m")
async def group(job: JobContext, input: Work) -> Done:
    """Lets `times` children wait `ms` each."""
    async with recorded(job) as run:
        # Each that has ended may be shown as progress.
        run.ending["reports"] += input.times
        child = Child("chaos.sleep", {"ms": input.ms}, tags=[f"child of {job.id}"])
        endings = await job.children([child] * input.times)
        return Done(run=run.id, children=[(str(ending.id), ending.state) for ending in endings])


@kind("chaos.crash", timeout="1m")
async def crash(job: JobContext, input: Work) -> Done:
    """Kills its worker in each of its first `times` runs."""
    async with recorded(job) as run:
        step = (job.checkpoint or {"step": 0})["step"] + 1
        if step <= input.times:
            await run.save(step)
            os.kill(os.getpid(), signal.SIGKILL)
        return Done(run=run.id)

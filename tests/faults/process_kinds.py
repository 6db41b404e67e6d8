"""Kinds for workers that are processes of their own."""

import asyncio
import os
import signal
from pathlib import Path

from pydantic import BaseModel

from headway import JobContext, kind


class Wait(BaseModel):
    path: Path


class Waited(BaseModel):
    attempt: int
    checkpoint: int | None


@kind("fault.wait", timeout="60s")
async def wait(job: JobContext, input: Wait) -> Waited:
    """Reports until a file is there; the checkpoint counts its runs."""
    found = job.checkpoint
    await job.save_checkpoint((found or 0) + 1)
    done = 0
    while not await asyncio.to_thread(input.path.exists):
        done += 1
        await job.report(done)
        await asyncio.sleep(0.02)
    return Waited(attempt=job.attempt, checkpoint=found)


@kind("fault.crash", timeout="60s")
async def crash(job: JobContext, input: None) -> None:
    """Kills its worker."""
    os.kill(os.getpid(), signal.SIGKILL)

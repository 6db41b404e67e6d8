"""A kind whose every event can be told from the others."""

import asyncio

from pydantic import BaseModel

from headway import JobContext, kind


class Lines(BaseModel):
    count: int


@kind("test.lines")
async def write_lines(job: JobContext, input: Lines) -> None:
    """Logs its progress."""
    for number in range(input.count):
        await job.log(str(number))
        await asyncio.sleep(0.05)

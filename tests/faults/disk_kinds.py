"""A kind that fills a disk, for workers that are processes of their own."""

from pydantic import BaseModel

from headway import JobContext, kind

PIECE = 1 << 20


class Write(BaseModel):
    pieces: int


@kind("fault.write", timeout="60s", max_attempts=20, backoff=0.2, backoff_cap=0.2)
async def write(job: JobContext, input: Write) -> int:
    """Writes an artifact; tells which attempt did."""
    async with job.artifact("bytes.bin") as out:
        for _ in range(input.pieces):
            await out.write(b"x" * PIECE)
    return job.attempt

"""`demo.countdown`: a job that only shows progress."""

import asyncio

from pydantic import BaseModel, ConfigDict, Field

from headway import JobContext, kind

REPORTS_A_SECOND = 10


class Countdown(BaseModel):
    model_config = ConfigDict(extra="forbid")

    seconds: float = Field(ge=0, le=3600, description="How long the job takes.")


class CountdownResult(BaseModel):
    seconds: float


@kind("demo.countdown", timeout="2h")
async def countdown(job: JobContext, input: Countdown) -> CountdownResult:
    """Counts down, with ten reports a second."""
    reports = round(input.seconds * REPORTS_A_SECOND)
    clock = asyncio.get_running_loop().time
    began = clock()
    for report in range(1, reports + 1):
        await asyncio.sleep(began + report / REPORTS_A_SECOND - clock())
        await job.report(report / REPORTS_A_SECOND, input.seconds, "counting down", unit="seconds")
    return CountdownResult(seconds=input.seconds)

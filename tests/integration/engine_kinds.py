"""Kinds that the engine's tests run; `calls` remembers the inputs in the order they were started."""

import asyncio
from typing import Any

from headway import Fatal, JobContext, Retry, kind

calls: list[Any] = []


@kind("engine.fail", max_attempts=3, backoff="1ms")
async def fail(job: JobContext, input: dict[str, Any]) -> str:
    calls.append((input, job.attempt))
    if input.get("fatal"):
        raise Fatal("Never.")
    if "after" in input and job.attempt == 1:
        raise Retry("Not yet.", after=input["after"])
    if job.attempt <= input.get("times", 100):
        raise ValueError(f"attempt {job.attempt}")
    return "done"


@kind("engine.note")
async def note(job: JobContext, input: Any) -> None:
    calls.append(input)


@kind("engine.hold")
async def hold(job: JobContext, input: float) -> None:
    await asyncio.sleep(input)

"""What `headway kinds new` writes."""

from string import Template

MODULE = Template('''"""The kind `$name`."""

import asyncio

from headway import JobContext, kind
from pydantic import BaseModel, ConfigDict, Field


class $model(BaseModel):
    model_config = ConfigDict(extra="forbid")

    steps: int = Field(3, ge=1, le=1000, description="How many steps the job takes.")


class ${model}Result(BaseModel):
    steps: int


@kind("$name", timeout="10m", max_attempts=3)
async def $module(job: JobContext, input: $model) -> ${model}Result:
    """Take some steps; this paragraph is what clients read of the kind."""
    for step in range(1, input.steps + 1):
        await asyncio.sleep(0.1)  # the work of a step
        await job.report(step, input.steps, "working", unit="steps")
    return ${model}Result(steps=input.steps)
''')

TEST = Template('''"""Runs `$name` for real, on a Postgres and a Redis that the first test starts."""

import asyncio

from services.worker.testing import run_kind

from $module import $model, $module


def test_it_takes_its_steps() -> None:
    ended = asyncio.run(run_kind($module, $model(steps=2)))

    assert ended.result == {"steps": 2}, ended
    assert ended.progress is not None
    assert ended.progress["done"] == 2
''')

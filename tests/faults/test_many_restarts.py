"""A job that is longer than the time between two restarts gets to its end."""

import asyncio
from functools import cache

import pytest

from headway import JobContext, kinds
from headway.states import JobState
from services.worker import lease
from tests.conftest import until
from tests.engine import Engine, worker

RESTARTS = 100


@pytest.mark.timeout(180)
async def test_a_job_outlives_a_hundred_restarts_and_goes_on_from_its_checkpoint_each_time(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The workers are of this process, which only saves their start."""
    # The thread that renews leases ends at its next look; what there is to run is found once.
    monkeypatch.setattr(kinds, "discover", cache(kinds.discover))
    monkeypatch.setattr(lease, "LOOK_EVERY", 0.01)
    found: list[int] = []
    restarts = 0

    async def handler(job: JobContext) -> int:
        step = job.checkpoint or 0
        found.append(step)
        while step < RESTARTS:
            await job.save_checkpoint(step := step + 1)
            if step > restarts:
                await asyncio.Event().wait()
        return step

    settings = engine.settings.model_copy(update={"drain": 0, "slots": 1})
    job_id = await engine.submit(handler, timeout=600)

    async def stepped() -> bool:
        return (await engine.row(job_id))["checkpoint"] == restarts + 1

    while restarts < RESTARTS:
        async with worker(settings):
            await until(stepped)
        restarts += 1
    async with worker(settings):
        job = await engine.ended(job_id)

    assert (job.state, job.result) == (JobState.SUCCEEDED, RESTARTS)
    assert found == list(range(RESTARTS + 1))
    assert (job.attempt, job.interruptions) == (1, RESTARTS)
    assert (await engine.row(job_id))["crashes"] == 0
    events = await engine.events(job_id)
    assert [event.seq for event in events] == list(range(1, job.seq + 1))

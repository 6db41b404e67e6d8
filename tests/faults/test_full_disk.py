"""What becomes of files when the disk takes no more of them."""

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from headway.states import JobState
from tests.conftest import files_below, until
from tests.engine import Engine
from tests.faults.conftest import Spawner, WorkerProcess

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the limit of another process is set on Linux alone")

PIECES = 12
# More than a log takes.
FITS = 1 << 20


@contextmanager
def full(process: WorkerProcess) -> Iterator[None]:
    """Writes of the process past the first bytes of a file fail, as they do on a disk that is full."""
    pid = process.process.pid
    before = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (FITS, before[1]))
    yield
    resource.prlimit(pid, resource.RLIMIT_FSIZE, before)


def kept(engine: Engine) -> list[Path]:
    """Every file below the folder of files and artifacts."""
    return files_below(engine.settings.home / "files")


async def test_an_artifact_that_the_disk_does_not_take_fails_its_attempt_alone(engine: Engine, spawn: Spawner) -> None:
    worker = await spawn(HEADWAY_KINDS="tests.faults.disk_kinds")
    with full(worker):
        job_id = await engine.submit_kind("fault.write", {"pieces": PIECES}, max_attempts=20)

        async def failed() -> bool:
            return len(await engine.store.failures(job_id, engine.tenant.id)) >= 2

        await until(failed)
        small = await engine.ended(await engine.submit_kind("demo.countdown", {"seconds": 0}))
        assert small.state == JobState.SUCCEEDED
    job = await engine.ended(job_id)

    assert job.state == JobState.SUCCEEDED
    assert job.attempt == job.result > 2
    for failure in await engine.store.failures(job_id, engine.tenant.id):
        assert failure["error"]["message"].startswith("NoStorage: The file could not be kept")
    [artifact] = await engine.store.artifacts(job_id, engine.tenant.id)
    # The worker deletes what is left of earlier attempts once the job has ended.
    await until(lambda: kept(engine) == [engine.settings.home / "files" / artifact.key])


async def test_an_upload_that_the_disk_does_not_take_is_refused_and_leaves_nothing(
    engine: Engine, spawn: Spawner
) -> None:
    web, http = await spawn.web()
    body = b"x" * (PIECES << 20)
    with full(web):
        answer = await http.post("/files", content=body)
        assert (answer.status_code, answer.json()["type"]) == (507, "urn:headway:problem:no-storage")
        assert answer.headers["Content-Type"] == "application/problem+json"
        await until(lambda: kept(engine) == [])
        assert (await http.post("/files", content=b"small")).status_code == 201
    assert await engine.database.fetchval("SELECT count(*) FROM files") == 1
    assert (await http.post("/files", content=body)).status_code == 201

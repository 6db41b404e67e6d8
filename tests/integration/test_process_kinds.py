"""Handlers in child processes: what reaches the job, how they end, and that nothing of them is left."""

import asyncio
import hashlib
import os
import signal
import time
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from uuid import UUID

import pytest
from pydantic import SecretStr
from uuid_utils.compat import uuid7

from headway import JobContext
from headway.embedded import Embedded
from headway.job import Job
from headway.settings import Source
from headway.states import JobState
from services.worker import process, runner
from tests.conftest import files_below, until
from tests.engine import Engine, worker
from tests.engine import engine as make_engine
from tests.faults.conftest import Spawner
from tests.integration import process_handlers

MAX_FILE = 20_000_000
SOURCE = "postgresql+asyncpg://user:password@somewhere/else"


@pytest.fixture
async def idle(servers: Embedded, tmp_path: Path) -> AsyncIterator[Engine]:
    """An engine without a worker."""
    sources = {
        "default": Source(url=SecretStr(SOURCE)),
        "theirs": Source(url=SecretStr(SOURCE), tenants=frozenset({uuid7()})),
    }
    changed = {"max_file": MAX_FILE, "sources": sources, "drain": 0.0}
    async with make_engine(servers, tmp_path, **changed) as engine:
        yield engine


@pytest.fixture
async def engine(idle: Engine) -> AsyncIterator[Engine]:
    async with worker(idle.settings):
        yield idle


@pytest.fixture
def short_grace(monkeypatch: pytest.MonkeyPatch) -> float:
    monkeypatch.setattr(process, "GRACE", 0.5)
    return 0.5


async def child_of(engine: Engine, job_id: UUID) -> int:
    """The process of a job that reports its pid."""

    async def told() -> float | None:
        progress = (await engine.job(job_id)).progress
        return progress and progress["done"]

    return int(await until(told, 30))


def lives(pid: int) -> bool:
    """Whether the process runs; one that is dead and that nobody has asked for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


async def logged(engine: Engine, job_id: UUID) -> list[str]:
    return [event.data["message"] for event in await engine.events(job_id) if event.type == "log"]


async def run(engine: Engine, kind: str, input: object, max_attempts: int = 1) -> Job:
    return await engine.ended(await engine.submit_kind(kind, input, max_attempts=max_attempts), within=30)


# -- what reaches the job ------------------------------------------------------------------------------------------


async def test_result_progress_and_log_of_a_child_arrive_and_reports_are_cheap(engine: Engine) -> None:
    job = await run(engine, "child.count", 50_000)

    assert job.state == JobState.SUCCEEDED
    assert job.progress is not None
    assert {key: value for key, value in job.progress.items() if key not in ("rate", "eta")} == {
        **{"done": 50_000, "total": 50_000, "unit": "rows", "message": "counting", "counts": {"odd": 25_000}},
    }
    assert job.result["pid"] != os.getpid()
    assert not lives(job.result["pid"])
    assert job.seq < 10 + 10 * job.result["seconds"]
    assert await logged(engine, job.id) == ["I count"]


async def test_files_artifacts_and_parts_go_through_in_pieces(engine: Engine) -> None:
    content = os.urandom(7_000_000) + b"the end"
    file_id = (await engine.upload(content)).id

    job = await run(engine, "child.copy", str(file_id))

    digest = hashlib.sha256(content).hexdigest()
    assert job.result == {"sha256": digest, "size": len(content), "name": "in.csv", "part": "e end"}
    [artifact] = await engine.store.artifacts(job.id, engine.tenant.id)
    assert (artifact.sha256, artifact.size, artifact.content_type) == (digest, len(content), "application/x-copy")
    assert b"".join([chunk async for chunk in engine.files.read(artifact.key)]) == content


async def test_what_a_context_refuses_is_refused_in_the_child(engine: Engine) -> None:
    job = await run(engine, "child.refused", str(unknown := uuid7()))

    assert [found.split(".")[0] for found in job.result] == [
        "ValueError: report() takes finite numbers, not done=nan and total=None",
        "Fatal: The checkpoint is not JSON: Object of type set is not JSON serializable",
        f"Fatal: There is no file {unknown}; upload it with POST /api/v1/files and use the id of the answer",
        "TooLarge: as it should be",
        "ValueError: The job has an artifact 'out",
        "ValueError: 'parts/of/another' is not a part of this job; use a key that save_part has answered with",
        "Fatal: There is no source 'other'; there are: default",
        "Fatal: There is no source 'theirs'; there are: default",
        SOURCE,
    ]


# -- how it ends ---------------------------------------------------------------------------------------------------


async def run_all(engine: Engine, kind: str, inputs: Iterable[object], max_attempts: int) -> dict[object, Job]:
    """The jobs by their inputs, run side by side: most of the time of each is the start of Python."""
    ids = {input: await engine.submit_kind(kind, input, max_attempts=max_attempts) for input in inputs}
    return {input: await engine.ended(job_id, within=30) for input, job_id in ids.items()}


async def failure_of(engine: Engine, job: Job) -> dict[str, str]:
    """What is kept of the first attempt that failed."""
    kept = await engine.database.fetchval(
        "SELECT error FROM failures WHERE job_id = $1 ORDER BY attempt LIMIT 1", job.id
    )
    return dict(kept)


async def test_errors_of_a_child_mean_what_they_mean_in_the_worker(engine: Engine) -> None:
    expected = {
        "fatal": ("fatal", "Row 7 is no row."),
        "group": ("fatal", "Part 7 is empty."),
        "retry": ("retry", "Not yet."),
        "cancel": ("handler-failed", "CancelledError: "),
        "key": ("handler-failed", "KeyError: 'a column \\x00 \\ud800'"),
        "result": ("handler-failed", "The result is not what the kind declares"),
        7: ("input-refused", "input: Input should be a valid string"),
    }

    jobs = await run_all(engine, "child.raise", expected, max_attempts=1)

    assert {job.state for job in jobs.values()} == {JobState.FAILED}
    errors = {input: (job.error["type"], job.error["message"]) for input, job in jobs.items() if job.error}
    assert {
        input: (error, message[: len(expected[input][1])]) for input, (error, message) in errors.items()
    } == expected
    failure = await failure_of(engine, jobs["key"])
    assert failure["class"] == "builtins.KeyError"
    assert 'raise KeyError("a column' in failure["traceback"]


async def test_a_retry_of_a_child_chooses_its_time(engine: Engine) -> None:
    """The kind's own backoff is an hour."""
    job = await run(engine, "child.raise", "retry", max_attempts=2)

    assert (job.attempt, job.error) == (2, {"type": "retry", "message": "Not yet."})


async def test_a_child_that_dies_fails_its_attempt_and_harms_no_other_job(engine: Engine, short_grace: float) -> None:
    end = asyncio.Event()

    async def bystander(job: JobContext) -> str:
        await end.wait()
        return "unharmed"

    other = await engine.submit(bystander)

    jobs = await run_all(engine, "child.die", ["kill", "exit", "fork", "sys.exit"], max_attempts=2)

    for job in jobs.values():
        assert (job.state, job.result, job.attempt, job.crashes) == (JobState.SUCCEEDED, "lived", 2, 0)
    why = "The worker's log, or its memory limit, may tell why."
    assert {input: tuple((await failure_of(engine, job)).values())[:2] for input, job in jobs.items()} == {
        "kill": ("child-died", f"The handler's process was ended by SIGKILL. {why}"),
        "exit": ("child-died", f"The handler's process ended with exit code 3. {why}"),
        "fork": ("child-died", f"The handler's process was ended by SIGKILL. {why}"),
        "sys.exit": ("handler-failed", "SystemExit: usage: ..."),
    }
    end.set()
    assert (await engine.ended(other)).result == "unharmed"


# -- interruptions -------------------------------------------------------------------------------------------------


async def test_children_that_block_are_cancelled_within_the_grace_and_are_gone(
    engine: Engine, short_grace: float
) -> None:
    jobs = [await engine.submit_kind("child.busy", way) for way in ("loop", "sleep")]
    pids = [await child_of(engine, job_id) for job_id in jobs]
    assert all(map(lives, pids))
    began = time.monotonic()
    for job_id in jobs:
        await engine.lifecycle.cancel(job_id, engine.tenant.id)

    assert {(await engine.ended(job_id)).state for job_id in jobs} == {JobState.CANCELLED}

    assert time.monotonic() - began < short_grace + 4
    assert not any(map(lives, pids))


async def test_a_child_is_killed_before_the_runner_would_leave_it_behind() -> None:
    assert process.GRACE + 1 < runner.GRACE


async def test_a_child_that_is_cancelled_knows_why_and_may_clean_up(engine: Engine) -> None:
    job_id = await engine.submit_kind("child.polite", None)
    pid = await child_of(engine, job_id)
    await engine.lifecycle.cancel(job_id, engine.tenant.id)

    job = await engine.ended(job_id, within=process.GRACE)

    assert job.state == JobState.CANCELLED
    assert await logged(engine, job_id) == ["cleaned up: cancelled"]
    assert not lives(pid)
    await until(lambda: not files_below(engine.settings.home / "files"))


async def test_a_child_that_blocks_may_listen_to_sigterm(engine: Engine) -> None:
    job_id = await engine.submit_kind("child.busy", "listen")
    await child_of(engine, job_id)
    began = time.monotonic()
    await engine.lifecycle.cancel(job_id, engine.tenant.id)

    assert (await engine.ended(job_id)).state == JobState.CANCELLED
    assert time.monotonic() - began < process.GRACE


async def test_a_child_that_runs_longer_than_its_timeout_fails(engine: Engine, short_grace: float) -> None:
    job_id = await engine.submit_kind("child.busy", "sleep", timeout=10)
    pid = await child_of(engine, job_id)

    job = await engine.ended(job_id, 30)

    assert job.error == {"type": "timed-out", "message": "The attempt ran longer than its timeout, 10 s."}
    assert not lives(pid)


async def test_a_child_that_is_drained_gives_its_job_back_which_goes_on_from_the_checkpoint(idle: Engine) -> None:
    async with worker(idle.settings):
        job_id = await idle.submit_kind("child.polite", None)
        pid = await child_of(idle, job_id)
    assert await idle.state(job_id) == JobState.QUEUED
    assert not lives(pid)
    async with worker(idle.settings):
        job = await idle.ended(job_id)

    assert (job.result, job.attempt, job.interruptions) == ({"stopped": "drained"}, 1, 1)


async def test_a_child_does_not_outlive_a_worker_that_is_killed(idle: Engine, tmp_path: Path) -> None:
    spawner = Spawner(idle, tmp_path)
    try:
        process = await spawner(HEADWAY_KINDS=process_handlers.__name__)
        pids = [await child_of(idle, await idle.submit_kind("child.busy", way)) for way in ("loop", "sleep")]
        arguments = Path(f"/proc/{pids[0]}/cmdline").read_bytes()
        process.signal(signal.SIGKILL)
        await process.ended()

        await until(lambda: not any(map(lives, pids)), 2)
        assert b"password" not in arguments
    finally:
        await spawner.end()

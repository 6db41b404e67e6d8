"""How an attempt ends: what the handler does, what becomes of it, and what its owner is told."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict, Field

from headway import Fatal, JobContext, kind, metrics
from headway.embedded import Embedded
from headway.job import Job
from headway.states import JobState
from services.worker import runner
from tests.conftest import files_below, until
from tests.engine import Engine, counted, worker
from tests.engine import engine as make_engine

MAX_RESULT = 10_000


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")

    number: int = Field(ge=0)


class Number(BaseModel):
    value: float


@kind("test.strict")
async def strict(job: JobContext, input: Strict) -> Number:
    """Returns something else than it declares, by the number it is given."""
    return [Number(value=1.5), None, {"value": 1}, Number.model_construct(value="x"), Number(value=float("nan"))][
        input.number
    ]


@pytest.fixture
async def engine(servers: Embedded, tmp_path: Path) -> AsyncIterator[Engine]:
    async with make_engine(servers, tmp_path, max_result=MAX_RESULT) as engine, worker(engine.settings):
        yield engine


async def ended(engine: Engine, handler: Any, **options: Any) -> Job:
    """The job that ran `handler`, once it has ended. Its last event says the same as the job."""
    job = await engine.ended(await engine.submit(handler, **options))
    last = (await engine.events(job.id))[-1]
    assert last.seq == job.seq
    assert {name: last.data[name] for name in ("state", "result", "error", "progress")} == {
        "state": job.state,
        "result": job.result,
        "error": job.error,
        "progress": job.progress,
    }
    return job


async def artifacts(engine: Engine, job: Job) -> list[str]:
    return [artifact.name for artifact in await engine.store.artifacts(job.id, engine.tenant.id)]


def bytes_kept(engine: Engine) -> list[Path]:
    return files_below(engine.settings.home / "files")


# -- success -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("result", [None, 0, "", [], {"a": [1, 2.5, None, "é\U0001f600 \\u0000"]}, "x" * 9000])
async def test_a_job_succeeds_with_what_its_handler_returns(engine: Engine, result: Any) -> None:
    async def handler(job: JobContext) -> Any:
        return result

    job = await ended(engine, handler)

    assert (job.state, job.result, job.error) == (JobState.SUCCEEDED, result, None)


async def test_the_last_report_is_on_the_finished_job(engine: Engine) -> None:
    async def handler(job: JobContext) -> None:
        for done in range(1000):
            await job.report(done + 1, 1000, "counting", unit="rows", counts={"odd": done // 2})

    job = await ended(engine, handler)

    assert job.progress is not None
    assert {key: value for key, value in job.progress.items() if key not in ("rate", "eta")} == {
        **{"done": 1000, "total": 1000, "unit": "rows", "message": "counting", "counts": {"odd": 499}},
    }


# -- failures ------------------------------------------------------------------------------------------------------


async def failure(engine: Engine, handler: Any, **options: Any) -> tuple[str, str]:
    job = await ended(engine, handler, **options)
    assert job.state == JobState.FAILED
    assert job.error is not None
    assert job.result is None
    return job.error["type"], job.error["message"]


async def test_a_progress_that_cannot_be_kept_fails_the_job(engine: Engine) -> None:
    async def handler(job: JobContext) -> None:
        await job.report(1, counts={"rows": 10**5000})

    job = await engine.ended(await engine.submit(handler))
    assert (job.state, job.error["type"]) == (JobState.FAILED, "handler-failed")


async def test_fatal_fails_with_its_message(engine: Engine) -> None:
    async def handler(job: JobContext) -> None:
        raise Fatal("Upload a file with a header row.")

    assert await failure(engine, handler) == ("fatal", "Upload a file with a header row.")


async def test_fatal_out_of_a_task_group_fails_the_same(engine: Engine) -> None:
    async def part() -> None:
        raise Fatal("Part 7 is empty.")

    async def handler(job: JobContext) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(part())
            group.create_task(asyncio.sleep(60))

    assert await failure(engine, handler) == ("fatal", "Part 7 is empty.")


async def test_any_other_exception_fails_with_its_class_and_message_and_no_traceback(engine: Engine) -> None:
    async def handler(job: JobContext) -> None:
        raise KeyError("a column")

    kind, message = await failure(engine, handler)

    assert (kind, message) == ("handler-failed", "KeyError: 'a column'")


@pytest.mark.parametrize(
    "error", [SystemExit("usage: …"), KeyboardInterrupt(), asyncio.CancelledError(), GeneratorExit("gone")], ids=repr
)
async def test_exceptions_that_end_processes_and_tasks_only_fail_the_job(engine: Engine, error: BaseException) -> None:
    async def handler(job: JobContext) -> None:
        raise error

    kind, message = await failure(engine, handler)

    assert kind == "handler-failed"
    assert message.startswith(type(error).__name__)


class Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no message")


@pytest.mark.parametrize(
    "error",
    [Fatal("NUL \0, half a pair \ud800, and more" + "." * 5000), ValueError("NUL \0 and \udfff"), Unprintable()],
    ids=["fatal", "other", "unprintable"],
)
async def test_a_message_that_cannot_be_kept_as_it_is_does_not_keep_the_job_from_ending(
    engine: Engine, error: Exception
) -> None:
    async def handler(job: JobContext) -> None:
        raise error

    _, message = await failure(engine, handler)

    assert "\0" not in message
    assert 10 < len(message) <= 2000


@pytest.mark.parametrize(
    ("result", "hint"),
    [
        (object(), "object"),
        ("a NUL \0", "Postgres cannot keep the result"),
        ("half a pair \ud800", "Postgres cannot keep the result"),
        ({"half a pair \ud800": 1}, "not JSON"),
        ("é" * MAX_RESULT, "write large results to an artifact"),
    ],
    ids=["object", "nul", "surrogate", "surrogate in a name", "too large"],
)
async def test_a_result_that_cannot_be_kept_fails_the_job(engine: Engine, result: Any, hint: str) -> None:
    async def handler(job: JobContext) -> Any:
        return result

    _, message = await failure(engine, handler)

    assert hint in message


@pytest.mark.parametrize("number", [1, 2, 3, 4], ids=["none", "dict", "wrong field", "nan"])
async def test_a_result_that_is_not_what_the_kind_declares_fails_the_job(engine: Engine, number: int) -> None:
    job = await engine.ended(await engine.submit_kind("test.strict", {"number": number}))

    assert job.error is not None
    assert job.error["type"] == "handler-failed"
    assert "not what the kind declares" in job.error["message"]


@pytest.mark.parametrize(
    ("input", "where"),
    [({"number": -1}, "input.number"), ({"number": 1, "more": 2}, "input.more"), ({}, "input.number"), (7, "input")],
)
async def test_an_input_that_the_workers_model_refuses_fails_the_job(engine: Engine, input: Any, where: str) -> None:
    job = await engine.ended(await engine.submit_kind("test.strict", input))

    assert job.error is not None
    assert job.error["type"] == "input-refused"
    assert job.error["message"].startswith(f"{where}: ")


# -- timeouts ------------------------------------------------------------------------------------------------------


async def test_an_attempt_that_runs_longer_than_its_timeout_fails(engine: Engine) -> None:
    cleaned_up = asyncio.Event()

    async def handler(job: JobContext) -> None:
        try:
            await asyncio.sleep(60)
        finally:
            cleaned_up.set()

    assert await failure(engine, handler, timeout=0.1) == (
        "timed-out",
        "The attempt ran longer than its timeout, 0.1 s.",
    )
    assert cleaned_up.is_set()


async def test_a_handlers_own_timeouts_are_its_own(engine: Engine) -> None:
    async def handler(job: JobContext) -> str:
        with suppress(TimeoutError):
            async with asyncio.timeout(0.01):
                await asyncio.sleep(60)
        return "went on"

    assert (await ended(engine, handler)).result == "went on"


async def test_a_handler_that_ignores_its_interruption_is_left_behind(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "GRACE", 0.1)
    release, refused = asyncio.Event(), asyncio.Event()

    async def handler(job: JobContext) -> None:
        while not release.is_set():
            with suppress(asyncio.CancelledError):
                await release.wait()
        try:
            await job.report(1)
        except Exception:
            refused.set()
            raise

    assert (await failure(engine, handler, timeout=0.1))[0] == "timed-out"
    release.set()
    await refused.wait()


# -- cancel --------------------------------------------------------------------------------------------------------


async def cancelled(engine: Engine, handler: Any, started: asyncio.Event) -> Job:
    """The job after a cancel while it ran; half a second may pass until the worker looks for it."""
    job_id = await engine.submit(handler)
    await started.wait()
    asked = await engine.lifecycle.cancel(job_id, engine.tenant.id)
    assert asked.state == JobState.RUNNING
    job = await engine.ended(job_id)
    assert job.cancel_requested_at is not None
    assert job.finished_at is not None
    if job.state == JobState.CANCELLED:
        assert (job.finished_at - job.cancel_requested_at).total_seconds() < 3
    return job


async def test_a_running_job_is_cancelled_and_leaves_nothing(engine: Engine) -> None:
    started, cleaned_up = asyncio.Event(), asyncio.Event()

    async def handler(job: JobContext) -> None:
        async with job.artifact("whole.txt") as out:
            await out.write(b"complete")
        try:
            async with job.artifact("half.txt") as out:
                await out.write(b"not complete")
                started.set()
                await asyncio.sleep(60)
        finally:
            cleaned_up.set()

    job = await cancelled(engine, handler, started)

    assert (job.state, job.result, job.error) == (JobState.CANCELLED, None, None)
    assert cleaned_up.is_set()
    assert await artifacts(engine, job) == []
    await until(lambda: bytes_kept(engine) == [])


async def test_a_cancel_is_felt_in_a_loop_that_does_nothing_but_report(engine: Engine) -> None:
    started = asyncio.Event()

    async def handler(job: JobContext) -> None:
        done = 0
        while True:
            done += 1
            await job.report(done)
            started.set()

    assert (await cancelled(engine, handler, started)).state == JobState.CANCELLED


async def test_a_handler_that_finishes_though_it_is_cancelled_has_succeeded(engine: Engine) -> None:
    started = asyncio.Event()

    async def handler(job: JobContext) -> str:
        started.set()
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(60)
        async with job.artifact("done.txt") as out:
            await out.write(b"committed")
        return "committed"

    job = await cancelled(engine, handler, started)

    assert (job.state, job.result) == (JobState.SUCCEEDED, "committed")
    assert await artifacts(engine, job) == ["done.txt"]


async def test_a_handler_that_fails_while_it_is_cancelled_is_cancelled(engine: Engine) -> None:
    started = asyncio.Event()

    async def handler(job: JobContext) -> None:
        started.set()
        try:
            await asyncio.sleep(60)
        finally:
            raise Fatal("cleaning up went wrong")

    assert (await cancelled(engine, handler, started)).state == JobState.CANCELLED


async def test_what_interrupts_a_handler_that_has_ended_comes_too_late() -> None:
    """Neither its outcome nor the count of lost leases may change by that."""

    async def handle() -> str:
        return "done"

    attempt = runner.Attempt()
    task = await attempt.perform(handle(), 10)

    assert [attempt.interrupt(reason) for reason in ("cancelled", "drained", "lost")] == [False] * 3
    assert (attempt.reason, task.result()) == (None, "done")


async def test_only_the_loss_of_the_lease_outweighs_the_first_interruption() -> None:
    attempt = runner.Attempt()
    performing = asyncio.create_task(attempt.perform(asyncio.sleep(60), 60))
    await asyncio.sleep(0)

    assert [attempt.interrupt(reason) for reason in ("cancelled", "drained", "lost", "lost", "cancelled")] == [
        *(True, False, True, False, False)
    ]
    assert attempt.reason == "lost"
    assert (await performing).cancelled()


# -- artifacts -----------------------------------------------------------------------------------------------------


async def test_artifacts_become_visible_when_the_job_ends_and_not_before(engine: Engine) -> None:
    written, end = asyncio.Event(), asyncio.Event()

    async def handler(job: JobContext) -> None:
        async with job.artifact("b.csv", "text/csv") as out:
            await out.write(b"1\n")
        async with job.artifact("a.csv", "text/csv") as out:
            await out.write(b"2\n" * 1_000_000)
        written.set()
        await end.wait()

    job_id = await engine.submit(handler)
    await written.wait()
    assert await artifacts(engine, await engine.job(job_id)) == []
    end.set()

    job = await engine.ended(job_id)
    found = await engine.store.artifacts(job_id, engine.tenant.id)
    assert await artifacts(engine, job) == ["a.csv", "b.csv"]
    assert [(artifact.size, artifact.content_type) for artifact in found] == [(2_000_000, "text/csv"), (2, "text/csv")]
    assert b"".join([chunk async for chunk in engine.files.read(found[1].key)]) == b"1\n"


@pytest.mark.parametrize(
    ("error", "kept"),
    [(Fatal("too many bad rows"), ["rejected.csv"]), (RuntimeError("a bug"), [])],
    ids=["fatal", "bug"],
)
async def test_artifacts_of_a_fatal_are_kept_and_those_of_other_failures_are_not(
    engine: Engine, error: Exception, kept: list[str]
) -> None:
    async def handler(job: JobContext) -> None:
        async with job.artifact("rejected.csv") as out:
            await out.write(b"row 7\n")
        raise error

    job = await ended(engine, handler)

    assert job.state == JobState.FAILED
    assert await artifacts(engine, job) == kept
    await until(lambda: len(bytes_kept(engine)) == len(kept))


async def test_artifacts_of_an_attempt_that_lost_its_lease_are_deleted_and_those_of_the_next_stand(
    engine: Engine,
) -> None:
    attempts: list[int] = []
    go_on = asyncio.Event()

    async def handler(job: JobContext) -> int:
        attempts.append(len(attempts) + 1)
        number = attempts[-1]
        async with job.artifact("out.txt") as out:
            await out.write(f"attempt {number}".encode())
        if number == 1:
            await engine.expire(job.id)
            await go_on.wait()
        return number

    job_id = await engine.submit(handler)
    lost = counted(metrics.lease_lost)
    # The worker's own scan rescues the job and runs it again, while its first attempt is still here.
    job = await engine.ended(job_id)
    go_on.set()
    await until(lambda: counted(metrics.lease_lost) > lost)

    assert (job.state, job.result, attempts) == (JobState.SUCCEEDED, 2, [1, 2])
    [artifact] = await engine.store.artifacts(job_id, engine.tenant.id)
    await until(lambda: len(bytes_kept(engine)) == 1)
    assert b"".join([chunk async for chunk in engine.files.read(artifact.key)]) == b"attempt 2"
    assert (await engine.job(job_id)).seq == job.seq

"""The lifecycle on the real store: which moves there are, what fences them, and what is announced of them."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from headway import metrics
from headway.embedded import Embedded
from headway.errors import Crashed, Fatal, LeaseLost, NotFound
from headway.job import Artifact, Claim, Ending, Event, Priority
from headway.lifecycle import LEASE, MOST_CRASHES
from headway.states import TERMINAL, TRANSITIONS, JobState
from headway.store import OUTAGES, REFUSALS, Store, sql
from headway.submission import NewJob
from services.worker.lease import LeaseKeeper
from tests.conftest import make_tenant, until
from tests.engine import Engine, behind_proxy, counted, parts
from tests.engine import engine as make_engine

KIND = "test.call"
ARTIFACT = Artifact("out.csv", "text/csv", 3, "0" * 64, "somewhere")


@pytest.fixture
async def engine(servers: Embedded, tmp_path: Path) -> AsyncIterator[Engine]:
    async with make_engine(servers, tmp_path) as engine:
        yield engine


@pytest.fixture
async def claim(engine: Engine) -> Claim:
    """A job that is running."""
    return await engine.claim(await engine.submit_kind(KIND, {}))


# -- moves ---------------------------------------------------------------------------------------------------------


async def claim_it(engine: Engine, claim: Claim) -> None:
    await engine.lifecycle.claim([claim.job_id], [KIND], "another worker")


async def rescue_it(engine: Engine, claim: Claim) -> None:
    await engine.lifecycle.rescue(10)


async def rescue_expired(engine: Engine, claim: Claim) -> None:
    await engine.expire(claim.job_id)
    await engine.lifecycle.rescue(10)


async def rescue_once_more(engine: Engine, claim: Claim) -> None:
    await engine.database.execute("UPDATE jobs SET crashes = $1 WHERE id = $2", MOST_CRASHES - 1, claim.job_id)
    await rescue_expired(engine, claim)


async def cancel_it(engine: Engine, claim: Claim) -> None:
    await engine.lifecycle.cancel(claim.job_id, engine.tenant.id)


async def release_it(engine: Engine, claim: Claim) -> None:
    await engine.lifecycle.release(claim)


async def report_it(engine: Engine, claim: Claim) -> None:
    await engine.lifecycle.report(claim, {"done": 1})


async def log_it(engine: Engine, claim: Claim) -> None:
    await engine.lifecycle.log(claim, "a line", "info")


async def save_it(engine: Engine, claim: Claim) -> None:
    await engine.lifecycle.save_checkpoint(claim, {"at": 1})


async def promote_it(engine: Engine, claim: Claim) -> None:
    await engine.lifecycle.promote(10)


async def retry_it(engine: Engine, claim: Claim) -> None:
    error = {"type": "handler-failed", "message": "not yet"}
    await engine.lifecycle.finish(Ending(claim, JobState.SCHEDULED, error=error, failure=error, delay=60))


def finish_as(state: JobState) -> Callable[[Engine, Claim], Awaitable[None]]:
    async def finish(engine: Engine, claim: Claim) -> None:
        await engine.lifecycle.finish(Ending(claim, state, result={"a": 1}, artifacts=[ARTIFACT]))

    finish.__name__ = f"finish_as_{state}"
    return finish


FINISHES = [finish_as(state) for state in sorted(TERMINAL)]
MOVES = [
    claim_it,
    promote_it,
    rescue_it,
    rescue_expired,
    rescue_once_more,
    cancel_it,
    release_it,
    retry_it,
    report_it,
    log_it,
    save_it,
]
WRITES = [report_it, log_it, save_it, release_it, retry_it, *FINISHES]


async def job_in(engine: Engine, state: JobState) -> Claim:
    """A job in this state, and the claim that it had or would have."""
    job_id = await engine.submit_kind(KIND, {})
    claim = Claim(
        job_id,
        engine.tenant.id,
        KIND,
        {},
        30,
        max_attempts=1,
        concurrency_key=None,
        depth=0,
        attempt=1,
        token=1,
        checkpoint=None,
    )
    if state == JobState.SCHEDULED:
        await engine.database.execute("UPDATE jobs SET state = 'scheduled', run_at = now() WHERE id = $1", job_id)
    elif state != JobState.QUEUED:
        claim = await engine.claim(job_id)
        if state.terminal:
            await engine.lifecycle.finish(Ending(claim, state))
    return claim


async def test_the_table_of_moves_is_exactly_what_can_happen(engine: Engine) -> None:
    seen: dict[JobState, set[JobState]] = {state: set() for state in JobState}
    for state in JobState:
        for move in [*MOVES, *FINISHES]:
            claim = await job_in(engine, state)
            before = await engine.row(claim.job_id)
            try:
                await move(engine, claim)
            except LeaseLost:
                after = await engine.row(claim.job_id)
                assert before == after, f"{move.__name__} changed a job that was {state}"
            after = await engine.row(claim.job_id)
            if after["state"] != state:
                seen[state].add(JobState(after["state"]))
            if state.terminal:
                assert before | {"lease_expires_at": None} == after | {"lease_expires_at": None} or (
                    # rescue_once_more prepares the row itself.
                    before["crashes"] != after["crashes"] and before["seq"] == after["seq"]
                ), f"{move.__name__} changed a job that was {state}"
            assert (after["finished_at"] is not None) == JobState(after["state"]).terminal
            if after["state"] != "running":
                assert after["worker"] is None
    assert seen == {state: set(moves) for state, moves in TRANSITIONS.items()}


async def test_only_one_of_many_claims_wins(engine: Engine) -> None:
    ids = [await engine.submit_kind(KIND, {}) for _ in range(20)]

    claims = await asyncio.gather(*(engine.lifecycle.claim(ids, [KIND], f"worker {n}") for n in range(10)))

    assert sorted(claim.job_id for claimed in claims for claim in claimed) == sorted(ids)


async def test_a_kind_that_the_worker_does_not_know_stays_queued(engine: Engine) -> None:
    job_id = await engine.submit_kind(KIND, {})

    assert await engine.lifecycle.claim([job_id], ["some.other"], "a worker") == []
    assert await engine.store.ready(["some.other"], 10, "a worker") == []
    assert await engine.state(job_id) == "queued"


async def test_a_worker_runs_one_job_at_a_time_that_workers_died_under_twice(engine: Engine) -> None:
    suspects = [await engine.submit_kind(KIND, {}) for _ in range(3)]
    await engine.database.execute("UPDATE jobs SET crashes = 2")
    others = [await engine.submit_kind(KIND, {}) for _ in range(2)]
    await engine.database.execute("UPDATE jobs SET crashes = 1 WHERE id = $1", others[0])

    async def claimed(worker: str) -> set[UUID]:
        ready = await engine.store.ready([KIND], 10, worker)
        assert set(ready) <= {claim.job_id for claim in await engine.lifecycle.claim(suspects + others, [KIND], worker)}
        return set(ready)

    first, second = await claimed("a worker"), await claimed("another worker")

    assert first > set(others)
    assert (len(first), len(second)) == (3, 1)
    assert await claimed("a worker") == set()


async def test_jobs_are_ready_in_the_order_in_which_they_came(engine: Engine) -> None:
    ids = [await engine.submit_kind(KIND, {}) for _ in range(5)]

    assert await engine.store.ready([KIND], 3, "a worker") == ids[:3]


@pytest.mark.parametrize("value", [None, {}, [], 0, False, "", {"a": [1.5, None, "é\U0001f600"]}])
async def test_an_input_comes_out_as_it_went_in(engine: Engine, value: Any) -> None:
    job_id = await engine.submit_kind(KIND, value)

    assert (await engine.claim(job_id)).input == value
    assert (await engine.job(job_id)).input == value


async def test_a_job_that_postgres_refuses_harms_no_other(engine: Engine) -> None:
    new = NewJob(engine.tenant.id, KIND, {}, (), Priority.NORMAL, 30, 1)
    jobs = [replace(new, input={"n": n} if n != 7 else {"n": "\0"}) for n in range(20)]
    jobs[12] = replace(new, tenant_id=UUID(int=1))

    answers = await asyncio.gather(*(engine.lifecycle.submit(job) for job in jobs), return_exceptions=True)

    assert [n for n, answer in enumerate(answers) if isinstance(answer, REFUSALS)] == [7, 12]
    assert await engine.database.fetchval("SELECT count(*) FROM jobs") == 18


# -- fencing -------------------------------------------------------------------------------------------------------


async def state_of(engine: Engine, job_id: UUID) -> tuple[Any, ...]:
    artifacts = await engine.database.fetch("SELECT * FROM artifacts")
    return await engine.row(job_id), await engine.events(job_id), [dict(row) for row in artifacts]


@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__)
async def test_no_write_of_an_attempt_that_lost_its_lease_is_taken(
    engine: Engine, claim: Claim, write: Callable[[Engine, Claim], Awaitable[None]]
) -> None:
    await rescue_expired(engine, claim)
    second = await engine.claim(claim.job_id)
    assert second.token > claim.token
    before, lost = await state_of(engine, claim.job_id), counted(metrics.lease_lost)

    async with engine.heard(claim.job_id) as heard:
        with pytest.raises(LeaseLost):
            await write(engine, claim)
        assert await state_of(engine, claim.job_id) == before
        assert counted(metrics.lease_lost) == lost + 1
        # What the second attempt writes is heard, so anything of the first would have been heard before it.
        await engine.lifecycle.log(second, "still here", "info")
        await until(lambda: heard and heard[-1]["t"] == "log")
        assert [message["t"] for message in heard if message["seq"] > before[0]["seq"]] == ["log"]


@pytest.mark.parametrize("old_first", [True, False], ids=["old first", "old last"])
async def test_writes_of_two_attempts_in_one_statement_are_told_apart(
    engine: Engine, claim: Claim, old_first: bool
) -> None:
    await rescue_expired(engine, claim)
    second = await engine.claim(claim.job_id)
    order = [claim, second] if old_first else [second, claim]

    reports = await asyncio.gather(
        *(engine.lifecycle.report(each, {"token": each.token}) for each in order), return_exceptions=True
    )
    assert (await engine.job(claim.job_id)).progress == {"token": second.token}
    endings = await asyncio.gather(
        *(engine.lifecycle.finish(Ending(each, JobState.SUCCEEDED, result=each.token)) for each in order),
        return_exceptions=True,
    )

    assert (await engine.job(claim.job_id)).result == second.token
    for answers, answer in ((reports, False), (endings, JobState.SUCCEEDED)):
        assert isinstance(answers[order.index(claim)], LeaseLost)
        assert answers[order.index(second)] is answer


async def test_a_job_that_is_to_be_cancelled_is_not_run_again_though_its_attempt_failed_first(
    engine: Engine, claim: Claim
) -> None:
    await engine.lifecycle.cancel(claim.job_id, engine.tenant.id)
    failure = {"type": "handler-failed", "message": "too late"}
    ending = Ending(claim, JobState.SCHEDULED, error=failure, failure=failure, delay=600)

    assert await engine.lifecycle.finish(ending) is JobState.CANCELLED

    job = await engine.job(claim.job_id)
    assert (job.state, job.error, job.run_at) == (JobState.CANCELLED, None, None)
    assert job.finished_at is not None
    # What went wrong stays readable, and to write it again, its answer having been lost, is no second ending.
    assert [each["error"] for each in await engine.store.failures(job.id, engine.tenant.id)] == [failure]
    assert await engine.lifecycle.finish(ending) is JobState.CANCELLED
    assert (await engine.job(job.id)).seq == job.seq


@pytest.mark.parametrize("state", [JobState.CANCELLED, JobState.SCHEDULED])
async def test_an_attempt_that_was_given_back_did_not_end_the_job_that_was_cancelled_since(
    engine: Engine, claim: Claim, state: JobState
) -> None:
    await engine.lifecycle.release(claim)
    await engine.lifecycle.cancel(claim.job_id, engine.tenant.id)

    with pytest.raises(LeaseLost):
        await engine.lifecycle.finish(Ending(claim, state, delay=0))


async def test_an_ending_is_fenced_against_another_ending_of_the_same_attempt(engine: Engine, claim: Claim) -> None:
    await engine.lifecycle.finish(Ending(claim, JobState.CANCELLED))

    with pytest.raises(LeaseLost):
        await engine.lifecycle.finish(Ending(claim, JobState.SUCCEEDED, result=1))

    assert await engine.state(claim.job_id) == "cancelled"


@pytest.mark.parametrize("promoted", [False, True], ids=["at once", "promoted since"])
@pytest.mark.parametrize("state", [JobState.SUCCEEDED, JobState.SCHEDULED])
async def test_an_ending_whose_answer_was_lost_stands_when_it_is_written_again(
    engine: Engine, claim: Claim, state: JobState, promoted: bool
) -> None:
    again = state == JobState.SCHEDULED
    ending = Ending(claim, state, delay=0.0 if again else None, artifacts=[ARTIFACT])
    counter = (metrics.retried, {"kind": KIND}) if again else (metrics.jobs_finished, {"kind": KIND, "outcome": state})
    lost, ended = counted(metrics.lease_lost), counted(counter[0], **counter[1])
    async with (
        behind_proxy(engine.settings) as (proxy, settings),
        parts(settings, engine.tenant, engine.database) as behind,
    ):
        cut = proxy.cut_reply(containing=state.value.encode())
        with pytest.raises(OUTAGES):
            await behind.lifecycle.finish(ending)
        await cut
        assert await engine.state(claim.job_id) == state
        if promoted:
            assert await engine.lifecycle.promote(10) == again

        async with engine.heard(claim.job_id) as heard:
            await behind.lifecycle.finish(ending)
            await until(lambda: heard)

    [event] = [event for event in await engine.events(claim.job_id) if event.data["state"] == state]
    assert (heard[0]["seq"], json.loads(heard[0]["d"])) == (event.seq, event.data)
    assert counted(metrics.lease_lost) == lost
    assert counted(counter[0], **counter[1]) == ended + 1
    assert len(await engine.store.artifacts(claim.job_id, engine.tenant.id)) == 1


@pytest.mark.parametrize("state", [JobState.SUCCEEDED, JobState.SCHEDULED])
async def test_what_an_earlier_attempt_wrote_is_not_taken_for_a_later_ones_ending(
    engine: Engine, claim: Claim, state: JobState
) -> None:
    await engine.lifecycle.finish(Ending(claim, JobState.SCHEDULED, delay=0.0))
    await engine.lifecycle.promote(10)
    second = await engine.claim(claim.job_id)
    await engine.lifecycle.release(second)

    with pytest.raises(LeaseLost):
        await engine.lifecycle.finish(Ending(second, state, delay=0.0))


async def test_a_lease_that_ran_out_is_not_taken_up_again(engine: Engine, claim: Claim) -> None:
    lost: list[tuple[UUID, int]] = []
    keeper = LeaseKeeper(engine.settings.database_url.get_secret_value(), lambda *key: lost.append(key))
    await engine.expire(claim.job_id)
    expired = (await engine.row(claim.job_id))["lease_expires_at"]
    keeper.hold(claim, asyncio.get_running_loop().time())
    keeper.start()
    try:
        await until(lambda: lost)
    finally:
        keeper.stop()
        await asyncio.to_thread(keeper.join)

    assert lost == [(claim.job_id, claim.token)]
    assert (await engine.row(claim.job_id))["lease_expires_at"] == expired


async def test_reports_endings_and_renewals_of_the_same_jobs_do_not_wait_for_each_other(
    engine: Engine,
) -> None:
    """Statements that lock the same rows in different orders would end in deadlocks."""
    ids = [await engine.submit_kind(KIND, {}) for _ in range(60)]
    claims = sorted(await engine.lifecycle.claim(ids, [KIND], "a worker"), key=lambda claim: claim.job_id)
    store = Store(engine.settings.database_url.get_secret_value(), pool=4)
    await store.open()

    async def report(order: int) -> None:
        for _ in range(40):
            await store.report([(claim, {"done": 1}) for claim in claims[::order]])

    async def renew(order: int) -> None:
        for _ in range(40):
            mine = claims[::order]
            await store.rows(sql.RENEW, [c.job_id for c in mine], [c.token for c in mine], LEASE)

    await asyncio.gather(report(1), report(-1), renew(1), renew(-1))
    await asyncio.gather(
        store.finish([Ending(claim, JobState.SUCCEEDED) for claim in claims]),
        store.finish([Ending(claim, JobState.SUCCEEDED) for claim in reversed(claims)]),
        report(-1),
    )
    await store.close()


# -- events --------------------------------------------------------------------------------------------------------


async def test_what_is_heard_is_what_is_stored_and_nothing_is_missing(engine: Engine) -> None:
    job_id = await engine.submit_kind(KIND, {"a": 1})
    async with engine.heard(job_id) as heard:
        first = await engine.claim(job_id)
        await engine.lifecycle.log(first, "a line with NUL \0 and half a pair \ud800" + "x" * 3000, "warning")
        await engine.lifecycle.report(first, {"done": 1, "total": 2})
        await engine.lifecycle.release(first)
        second = await engine.claim(job_id)
        await engine.lifecycle.report(second, {"done": 2, "total": 2})
        await rescue_expired(engine, second)
        third = await engine.claim(job_id)
        await engine.lifecycle.cancel(job_id, engine.tenant.id)
        await engine.lifecycle.finish(Ending(third, JobState.CANCELLED, progress={"done": 2, "total": 2}))
        await until(lambda: heard and heard[-1]["terminal"])

    stored = await engine.events(job_id)
    assert [message["seq"] for message in heard] == list(range(2, (await engine.job(job_id)).seq + 1))
    assert {message["seq"] for message in heard if message["t"] == "progress"} == {4, 7}
    by_seq = {event.seq: event for event in stored}
    assert by_seq.keys() == {1, 2, 3, 5, 6, 8, 9, 10, 11}
    for message in heard:
        assert (message["job"], message["epoch"]) == (str(job_id), 1)
        if message["t"] != "progress":
            event = by_seq[message["seq"]]
            assert (message["t"], json.loads(message["d"])) == (event.type, event.data)
            assert message["terminal"] == event.terminal == (event.seq == 11)
    [line] = [event.data["message"] for event in stored if event.type == "log"]
    assert "\0" not in line
    assert 1900 < len(line) <= 2000
    assert [event.data.get("reason") for event in stored if event.data.get("state") == "queued"] == [
        None,
        "interrupted",
        "worker died",
    ]


async def test_events_of_many_jobs_under_load_are_gapless_and_in_order(engine: Engine) -> None:
    ids = [await engine.submit_kind(KIND, {}) for _ in range(30)]
    claims = await engine.lifecycle.claim(ids, [KIND], "a worker")

    async def live(claim: Claim) -> None:
        for done in range(5):
            await engine.lifecycle.report(claim, {"done": done})
            await engine.lifecycle.log(claim, "line", "info")
        await engine.lifecycle.finish(Ending(claim, JobState.SUCCEEDED, result=1))

    async with engine.heard(ids[0]) as first, engine.heard(ids[-1]) as last:
        await asyncio.gather(*map(live, claims))
        await until(lambda: first and last and first[-1]["terminal"] and last[-1]["terminal"])

    for heard in (first, last):
        assert [message["seq"] for message in heard] == list(range(3, 14))


@pytest.mark.parametrize("write", [report_it, FINISHES[0]], ids=["report", "finish"])
async def test_what_was_committed_is_announced_though_its_caller_has_gone(
    engine: Engine, claim: Claim, write: Callable[[Engine, Claim], Awaitable[None]]
) -> None:
    async with engine.heard(claim.job_id) as heard:
        async with engine.database.transaction():
            await engine.database.execute("SELECT 1 FROM jobs WHERE id = $1 FOR UPDATE", claim.job_id)
            writing = asyncio.create_task(write(engine, claim))
            await until(lambda: waits_for_a_lock(engine))
            writing.cancel()
        await until(lambda: heard)

    assert heard[0]["seq"] == (await engine.job(claim.job_id)).seq == 3


async def waits_for_a_lock(engine: Engine) -> bool:
    return bool(await engine.database.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted"))


async def test_a_progress_that_postgres_refuses_harms_no_other(engine: Engine) -> None:
    ids = [await engine.submit_kind(KIND, {}) for _ in range(10)]
    claims = await engine.lifecycle.claim(ids, [KIND], "a worker")
    bad = [float("nan"), "\0", "\ud800", object()]
    reports = [{"done": bad[n] if n < len(bad) else n} for n in range(10)]

    answers = await asyncio.gather(
        *(engine.lifecycle.report(*pair) for pair in zip(claims, reports, strict=True)), return_exceptions=True
    )

    assert all(isinstance(answer, REFUSALS) and not isinstance(answer, OUTAGES) for answer in answers[:4])
    assert answers[4:] == [False] * 6


# -- cancel, release, rescue ----------------------------------------------------------------------------------------


async def test_a_waiting_job_is_cancelled_at_once_and_a_repeated_cancel_changes_nothing(engine: Engine) -> None:
    job_id = await engine.submit_kind(KIND, {})

    first = await engine.lifecycle.cancel(job_id, engine.tenant.id)
    second = await engine.lifecycle.cancel(job_id, engine.tenant.id)

    assert first.state == JobState.CANCELLED
    assert first.finished_at == first.cancel_requested_at
    assert second == first
    assert await engine.lifecycle.claim([job_id], [KIND], "a worker") == []


async def test_a_running_job_hears_of_a_cancel_with_its_next_report(engine: Engine, claim: Claim) -> None:
    assert await engine.lifecycle.report(claim, {"done": 1}) is False

    asked = await engine.lifecycle.cancel(claim.job_id, engine.tenant.id)
    again = await engine.lifecycle.cancel(claim.job_id, engine.tenant.id)

    assert asked.state == again.state == JobState.RUNNING
    assert asked.cancel_requested_at == again.cancel_requested_at is not None
    assert again.seq == asked.seq
    assert await engine.lifecycle.report(claim, {"done": 2}) is True
    assert await engine.store.cancel_requested([claim.job_id]) == [(claim.job_id, claim.token)]


async def test_a_cancel_that_comes_after_the_end_answers_with_the_true_state(engine: Engine, claim: Claim) -> None:
    await engine.lifecycle.finish(Ending(claim, JobState.SUCCEEDED, result=5))

    job = await engine.lifecycle.cancel(claim.job_id, engine.tenant.id)

    assert (job.state, job.result, job.cancel_requested_at) == (JobState.SUCCEEDED, 5, None)


async def test_another_tenants_job_cannot_be_read_or_cancelled(engine: Engine, claim: Claim) -> None:
    stranger = await make_tenant(engine.database, "stranger")

    with pytest.raises(NotFound):
        await engine.lifecycle.cancel(claim.job_id, stranger.id)
    assert await engine.store.get(claim.job_id, stranger.id) is None
    assert await engine.store.events(claim.job_id, stranger.id, after=0, limit=10) == []
    assert await engine.store.artifacts(claim.job_id, stranger.id) == []
    assert (await engine.row(claim.job_id))["cancel_requested_at"] is None


async def test_cancels_and_endings_at_the_same_time_agree(engine: Engine) -> None:
    ids = [await engine.submit_kind(KIND, {}) for _ in range(40)]
    claims = await engine.lifecycle.claim(ids, [KIND], "a worker")

    answers = await asyncio.gather(
        *(engine.lifecycle.cancel(claim.job_id, engine.tenant.id) for claim in claims),
        *(engine.lifecycle.finish(Ending(claim, JobState.SUCCEEDED)) for claim in claims),
    )

    for job in answers[:40]:
        assert job is not None
        assert job.state in (JobState.RUNNING, JobState.SUCCEEDED)
        events = await engine.events(job.id)
        assert [event.seq for event in events] == list(range(1, len(events) + 1))
        assert [event.terminal for event in events].index(True) == len(events) - 1


async def test_an_interruption_does_not_use_up_an_attempt_and_keeps_the_checkpoint(engine: Engine) -> None:
    job_id = await engine.submit_kind(KIND, {})
    for interruptions in range(5):
        claim = await engine.claim(job_id)
        assert claim.attempt == 1
        assert claim.checkpoint == ({"at": interruptions - 1} if interruptions else None)
        await engine.lifecycle.save_checkpoint(claim, {"at": interruptions})
        await engine.lifecycle.release(claim)
    job = await engine.job(job_id)
    assert (job.state, job.attempt, job.interruptions) == (JobState.QUEUED, 0, 5)
    assert job.started_at is not None


@pytest.mark.parametrize("give_back", [release_it, rescue_expired], ids=["release", "rescue"])
async def test_a_job_that_was_to_be_cancelled_is_cancelled_when_it_is_given_back(
    engine: Engine, claim: Claim, give_back: Callable[[Engine, Claim], Awaitable[None]]
) -> None:
    await engine.lifecycle.cancel(claim.job_id, engine.tenant.id)
    before = counted(metrics.jobs_finished, kind=KIND, outcome="cancelled")

    await give_back(engine, claim)

    job = await engine.job(claim.job_id)
    assert (job.state, job.attempt, job.error) == (JobState.CANCELLED, 1, None)
    assert job.finished_at is not None
    assert counted(metrics.jobs_finished, kind=KIND, outcome="cancelled") == before + 1


async def test_a_job_whose_workers_keep_dying_fails_and_says_so(engine: Engine) -> None:
    job_id = await engine.submit_kind(KIND, {})
    for _ in range(MOST_CRASHES):
        claim = await engine.claim(job_id)
        await engine.lifecycle.save_checkpoint(claim, {"kept": True})
        await rescue_expired(engine, claim)

    job = await engine.job(job_id)
    assert job.state == JobState.FAILED
    assert job.error is not None
    assert job.error["type"] == Crashed.slug
    assert str(MOST_CRASHES) in job.error["message"]
    assert (job.attempt, job.interruptions) == (1, 0)
    last = (await engine.events(job_id))[-1]
    assert (last.data["state"], last.data["error"]) == ("failed", job.error)


async def test_only_leases_that_ran_out_are_rescued_and_each_only_once(engine: Engine, claim: Claim) -> None:
    others = [await engine.claim(await engine.submit_kind(KIND, {})) for _ in range(10)]
    for other in others:
        await engine.expire(other.job_id)

    rescued = await asyncio.gather(*(engine.lifecycle.rescue(4) for _ in range(5)))

    assert sum(rescued) == 10
    assert max(rescued) <= 4
    assert await engine.state(claim.job_id) == "running"
    assert await engine.database.fetchval("SELECT max(crashes) FROM jobs") == 1


# -- endings -------------------------------------------------------------------------------------------------------


async def test_state_result_and_artifacts_become_visible_together(engine: Engine, claim: Claim) -> None:
    error = Fatal("do something else").as_json()
    progress = {"done": 3, "total": 3}

    await engine.lifecycle.finish(Ending(claim, JobState.FAILED, error=error, progress=progress, artifacts=[ARTIFACT]))

    job = await engine.job(claim.job_id)
    assert (job.state, job.error, job.progress, job.result) == (JobState.FAILED, error, progress, None)
    assert job.finished_at is not None
    assert await engine.store.artifacts(claim.job_id, engine.tenant.id) == [ARTIFACT]
    last = (await engine.events(claim.job_id))[-1]
    assert last == Event(claim.job_id, claim.tenant_id, 1, 3, "state", last.data)
    assert {key: last.data[key] for key in ("state", "error", "progress", "attempt")} == {
        "state": "failed",
        "error": error,
        "progress": progress,
        "attempt": 1,
    }


async def test_an_ending_without_progress_leaves_the_reported_one(engine: Engine, claim: Claim) -> None:
    await engine.lifecycle.report(claim, {"done": 4})
    await engine.lifecycle.finish(Ending(claim, JobState.SUCCEEDED))

    assert (await engine.job(claim.job_id)).progress == {"done": 4}


async def test_a_result_that_postgres_refuses_harms_no_other_ending(engine: Engine) -> None:
    ids = [await engine.submit_kind(KIND, {}) for _ in range(12)]
    claims = await engine.lifecycle.claim(ids, [KIND], "a worker")
    twice = [ARTIFACT, ARTIFACT]
    endings = [Ending(claim, JobState.SUCCEEDED, result=n) for n, claim in enumerate(claims)]
    endings[3] = Ending(claims[3], JobState.SUCCEEDED, result="\0")
    endings[5] = Ending(claims[5], JobState.SUCCEEDED, result=object())
    endings[8] = Ending(claims[8], JobState.SUCCEEDED, artifacts=twice)

    answers = await asyncio.gather(*map(engine.lifecycle.finish, endings), return_exceptions=True)

    assert [n for n, answer in enumerate(answers) if isinstance(answer, REFUSALS)] == [3, 5, 8]
    for n, claim in enumerate(claims):
        assert await engine.state(claim.job_id) == ("running" if n in (3, 5, 8) else "succeeded")


async def test_times_of_a_job_do_not_go_backwards(engine: Engine, claim: Claim) -> None:
    await engine.lifecycle.finish(Ending(claim, JobState.SUCCEEDED))

    job = await engine.job(claim.job_id)
    at = [event.data["at"] for event in await engine.events(claim.job_id)]
    assert job.started_at is not None
    assert job.finished_at is not None
    assert job.created_at <= job.started_at <= job.finished_at
    assert all(earlier <= later for earlier, later in pairwise(at))


async def test_open_jobs_are_counted_by_state_and_the_oldest_is_known(engine: Engine) -> None:
    assert await engine.store.open_jobs() == ({"scheduled": 0, "queued": 0, "running": 0}, 0.0)
    ids = [await engine.submit_kind(KIND, {}) for _ in range(3)]
    await engine.database.execute("UPDATE jobs SET created_at = now() - interval '1 h' WHERE id = $1", ids[0])
    ended = await engine.claim(ids[2])
    await engine.lifecycle.finish(Ending(ended, JobState.SUCCEEDED))
    await engine.claim(ids[1])

    counts, oldest = await engine.store.open_jobs()

    assert counts == {"scheduled": 0, "queued": 1, "running": 1}
    assert 3600 <= oldest < 3660

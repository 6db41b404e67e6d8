"""Schedules over HTTP, and their slots submitted once, whatever breaks."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import httpx
import pytest

from headway import kinds, metrics
from headway.schedules import MOST_SCHEDULES, Schedules
from headway.settings import Settings
from services.worker.scheduler import Scheduler
from tests.conftest import Tenant, make_tenant, until, web, worker
from tests.engine import Engine, behind_proxy, counted, parts

JOB = {"kind": "demo.countdown", "input": {"seconds": 0.1}}
PATH = "/api/v1/schedules"
TIMES = "cron, timezone, next_at, paused_at"


@pytest.fixture
async def engine(settings: Settings, tenant: Tenant, database: asyncpg.Connection) -> AsyncIterator[Engine]:
    async with parts(settings, tenant, database) as engine:
        await engine.store.announce_kinds([kind.as_json() for kind in kinds.discover().values()])
        yield engine


@pytest.fixture
async def http(settings: Settings, engine: Engine) -> AsyncIterator[httpx.AsyncClient]:
    """The API without a worker."""
    headers = {"Authorization": f"Bearer {engine.tenant.api_key}"}
    async with (
        web(settings) as url,
        httpx.AsyncClient(base_url=url, headers=headers, trust_env=False, verify=False) as http,
    ):
        yield http


async def create(http: httpx.AsyncClient, name: str = "hourly", **changed: Any) -> dict[str, Any]:
    body = {"name": name, "cron": "0 0 1 1 *", "job": JOB, **changed}
    answer = await http.post(PATH, json=body)
    assert answer.status_code == 201, answer.text
    created: dict[str, Any] = answer.json()
    assert answer.headers["Location"] == f"{PATH}/{created['id']}"
    return created


async def missed(engine: Engine, slots: int, catch_up: str, name: str = "hourly") -> tuple[UUID, list[str]]:
    """A schedule of which so many slots were missed, the latest of them minutes ago; and these slots."""
    now = await engine.database.fetchval("SELECT now()")
    last = (now - timedelta(minutes=5)).replace(second=0, microsecond=0)
    values = {"name": name, "cron": f"{last.minute} * * * *", "timezone": "UTC", "job": JOB}
    schedule = await Schedules(engine.store, engine.lifecycle).create(
        engine.tenant.id,
        catch_up=catch_up,
        **values,  # type: ignore[arg-type]
    )
    due = [last - timedelta(hours=hours) for hours in reversed(range(slots))]
    await engine.database.execute("UPDATE schedules SET next_at = $2 WHERE id = $1", schedule.id, due[0])
    return schedule.id, [f"{slot:%Y-%m-%dT%H:%M:%S.000Z}" for slot in due]


async def submitted(engine: Engine, schedule_id: UUID) -> list[str]:
    """The slots for which there is a job, in the order of the jobs."""
    keys = await engine.database.fetch("SELECT idempotency_key AS key FROM jobs ORDER BY id")
    mine = [row["key"].split(" ") for row in keys]
    return [slot for word, schedule, slot in mine if (word, schedule) == ("schedule", str(schedule_id))]


async def next_at(engine: Engine, schedule_id: UUID) -> datetime:
    return await engine.database.fetchval("SELECT next_at FROM schedules WHERE id = $1", schedule_id)


async def fire(engine: Engine) -> None:
    """What one look of a scheduler does."""
    schedules = Schedules(engine.store, engine.lifecycle)
    while await schedules.fire():
        pass


async def test_a_schedule_is_created_read_listed_changed_and_deleted(http: httpx.AsyncClient) -> None:
    job = {**JOB, "tags": ["mine"], "priority": "low", "timeout": 9, "concurrency_key": "one at a time"}
    created = await create(http, "b", cron="30 2 * * MON#1", timezone="Europe/Berlin", catch_up="skip", job=job)
    assert created["job"] == job
    assert (created["cron"], created["timezone"], created["catch_up"]) == ("30 2 * * MON#1", "Europe/Berlin", "skip")
    assert datetime.fromisoformat(created["next_at"]) > datetime.now(UTC)
    assert created["paused_at"] is None

    other = await create(http, "a")
    assert (other["timezone"], other["catch_up"], other["job"]) == ("UTC", "one", JOB)
    assert (await http.get(PATH)).json() == {"schedules": [other, created]}
    assert (await http.get(PATH, params={"limit": "1"})).json() == {"schedules": [other]}

    where = f"{PATH}/{created['id']}"
    changed = await http.patch(where, json={"cron": "0 0 1 1 *", "job": JOB, "name": "c"})
    assert changed.json() == {
        **created,
        **{"name": "c", "cron": "0 0 1 1 *", "job": JOB, "next_at": changed.json()["next_at"]},
    }
    # Midnight in Berlin, where it is winter.
    assert changed.json()["next_at"].endswith("-12-31T23:00:00.000Z")
    assert (await http.get(where)).json() == changed.json()
    same = await http.patch(where, json={})
    assert (same.status_code, same.json()) == (200, changed.json())

    deleted = await http.delete(where)
    assert (deleted.status_code, deleted.content) == (204, b"")
    assert (await http.get(where)).status_code == (await http.delete(where)).status_code == 404
    assert (await http.get(PATH)).json() == {"schedules": [other]}


# What is wrong with a schedule, and the field that the answer names.
BAD = [
    ({"cron": "0 0 31 2 *"}, "cron"),
    ({"cron": "* * * * * *"}, "cron"),
    ({"cron": ""}, "cron"),
    ({"timezone": ""}, "timezone"),
    ({"timezone": "Europe/Atlantis"}, "timezone"),
    ({"catch_up": "some"}, "catch_up"),
    ({"name": "a b"}, "name"),
    ({"name": "x" * 81}, "name"),
    ({"every": "day"}, "every"),
    ({"job": {**JOB, "delay": 5}}, "job"),
    ({"job": {**JOB, "run_at": "2020-01-01T00:00:00Z"}}, "job"),
    ({"job": {**JOB, "tags": ["t"] * 20}}, "job"),
    ({"job": {**JOB, "timeout": -1}}, "job.timeout"),
    ({"job": {"kind": "demo.countdown", "input": {"seconds": "x"}}}, "input.seconds"),
    ({"job": {"kind": "no.such", "input": {}}}, None),
]


async def test_bad_input_is_refused_by_field(http: httpx.AsyncClient) -> None:
    created = await create(http, "good")
    for changed, field in BAD:
        refused = await http.post(PATH, json={"name": "bad", "cron": "0 * * * *", "job": JOB, **changed})
        assert refused.status_code == 422, changed
        assert [error["field"] for error in refused.json().get("errors", [])] == ([field] if field else []), changed
        unchanged = await http.patch(f"{PATH}/{created['id']}", json=changed)
        assert (unchanged.status_code, unchanged.json()) == (422, refused.json()), changed
    assert (await http.post(PATH, json={"name": "bad", "cron": "0 * * * *"})).status_code == 422
    assert (await http.get(PATH)).json() == {"schedules": [created]}


async def test_a_name_is_taken_once_and_schedules_have_a_limit(http: httpx.AsyncClient, engine: Engine) -> None:
    first = await create(http, "first")
    second = await create(http, "second")
    again = await http.post(PATH, json={"name": "first", "cron": "0 * * * *", "job": JOB})
    renamed = await http.patch(f"{PATH}/{second['id']}", json={"name": "first"})
    assert again.status_code == renamed.status_code == 409
    assert "'first'" in again.json()["detail"]
    assert (await http.get(PATH)).json() == {"schedules": [first, second]}

    await engine.database.execute(
        "INSERT INTO schedules (id, tenant_id, name, cron, job, next_at) "
        "SELECT gen_random_uuid(), $1, 'n' || n, '0 0 1 1 *', '{}', now() + interval '1 day' "
        "FROM generate_series(1, $2) n",
        engine.tenant.id,
        MOST_SCHEDULES - 2,
    )
    full = await http.post(PATH, json={"name": "last", "cron": "0 * * * *", "job": JOB})
    assert full.status_code == 409
    assert "1,000" in full.json()["detail"]


async def test_another_tenants_schedule_does_not_exist(http: httpx.AsyncClient, engine: Engine) -> None:
    mine = await create(http)
    where = f"{PATH}/{mine['id']}"
    other = await make_tenant(engine.database, "other")
    http.headers["Authorization"] = f"Bearer {other.api_key}"
    answers = [
        await http.get(where),
        await http.patch(where, json={"cron": "0 0 1 1 *"}),
        await http.delete(where),
        *[await http.post(f"{where}/{action}") for action in ("pause", "resume", "run")],
    ]
    assert [answer.status_code for answer in answers] == [404] * 6
    assert (await http.get(PATH)).json() == {"schedules": []}
    assert (await create(http))["name"] == mine["name"]

    http.headers["Authorization"] = f"Bearer {engine.tenant.api_key}"
    assert (await http.get(where)).json() == mine
    assert await engine.database.fetchval("SELECT count(*) FROM jobs") == 0


async def test_run_now_submits_apart_from_the_slots(http: httpx.AsyncClient, engine: Engine) -> None:
    schedule = await create(http, job={**JOB, "tags": ["mine"], "priority": "high"})
    where = f"{PATH}/{schedule['id']}"
    ran = await http.post(f"{where}/run", headers={"Idempotency-Key": "once"})
    assert ran.status_code == 202
    assert ran.headers["Location"] == f"/api/v1/jobs/{ran.json()['id']}"
    job = (await http.get(ran.headers["Location"])).json()
    assert job == ran.json()
    assert (job["tags"], job["priority"], job["input"]) == (["mine", "schedule:hourly"], "high", JOB["input"])
    kind = (await http.get("/api/v1/kinds/demo.countdown")).json()
    assert (job["timeout"], job["max_attempts"]) == (kind["timeout"], kind["max_attempts"])

    again = await http.post(f"{where}/run", headers={"Idempotency-Key": "once"})
    assert (again.status_code, again.headers["Idempotent-Replayed"]) == (200, "true")
    assert again.json()["id"] == job["id"]
    # What no client can send: the key of a slot.
    slot = {"Idempotency-Key": f"schedule {schedule['id']} {schedule['next_at']}"}
    assert (await http.post(f"{where}/run", headers=slot)).status_code == 400

    held = await http.post(f"{where}/run", headers={"Idempotency-Key": "once", "Prefer": "wait=0"})
    assert held.headers["Preference-Applied"] == "wait=0"

    await http.post(f"{where}/pause")
    assert (await http.post(f"{where}/run")).status_code == 202
    assert (await http.post(f"{where}/resume")).json() == schedule
    assert len((await http.get("/api/v1/jobs", params={"tag": "schedule:hourly"})).json()["jobs"]) == 2


@pytest.mark.parametrize(("catch_up", "count"), [("skip", 0), ("one", 1), ("all", 130)])
async def test_what_is_submitted_of_missed_slots(engine: Engine, catch_up: str, count: int) -> None:
    schedule_id, slots = await missed(engine, 130, catch_up)
    before = counted(metrics.schedule_slots, outcome="submitted"), counted(metrics.schedule_slots, outcome="missed")
    await fire(engine)
    await fire(engine)

    assert await submitted(engine, schedule_id) == slots[len(slots) - count :]
    assert await next_at(engine, schedule_id) == datetime.fromisoformat(slots[-1]) + timedelta(hours=1)
    after = counted(metrics.schedule_slots, outcome="submitted"), counted(metrics.schedule_slots, outcome="missed")
    assert (after[0] - before[0], after[1] - before[1]) == (count, 130 - count)


async def test_a_worker_submits_a_slot_as_it_comes_and_runs_it(
    settings: Settings, engine: Engine, http: httpx.AsyncClient
) -> None:
    created = await create(http, cron="* * * * *", job={**JOB, "timeout": 9})
    due = (await engine.database.fetchval("SELECT now()")).replace(second=0, microsecond=0)
    await engine.database.execute("UPDATE schedules SET next_at = $1", due)
    async with worker(settings):

        async def succeeded() -> dict[str, Any] | None:
            found = await http.get("/api/v1/jobs", params={"tag": "schedule:hourly", "state": "succeeded"})
            return next(iter(found.json()["jobs"]), None)

        job = await until(succeeded)

    assert (job["kind"], job["input"], job["timeout"]) == ("demo.countdown", JOB["input"], 9)
    assert (await http.get(f"{PATH}/{created['id']}")).json()["next_at"] > f"{due:%Y-%m-%dT%H:%M:%S.000Z}"


async def test_two_schedulers_side_by_side_submit_each_slot_once(
    settings: Settings, tenant: Tenant, engine: Engine
) -> None:
    schedules = {(await missed(engine, 60, "all", f"s{number}"))[0] for number in range(8)}
    async with parts(settings, tenant, engine.database) as other:
        schedulers = [Scheduler(Schedules(each.store, each.lifecycle)) for each in (engine, other)]
        running = [asyncio.create_task(scheduler.run()) for scheduler in schedulers]

        async def done() -> bool:
            return not await engine.database.fetchval("SELECT count(*) FROM schedules WHERE next_at <= now()")

        await until(done)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    for schedule_id in schedules:
        slots = await submitted(engine, schedule_id)
        assert len(slots) == len(set(slots)) == 60


@pytest.mark.parametrize("edited", [False, True])
async def test_death_between_submit_and_move_leaves_one_job(settings: Settings, engine: Engine, edited: bool) -> None:
    schedule_id, slots = await missed(engine, 3, "all")

    async def all_there() -> bool:
        return len(await submitted(engine, schedule_id)) == 3

    locker = await asyncpg.connect(settings.database_url.get_secret_value())
    async with locker.transaction():
        await locker.execute("SELECT FROM schedules FOR UPDATE")
        dying = asyncio.create_task(fire(engine))
        await until(all_there)
        dying.cancel()
        await asyncio.gather(dying, return_exceptions=True)
    await locker.close()
    assert await next_at(engine, schedule_id) == datetime.fromisoformat(slots[0])

    if edited:
        schedules = Schedules(engine.store, engine.lifecycle)
        await schedules.change(schedule_id, engine.tenant.id, job={**JOB, "input": {"seconds": 2}})
    await fire(engine)
    assert await submitted(engine, schedule_id) == slots
    assert await next_at(engine, schedule_id) > datetime.fromisoformat(slots[-1])


async def test_a_scheduler_outlives_postgres_and_submits_a_slot_of_unknown_outcome_once(
    settings: Settings, tenant: Tenant, engine: Engine
) -> None:
    schedule_id, slots = await missed(engine, 1, "all")
    async with AsyncExitStack() as stack:
        proxy, through = await stack.enter_async_context(behind_proxy(settings))
        apart = await stack.enter_async_context(parts(through, tenant, engine.database))
        cut = proxy.cut_reply(containing=b"schedule:hourly")
        running = asyncio.create_task(Scheduler(Schedules(apart.store, apart.lifecycle)).run())
        await cut

        async def moved() -> bool:
            return await next_at(engine, schedule_id) > datetime.fromisoformat(slots[0])

        await until(moved)
        # And a look that gets no answer.
        cut = proxy.cut_reply(containing=b"second")
        second, later = await missed(engine, 1, "one", "second")
        await cut

        async def there() -> bool:
            return await submitted(engine, second) == later

        await until(there)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    assert await submitted(engine, schedule_id) == slots


async def test_slots_of_a_pause_are_not_caught_up(http: httpx.AsyncClient, engine: Engine) -> None:
    schedule_id, slots = await missed(engine, 3, "all")
    where = f"{PATH}/{schedule_id}"
    paused = (await http.post(f"{where}/pause")).json()
    assert paused["next_at"] is None
    assert (await http.post(f"{where}/pause")).json() == paused
    await fire(engine)
    assert await submitted(engine, schedule_id) == []

    resumed = (await http.post(f"{where}/resume")).json()
    assert resumed["paused_at"] is None
    assert datetime.fromisoformat(resumed["next_at"]) == datetime.fromisoformat(slots[-1]) + timedelta(hours=1)
    assert (await http.post(f"{where}/resume")).json() == resumed
    await fire(engine)
    assert await submitted(engine, schedule_id) == []


async def test_resume_of_what_is_not_paused_drops_no_slot(http: httpx.AsyncClient, engine: Engine) -> None:
    schedule_id, slots = await missed(engine, 3, "all")
    await http.post(f"{PATH}/{schedule_id}/resume")
    await fire(engine)
    assert await submitted(engine, schedule_id) == slots


async def test_new_times_begin_now_and_keep_a_slot_that_is_due(http: httpx.AsyncClient, engine: Engine) -> None:
    schedule_id, _ = await missed(engine, 3, "all")
    changed = (await http.patch(f"{PATH}/{schedule_id}", json={"cron": "* * * * *"})).json()
    # None of the hours that were missed under the old times is a slot of the new ones.
    assert datetime.fromisoformat(changed["next_at"]) > datetime.now(UTC) - timedelta(minutes=2)
    await http.patch(f"{PATH}/{schedule_id}", json={"cron": "0 0 1 1 *"})
    await fire(engine)
    assert await submitted(engine, schedule_id) == []

    # A slot that has just come, which no worker has seen yet, and which the new times have as well.
    await engine.database.execute("UPDATE schedules SET next_at = date_trunc('minute', now())")
    due = await next_at(engine, schedule_id)
    await http.patch(f"{PATH}/{schedule_id}", json={"cron": "* * * * *"})
    # The minute may have ended meanwhile.
    assert await next_at(engine, schedule_id) in (due, due + timedelta(minutes=1))
    # One that was submitted is not submitted again.
    await fire(engine)
    after = await next_at(engine, schedule_id)
    await http.patch(f"{PATH}/{schedule_id}", json={"timezone": "Asia/Kathmandu"})
    assert await next_at(engine, schedule_id) >= after
    slots = await submitted(engine, schedule_id)
    assert len(slots) == len(set(slots)) >= 1


@pytest.mark.parametrize(
    "change",
    ["cron = '0 0 1 1 *'", "timezone = 'Asia/Kathmandu'", "next_at = now() + interval '1 day'", "paused_at = now()"],
)
async def test_what_is_changed_while_slots_are_submitted_holds(settings: Settings, engine: Engine, change: str) -> None:
    schedule_id, _ = await missed(engine, 3, "skip")
    locker = await asyncpg.connect(settings.database_url.get_secret_value())
    async with locker.transaction():
        changed = await locker.fetchrow(f"UPDATE schedules SET {change} RETURNING {TIMES}")
        firing = asyncio.create_task(fire(engine))

        async def waiting() -> bool:
            return bool(await engine.database.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted"))

        await until(waiting)
    await locker.close()
    await firing
    # Where the schedule as it was read would have gone on is no longer where it goes on.
    assert await engine.database.fetchrow(f"SELECT {TIMES} FROM schedules WHERE id = $1", schedule_id) == changed


async def test_a_schedule_that_cannot_go_on_is_paused_and_hinders_no_other(engine: Engine) -> None:
    gone, _ = await missed(engine, 2, "one", "gone")
    await engine.database.execute("UPDATE schedules SET timezone = 'Europe/Atlantis' WHERE id = $1", gone)
    there, slots = await missed(engine, 2, "one", "there")
    await fire(engine)
    assert await submitted(engine, gone) == []
    assert await submitted(engine, there) == slots[-1:]
    assert await engine.database.fetchval("SELECT paused_at FROM schedules WHERE id = $1", gone) is not None


async def test_a_kind_that_is_gone_is_submitted_all_the_same(engine: Engine) -> None:
    schedule_id, slots = await missed(engine, 1, "one")
    kind = f"gone.{uuid4().hex[:8]}"
    await engine.database.execute("UPDATE schedules SET job = job || jsonb_build_object('kind', $1::text)", kind)
    await fire(engine)
    assert await submitted(engine, schedule_id) == slots
    assert await engine.database.fetchval("SELECT kind FROM jobs") == kind

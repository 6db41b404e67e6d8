"""Live sets: all jobs of a tenant, a kind, a tag or a parent; nothing is missed and nothing comes twice."""

import asyncio
import base64
from collections.abc import Callable
from typing import Any
from uuid import UUID

import asyncpg
import pytest
from hypothesis import HealthCheck, Phase, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from redis.asyncio import Redis
from uuid_utils.compat import uuid7

from headway.settings import Settings
from headway.store.sets import SetStore
from services.web.live.feed import PART
from tests.conftest import Service, Tenant, make_tenant
from tests.integration.live_clients import Chains, Frame, live, stream
from tests.integration.test_api_jobs import idle, submit

DURABLE = ("state", "log")
AT = "2026-01-01T00:00:00.000Z"
LINE = {"message": "line", "level": "info", "at": AT}


class History:
    """Writes jobs and their events as transactions do, and tells nobody."""

    def __init__(self, database: asyncpg.Connection, tenant: Tenant) -> None:
        self._database = database
        self._tenant = tenant

    async def job(self, connection: asyncpg.Connection | None = None, *, tag: str = "a") -> str:
        job_id = uuid7()
        connection = connection or self._database
        async with connection.transaction():
            await connection.execute(
                "INSERT INTO jobs (id, tenant_id, kind, state, input, tags, timeout, seq) "
                "VALUES ($1, $2, 'test', 'queued', '{}', ARRAY[$3], 60, 1)",
                job_id,
                self._tenant.id,
                tag,
            )
            await self._event(connection, job_id, 1, "state", {"state": "queued", "attempt": 0, "at": AT})
        return str(job_id)

    async def log(self, job: str, connection: asyncpg.Connection | None = None) -> None:
        connection = connection or self._database
        async with connection.transaction():
            seq = await connection.fetchval("UPDATE jobs SET seq = seq + 1 WHERE id = $1 RETURNING seq", UUID(job))
            await self._event(connection, UUID(job), seq, "log", {"message": f"line {seq}", "level": "info", "at": AT})

    async def end(self, job: str) -> None:
        async with self._database.transaction():
            seq = await self._database.fetchval(
                "UPDATE jobs SET seq = seq + 1, state = 'succeeded', finished_at = now() WHERE id = $1 RETURNING seq",
                UUID(job),
            )
            data = {"state": "succeeded", "attempt": 1, "at": AT, "result": {"n": 0.1}}
            await self._event(self._database, UUID(job), seq, "state", data)

    async def _event(self, connection: asyncpg.Connection, job: UUID, seq: int, type: str, data: Any) -> None:
        await connection.execute(
            "INSERT INTO events (job_id, seq, type, data) VALUES ($1, $2, $3, $4)", job, seq, type, data
        )


@pytest.fixture
def history(database: asyncpg.Connection, tenant: Tenant) -> History:
    return History(database, tenant)


async def connection(settings: Settings) -> asyncpg.Connection:
    """Another connection to Headway's database."""
    from headway.store import prepare

    made = await asyncpg.connect(settings.database_url.get_secret_value())
    await prepare(made)
    return made


def durable(frames: list[Frame]) -> list[tuple[str, int]]:
    return [(frame["job"], frame["seq"]) for frame in frames if frame["t"] in DURABLE]


async def quiet(client: Chains, recv: Callable[[], Any], seconds: float = 2.5) -> list[Frame]:
    """Every frame until none comes for longer than the feed waits between two rounds."""
    frames = []
    while True:
        try:
            async with asyncio.timeout(seconds):
                frames.append(await recv())
        except TimeoutError:
            return frames


async def test_a_set_tells_of_jobs_that_are_open_and_of_new_ones(service: Service) -> None:
    before = (await submit(service.http, seconds=2, tags=["a"]))["id"]
    await submit(service.http, seconds=0.2, tags=["b"])
    async with live(service.http) as socket:
        ack = await socket.ask("subscribe", sets=[{"set": "mine", "tag": "a"}])
        assert ack["d"] == {"sets": ["mine"]}
        await socket.until(lambda frame: frame["t"] == "hb")
        after = (await submit(service.http, seconds=1, tags=["a", "x"]))["id"]
        over: set[str] = set()
        while over != {before, after}:
            frame = await socket.until(lambda frame: frame["t"] in ("state", "snapshot"))
            if frame["d"]["state"] == "succeeded":
                over.add(frame["job"])
    assert {frame["job"] for frame in socket.frames if "job" in frame} == {before, after}
    for job in (before, after):
        frames = socket.of(job)
        assert frames[0]["t"] == "snapshot"
        assert all(frame["set"] == ["mine"] for frame in frames)
        assert all("cursor" in frame for frame in frames if frame["t"] == "state")
        assert not any("cursor" in frame for frame in frames if frame["t"] == "progress")
    assert socket.of(after, "progress")


async def test_sets_are_of_a_kind_a_tag_a_parent_or_all_and_of_one_tenant(
    settings: Settings, redis: Redis, tenant: Tenant, database: asyncpg.Connection, history: History
) -> None:
    other = await make_tenant(database, "other")
    async with idle(settings, tenant) as http, idle(settings, other) as strange, live(http) as socket:
        sets: list[dict[str, Any]] = [
            {"set": "all"},
            {"set": "kind", "kind": "demo.countdown"},
            {"set": "b", "tag": "b"},
        ]
        parent = (await submit(http))["id"]
        await socket.ask("subscribe", sets=[*sets, {"set": "children", "parent": parent}])
        await submit(strange, tags=["b"])
        one, two = (await submit(http, tags=["b"]))["id"], await history.job(tag="b")
        child = await history.job()
        await database.execute("UPDATE jobs SET parent_id = $1 WHERE id = $2", UUID(parent), UUID(child))
        await history.log(child)
        found: dict[str, set[str]] = {}
        expected = {"all": {parent, one, two, child}, "kind": {parent, one}, "b": {one, two}, "children": {child}}
        while found != expected:
            frame = await socket.until(lambda frame: "job" in frame)
            for name in frame["set"]:
                found.setdefault(name, set()).add(frame["job"])
        ack = await socket.ask("unsubscribe", sets=["all", "kind", "children", "none"])
        assert ack["t"] == "ack"
        await history.log(two)
        assert (await socket.until(lambda frame: frame.get("job") == two))["set"] == ["b"]


async def test_what_commits_late_is_told_once_and_holds_up_nothing(
    settings: Settings, redis: Redis, tenant: Tenant, history: History
) -> None:
    slow = await connection(settings)
    async with idle(settings, tenant) as http, live(http) as socket:
        open_before = await history.job()
        transaction = slow.transaction()
        await transaction.start()
        late = await history.job(slow)
        await socket.ask("subscribe", sets=[{"set": "all"}])
        await socket.until(lambda frame: frame["t"] == "hb")
        ids = [job["id"] for job in await asyncio.gather(*(submit(http) for _ in range(20)))]
        for job in (open_before, *ids):
            await history.log(job)
        cursor = ""
        while not {open_before, *ids} <= {frame["job"] for frame in socket.frames if frame.get("seq") == 2}:
            cursor = (await socket.until(lambda frame: "cursor" in frame))["cursor"]
        assert socket.of(late) == []
        await transaction.commit()
        await socket.until(lambda frame: frame.get("job") == late)
        rest = await quiet(socket, socket.recv)
        assert durable(rest) == []
        assert len(set(durable(socket.frames))) == len(durable(socket.frames))
        # Whoever comes with the last cursor from before is told of it as well.
        async with live(http) as again:
            await again.ask("subscribe", sets=[{"set": "all", "since": cursor}])
            await again.until(lambda frame: frame["t"] == "hb")
            assert [(frame["t"], frame["job"]) for frame in again.frames if "job" in frame] == [("snapshot", late)]
    await slow.close()


STEPS = st.lists(
    st.tuples(st.sampled_from(["job", "log", "log", "end", "begin", "commit", "pause"]), st.integers(0, 5)), max_size=25
)


class Interleaved:
    """Takes steps of a history, some of them in a transaction that goes on beside the others."""

    def __init__(self, history: History, side: asyncpg.Connection) -> None:
        self.jobs: list[str] = []
        self._history = history
        self._side = side
        self._transaction: Any = None
        self._busy = ""

    async def take(self, step: str, number: int) -> None:
        job = self.jobs[number % len(self.jobs)]
        if step == "job":
            self.jobs.append(await self._history.job())
        elif step == "begin" and self._transaction is None:
            self._transaction = self._side.transaction()
            await self._transaction.start()
            await self._history.log(job, self._side)
            self._busy = job
        elif step == "commit":
            await self.commit()
        elif step == "log" and job != self._busy:
            await self._history.log(job)
        elif step == "end" and job != self._busy and len(self.jobs) > 1:
            self.jobs.remove(job)
            await self._history.end(job)
        elif step == "pause":
            await asyncio.sleep(0.06)

    async def commit(self) -> None:
        if self._transaction is not None:
            await self._transaction.commit()
        self._transaction, self._busy = None, ""


@hypothesis_settings(
    max_examples=5,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    # To shrink a history takes longer than to read it.
    phases=[Phase.explicit, Phase.generate],
)
@given(steps=STEPS)
async def test_a_cursor_gives_the_same_on_both_and_is_exact(
    settings: Settings, redis: Redis, tenant: Tenant, history: History, steps: list[tuple[str, int]]
) -> None:
    """Whatever transactions do, and wherever the stream is cut: what follows is all of the rest, and nothing else."""
    side = await connection(settings)
    taken = Interleaved(history, side)
    async with idle(settings, tenant) as http, live(http) as socket:
        taken.jobs.append(await history.job())
        await socket.ask("subscribe", sets=[{"set": "all"}])
        first = (await socket.until(lambda frame: frame["t"] == "hb"))["d"]["cursor"]
        for step in steps:
            await taken.take(*step)
        await taken.commit()
        await history.end(last := await history.job())
        await socket.until(lambda frame: frame.get("job") == last and frame["d"].get("state") == "succeeded")
        final = {frame["job"]: frame["seq"] for frame in socket.frames if "job" in frame}
        cursors = [first, *(frame["cursor"] for frame in socket.frames if "cursor" in frame)]
        for cut in {0, len(cursors) // 2, len(cursors) - 1}:
            async with live(http) as again, stream(http, "/events", cursors[cut]) as events:
                await again.ask("subscribe", sets=[{"set": "all", "since": cursors[cut]}])
                await again.until(lambda frame: frame["t"] == "hb")
                over_socket = [comparable(frame) for frame in again.frames if "job" in frame]
                assert [comparable(await events.recv()) for _ in over_socket] == over_socket
            held = before_cut(socket.frames, cut)
            for frame in over_socket:
                assert frame["seq"] > held.get(frame["job"], 0)
                held[frame["job"]] = frame["seq"]
            assert held == final
    await side.close()


def comparable(frame: Frame) -> Frame:
    """Without what may differ: the name of the set, and the time in the cursor."""
    return {name: value for name, value in frame.items() if name not in ("set", "cursor")}


def before_cut(frames: list[Frame], cut: int) -> dict[str, int]:
    """What a client holds of each job that has received so many envelopes with a cursor."""
    held = {}
    for frame in frames:
        cut -= "cursor" in frame
        if cut < 0:
            break
        if "job" in frame:
            held[frame["job"]] = frame["seq"]
    return held


async def test_a_cursor_that_is_no_good(settings: Settings, redis: Redis, tenant: Tenant, history: History) -> None:
    job = await history.job()
    async with idle(settings, tenant) as http, live(http) as socket:
        await socket.ask("subscribe", sets=[{"set": "all"}])
        cursor = (await socket.until(lambda frame: frame["t"] == "hb"))["d"]["cursor"]
        parts = base64.urlsafe_b64decode(cursor + "==").decode().split("|")

        def changed(place: int, text: str) -> str:
            parts_now = [*parts[:place], text, *parts[place + 1 :]]
            return base64.urlsafe_b64encode("|".join(parts_now).encode()).decode().rstrip("=")

        for since, reason in (
            (changed(0, "elsewhere"), "cursor"),
            (changed(1, "1000000000"), "retention"),
            (changed(2, "9000000000:9000000000:"), "cursor"),
        ):
            await socket.ask("subscribe", sets=[{"set": "all", "since": since}])
            assert await socket.recv() == {"t": "resync", "set": "all", "d": {"reason": reason}}
            snapshot = await socket.recv()
            assert (snapshot["t"], snapshot["job"]) == ("snapshot", job)
            await socket.until(lambda frame: frame["t"] == "hb")
        for since in ("x", "", "é", changed(2, "1:2"), changed(2, "5:2:"), changed(1, "NaN"), cursor[:-9]):
            ack = await socket.ask("subscribe", sets=[{"set": "bad", "since": since}])
            assert ack["d"] == {"sets": []}
            error = await socket.recv()
            assert (error["t"], error["d"]["set"]) == ("error", "bad")
            assert error["d"]["type"] == "urn:headway:problem:invalid-request"
            if since:
                answer = await http.get("/api/v1/events", params={"last_event_id": since})
                assert answer.status_code == 400


async def test_who_is_too_far_behind_begins_anew(
    settings: Settings, redis: Redis, tenant: Tenant, database: asyncpg.Connection, history: History
) -> None:
    job = await history.job()
    async with idle(settings, tenant) as http:
        async with live(http) as socket:
            await socket.ask("subscribe", sets=[{"set": "all"}])
            cursor = (await socket.until(lambda frame: frame["t"] == "hb"))["d"]["cursor"]
        await database.execute(
            "INSERT INTO events (job_id, seq, type, data) SELECT $1, 1 + n, 'log', $2 FROM generate_series(1, 9000) n",
            UUID(job),
            LINE,
        )
        await database.execute("UPDATE jobs SET seq = 9001 WHERE id = $1", UUID(job))
        async with live(http) as socket:
            await socket.ask("subscribe", sets=[{"set": "all", "since": cursor}])
            await socket.until(lambda frame: frame["t"] == "hb" and "cursor" in frame["d"], 40)
            assert durable(socket.frames) == [(job, seq) for seq in range(2, 9002)]
        await database.execute(
            "INSERT INTO events (job_id, seq, type, data) "
            "SELECT $1, 9001 + n, 'log', $2 FROM generate_series(1, 1001) n",
            UUID(job),
            LINE,
        )
        async with live(http) as socket:
            await socket.ask("subscribe", sets=[{"set": "all", "since": cursor}])
            assert (await socket.recv())["d"] == {"reason": "retention"}


@pytest.mark.usefixtures("redis")
async def test_a_burst_and_a_slow_client_of_a_set(
    settings: Settings,
    tenant: Tenant,
    database: asyncpg.Connection,
    history: History,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from services.web.live import sessions

    # Nothing is read from the slow one until the other has all.
    monkeypatch.setattr(sessions, "PATIENCE", 40.0)
    jobs = [await history.job() for _ in range(12)]
    async with idle(settings, tenant) as http, live(http, max_queue=1) as slow, live(http) as quick:
        for socket in (slow, quick):
            await socket.ask("subscribe", sets=[{"set": "all"}])
            await socket.until(lambda frame: frame["t"] == "hb")
        async with database.transaction():
            await database.execute(
                "INSERT INTO events (job_id, seq, type, data) SELECT id, 1 + n, 'log', "
                "$1 || jsonb_build_object('message', repeat('x', 2000)) FROM jobs, generate_series(1, 200) n",
                LINE,
            )
            await database.execute("UPDATE jobs SET seq = 201")
        expected = {(job, seq) for job in jobs for seq in range(2, 202)}
        for socket in (quick, slow):
            for _ in expected:
                await socket.until(lambda frame: frame["t"] == "log")
            assert set(durable(socket.frames)) == expected


async def test_a_job_is_told_of_once_though_a_snapshot_holds_its_end(
    settings: Settings, redis: Redis, tenant: Tenant, database: asyncpg.Connection, history: History
) -> None:
    """It began and ended in one round of the feed, which is told in two parts."""
    async with idle(settings, tenant) as http, live(http) as new, live(http) as resumed:
        await new.ask("subscribe", sets=[{"set": "all"}])
        cursor = (await new.until(lambda frame: frame["t"] == "hb"))["d"]["cursor"]
        await resumed.ask("subscribe", sets=[{"set": "all", "since": cursor}])
        await resumed.until(lambda frame: frame["t"] == "hb")
        async with database.transaction():
            before, job = await history.job(), await history.job()
            for _ in range(PART - 3):
                await history.log(before)
            await history.log(job)
            await history.end(job)
        for socket in (new, resumed):
            await socket.until(lambda frame: frame.get("job") == job)
            await quiet(socket, socket.recv)
            assert [frame["t"] for frame in socket.of(job)] == ["snapshot"]


async def test_a_job_that_ends_while_a_set_catches_up_is_told_of_once(
    settings: Settings, redis: Redis, tenant: Tenant, history: History, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = SetStore.events_at

    async def slow(self: SetStore, keys: Any) -> Any:
        """The snapshot that is read next has the end of the job; the feed tells of that later."""
        monkeypatch.setattr(SetStore, "events_at", original)
        await history.end(job)
        return await original(self, keys)

    async with idle(settings, tenant) as http, live(http) as socket:
        await socket.ask("subscribe", sets=[{"set": "all"}])
        cursor = (await socket.until(lambda frame: frame["t"] == "hb"))["d"]["cursor"]
        await socket.ask("unsubscribe", sets=["all"])
        job = await history.job()
        monkeypatch.setattr(SetStore, "events_at", slow)
        await socket.ask("subscribe", sets=[{"set": "all", "since": cursor}])
        snapshot = await socket.until(lambda frame: frame.get("job") == job)
        assert snapshot["d"]["state"] == "succeeded"
        await quiet(socket, socket.recv)
        assert socket.of(job) == [snapshot]


async def test_a_stream_of_a_set_resumes(service: Service) -> None:
    async with stream(service.http, "/events", tag="t") as events:
        first = (await submit(service.http, seconds=0.2, tags=["t"]))["id"]
        while (frame := await events.recv()) is not None and frame["d"].get("state") != "succeeded":
            assert frame["job"] == first
        last = events.last
    second = (await submit(service.http, seconds=0.1, tags=["t"]))["id"]
    async with stream(service.http, "/events", last, tag="t") as events:
        while (frame := await events.recv()) is not None and frame["d"].get("state") != "succeeded":
            assert frame["job"] == second
    assert (await service.http.get("/api/v1/events", params={"nothing": 1})).status_code == 422

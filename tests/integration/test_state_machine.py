"""The life of jobs against a model: random moves through the real Lifecycle on a real Postgres, checked after each.

The model is plain Python and knows every job's state, counts and events. After every step all rows and stored events
must be what it says. It does not know the order of the queue, which other tests are about.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import partial, wraps
from itertools import pairwise
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from headway.embedded import Embedded
from headway.errors import Conflict, KeyReused, LeaseLost, NotFound
from headway.groups import MOST_DEPTH, Groups
from headway.job import Child, Claim, Ending, Priority
from headway.lifecycle import MOST_CRASHES
from headway.states import TRANSITIONS, JobState
from headway.submission import NewJob
from tests.engine import Engine
from tests.engine import engine as make_engine

KINDS = ("machine.a", "machine.b")
LIMITS = {"one": 1, "two": 2}
WORKERS = ("worker 0", "worker 1")
# Long enough that nothing becomes due, or is lost, while the machine runs.
LATER = 3600.0
SUCCEEDED, FAILED, CANCELLED = JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED
SCHEDULED, QUEUED, RUNNING = JobState.SCHEDULED, JobState.QUEUED, JobState.RUNNING
COUNTED = ("state", "attempt", "interruptions", "crashes", "token", "seq", "checkpoint", "parent_id", "retry_of")

AFTER_CHILDREN = ("waits", "waits while they run", "fails", "goes on")

n = st.integers(0, 1000)
some = st.lists(n, min_size=1, max_size=4)
endings = st.sampled_from([SUCCEEDED, FAILED, CANCELLED, SCHEDULED])
kinds = st.sampled_from(KINDS)
keys = st.sampled_from([None, *LIMITS])


@dataclass
class Model:
    """What a job must be like."""

    id: UUID
    kind: str
    key: str | None
    state: JobState
    parent_id: UUID | None = None
    retry_of: UUID | None = None
    depth: int = 0
    attempt: int = 0
    interruptions: int = 0
    crashes: int = 0
    token: int = 0
    seq: int = 0
    checkpoint: Any = None
    cancelling: bool = False
    due: bool = False
    worker: str | None = None
    claim: Claim | None = None
    old: list[Claim] = field(default_factory=list)
    # The children it asks for; while it waits, how many it was told have ended.
    children: int = 0
    waits: bool = False
    told: int = 0
    # (seq, type, state, attempt) of what is stored; reports are not.
    events: list[tuple[int, str, str | None, int | None]] = field(default_factory=list)
    # What the last attempt came to: the first state after its own.
    came_to: JobState | None = None
    ended: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        self.tell()

    def tell(self) -> None:
        self.seq += 1
        self.events.append((self.seq, "state", self.state.value, self.attempt))
        if self.came_to is None and self.state is not RUNNING:
            self.came_to = self.state

    def start(self, claim: Claim, worker: str) -> None:
        self.claim, self.worker = claim, worker
        self.attempt, self.token, self.state = self.attempt + 1, self.token + 1, RUNNING
        self.came_to = None
        self.tell()

    def stop(self, state: JobState, *, uncounted: bool = False) -> None:
        assert self.claim is not None
        self.old.append(self.claim)
        self.attempt -= uncounted
        self.claim, self.worker, self.state = None, None, state
        self.tell()


def having(*states: JobState) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The step is taken only if there is a job in one of these states.

    As a precondition that would let what hypothesis draws depend on which worker wins a race.
    """

    def decorate(step: Callable[..., None]) -> Callable[..., None]:
        @wraps(step)
        def taken(self: "Machine", *drawn: Any, **named: Any) -> None:
            if self.those(*states):
                step(self, *drawn, **named)

        return taken

    return decorate


class Machine(RuleBasedStateMachine):
    """Two workers, two kinds, two concurrency keys, some clients."""

    def __init__(self, runner: asyncio.Runner, engine: Engine) -> None:
        super().__init__()
        self.runner, self.engine, self.lifecycle = runner, engine, engine.lifecycle
        self.groups = Groups(engine.store, engine.lifecycle)
        self.jobs: dict[UUID, Model] = {}
        self.asked: dict[str, tuple[dict[str, Any], UUID]] = {}
        self.paused: set[str] = set()
        self.run(self.empty())

    async def empty(self) -> None:
        await self.engine.database.execute("DELETE FROM failures; DELETE FROM events; DELETE FROM jobs")
        await self.engine.database.execute("UPDATE kinds SET paused_at = NULL")

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """What `coroutine` returns, once parked jobs were looked at too."""

        async def settled() -> Any:
            try:
                return await coroutine
            finally:
                await self.lifecycle.close()

        return self.runner.run(settled())

    def those(self, *states: JobState) -> list[Model]:
        return [job for job in self.jobs.values() if job.state in states]

    def any(self, number: int, *states: JobState) -> Model:
        jobs = self.those(*states)
        return jobs[number % len(jobs)]

    def running(self, number: int) -> tuple[Model, Claim]:
        job = self.any(number, RUNNING)
        assert job.claim is not None
        return job, job.claim

    def add(self, job_id: UUID, kind: str, key: str | None, state: JobState = QUEUED, **more: Any) -> None:
        self.jobs[job_id] = Model(job_id, kind, key, state, **more)

    @initialize(
        jobs=st.lists(st.tuples(kinds, keys), min_size=4, max_size=8),
        paused=st.sampled_from([None, None, None, *KINDS]),
    )
    def begin(self, jobs: list[tuple[str, str | None]], paused: str | None) -> None:
        """So that there is something to do, whichever rules hypothesis leaves out this time."""
        for place, (kind, key) in enumerate(jobs):
            self.submit(kind, key, LATER if place == 3 else None, None, 0)
        if paused:
            self.pause_or_resume(kind=paused)

    @rule(
        kind=kinds,
        key=keys,
        delay=st.sampled_from([None, None, 0.0, LATER]),
        idempotency_key=st.sampled_from([None, None, "x", "y"]),
        body=st.integers(0, 1),
    )
    def submit(self, kind: str, key: str | None, delay: float | None, idempotency_key: str | None, body: int) -> None:
        asked = {"kind": kind, "input": body, "delay": delay, "concurrency_key": key}
        asked["concurrency_limit"] = LIMITS[key] if key else 1
        new = NewJob(
            self.engine.tenant.id,
            tags=(),
            priority=Priority.NORMAL,
            timeout=60,
            max_attempts=1,
            idempotency_key=idempotency_key,
            **asked,
        )
        first, job_id = self.asked.get(idempotency_key or "", (None, None))
        if first is not None and first != asked:
            with pytest.raises(KeyReused):
                self.run(self.lifecycle.submit(new))
            return
        job, created = self.run(self.lifecycle.submit(new))
        assert created == (first is None)
        if created:
            self.add(job.id, kind, key, SCHEDULED if delay else QUEUED)
            if idempotency_key:
                self.asked[idempotency_key] = asked, job.id
        else:
            assert job.id == job_id

    @rule(number=n)
    def promote(self, number: int) -> None:
        timed = [job for job in self.those(SCHEDULED) if not job.waits]
        if timed:
            timed[number % len(timed)].due = True
            past = "UPDATE jobs SET run_at = now() - interval '1 second' WHERE id = $1"
            self.run(self.engine.database.execute(past, timed[number % len(timed)].id))
        due = [job for job in timed if job.due]
        assert self.run(self.lifecycle.promote(100)) == len(due)
        for job in due:
            job.state, job.due = QUEUED, False
            job.tell()

    @rule(numbers=some, worker=st.sampled_from(WORKERS))
    @having(QUEUED)
    def claim(self, numbers: list[int], worker: str) -> None:
        ids = sorted({self.any(number, QUEUED).id for number in numbers})
        self.start(ids, worker)

    def start(self, ids: Sequence[UUID], worker: str) -> None:
        self.started(ids, [(worker, self.run(self.lifecycle.claim(ids, KINDS, worker)))], raced=False)

    @rule()
    @having(QUEUED)
    def race(self) -> None:
        ids = sorted(job.id for job in self.jobs.values())

        async def both() -> list[list[Claim]]:
            return await asyncio.gather(*(self.lifecycle.claim(ids, KINDS, worker) for worker in WORKERS))

        self.started(ids, list(zip(WORKERS, self.run(both()), strict=True)), raced=True)

    def started(self, ids: Sequence[UUID], answers: Sequence[tuple[str, list[Claim]]], *, raced: bool) -> None:
        """Move the model along, if those are what was to be had."""
        free = Counter(LIMITS) - Counter(job.key for job in self.those(RUNNING) if job.key)
        certain, suspects, possible = set(), set(), set()
        for job in (self.jobs[job_id] for job_id in ids):
            if job.state is QUEUED and job.kind not in self.paused:
                possible.add(job.id)
                if job.key is None or free[job.key] > 0:
                    (suspects if job.crashes > 1 else certain).add(job.id)
                    free[job.key] -= job.key is not None
        for worker, claims in answers:
            suspected = [job for job in self.those(RUNNING) if job.worker == worker and job.crashes > 1]
            taken = {claim.job_id for claim in claims}
            risky = {job_id for job_id in taken if self.jobs[job_id].crashes > 1}
            assert len(risky) + len(suspected) <= 1
            if raced:
                # Which of a key's jobs get its places is not known, nor how many while the other is at them.
                assert taken <= possible
            else:
                assert taken - risky == certain
                assert risky <= suspects
                assert len(risky) == (1 if suspects and not suspected else 0)
            possible -= taken
            for claim in claims:
                job = self.jobs[claim.job_id]
                job.start(claim, worker)
                assert (claim.token, claim.attempt, claim.checkpoint) == (job.token, job.attempt, job.checkpoint)
        assert not [job_id for job_id in certain & possible if self.jobs[job_id].key is None]

    @rule(number=n, value=st.integers(0, 9))
    @having(RUNNING)
    def write(self, number: int, value: int) -> None:
        job, claim = self.running(number)
        assert self.run(self.lifecycle.report(claim, {"done": value})) == job.cancelling
        self.run(self.lifecycle.log(claim, f"line {value}", "info"))
        self.run(self.lifecycle.save_checkpoint(claim, {"at": value}))
        job.seq += 2
        job.events.append((job.seq, "log", None, None))
        job.checkpoint = {"at": value}

    @rule(number=n, state=endings, now=st.booleans(), unwanted=st.booleans())
    @having(RUNNING)
    def finish(self, number: int, state: JobState, now: bool, unwanted: bool) -> None:
        job, claim = self.running(number)
        if unwanted:
            self.run(self.lifecycle.cancel(job.id, self.engine.tenant.id))
            self.cancelled(job)
        self.run(self.lifecycle.finish(_ending(claim, state, delay=0 if now else LATER)))
        if state is SCHEDULED and job.cancelling:
            state = CANCELLED
        job.stop(state)
        job.due = state is SCHEDULED and now

    @rule(number=n)
    @having(RUNNING)
    def release(self, number: int) -> None:
        job, claim = self.running(number)
        self.run(self.lifecycle.release(claim))
        job.interruptions += 1
        job.stop(CANCELLED if job.cancelling else QUEUED, uncounted=not job.cancelling)

    @rule(number=n, twice=st.booleans())
    @having(RUNNING)
    def die(self, number: int, twice: bool) -> None:
        """A worker dies; what it ran is rescued. If `twice`, it is started anew and dies again."""
        worker = self.running(number)[0].worker
        assert worker is not None
        dead = [job for job in self.those(RUNNING) if job.worker == worker]
        self.rescued(dead)
        if twice:
            self.start([job.id for job in dead], worker)
            self.rescued([job for job in self.those(RUNNING) if job.worker == worker])

    def rescued(self, dead: list[Model]) -> None:
        for job in dead:
            self.run(self.engine.expire(job.id))
        assert self.run(self.lifecycle.rescue(100)) == len(dead)
        for job in dead:
            job.crashes, job.token = job.crashes + 1, job.token + 1
            hopeless = FAILED if job.crashes == MOST_CRASHES else QUEUED
            state = CANCELLED if job.cancelling else hopeless
            job.stop(state, uncounted=state is QUEUED)

    @rule(number=n)
    @having(*JobState)
    def cancel(self, number: int) -> None:
        job = self.any(number, *JobState)
        with pytest.raises(NotFound):
            self.run(self.lifecycle.cancel(job.id, uuid4()))
        answer = self.run(self.lifecycle.cancel(job.id, self.engine.tenant.id))
        self.cancelled(job)
        assert (answer.state, answer.cancel_requested_at is not None) == (job.state, job.cancelling)

    @rule(numbers=some)
    @having(*JobState)
    def cancel_many(self, numbers: list[int]) -> None:
        jobs = {job.id: job for job in (self.any(number, *JobState) for number in numbers)}
        changed = self.run(self.lifecycle.cancel_many([*jobs], self.engine.tenant.id))
        assert changed == sum([self.cancelled(job) for job in jobs.values()])

    def cancelled(self, job: Model) -> bool:
        """Whether a request to cancel the job changes it; the model is moved along."""
        if job.state.terminal or job.cancelling:
            return False
        job.cancelling = True
        if job.state is not RUNNING:
            job.state = CANCELLED
        job.tell()
        return True

    @rule(number=n)
    @having(*JobState)
    def retry(self, number: int) -> None:
        job = self.any(number, *(JobState if number % 2 else self.those_ended() or JobState))
        if not job.state.terminal:
            with pytest.raises(Conflict):
                self.run(self.lifecycle.retry(job.id, self.engine.tenant.id))
            return
        again, created = self.run(self.lifecycle.retry(job.id, self.engine.tenant.id))
        assert created == (job.id not in {other.retry_of for other in self.jobs.values()})
        if created:
            self.add(again.id, job.kind, job.key, retry_of=job.id)
        assert self.jobs[again.id].retry_of == job.id

    def those_ended(self) -> list[JobState]:
        return [state for state in JobState if state.terminal and self.those(state)]

    @rule(number=n, count=st.integers(1, 3), key=st.sampled_from([None, "two"]), then=st.sampled_from(AFTER_CHILDREN))
    @having(RUNNING)
    def run_children(self, number: int, count: int, key: str | None, then: str) -> None:
        job, claim = self.running(number)
        if job.depth == MOST_DEPTH:
            return
        new = not job.children
        job.children = job.children or count
        asked = [Child(KINDS[0], place, concurrency_key=key, concurrency_limit=LIMITS["two"]) for place in range(count)]
        endings = self.run(self.groups.endings(claim, asked[: job.children], 0))
        there = [child for child in self.jobs.values() if child.parent_id == job.id]
        if new:
            assert endings is None
            for row in self.run(
                self.engine.database.fetch("SELECT id FROM jobs WHERE parent_id = $1 ORDER BY idempotency_key", job.id)
            ):
                self.add(row["id"], KINDS[0], key, parent_id=job.id, depth=job.depth + 1)
        elif count >= job.children:
            ended = [child.state for child in there] if all(child.state.terminal for child in there) else None
            assert (endings and [ending.state for ending in endings]) == ended
        if then == "fails":
            self.finish(number=number, state=FAILED, now=False, unwanted=False)
        elif then != "goes on":
            self.run(self.groups.wait(claim, job.children))
            job.waits, job.told = not job.cancelling, 0
            job.stop(CANCELLED if job.cancelling else SCHEDULED, uncounted=not job.cancelling)
        if then == "waits while they run":
            self.start(sorted(child.id for child in self.open_children(job)), WORKERS[0])
        if then != "goes on":
            self.tend()

    @rule()
    def tend(self) -> None:
        self.run(self.groups.tend())
        for job in [job for job in self.jobs.values() if job.waits and job.state is SCHEDULED]:
            ended = job.children - len(self.open_children(job))
            if ended != job.told:
                job.told, job.seq = ended, job.seq + 1
            if ended == job.children:
                job.state, job.waits = QUEUED, False
                job.tell()
        orphaning = (CANCELLED, FAILED)
        while any(self.cancelled(child) for job in self.those(*orphaning) for child in self.open_children(job)):
            pass

    def open_children(self, job: Model) -> list[Model]:
        return [child for child in self.jobs.values() if child.parent_id == job.id and not child.state.terminal]

    @rule(kind=kinds)
    def pause_or_resume(self, kind: str) -> None:
        self.paused ^= {kind}
        at = "now()" if kind in self.paused else "NULL"
        self.run(self.engine.database.execute(f"UPDATE kinds SET paused_at = {at} WHERE name = $1", kind))
        self.run(self.lifecycle.unpark())

    @rule(number=n, state=endings, dies=st.booleans())
    @having(RUNNING)
    def overtake(self, number: int, state: JobState, dies: bool) -> None:
        """A job is taken from a worker, which goes on with it while another one runs it."""
        job, claim = self.running(number)
        worker = WORKERS[job.worker == WORKERS[0]]
        if dies:
            self.die(number=number, twice=False)
        else:
            self.release(number=number)
        if job.state is QUEUED:
            self.start([job.id], worker)
        self.late(job, claim, state)

    @rule(number=n, state=endings)
    def go_on(self, number: int, state: JobState) -> None:
        """An attempt that is over goes on."""
        stale = [(job, claim) for job in self.jobs.values() for claim in job.old]
        if stale:
            self.late(*stale[number % len(stale)], state)

    def late(self, job: Model, claim: Claim, state: JobState) -> None:
        """Whatever the attempt writes changes nothing, and it is told so."""
        before = self.run(self.engine.row(job.id))
        late: list[Callable[[], Coroutine[Any, Any, Any]]] = [
            partial(self.lifecycle.report, claim, {"done": -1}),
            partial(self.lifecycle.log, claim, "late", "info"),
            partial(self.lifecycle.save_checkpoint, claim, "late"),
            partial(self.lifecycle.release, claim),
            partial(self.groups.wait, claim, 1),
        ]
        # An ending may be written again, in case its answer was lost.
        ending = partial(self.lifecycle.finish, _ending(claim, state, delay=0))
        if claim.token == job.token and job.came_to in ((state, CANCELLED) if state is SCHEDULED else (state,)):
            self.run(ending())
        else:
            late.append(ending)
        for write in late:
            with pytest.raises(LeaseLost):
                self.run(write())
        assert self.run(self.engine.row(job.id)) == before

    @invariant()
    def all_is_as_the_model_says(self) -> None:
        rows, events = self.run(self.read())
        assert rows.keys() == self.jobs.keys()
        running: Counter[str] = Counter()
        places = set()
        for job_id, job in self.jobs.items():
            row = rows[job_id]
            assert {name: row[name] for name in COUNTED} == {name: getattr(job, name) for name in COUNTED}
            assert (row["cancel_requested_at"] is not None) == job.cancelling
            assert (row["finished_at"] is not None) == job.state.terminal
            assert (row["lease_expires_at"] is not None) == (job.state is RUNNING)
            assert row["worker"] == job.worker
            if job.state is SCHEDULED:
                assert (row["run_at"] is None) == job.waits
            assert events.get(job_id, []) == job.events
            self.moves(job)
            if job.state.terminal:
                job.ended = job.ended or row
                assert row == job.ended
            elif job.state is RUNNING and job.key is not None:
                running[job.key] += 1
                places.add((job.key, row["concurrency_place"]))
        assert all(running[key] <= limit for key, limit in LIMITS.items())
        assert len(places) == running.total()
        self.nobody_stands_aside_in_vain(rows, running)

    async def read(self) -> tuple[dict[UUID, dict[str, Any]], dict[UUID, list[tuple[Any, ...]]]]:
        rows = await self.engine.database.fetch("SELECT * FROM jobs")
        events: dict[UUID, list[tuple[Any, ...]]] = {}
        for row in await self.engine.database.fetch("SELECT * FROM events ORDER BY job_id, seq"):
            told = row["data"].get("state"), row["data"].get("attempt")
            events.setdefault(row["job_id"], []).append((row["seq"], row["type"], *told))
        return {row["id"]: dict(row) for row in rows}, events

    def moves(self, job: Model) -> None:
        """The job's states follow each other as the table permits; a request to cancel tells the same one again."""
        states = [JobState(state) for _, _, state, _ in job.events if state]
        assert states[0] in (SCHEDULED, QUEUED)
        for before, after in pairwise(states):
            assert after in TRANSITIONS[before] or before is after is RUNNING, (before, after)

    def nobody_stands_aside_in_vain(self, rows: dict[UUID, dict[str, Any]], running: Counter[str]) -> None:
        for key, limit in LIMITS.items():
            waiting = [rows[job.id] for job in self.those(QUEUED) if job.key == key and job.kind not in self.paused]
            standing = sum(not row["parked"] for row in waiting)
            assert standing >= min(len(waiting), limit - running[key])


def _ending(claim: Claim, state: JobState, *, delay: float) -> Ending:
    error = {"type": "failed", "message": ""} if state in (FAILED, SCHEDULED) else None
    return Ending(claim, state, result=1, error=error, failure=error, delay=delay if state is SCHEDULED else None)


@pytest.fixture
def make(servers: Embedded, tmp_path: Path) -> Iterator[Callable[[], Machine]]:
    """Makes machines on one engine, each with no jobs."""
    with asyncio.Runner() as runner:
        stack = AsyncExitStack()
        engine = runner.run(stack.enter_async_context(make_engine(servers, tmp_path)))
        try:
            announced = {"description": "", "timeout": 60, "max_attempts": 1, "input_schema": {}, "result_schema": {}}
            runner.run(engine.store.announce_kinds([{"name": name, **announced} for name in KINDS]))
            yield partial(Machine, runner, engine)
        finally:
            runner.run(stack.aclose())


def test_jobs_live_as_the_model_says(make: Callable[[], Machine]) -> None:
    chosen = settings(
        max_examples=40,
        stateful_step_count=40,
        derandomize=True,
        database=None,
        # To shrink a failure takes longer than a test may, and then the time limit is all that is told.
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(make, settings=chosen)


def test_moves_that_chance_makes_rarely(make: Callable[[], Machine]) -> None:
    machine = make()
    for _ in range(3):
        machine.submit(KINDS[0], None, None, None, 0)
    everyone = [0, 1, 2]
    machine.claim(everyone, WORKERS[0])
    # A worker dies twice, so that its jobs are suspects; one of them at a time is run by a worker.
    machine.die(number=0, twice=True)
    machine.claim(everyone, WORKERS[0])
    machine.claim([0, 1], WORKERS[0])
    machine.claim([0, 1], WORKERS[1])
    machine.all_is_as_the_model_says()
    # Parents are not woken while their children run.
    machine.run_children(number=0, count=2, key=None, then="waits while they run")
    machine.tend()
    machine.all_is_as_the_model_says()
    machine.finish(number=0, state=FAILED, now=False, unwanted=False)
    machine.tend()
    machine.all_is_as_the_model_says()
    for _ in range(3):
        machine.finish(number=0, state=SUCCEEDED, now=False, unwanted=False)
    machine.tend()
    machine.all_is_as_the_model_says()

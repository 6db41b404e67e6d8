"""Schedules: which times a cron expression has, and each of them submitted as a job once.

Any worker may submit a slot, with an idempotency key made of schedule and slot; only then is the schedule moved on to
its next slot. Whoever dies in between, or does the same at the same time, leaves one job.
"""

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache
from importlib.resources import files
from typing import Any, NoReturn
from uuid import UUID
from zoneinfo import ZoneInfo

import structlog
from cronsim import CronSim, CronSimError
from uuid_utils.compat import uuid7

from headway import metrics
from headway.errors import Conflict, InvalidRequest, KeyReused, NotFound
from headway.job import Job, timestamp
from headway.lifecycle import Lifecycle
from headway.store import OUTAGES, Store
from headway.store.schedules import CatchUp, Schedule, ScheduleStore
from headway.submission import NewJob

MOST_SCHEDULES = 1000
# A slot that is not submitted within this was missed. Slots are minutes apart, so one at most is due and not missed.
LATE = timedelta(minutes=1)
# How many schedules a round takes, how many slots of one it submits, and how many it looks at to pass over.
SCHEDULES_AT_ONCE = 200
SUBMITTED_AT_ONCE = 50
PASSED_AT_ONCE = 1000

log = structlog.get_logger(__name__)


@cache
def zones() -> frozenset[str]:
    """Every time zone that can be asked for: those of the package, which is the same for web and workers."""
    return frozenset(files("tzdata").joinpath("zones").read_text().split())


def slots(cron: str, timezone: str, after: datetime) -> Iterator[datetime]:
    """The times of a cron expression after a moment, in UTC, as Debian's cron has them.

    A time that a change of the clocks skips comes right after the gap, one that it repeats comes once; minutes or hours
    with `*` go on by real time. Raises InvalidRequest if there is none in 50 years, or an argument is wrong.
    """
    if timezone not in zones():
        _refuse("timezone", f"there is no {timezone[:64]!r}; send a name such as UTC or Europe/Berlin")
    if (fields := len(cron.split())) != 5:
        _refuse("cron", f"five fields are needed, minute hour day-of-month month day-of-week, not {fields}")
    try:
        for local in CronSim(cron, after.astimezone(ZoneInfo(timezone))):
            slot = local.astimezone(UTC)
            # In the hour that a change of the clocks repeats, the expression's times may lie in the first one.
            if slot > after:
                after = slot
                yield slot
    except CronSimError as error:
        _refuse("cron", f"{error}: it is not in the form of cron, or there is no such day")
    _refuse("cron", "no time fits it within 50 years")


def next_slot(cron: str, timezone: str, after: datetime) -> datetime:
    """The first of `slots`."""
    return next(slots(cron, timezone, after))


def _refuse(field: str, why: str) -> NoReturn:
    raise InvalidRequest(f"{field}: {why}.", errors=[{"field": field, "message": why}])


@dataclass(frozen=True, slots=True)
class Turn:
    """What a round does with a schedule: slots to submit, how many to pass over, and where to go on."""

    schedule: Schedule
    submitted: list[datetime]
    passed: int
    following: datetime

    @classmethod
    def of(cls, schedule: Schedule) -> "Turn":
        """What to do with a schedule that is due. Raises InvalidRequest if its times cannot be computed any more."""
        due, now = [schedule.next_at], schedule.read_at
        most = SUBMITTED_AT_ONCE if schedule.catch_up == "all" else PASSED_AT_ONCE
        later = slots(schedule.cron, schedule.timezone, schedule.next_at)
        while (following := next(later)) <= now and len(due) < most:
            due.append(following)
        submitted: list[datetime] = []
        if schedule.catch_up == "all":
            submitted = due
        elif following > now and (schedule.catch_up == "one" or now - due[-1] < LATE):
            submitted = due[-1:]
        return cls(schedule, submitted, len(due) - len(submitted), following)


class Schedules:
    """Creates, changes and fires the schedules in `store`; their jobs go through `lifecycle`."""

    def __init__(self, store: Store, lifecycle: Lifecycle) -> None:
        self._store = ScheduleStore(store)
        self._lifecycle = lifecycle

    async def create(
        self, tenant_id: UUID, *, name: str, cron: str, timezone: str, catch_up: CatchUp, job: dict[str, Any]
    ) -> Schedule:
        """A schedule whose first slot lies ahead; `job` has been checked.

        Raises InvalidRequest for cron and time zone, Conflict if the name is taken or there are too many.
        """
        now, there = await self._store.room(tenant_id)
        if there >= MOST_SCHEDULES:
            raise Conflict(f"There are {there:,} schedules, which is the most; delete some that are not needed.")
        next_at = next_slot(cron, timezone, now)
        return await self._store.add(
            uuid7(), tenant_id, name=name, cron=cron, timezone=timezone, catch_up=catch_up, job=job, next_at=next_at
        )

    async def get(self, schedule_id: UUID, tenant_id: UUID) -> Schedule:
        """Raises NotFound."""
        return _found(await self._store.get(schedule_id, tenant_id), schedule_id)

    async def list_schedules(self, tenant_id: UUID, limit: int) -> list[Schedule]:
        """By name."""
        return await self._store.list_schedules(tenant_id, limit)

    async def change(
        self,
        schedule_id: UUID,
        tenant_id: UUID,
        *,
        name: str | None = None,
        cron: str | None = None,
        timezone: str | None = None,
        catch_up: CatchUp | None = None,
        job: dict[str, Any] | None = None,
    ) -> Schedule:
        """Change what is given. New times begin now, with a slot that is due this minute and was not submitted yet.

        Raises NotFound, InvalidRequest for cron and time zone, Conflict if the name is taken.
        """
        while True:
            old = await self.get(schedule_id, tenant_id)
            new = old.cron if cron is None else cron, old.timezone if timezone is None else timezone
            next_at = old.next_at
            if new != (old.cron, old.timezone):
                # Slots before `next_at` are done; the moment before it is the last one whose slots are.
                done = min(old.next_at - timedelta.resolution, old.read_at)
                next_at = next_slot(*new, max(done, old.read_at - LATE))
            changed = await self._store.change(
                old, name=name, catch_up=catch_up, job=job, cron=new[0], timezone=new[1], next_at=next_at
            )
            if changed is not None:
                return changed

    async def pause(self, schedule_id: UUID, tenant_id: UUID) -> Schedule:
        """Submit nothing until `resume`. Raises NotFound."""
        return _found(await self._store.pause(schedule_id, tenant_id), schedule_id)

    async def resume(self, schedule_id: UUID, tenant_id: UUID) -> Schedule:
        """Go on with the next slot from now; those of the pause are not caught up. Raises NotFound."""
        while True:
            old = await self.get(schedule_id, tenant_id)
            if old.paused_at is None:
                return old
            resumed = await self._store.resume(old, next_slot(old.cron, old.timezone, old.read_at))
            if resumed is not None:
                return resumed

    async def delete(self, schedule_id: UUID, tenant_id: UUID) -> None:
        """Its jobs stay. Raises NotFound."""
        if not await self._store.delete(schedule_id, tenant_id):
            _found(None, schedule_id)

    async def run(self, schedule: Schedule, idempotency_key: str | None) -> tuple[Job, bool]:
        """Submit its job now, apart from its slots, paused or not; answers and raises as Lifecycle.submit does."""
        return await self._lifecycle.submit(NewJob(**schedule.new_job(), idempotency_key=idempotency_key))

    async def fire(self) -> bool:
        """Submit the slots that are due, schedules taking turns; whether more are due already.

        A schedule that cannot go on, since its time zone is gone or it has no time left, is paused.
        """
        due = await self._store.due(SCHEDULES_AT_ONCE)
        turns = []
        for schedule in due:
            try:
                turns.append(Turn.of(schedule))
            except InvalidRequest as error:
                log.warning("a schedule cannot go on and is paused", schedule=str(schedule.id), why=str(error))
                await self._store.pause(schedule.id, schedule.tenant_id)
        failures = await asyncio.gather(*(self._submit(turn) for turn in turns), return_exceptions=True)
        done = [turn for turn, failure in zip(turns, failures, strict=True) if failure is None]
        if done:
            moved = await self._store.move([(turn.schedule, turn.following) for turn in done])
            for turn in done:
                if turn.passed and turn.schedule.id in moved:
                    metrics.schedule_slots.labels("missed").inc(turn.passed)
                    log.warning("slots were missed", schedule=str(turn.schedule.id), slots=turn.passed)
        for turn, failure in zip(turns, failures, strict=True):
            if failure is None:
                continue
            if isinstance(failure, OUTAGES):
                raise failure
            log.error("slots were not submitted", schedule=str(turn.schedule.id), exc_info=failure)
        return len(due) == SCHEDULES_AT_ONCE or any(turn.following <= turn.schedule.read_at for turn in done)

    async def _submit(self, turn: Turn) -> None:
        """Submit slots, oldest first. Raises the first exception that one met, once all have been tried."""
        tried = (self._submit_slot(turn.schedule, slot) for slot in turn.submitted)
        for failure in await asyncio.gather(*tried, return_exceptions=True):
            if failure is not None:
                raise failure

    async def _submit_slot(self, schedule: Schedule, slot: datetime) -> None:
        # A client's key has no spaces, so none of theirs is one of these.
        key = f"schedule {schedule.id} {timestamp(slot)}"
        try:
            _, created = await self._lifecycle.submit(NewJob(**schedule.new_job(), idempotency_key=key))
        except KeyReused:
            # It was submitted before the schedule's job was changed.
            return
        if created:
            metrics.schedule_slots.labels("submitted").inc()


def _found(schedule: Schedule | None, schedule_id: UUID) -> Schedule:
    if schedule is None:
        raise NotFound(f"There is no schedule {schedule_id}.")
    return schedule

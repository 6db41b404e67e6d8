"""The wiring of the worker: which parts there are and how they hold each other."""

import asyncio
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from uuid import UUID

import structlog

from headway import kinds, queue, schemas
from headway.errors import InvalidSettings
from headway.events import Events, layer
from headway.files import Files
from headway.groups import Groups
from headway.lifecycle import LEASE, Lifecycle
from headway.queue import Queue
from headway.retention import Retention
from headway.schedules import Schedules
from headway.settings import Settings
from headway.startup import Opened
from headway.store import OUTAGES, Store
from headway.uploads import Uploads
from services.worker.context import Parts
from services.worker.lease import LeaseKeeper
from services.worker.runner import Runner
from services.worker.scheduler import Scheduler
from services.worker.sweeper import Sweeper
from services.worker.worker import PROMOTED_AT_ONCE, HeadwayWorker

# Connections that claim, finish and look after jobs at a time.
BUSY = 4
# How often Postgres plans a statement anew on a connection, before it keeps a plan.
PLANNED = 5

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class App:
    """One worker and what it holds."""

    store: Store
    lifecycle: Lifecycle
    queue: Queue
    events: Events
    keeper: LeaseKeeper
    opened: Opened
    worker: HeadwayWorker

    @classmethod
    async def open(cls, settings: Settings, *, lease: timedelta = LEASE) -> "App":
        """Open what handlers need, connect, and announce the kinds.

        Raises InvalidSettings if a module of kinds cannot be imported or a schema is none, and StartFailed if what they
        need cannot be had.
        """
        found = kinds.discover(settings.kinds)
        announced = [kind.as_json() for kind in found.values()]
        _check(announced)
        opened = Opened()
        # Those of kinds that run as processes are opened there.
        needs = [need for kind in found.values() if kind.runs != "process" for need in kind.needs.values()]
        await opened.open(dict.fromkeys(needs))
        url = settings.database_url.get_secret_value()
        store = Store(url, pool=settings.database_pool)
        await store.open()
        await _announce(store, announced)
        redis_url = settings.redis_url.get_secret_value()
        wakeups, events = Queue(queue.connect(redis_url)), Events(layer(redis_url))
        lifecycle = Lifecycle(store, wakeups, events, lease=lease)
        await _warm_up(store, lifecycle)
        files = Files(settings.files_location, max_size=settings.max_file, options=settings.files_options)
        runner = Runner(found, Parts(settings, store, lifecycle, files), opened.values)
        age = timedelta(days=settings.keep_days)
        sweeper = Sweeper(Retention(store, files, age=age, most=settings.keep_jobs), Uploads.of(settings, store, files))
        loop = asyncio.get_running_loop()

        def lost(job_id: UUID, token: int) -> None:
            loop.call_soon_threadsafe(runner.lose, job_id, token)

        keeper = LeaseKeeper(url, lost, lease=lease)
        keeper.start()
        worker = HeadwayWorker(
            f"{socket.gethostname()}:{os.getpid()}:{os.urandom(3).hex()}",
            slots=settings.slots,
            kinds=list(found),
            runner=runner,
            lifecycle=lifecycle,
            groups=Groups(store, lifecycle),
            store=store,
            queue=wakeups,
            keeper=keeper,
            beside=[Scheduler(Schedules(store, lifecycle)).run, sweeper.run, opened.watch],
        )
        return cls(store, lifecycle, wakeups, events, keeper, opened, worker)

    async def close(self) -> None:
        self.keeper.stop()
        await asyncio.to_thread(self.keeper.join, 5)
        await self.opened.close()
        await self.lifecycle.close()
        await self.queue.close()
        await self.events.close()
        await self.store.close()


def _check(announced: Sequence[Mapping[str, Any]]) -> None:
    """See that the web service can hold inputs against what is to be announced; it would refuse all kinds for one."""
    for kind in announced:
        for name in ("input_schema", "result_schema"):
            try:
                schemas.validator(kind[name])
            except ValueError as error:
                raise InvalidSettings(f"The {name} of {kind['name']} is no JSON Schema: {error}.") from error


async def _announce(store: Store, announced: Sequence[Mapping[str, Any]]) -> None:
    """Tell the web service what can be run; waits for a database that is still starting."""
    while True:
        try:
            await store.announce_kinds(announced)
        except OUTAGES as error:
            log.warning("waiting for the database", error=repr(error))
            await asyncio.sleep(1)
        else:
            log.info("kinds announced", kinds=sorted(kind["name"] for kind in announced))
            return


async def _warm_up(store: Store, lifecycle: Lifecycle) -> None:
    """Have Postgres plan what each job needs before one waits for it: a connection's first claim takes 20 ms."""

    async def warm_up() -> None:
        for _ in range(PLANNED):
            await lifecycle.claim([], [], "")
            await store.finish([])
            await lifecycle.promote(PROMOTED_AT_ONCE)

    try:
        await asyncio.gather(*(warm_up() for _ in range(BUSY)))
    except OUTAGES as error:
        log.warning("the first jobs may begin later", error=repr(error))

"""The engine without HTTP: store, queue, events and lifecycle on real servers, and jobs whose handler a test writes."""

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID, uuid4

import asyncpg
import psycopg
from pydantic import BaseModel, SecretStr
from redis.asyncio import Redis

from headway import JobContext, kind
from headway import settings as headway_settings
from headway.embedded import Embedded
from headway.events import EVERYONE, Events, Layer, group
from headway.files import Files
from headway.job import Claim, Event, File, Job, Priority
from headway.lifecycle import LEASE, Lifecycle
from headway.queue import Queue, connect
from headway.settings import Settings
from headway.store import Store, prepare
from headway.submission import NewJob
from headway.uploads import Uploads
from services.worker.app import App
from tests.conftest import TEMPLATE, Tenant, make_tenant, until
from tests.faults.proxy import Proxy

DATABASE = "headway_engine"
TABLES = (
    "messages",
    "rooms",
    "schedules",
    "artifacts",
    "failures",
    "events",
    "jobs",
    "files",
    "kinds",
    "api_keys",
    "tenants",
)

Handler = Callable[[JobContext], Awaitable[Any]]

_handlers: dict[str, Handler] = {}


class Call(BaseModel):
    handler: str


@kind("test.call", timeout="30s")
async def call(job: JobContext, input: Call) -> Any:
    """Runs a function of the test."""
    return await _handlers[input.handler](job)


@dataclass(frozen=True)
class Engine:
    """What a worker and the web service are made of."""

    settings: Settings
    tenant: Tenant
    database: asyncpg.Connection
    store: Store
    queue: Queue
    layer: Layer
    lifecycle: Lifecycle
    files: Files
    uploads: Uploads

    async def submit(self, handler: Handler, *, timeout: float = 30, max_attempts: int = 1, **more: Any) -> UUID:
        """A job that runs `handler`, which must be in this process."""
        _handlers[name := uuid4().hex] = handler
        return await self.submit_kind(
            "test.call", {"handler": name}, timeout=timeout, max_attempts=max_attempts, **more
        )

    async def submit_kind(
        self, kind: str, input: Any, *, timeout: float = 30, max_attempts: int = 1, **more: Any
    ) -> UUID:
        asked = {"tags": (), "priority": Priority.NORMAL, "tenant_id": self.tenant.id} | more
        new = NewJob(kind=kind, input=input, timeout=timeout, max_attempts=max_attempts, **asked)
        return (await self.lifecycle.submit(new))[0].id

    async def upload(self, content: bytes, tenant_id: UUID | None = None) -> File:
        async def chunks() -> AsyncIterator[bytes]:
            yield content

        return await self.uploads.receive(
            tenant_id or self.tenant.id, "in.csv", "text/csv", chunks(), size=len(content)
        )

    async def claim(self, job_id: UUID, kind: str = "test.call") -> Claim:
        """Claim as a worker does. Fails if the job is not to be had."""
        [claim] = await self.lifecycle.claim([job_id], [kind], "a worker of the test")
        return claim

    async def expire(self, job_id: UUID) -> None:
        """Let the lease run out now."""
        await self.database.execute("UPDATE jobs SET lease_expires_at = now() - interval '1 ms' WHERE id = $1", job_id)

    async def job(self, job_id: UUID) -> Job:
        job = await self.store.get(job_id, self.tenant.id)
        assert job is not None
        return job

    async def state(self, job_id: UUID) -> str:
        return await self.database.fetchval("SELECT state FROM jobs WHERE id = $1", job_id)

    async def ended(self, job_id: UUID, within: float = 10) -> Job:
        """The job once it is terminal."""

        async def terminal() -> Job | None:
            job = await self.job(job_id)
            return job if job.state.terminal else None

        return await until(terminal, within)

    async def running(self, job_id: UUID) -> None:
        """Returns once the job is claimed."""

        async def claimed() -> bool:
            return await self.state(job_id) == "running"

        await until(claimed)

    async def events(self, job_id: UUID) -> list[Event]:
        """The stored events."""
        return await self.store.events(job_id, self.tenant.id, after=0, limit=1000)

    async def published(self) -> None:
        """Returns once what this engine has to publish is published."""
        if (sending := self.lifecycle._events._task) is not None:
            await sending

    async def row(self, job_id: UUID) -> dict[str, Any]:
        """All columns of the job."""
        return dict(await self.database.fetchrow("SELECT * FROM jobs WHERE id = $1", job_id))

    @asynccontextmanager
    async def heard(self, job_id: UUID) -> AsyncIterator[list[dict[str, Any]]]:
        """The messages that are published for a job from here on, as they come."""
        await self.published()
        heard: list[dict[str, Any]] = []
        subscribed = asyncio.Event()
        channel = await self.layer.new_channel()
        # As the web service does: who is not in the first is not told of anything.
        for name in (EVERYONE, group(job_id)):
            await self.layer.group_add(name, channel)

        async def listen() -> None:
            while True:
                message = await self.layer.receive(channel)
                if message["type"] == "probe":
                    subscribed.set()
                else:
                    heard.append(message)

        async def probe() -> bool:
            await self.layer.group_send(group(job_id), {"type": "probe"})
            return subscribed.is_set()

        listening = asyncio.create_task(listen())
        await until(probe)
        try:
            yield heard
        finally:
            listening.cancel()
            await asyncio.gather(listening, return_exceptions=True)


@asynccontextmanager
async def engine(servers: Embedded, home: Path, **changed: Any) -> AsyncIterator[Engine]:
    """An engine on an empty database and an empty Redis. `changed` are settings in other words than the usual."""
    async with Redis.from_url(servers.redis_url) as redis:
        await redis.flushall()
    database = await _emptied(servers)
    try:
        tenant = await make_tenant(database, "default")
        async with parts(_settings(servers, home).model_copy(update=changed), tenant, database) as engine:
            yield engine
    finally:
        await database.close()


@asynccontextmanager
async def parts(settings: Settings, tenant: Tenant, database: asyncpg.Connection) -> AsyncIterator[Engine]:
    """An engine with connections of its own."""
    url = settings.redis_url.get_secret_value()
    store, queue, layer = Store(settings.database_url.get_secret_value(), pool=5), Queue(connect(url)), Layer(url)
    await store.open()
    events = Events(layer)
    files = Files(settings.files_location, max_size=settings.max_file, options=settings.files_options)
    lifecycle = Lifecycle(store, queue, events)
    try:
        uploads = Uploads.of(settings, store, files)
        yield Engine(settings, tenant, database, store, queue, layer, lifecycle, files, uploads)
    finally:
        await lifecycle.close()
        await queue.close()
        await events.close()
        await store.close()


@asynccontextmanager
async def worker(settings: Settings, *, lease: timedelta = LEASE) -> AsyncIterator[App]:
    """A worker in this process. Leaving drains it."""
    app = await App.open(settings, lease=lease)
    running = asyncio.create_task(app.worker.async_run())
    try:
        yield app
    finally:
        await app.worker.drain(settings.drain)
        await asyncio.gather(running, return_exceptions=True)
        await app.close()


@asynccontextmanager
async def behind_proxy(settings: Settings) -> AsyncIterator[tuple[Proxy, Settings]]:
    """A proxy before Postgres, and settings that go through it."""
    url = settings.database_url.get_secret_value()
    port = urlsplit(url).port
    assert port is not None
    async with Proxy(port) as proxy:
        yield proxy, settings.model_copy(update={"database_url": SecretStr(url.replace(str(port), str(proxy.port)))})


def counted(metric: Any, **labels: str) -> float:
    """What a metric of this process stands at."""
    samples = (sample for family in metric.collect() for sample in family.samples)
    return next((sample.value for sample in samples if sample.labels == labels), 0.0)


async def _emptied(servers: Embedded) -> asyncpg.Connection:
    """A connection to the one database of all tests of the engine, emptied: that is quicker than to make one each."""
    try:
        database = await asyncpg.connect(servers.postgres_url(DATABASE))
    except asyncpg.InvalidCatalogNameError:
        with psycopg.connect(servers.postgres_url("postgres"), autocommit=True) as admin:
            admin.execute(f"CREATE DATABASE {DATABASE} TEMPLATE {TEMPLATE}")
        return await _emptied(servers)
    await prepare(database)
    await database.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
        "WHERE datname = current_database() AND pid <> pg_backend_pid();"
        + "".join(f"DELETE FROM {table};" for table in TABLES)
    )
    return database


def _settings(servers: Embedded, home: Path) -> Settings:
    return headway_settings.load(
        {
            **{key: os.environ[key] for key in ("HEADWAY_REDIS_URL", "HEADWAY_SECRET_KEY", "HEADWAY_KEY_PEPPER")},
            "HEADWAY_DATABASE_URL": servers.postgres_url(DATABASE),
            "HEADWAY_HOME": str(home),
            "HEADWAY_DRAIN": "2",
            "HEADWAY_KINDS": __name__,
        }
    )

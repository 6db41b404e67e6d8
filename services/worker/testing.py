"""Run one kind for real in a test: a worker in the test's process, on a Postgres and a Redis that it starts itself.

    from services.worker.testing import run_kind

    ended = await run_kind(build, Report(month="2026-11"))
    assert ended.result == {"month": "2026-11", "bytes": 181}

The servers start at the first call, in about five seconds, and end with the process. Each call has an empty database.
"""

import asyncio
import atexit
import os
import secrets
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from uuid import UUID, uuid4

import asyncpg
from pydantic_core import to_jsonable_python
from uuid_utils.compat import uuid7

from headway import kinds, settings
from headway.embedded import Embedded
from headway.files import Files
from headway.job import Job, Priority
from headway.settings import Settings
from headway.states import JobState
from headway.submission import NewJob
from headway.uploads import Uploads
from services.worker.app import App

TEMPLATE = "template_of_tests"


@dataclass(frozen=True, slots=True)
class Ended:
    """A job that has ended, with the lines of its log, its artifacts by name, and the tracebacks of its attempts."""

    id: UUID
    state: JobState
    result: Any
    error: Mapping[str, Any] | None
    progress: Mapping[str, Any] | None
    log: tuple[str, ...]
    artifacts: Mapping[str, bytes]
    tracebacks: tuple[str, ...]


async def run_kind(kind: str | Callable[..., Any], input: Any = None, *, max_attempts: int = 1) -> Ended:
    """Submit a job to a worker of its own, and wait until it has ended: `RealWorker.run` on an empty database.

    Raises StartFailed, which says what to do, where there are no servers to start.
    """
    async with real_worker() as worker:
        return await worker.run(kind, input, max_attempts=max_attempts)


class RealWorker:
    """A worker that runs, and what a client could do with it."""

    def __init__(self, app: App, config: Settings, tenant_id: UUID) -> None:
        self._app = app
        self._tenant = tenant_id
        self._files = Files(config.files_location, max_size=config.max_file, options=config.files_options)
        self._uploads = Uploads.of(config, app.store, self._files)

    async def run(
        self, kind: str | Callable[..., Any], input: Any = None, *, max_attempts: int = 1, within: float = 60
    ) -> Ended:
        """Submit a job and wait until it has ended."""
        return await self.ended(await self.submit(kind, input, max_attempts=max_attempts), within=within)

    async def submit(self, kind: str | Callable[..., Any], input: Any = None, *, max_attempts: int = 1) -> UUID:
        """The id of a new job. `kind` is a name or a handler; `input` is JSON, or an instance of the kind's model.

        Raises KeyError for what is no kind.
        """
        found = _kind(kind)
        new = NewJob(
            self._tenant, found.name, to_jsonable_python(input), (), Priority.NORMAL, found.timeout, max_attempts
        )
        job, _ = await self._app.lifecycle.submit(new)
        return job.id

    async def upload(self, content: bytes, name: str = "file") -> UUID:
        """The id of a file with this content, for an input."""

        async def chunks() -> AsyncIterator[bytes]:
            yield content

        kept = await self._uploads.receive(self._tenant, name, "application/octet-stream", chunks(), size=len(content))
        return kept.id

    async def cancel(self, job_id: UUID) -> None:
        """Ask for the job's cancel."""
        await self._app.lifecycle.cancel(job_id, self._tenant)

    async def progress(self, job_id: UUID) -> Mapping[str, Any] | None:
        """What the job has reported last."""
        job = await self._app.store.get(job_id, self._tenant)
        return job.progress if job else None

    async def ended(self, job_id: UUID, *, within: float = 60) -> Ended:
        """The job, once it has ended. Raises TimeoutError after `within` seconds."""
        store = self._app.store
        async with asyncio.timeout(within):
            job = await self._terminal(job_id)
        events = await store.events(job_id, self._tenant, after=0, limit=10_000)
        return Ended(
            job_id,
            job.state,
            job.result,
            job.error,
            job.progress,
            tuple(event.data["message"] for event in events if event.type == "log"),
            {
                artifact.name: b"".join([chunk async for chunk in self._files.read(artifact.key)])
                for artifact in await store.artifacts(job_id, self._tenant)
            },
            tuple(failure["error"].get("traceback", "") for failure in await store.failures(job_id, self._tenant)),
        )

    async def _terminal(self, job_id: UUID) -> Job:
        while True:
            job = await self._app.store.get(job_id, self._tenant)
            if job is not None and job.state.terminal:
                return job
            await asyncio.sleep(0.01)


@asynccontextmanager
async def real_worker(**variables: str) -> AsyncIterator[RealWorker]:
    """A worker with an empty database, which takes files, is watched while it runs, and can cancel.

    `variables` are settings by their names, such as `HEADWAY_SOURCES`; nothing is taken from the environment.
    """
    servers = _servers()
    name = f"test_{uuid4().hex}"
    admin = await asyncpg.connect(servers.postgres_url("postgres"))
    try:
        await admin.execute(f"CREATE DATABASE {name} TEMPLATE {TEMPLATE} STRATEGY file_copy")
        with TemporaryDirectory(prefix="headway-") as home:
            config = settings.load(_environment(servers, name) | {"HEADWAY_HOME": home} | variables)
            app = await App.open(config)
            try:
                async with _working(app):
                    yield RealWorker(app, config, await _make_tenant(config))
            finally:
                await app.close()
    finally:
        await admin.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
        await admin.close()


@asynccontextmanager
async def _working(app: App) -> AsyncIterator[None]:
    working = asyncio.create_task(app.worker.async_run())
    try:
        yield
    finally:
        await app.worker.drain(0)
        await asyncio.gather(working, return_exceptions=True)


def _kind(kind: str | Callable[..., Any]) -> kinds.Kind:
    found = kinds.discover()
    if isinstance(kind, str):
        return found[kind]
    for one in found.values():
        if one.handler is kind:
            return one
    raise KeyError(f"{kind!r} is no kind; write @kind above it, or give the name of one.")


async def _make_tenant(config: Settings) -> UUID:
    database = await asyncpg.connect(config.database_url.get_secret_value())
    tenant_id = uuid7()
    await database.execute("INSERT INTO tenants (id, name) VALUES ($1, 'test')", tenant_id)
    await database.close()
    return tenant_id


@cache
def _servers() -> Embedded:
    """The servers of this process, and on them a migrated database to copy."""
    stack = ExitStack()
    home = stack.enter_context(TemporaryDirectory(prefix="headway-"))
    servers = stack.enter_context(Embedded(Path(home), durable=False))
    atexit.register(stack.close)
    servers.create_database(TEMPLATE)
    others = {name: value for name, value in os.environ.items() if not name.startswith("HEADWAY_")}
    ours = {"HEADWAY_HOME": home, "DJANGO_SETTINGS_MODULE": "services.web.settings"}
    subprocess.run(
        [sys.executable, "-m", "services.web.manage", "migrate", "--skip-checks", "--verbosity=0"],
        env=others | ours | _environment(servers, TEMPLATE),
        check=True,
    )
    return servers


def _environment(servers: Embedded, database: str) -> dict[str, str]:
    return {
        "HEADWAY_DATABASE_URL": servers.postgres_url(database),
        "HEADWAY_REDIS_URL": servers.redis_url,
        "HEADWAY_SECRET_KEY": secrets.token_hex(32),
        "HEADWAY_KEY_PEPPER": secrets.token_hex(32),
        "HEADWAY_DATABASE_POOL": "4",
    }

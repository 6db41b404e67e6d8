"""Real servers for all tests, a database of its own for each, and the service itself on a port of its own."""

import asyncio
import os
import secrets
import shutil
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import httpx
import hypothesis
import psycopg
import pytest
from redis.asyncio import Redis
from uuid_utils.compat import uuid7

from headway import keys
from headway import settings as headway_settings
from headway.client import Client
from headway.embedded import Embedded
from headway.settings import Settings

PEPPER = "a pepper that only the tests use, of some length"
TEMPLATE = "headway_template"

# What takes long says nothing on a machine that is shared; each test has a timeout.
hypothesis.settings.register_profile("headway", deadline=None)
hypothesis.settings.load_profile("headway")


def in_memory() -> Path | None:
    """A folder in memory, if there is room: to copy a database there costs a tenth of what it costs on a disk."""
    memory = Path("/dev/shm")
    return memory if memory.is_dir() and shutil.disk_usage(memory).free > 2 << 30 else None


@pytest.fixture(scope="session")
def servers() -> Iterator[Embedded]:
    """Postgres and Redis, and a migrated database to copy."""
    # Not below pytest's folder: another run shuts that for other users, and as root Postgres runs as one.
    with (
        TemporaryDirectory(prefix="headway-", dir=in_memory()) as home,
        Embedded(Path(home), durable=False) as servers,
    ):
        servers.create_database(TEMPLATE)
        os.environ |= {
            "HEADWAY_DATABASE_URL": servers.postgres_url(TEMPLATE),
            "HEADWAY_REDIS_URL": servers.redis_url,
            "HEADWAY_SECRET_KEY": secrets.token_hex(32),
            "HEADWAY_KEY_PEPPER": PEPPER,
            "HEADWAY_FETCH_ALLOW": "127.0.0.0/8",
            "DJANGO_SETTINGS_MODULE": "services.web.settings",
        }
        import django
        from django.core.management import call_command
        from django.db import connections

        django.setup()
        call_command("migrate", verbosity=0)
        connections.close_all()
        yield servers


@pytest.fixture
def settings(servers: Embedded, tmp_path: Path) -> Iterator[Settings]:
    """Settings of a fresh database, a source `default` that the fixture `source` makes, and an empty home folder."""
    name = f"t{uuid4().hex[:12]}"
    with psycopg.connect(servers.postgres_url("postgres"), autocommit=True) as admin:
        admin.execute(f"CREATE DATABASE {name} TEMPLATE {TEMPLATE} STRATEGY file_copy")
        source = servers.postgres_url(f"{name}_source").replace("postgresql://", "postgresql+asyncpg://")
        yield headway_settings.load(
            {
                **{key: os.environ[key] for key in ("HEADWAY_REDIS_URL", "HEADWAY_SECRET_KEY", "HEADWAY_KEY_PEPPER")},
                "HEADWAY_DATABASE_URL": servers.postgres_url(name),
                "HEADWAY_SOURCES": f'{{"default": "{source}"}}',
                "HEADWAY_HOME": str(tmp_path),
                "HEADWAY_DRAIN": "2",
            }
        )
        for database in (name, f"{name}_source"):
            admin.execute(f"DROP DATABASE IF EXISTS {database} WITH (FORCE)")


@pytest.fixture
async def redis(settings: Settings) -> AsyncIterator[Redis]:
    """An empty Redis."""
    async with Redis.from_url(settings.redis_url.get_secret_value()) as client:
        await client.flushall()
        yield client


@pytest.fixture
async def database(settings: Settings) -> AsyncIterator[asyncpg.Connection]:
    """A connection of the test's own to Headway's database."""
    from headway.store import prepare

    connection = await asyncpg.connect(settings.database_url.get_secret_value())
    await prepare(connection)
    yield connection
    await connection.close()


@pytest.fixture
async def source(servers: Embedded, settings: Settings) -> AsyncIterator[asyncpg.Connection]:
    """The source `default`, empty, and a connection of the test's own to it."""
    url = settings.sources["default"].url.get_secret_value()
    with psycopg.connect(servers.postgres_url("postgres"), autocommit=True) as admin:
        admin.execute(f"CREATE DATABASE {url.rpartition('/')[2]} TEMPLATE template0 STRATEGY file_copy")
    connection = await asyncpg.connect(url.replace("postgresql+asyncpg://", "postgresql://"))
    yield connection
    await connection.close()


@dataclass(frozen=True)
class Tenant:
    """A tenant and a key of it."""

    id: UUID
    api_key: str
    key_id: str


async def make_tenant(database: asyncpg.Connection, name: str) -> Tenant:
    key, tenant_id = keys.new(), uuid7()
    await database.execute("INSERT INTO tenants (id, name) VALUES ($1, $2)", tenant_id, name)
    await database.execute(
        "INSERT INTO api_keys (id, tenant_id, name, digest) VALUES ($1, $2, 'test', $3)",
        key.id,
        tenant_id,
        key.digest(PEPPER),
    )
    return Tenant(tenant_id, key.text, key.id)


@pytest.fixture
async def tenant(database: asyncpg.Connection) -> Tenant:
    return await make_tenant(database, "default")


@asynccontextmanager
async def web(settings: Settings, *, port: int = 0) -> AsyncIterator[str]:
    """The web service on uvicorn, as it is served; yields its URL. Its frames must be those that it describes."""
    from services.web.__main__ import Server, server_config
    from tests.described import Described

    listener = socket.create_server((settings.host, port))
    application = Described(settings)
    server = Server(server_config(application, settings))
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started:
        assert not serving.done(), "the web service did not start"
        await asyncio.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        await serving
    assert application.faults == []


@asynccontextmanager
async def worker(settings: Settings) -> AsyncIterator[Any]:
    """A worker in this process; yields its App. Leaving drains it."""
    from services.worker.app import App

    app = await App.open(settings)
    running = asyncio.create_task(app.worker.async_run())
    try:
        yield app
    finally:
        await app.worker.drain(settings.drain)
        await asyncio.gather(running, return_exceptions=True)
        await app.close()


@dataclass(frozen=True)
class Service:
    """Headway as its users meet it."""

    url: str
    api_key: str
    tenant: Tenant
    settings: Settings
    http: httpx.AsyncClient
    client: Client


@pytest.fixture
async def service(settings: Settings, redis: Redis, tenant: Tenant) -> AsyncIterator[Service]:
    """Web and worker, running; an HTTP client and Headway's own client with a key."""
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(worker(settings))
        url = await stack.enter_async_context(web(settings))
        # Reading the certificates takes 40 ms, and no client of the tests needs them.
        http = await stack.enter_async_context(
            httpx.AsyncClient(
                base_url=url, headers={"Authorization": f"Bearer {tenant.api_key}"}, trust_env=False, verify=False
            )
        )
        client = await stack.enter_async_context(Client(url, tenant.api_key))
        yield Service(url, tenant.api_key, tenant, settings, http, client)


def files_below(folder: Path) -> list[Path]:
    """Every file, however deep. Unlike `rglob`, it puts up with folders that a worker deletes meanwhile."""
    return [Path(base, name) for base, _, names in os.walk(folder) for name in names]


async def until(condition: Callable[[], Any], deadline: float = 10.0) -> Any:
    """The first true value of `condition` (or of what it awaits), looked at often. Fails after `deadline` seconds."""
    async with asyncio.timeout(deadline):
        while True:
            value = condition()
            if asyncio.iscoroutine(value):
                value = await value
            if value:
                return value
            await asyncio.sleep(0.01)


async def run(service: Service, kind: str, input: Any, **fields: Any) -> dict[str, Any]:
    """Submit a job and wait until it has ended."""
    accepted = await service.http.post("/api/v1/jobs", json={"kind": kind, "input": input, **fields})
    assert accepted.status_code == 202, accepted.text

    async def ended() -> dict[str, Any] | None:
        job = (await service.http.get(accepted.headers["Location"])).json()
        return job if job["finished_at"] else None

    return await until(ended)

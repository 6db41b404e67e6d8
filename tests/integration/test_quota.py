"""What a tenant may keep: never more than its quota, and counted to the byte whatever happens at the same time."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import httpx
import pytest

from headway.settings import Settings
from tests.conftest import Tenant, make_tenant
from tests.integration.test_api_bad_input import refused
from tests.integration.test_api_files import FILES, kept
from tests.integration.test_api_jobs import idle
from tests.integration.test_api_uploads import TUS, UPLOADS, create, patch

QUOTA = 100_000


@pytest.fixture
async def http(settings: Settings, tenant: Tenant) -> AsyncIterator[httpx.AsyncClient]:
    async with idle(settings.model_copy(update={"quota": QUOTA}), tenant) as http:
        yield http


async def in_pieces(size: int) -> AsyncIterator[bytes]:
    """A body whose length is not announced."""
    for _ in range(10):
        yield bytes(size // 10)


async def counted(database: asyncpg.Connection) -> int:
    """What the tenant keeps as it is counted, which is the sum of what is there."""
    stored, there = await database.fetchrow(
        "SELECT stored, (SELECT coalesce(sum(size), 0) FROM files WHERE tenant_id = tenants.id) "
        "FROM tenants WHERE name = 'default'"
    )
    assert stored == there
    return int(stored)


async def test_what_does_not_fit_is_refused_with_a_sentence_and_leaves_nothing(
    http: httpx.AsyncClient, settings: Settings, database: asyncpg.Connection
) -> None:
    assert (await http.post(FILES, content=bytes(60_000))).status_code == 201
    upload = await create(http, 30_000)
    before = kept(settings)
    for content in (bytes(10_001), in_pieces(20_000), in_pieces(5_000_000)):
        problem = refused(await http.post(FILES, content=content), 413, "quota-exceeded")
        assert "may keep 100,000 bytes of files and keeps 90,000" in problem["detail"]
        assert "HEADWAY_QUOTA" in problem["detail"]
    refused(await http.post(FILES, files={"f": ("a", bytes(10_001))}), 413, "quota-exceeded")
    refused(await http.post(UPLOADS, headers={**TUS, "Upload-Length": "10001"}), 413, "quota-exceeded")
    assert kept(settings) == before
    assert await counted(database) == 90_000
    for content in (bytes(2_000), in_pieces(3_000)):
        assert (await http.post(FILES, content=content)).status_code == 201
    assert (await http.post(FILES, files={"f": ("a", bytes(5_000))})).status_code == 201
    assert (await patch(http, upload, 0, bytes(30_000))).headers["Headway-File"]
    assert await counted(database) == QUOTA
    assert (await http.post(FILES, content=b"")).status_code == 201


async def test_what_is_deleted_or_given_up_makes_room(http: httpx.AsyncClient, database: asyncpg.Connection) -> None:
    file = await http.post(FILES, content=bytes(QUOTA))
    refused(await http.post(FILES, content=b"x"), 413, "quota-exceeded")
    await http.delete(file.headers["Location"])
    upload = await create(http, QUOTA)
    await patch(http, upload, 0, bytes(10))
    refused(await http.post(FILES, content=b"x"), 413, "quota-exceeded")
    await http.delete(upload, headers=TUS)
    assert await counted(database) == 0
    assert (await http.post(FILES, content=in_pieces(QUOTA))).status_code == 201


async def test_another_tenant_has_a_quota_of_its_own(http: httpx.AsyncClient, database: asyncpg.Connection) -> None:
    stranger = {"Authorization": f"Bearer {(await make_tenant(database, 'stranger')).api_key}"}
    for headers in ({}, stranger):
        assert (await http.post(FILES, content=bytes(QUOTA), headers=headers)).status_code == 201


async def test_uploads_side_by_side_are_counted_to_the_byte(
    http: httpx.AsyncClient, database: asyncpg.Connection
) -> None:
    async def one(number: int) -> Any:
        size = 9_000 + number
        if number % 3 == 0:
            return await http.post(FILES, content=bytes(size))
        if number % 3 == 1:
            return await http.post(FILES, content=in_pieces(size))
        created = await http.post(UPLOADS, headers={**TUS, "Upload-Length": str(size)})
        if created.status_code == 201 and number % 2:
            await http.delete(created.headers["Location"], headers=TUS)
        return created

    answers = await asyncio.gather(*(one(number) for number in range(60)))
    assert {answer.status_code for answer in answers} == {201, 413}
    kept = await counted(database)
    assert 0 < kept <= QUOTA
    # What is deleted last makes room that nobody asks for again; it is there to the byte.
    assert (await http.post(FILES, content=bytes(QUOTA - kept))).status_code == 201
    refused(await http.post(FILES, content=b"x"), 413, "quota-exceeded")
    for file in (await http.get(FILES)).json()["files"]:
        await http.delete(f"{FILES}/{file['id']}")
    await counted(database)

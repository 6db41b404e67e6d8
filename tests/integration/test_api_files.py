"""Files: streamed in at constant memory, whole or not at all."""

import asyncio
import os
from collections.abc import AsyncIterator
from hashlib import sha256
from pathlib import Path
from urllib.parse import urlsplit

import asyncpg
import httpx
import pytest

from headway.settings import Settings
from tests.conftest import Tenant, until
from tests.integration.test_api_bad_input import refused
from tests.integration.test_api_jobs import idle

FILES = "/api/v1/files"
MIB = 1 << 20


@pytest.fixture
async def http(settings: Settings, tenant: Tenant) -> AsyncIterator[httpx.AsyncClient]:
    """The web service alone, with files of at most 4 MiB."""
    async with idle(settings.model_copy(update={"max_file": 4 * MIB}), tenant) as http:
        yield http


def kept(settings: Settings) -> list[Path]:
    """Every file in storage, also what is only half-written."""
    return [path for path in (settings.home / "files").rglob("*") if path.is_file()]


async def pieces(data: bytes, size: int = 50_000) -> AsyncIterator[bytes]:
    for start in range(0, len(data), size):
        yield data[start : start + size]


async def test_a_file_is_kept_as_it_was_sent(
    http: httpx.AsyncClient, settings: Settings, tenant: Tenant, database: asyncpg.Connection
) -> None:
    data = os.urandom(3 * MIB + 17)
    for name, content_type, content in (
        ("orders.csv", "text/csv; charset=utf-8", data),
        ("größe 日本 \U0001f4a9 .csv", "application/x-any+json", pieces(data)),
        ("empty", "text/plain", b""),
    ):
        answer = await http.post(FILES, params={"name": name}, content=content, headers={"Content-Type": content_type})
        assert answer.status_code == 201, answer.text
        file = answer.json()
        sent = b"" if name == "empty" else data
        assert (file["name"], file["content_type"], file["size"]) == (name, content_type, len(sent))
        assert file["sha256"] == sha256(sent).hexdigest()
        assert answer.headers["Location"] == f"{FILES}/{file['id']}"
        assert (await http.get(answer.headers["Location"])).json() == file
        assert (settings.home / "files" / "files" / str(tenant.id) / file["id"]).read_bytes() == sent
    assert await database.fetchval("SELECT count(*) FROM files") == len(kept(settings)) == 3
    for headers in ({}, {"Content-Type": "no type"}, {"Content-Type": "text/html; <script>"}):
        file = (await http.post(FILES, content=b"x", headers=headers)).json()
        assert (file["name"], file["content_type"]) == ("file", "application/octet-stream")


async def test_names_that_could_be_taken_for_paths_are_refused(
    http: httpx.AsyncClient, settings: Settings, database: asyncpg.Connection
) -> None:
    for name in (
        "../up",
        "a/b",
        "a\\b",
        "/etc/passwd",
        "",
        "a\nb",
        "a\rb",
        "a\0b",
        "\x1b[1m",
        "a\x7f",
        "a\x85b",
        "x" * 256,
    ):
        refused(await http.post(FILES, params={"name": name}, content=b"x"), 422, "invalid-request")
    refused(await http.post(FILES, params={"nome": "x"}, content=b"x"), 422, "invalid-request")
    assert await database.fetchval("SELECT count(*) FROM files") == 0
    assert kept(settings) == []


async def test_a_file_over_the_limit_leaves_nothing(
    http: httpx.AsyncClient, settings: Settings, database: asyncpg.Connection
) -> None:
    for content in (bytes(4 * MIB + 1), pieces(bytes(4 * MIB + 1)), pieces(bytes(40 * MIB), MIB)):
        problem = refused(await http.post(FILES, content=content), 413, "too-large")
        assert "4,194,304 bytes" in problem["detail"]
    assert kept(settings) == []
    assert await database.fetchval("SELECT count(*) FROM files") == 0
    assert (await http.post(FILES, content=pieces(bytes(4 * MIB)))).status_code == 201


async def test_an_upload_that_breaks_off_leaves_nothing(
    http: httpx.AsyncClient, settings: Settings, database: asyncpg.Connection
) -> None:
    url = urlsplit(str(http.base_url))
    head = f"POST {FILES} HTTP/1.1\r\nHost: x\r\nAuthorization: {http.headers['Authorization']}\r\n"
    for framing, body in (
        ("Content-Length: 4000000", bytes(3 * MIB)),
        ("Transfer-Encoding: chunked", b"%x\r\n" % (3 * MIB) + bytes(3 * MIB) + b"\r\n5\r\nab"),
    ):
        _, writer = await asyncio.open_connection(url.hostname, url.port)
        writer.write(f"{head}{framing}\r\n\r\n".encode() + body)
        await writer.drain()
        await until(lambda: kept(settings))
        writer.close()
        await writer.wait_closed()
        await until(lambda: not kept(settings))
    assert await database.fetchval("SELECT count(*) FROM files") == 0


async def test_a_file_that_cannot_be_recorded_leaves_nothing(
    http: httpx.AsyncClient, settings: Settings, database: asyncpg.Connection
) -> None:
    await database.execute("ALTER TABLE files ADD CONSTRAINT none CHECK (size = 0)")
    refused(await http.post(FILES, content=b"x"), 500, "internal")
    assert kept(settings) == []


async def test_memory_stays_flat_however_large_the_file(settings: Settings, tenant: Tenant) -> None:
    piece, count = os.urandom(MIB), 200
    resident: list[int] = []

    async def large() -> AsyncIterator[bytes]:
        for _ in range(count):
            resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
            yield piece

    async with idle(settings, tenant) as http:
        await http.post(FILES, content=pieces(piece))
        answer = await http.post(FILES, content=large(), timeout=60)
        assert (answer.status_code, answer.json()["size"]) == (201, count * MIB)
    assert max(resident) - resident[0] < 64 * MIB

"""Files: streamed in at constant memory, whole or not at all."""

import asyncio
import base64
import os
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path
from urllib.parse import urlsplit

import asyncpg
import httpx
import pytest
from uuid_utils.compat import uuid7

from headway.settings import Settings
from tests.conftest import Tenant, files_below, make_tenant, until
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
    return files_below(settings.home / "files")


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
        assert (await http.get(f"{answer.headers['Location']}/content")).content == sent
        assert all(str(tenant.id) in path.parts for path in kept(settings))
    assert await database.fetchval("SELECT count(*) FROM files") == 3
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

    async def forgotten() -> bool:
        return bool(await database.fetchval("SELECT count(*) = 0 FROM files"))

    await until(forgotten)


def digests(data: bytes, *, older: bool = False) -> dict[str, str]:
    digest = base64.b64encode(sha256(data).digest()).decode()
    return {"Digest": f"SHA-256={digest}"} if older else {"Content-Digest": f"sha-256=:{digest}:"}


async def test_a_body_is_held_against_its_digest(
    http: httpx.AsyncClient, settings: Settings, database: asyncpg.Connection
) -> None:
    data = os.urandom(MIB)
    other = "sha-512=:AAAA:, unixsum=:30637:"
    for headers in (
        digests(data),
        digests(data, older=True),
        {**digests(data), **digests(data, older=True)},
        {"Content-Digest": f"{other}, {digests(data)['Content-Digest']}"},
        {"Content-Digest": other},
    ):
        assert (await http.post(FILES, content=pieces(data), headers=headers)).status_code == 201
    before = kept(settings)
    for headers in (
        digests(b"x"),
        digests(b"x", older=True),
        {**digests(data), **digests(b"x", older=True)},
        {"Content-Digest": f"{digests(data)['Content-Digest']}, {digests(b'x')['Content-Digest']}"},
    ):
        refused(await http.post(FILES, content=pieces(data), headers=headers), 422, "digest-mismatch")
    for wrong in ("sha-256=abc", "sha-256=:AAAA:", "sha-256=:not base64:", "sha-256"):
        refused(await http.post(FILES, content=data, headers={"Content-Digest": wrong}), 400, "bad-request")
    refused(await http.post(FILES, content=data, headers={"Digest": "SHA-256=:AAAA:"}), 400, "bad-request")
    assert kept(settings) == before
    assert await database.fetchval("SELECT count(*) FROM files") == 5


async def test_a_form_with_a_file_is_as_good_as_the_file(http: httpx.AsyncClient) -> None:
    data = os.urandom(3 * MIB) + b"\r\n--boundary\r\n--"
    answer = await http.post(FILES, files={"any": ("größe.csv", data, "text/csv")})
    assert answer.status_code == 201, answer.text
    file = answer.json()
    assert (file["name"], file["content_type"], file["size"]) == ("größe.csv", "text/csv", len(data))
    assert (await http.get(f"{FILES}/{file['id']}/content")).content == data
    named = await http.post(FILES, params={"name": "other"}, files={"any": ("a.csv", b"", "no type")})
    assert [named.json()[key] for key in ("name", "content_type", "size")] == ["other", "application/octet-stream", 0]
    form = httpx.Request("POST", "http://x", files={"f": ("a", data)})
    body, headers = form.read(), {"Content-Type": form.headers["Content-Type"]}
    assert (await http.post(FILES, content=body, headers=headers | digests(body))).status_code == 201
    assert (await http.post(FILES, content=pieces(body + b"\r\n", len(body)), headers=headers)).status_code == 201
    refused(await http.post(FILES, content=body, headers=headers | digests(data)), 422, "digest-mismatch")


async def test_a_form_that_is_not_one_file_leaves_nothing(
    http: httpx.AsyncClient, settings: Settings, database: asyncpg.Connection
) -> None:
    for form in (
        {"files": [("a", ("a", b"1")), ("b", ("b", b"2"))]},
        {"files": {"a": ("a", b"1")}, "data": {"expires": "never"}},
        {"files": {"a": (None, b"1")}},
        {"files": {"a": ("../up", b"1")}},
        {"files": {"a": ("a\\b", b"1")}},
    ):
        refused(await http.post(FILES, **form), 422, "invalid-request")
    whole = httpx.Request("POST", "http://x", files={"f": ("a", bytes(MIB))})
    headers = {"Content-Type": whole.headers["Content-Type"]}
    for body in (whole.read()[:-4], whole.read()[:MIB], b"--", b"x" * MIB):
        refused(await http.post(FILES, content=body, headers=headers), 400, "bad-request")
    refused(await http.post(FILES, content=b"", headers=headers), 400, "bad-request")
    for boundary in ("", "; boundary=", "; boundary=" + "b" * 2000):
        answer = await http.post(FILES, content=b"--b--", headers={"Content-Type": f"multipart/form-data{boundary}"})
        refused(answer, 400, "bad-request")
    refused(await http.post(FILES, files={"f": ("a", bytes(4 * MIB + 1))}), 413, "too-large")
    assert kept(settings) == []
    assert await database.fetchval("SELECT count(*) FROM files") == 0
    assert await database.fetchval("SELECT stored FROM tenants") == 0


async def test_files_are_listed_newest_first_and_belong_to_their_tenant(
    http: httpx.AsyncClient, database: asyncpg.Connection
) -> None:
    stranger = {"Authorization": f"Bearer {(await make_tenant(database, 'stranger')).api_key}"}
    files = [(await http.post(FILES, params={"name": f"n{n}"}, content=b"x")).json() for n in range(5)]
    theirs = (await http.post(FILES, content=b"secret", headers=stranger)).json()
    first = (await http.get(FILES, params={"limit": 3})).json()
    assert first["files"] == files[:1:-1]
    second = (await http.get(FILES, params={"limit": 3, "cursor": first["next_cursor"]})).json()
    assert second == {"files": files[1::-1], "next_cursor": None}
    for answer in (
        await http.get(f"{FILES}/{theirs['id']}"),
        await http.get(f"{FILES}/{theirs['id']}/content"),
        await http.delete(f"{FILES}/{theirs['id']}"),
    ):
        refused(answer, 404, "not-found")
    refused(await http.get(FILES, params={"cursor": "x"}), 400, "bad-request")
    refused(await http.get(FILES, params={"limit": 501}), 422, "invalid-request")


async def test_a_file_is_deleted(http: httpx.AsyncClient, settings: Settings, database: asyncpg.Connection) -> None:
    path = (await http.post(FILES, content=b"x")).headers["Location"]
    assert (await http.delete(path)).status_code == 204
    assert kept(settings) == []
    for answer in (await http.delete(path), await http.get(path), await http.get(f"{path}/content")):
        refused(answer, 404, "not-found")
    assert (await http.get(FILES)).json()["files"] == []
    assert await database.fetchval("SELECT stored FROM tenants") == 0


async def test_a_file_goes_when_its_time_is_over(http: httpx.AsyncClient, database: asyncpg.Connection) -> None:
    now = datetime.now(UTC)
    usual = (await http.post(FILES, content=b"x")).json()
    assert timedelta(days=29) < datetime.fromisoformat(usual["expires_at"]) - now < timedelta(days=31)
    soon = now + timedelta(seconds=30)
    file = (await http.post(FILES, params={"expires": soon.isoformat()}, content=b"x")).json()
    assert abs(datetime.fromisoformat(file["expires_at"]) - soon) < timedelta(milliseconds=1)
    await database.execute("UPDATE files SET expires_at = now() WHERE id = $1", file["id"])
    refused(await http.get(f"{FILES}/{file['id']}"), 404, "not-found")
    refused(await http.get(f"{FILES}/{file['id']}/content"), 404, "not-found")
    assert [one["id"] for one in (await http.get(FILES)).json()["files"]] == [usual["id"]]
    for wrong in (now.isoformat(), "2999-01-01T00:00:00Z", "2001-01-01", "tomorrow"):
        refused(await http.post(FILES, params={"expires": wrong}, content=b"x"), 422, "invalid-request")


async def test_a_download_is_whole_or_a_range_of_it(http: httpx.AsyncClient) -> None:
    data = os.urandom(2 * MIB)
    answer = await http.post(FILES, params={"name": 'a "b" 100%.bin'}, content=data)
    path, etag = f"{answer.headers['Location']}/content", f'"{answer.json()["sha256"]}"'
    whole = await http.get(path)
    assert (whole.status_code, whole.content, whole.headers["ETag"]) == (200, data, etag)
    assert whole.headers["Accept-Ranges"] == "bytes"
    assert whole.headers["X-Content-Type-Options"] == "nosniff"
    assert whole.headers["Content-Disposition"] == (
        "attachment; filename=\"a _b_ 100_.bin\"; filename*=UTF-8''a%20%22b%22%20100%25.bin"
    )
    part = await http.get(path, headers={"Range": "bytes=5-9", "If-Range": etag})
    assert (part.status_code, part.content) == (206, data[5:10])
    assert part.headers["Content-Range"] == f"bytes 5-9/{2 * MIB}"
    for headers in (
        {"Range": "bytes=0-1,5-9"},
        {"Range": "bytes=5-9", "If-Range": '"other"'},
        {"Range": "lines=1-2"},
        {"Range": "bytes=5-2"},
    ):
        assert (await http.get(path, headers=headers)).content == data
    assert (await http.get(path, headers={"If-None-Match": etag})).status_code == 304
    head = await http.head(path, headers={"Range": "bytes=5-9"})
    assert (head.status_code, head.content, head.headers["Content-Length"]) == (200, b"", str(2 * MIB))
    beyond = await http.get(path, headers={"Range": f"bytes={2 * MIB}-"})
    assert (beyond.status_code, beyond.headers["Content-Range"]) == (416, f"bytes */{2 * MIB}")
    assert beyond.json()["type"] == "urn:headway:problem:range-not-satisfiable"


async def test_a_file_from_before_there_were_parts_is_still_to_be_had(
    http: httpx.AsyncClient, settings: Settings, tenant: Tenant, database: asyncpg.Connection
) -> None:
    file_id = uuid7()
    old = settings.home / "files" / "files" / str(tenant.id) / str(file_id)
    old.parent.mkdir(parents=True)
    old.write_bytes(b"old")
    await database.execute(
        "INSERT INTO files (id, tenant_id, name, content_type, size, sha256) VALUES ($1, $2, 'old', 'text/csv', 3, $3)",
        file_id,
        tenant.id,
        sha256(b"old").hexdigest(),
    )
    path = f"{FILES}/{file_id}"
    assert (await http.get(path)).json()["expires_at"] is None
    assert (await http.get(f"{path}/content")).content == b"old"
    assert (await http.delete(path)).status_code == 204
    assert not old.exists()


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

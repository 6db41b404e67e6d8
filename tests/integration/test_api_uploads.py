"""Uploads in several requests: whatever breaks, what arrived is kept, once, and the file is what was sent."""

import asyncio
import base64
import io
import os
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from hashlib import sha1, sha256
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import httpx
import pytest
from tusclient.client import TusClient

from headway import uploads
from headway.settings import Settings
from services.web.api import bodies
from tests.conftest import Tenant, make_tenant, until
from tests.integration.test_api_bad_input import raw, refused
from tests.integration.test_api_files import FILES, MIB, kept
from tests.integration.test_api_jobs import idle

UPLOADS = "/api/v1/uploads"
TUS = {"Tus-Resumable": "1.0.0"}
BYTES = {**TUS, "Content-Type": "application/offset+octet-stream"}


@pytest.fixture
async def http(settings: Settings, tenant: Tenant) -> AsyncIterator[httpx.AsyncClient]:
    """The web service alone, with files of at most 64 MiB."""
    async with idle(settings.model_copy(update={"max_file": 64 * MIB}), tenant) as http:
        yield http


def b64(text: str | bytes) -> str:
    return base64.b64encode(text.encode() if isinstance(text, str) else text).decode()


async def create(http: httpx.AsyncClient, length: int, **headers: str) -> str:
    """The path of a new upload."""
    answer = await http.post(UPLOADS, headers={**TUS, "Upload-Length": str(length), **headers})
    assert answer.status_code == 201, answer.text
    assert answer.headers["Tus-Resumable"] == "1.0.0"
    return answer.headers["Location"]


async def patch(http: httpx.AsyncClient, path: str, offset: int, data: Any, **headers: str) -> httpx.Response:
    return await http.patch(path, content=data, headers={**BYTES, "Upload-Offset": str(offset), **headers})


async def offset(http: httpx.AsyncClient, path: str) -> int:
    answer = await http.head(path, headers=TUS)
    assert answer.status_code == 200
    assert answer.headers["Cache-Control"] == "no-store"
    return int(answer.headers["Upload-Offset"])


async def content(http: httpx.AsyncClient, path: str) -> bytes:
    """The bytes of the file that an upload became."""
    upload = (await http.get(path)).json()
    file = (await http.get(f"{FILES}/{upload['file']}")).json()
    data = (await http.get(f"{FILES}/{upload['file']}/content")).content
    assert file["sha256"] == sha256(data).hexdigest()
    assert file["size"] == len(data)
    return data


async def test_a_file_arrives_in_pieces(http: httpx.AsyncClient, settings: Settings) -> None:
    data = os.urandom(3 * MIB)
    metadata = f"filename {b64('größe.csv')},filetype {b64('text/csv')},empty"
    path = await create(http, len(data), **{"Upload-Metadata": metadata})
    assert (await http.get(path)).json()["file"] is None
    assert kept(settings) == []

    first = await patch(http, path, 0, data[:MIB])
    assert (first.status_code, first.headers["Upload-Offset"]) == (204, str(MIB))
    expires = datetime.strptime(first.headers["Upload-Expires"], "%a, %d %b %Y %H:%M:%S GMT").replace(tzinfo=UTC)
    assert timedelta(hours=23) < expires - datetime.now(UTC) <= timedelta(hours=24)
    head = await http.head(path, headers=TUS)
    assert (head.headers["Upload-Length"], head.headers["Upload-Metadata"]) == (str(len(data)), metadata)
    assert await offset(http, path) == MIB
    assert (await http.get(FILES)).json()["files"] == []
    refused(await http.get(path.replace("uploads", "files")), 404, "not-found")
    await patch(http, path, MIB, data[MIB : MIB + 7])
    last = await patch(http, path, MIB + 7, data[MIB + 7 :])

    assert last.status_code == 204
    file = (await http.get(f"{FILES}/{last.headers['Headway-File']}")).json()
    assert (file["name"], file["content_type"], file["size"]) == ("größe.csv", "text/csv", len(data))
    assert await content(http, path) == data
    head = await http.head(path, headers=TUS)
    assert (head.headers["Upload-Offset"], head.headers["Headway-File"]) == (str(len(data)), file["id"])
    assert "Upload-Expires" not in head.headers
    assert [file["id"] for file in (await http.get(FILES)).json()["files"]] == [file["id"]]


async def test_a_file_without_bytes_is_there_at_once(http: httpx.AsyncClient) -> None:
    path = await create(http, 0)
    assert await content(http, path) == b""
    refused(await patch(http, path, 0, b"x"), 413, "too-large")


async def test_the_first_bytes_may_come_with_the_creation(http: httpx.AsyncClient) -> None:
    headers = {**BYTES, "Upload-Length": "10"}
    begun = await http.post(UPLOADS, content=b"01234", headers=headers)
    assert (begun.status_code, begun.headers["Upload-Offset"]) == (201, "5")
    await patch(http, begun.headers["Location"], 5, b"56789")
    assert await content(http, begun.headers["Location"]) == b"0123456789"
    whole = await http.post(UPLOADS, content=b"0123456789", headers=headers)
    assert whole.headers["Headway-File"]


async def test_what_is_spoken_can_be_asked(http: httpx.AsyncClient) -> None:
    answer = await http.options(UPLOADS)
    assert answer.status_code == 204
    assert answer.headers["Tus-Version"] == "1.0.0"
    assert answer.headers["Tus-Max-Size"] == str(64 * MIB)
    assert set(answer.headers["Tus-Extension"].split(",")) == {
        "creation",
        "creation-with-upload",
        "checksum",
        "expiration",
        "termination",
    }
    assert answer.headers["Tus-Checksum-Algorithm"] == "sha1,sha256"


@pytest.mark.parametrize("algorithm", ["sha1", "sha256"])
async def test_damaged_bytes_are_refused_and_may_be_sent_again(
    http: httpx.AsyncClient, settings: Settings, algorithm: str
) -> None:
    data = os.urandom(2 * MIB)
    digest = {"sha1": sha1, "sha256": sha256}[algorithm](data).digest()
    checksum = {"Upload-Checksum": f"{algorithm} {b64(digest)}"}
    path = await create(http, len(data))
    damaged = await patch(http, path, 0, data[:-1] + bytes([data[-1] ^ 1]), **checksum)
    refused(damaged, 460, "checksum-mismatch")
    assert damaged.headers["Tus-Resumable"] == "1.0.0"
    assert await offset(http, path) == 0
    assert kept(settings) == []
    assert (await patch(http, path, 0, data, **checksum)).status_code == 204
    assert await content(http, path) == data


async def broken(http: httpx.AsyncClient, path: str, at: int, data: bytes, length: int, *headers: str) -> None:
    """A PATCH that announces `length` bytes, and whose connection breaks after `data`."""
    url = urlsplit(str(http.base_url))
    _, writer = await asyncio.open_connection(url.hostname, url.port)
    lines = (
        f"PATCH {path} HTTP/1.1",
        "Host: x",
        f"Authorization: {http.headers['Authorization']}",
        *(f"{name}: {value}" for name, value in BYTES.items()),
        f"Upload-Offset: {at}",
        f"Content-Length: {length}",
        *headers,
    )
    writer.write("\r\n".join([*lines, "", ""]).encode() + data)
    await writer.drain()
    writer.close()
    await writer.wait_closed()


async def test_what_arrived_before_the_connection_broke_is_kept(http: httpx.AsyncClient) -> None:
    data = os.urandom(3 * MIB)
    path = await create(http, len(data))
    await broken(http, path, 0, data[: 2 * MIB], len(data))

    async def arrived() -> bool:
        return await offset(http, path) > 0

    await until(arrived)
    at = await offset(http, path)
    assert at <= 2 * MIB
    assert (await patch(http, path, at, data[at:])).status_code == 204
    assert await content(http, path) == data


async def test_an_upload_whose_place_its_client_never_learns_keeps_no_room(
    http: httpx.AsyncClient, settings: Settings, database: asyncpg.Connection
) -> None:
    begun = {**BYTES, "Upload-Length": "10"}
    wrong = await http.post(UPLOADS, content=b"01234", headers={**begun, "Upload-Checksum": f"sha1 {b64(bytes(20))}"})
    refused(wrong, 460, "checksum-mismatch")
    refused(await http.post(UPLOADS, content=b"0123456789a", headers=begun), 413, "too-large")

    assert await database.fetchval("SELECT stored FROM tenants") == 0
    assert kept(settings) == []


async def test_what_cannot_be_held_against_its_checksum_is_not_kept(
    http: httpx.AsyncClient, settings: Settings
) -> None:
    data = os.urandom(3 * MIB)
    path = await create(http, len(data))
    await broken(http, path, 0, data[: 2 * MIB], len(data), f"Upload-Checksum: sha1 {b64(sha1(data).digest())}")
    await until(lambda: not kept(settings))
    assert await offset(http, path) == 0


async def test_who_sends_nothing_for_long_is_told_and_what_arrived_is_kept(
    http: httpx.AsyncClient, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bodies, "STALLED", 0.2)
    path = await create(http, 10)
    headers = "".join(f"{name}: {value}\n" for name, value in BYTES.items())
    for method, target in (("PATCH", path), ("POST", FILES)):
        head = f"{method} {target} HTTP/1.1\nHost: x\nKEY\n{headers}Upload-Offset: 0\nContent-Length: 10\n\n"
        refused(await raw(http, head.encode() + b"01234"), 408, "too-slow")
    assert await offset(http, path) == 5
    assert len(kept(settings)) == 1


async def test_of_two_that_write_at_the_same_offset_one_wins(http: httpx.AsyncClient, settings: Settings) -> None:
    for _ in range(10):
        ones, twos = b"1" * 200_000, b"2" * 200_000
        path = await create(http, 400_000)
        answers = await asyncio.gather(patch(http, path, 0, ones), patch(http, path, 0, twos))
        assert sorted(answer.status_code for answer in answers) == [204, 409]
        first = ones if answers[0].status_code == 204 else twos
        assert (await patch(http, path, 200_000, twos)).status_code == 204
        assert await content(http, path) == first + twos
    assert len(kept(settings)) == 20


async def test_a_connection_that_hangs_keeps_nobody_from_going_on(http: httpx.AsyncClient) -> None:
    begun, hangs = asyncio.Event(), asyncio.Event()

    async def half() -> AsyncIterator[bytes]:
        yield b"01234"
        begun.set()
        await hangs.wait()
        yield b"56789"

    path = await create(http, 10)
    headers = {**BYTES, "Upload-Offset": "0", "Content-Length": "10"}
    hanging = asyncio.create_task(http.patch(path, content=half(), headers=headers))
    await begun.wait()
    assert (await patch(http, path, 0, b"abcdefghij")).status_code == 204
    hangs.set()
    refused(await hanging, 409, "conflict")
    assert await content(http, path) == b"abcdefghij"


async def test_parts_that_were_closed_while_bytes_still_came_make_one_file(
    http: httpx.AsyncClient, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "PART", 100_000)
    data = os.urandom(2 * MIB)
    path = await create(http, len(data))
    assert (await patch(http, path, 0, data[:MIB])).status_code == 204
    assert (await patch(http, path, MIB, data[MIB:])).status_code == 204
    assert len(kept(settings)) >= 6
    assert await content(http, path) == data
    file = (await http.get(path)).json()["file"]
    for start, end in ((0, 1), (99_999, 100_001), (0, len(data)), (MIB - 1, MIB + 1), (len(data) - 1, len(data))):
        span = {"Range": f"bytes={start}-{end - 1}"}
        assert (await http.get(f"{FILES}/{file}/content", headers=span)).content == data[start:end]


async def test_another_process_goes_on_where_one_was_killed(settings: Settings, tenant: Tenant) -> None:
    data = os.urandom(MIB)
    async with idle(settings, tenant) as http:
        path = await create(http, len(data))
        await patch(http, path, 0, data[:1000])
    async with idle(settings, tenant) as http:
        assert await offset(http, path) == 1000
        await patch(http, path, 1000, data[1000:])
        assert await content(http, path) == data


async def test_who_asks_for_a_whole_upload_gets_its_file_although_the_process_died_before_it_made_one(
    http: httpx.AsyncClient, database: asyncpg.Connection
) -> None:
    path = await create(http, 10)
    await patch(http, path, 0, b"01234")
    await patch(http, path, 5, b"56789")
    await database.execute("UPDATE files SET sha256 = NULL, expires_at = now() + interval '1 hour', tidied = false")
    refused(await http.get(path.replace("uploads", "files")), 404, "not-found")
    assert await offset(http, path) == 10
    assert await content(http, path) == b"0123456789"


async def test_an_upload_is_given_up(http: httpx.AsyncClient, settings: Settings, database: asyncpg.Connection) -> None:
    path = await create(http, 10)
    await patch(http, path, 0, b"01234")
    answer = await http.delete(path, headers=TUS)
    assert (answer.status_code, answer.headers["Tus-Resumable"]) == (204, "1.0.0")
    assert kept(settings) == []
    for answer in (
        await http.head(path, headers=TUS),
        await http.get(path),
        await patch(http, path, 5, b"56789"),
        await http.delete(path, headers=TUS),
    ):
        assert answer.status_code == 404
    assert await database.fetchval("SELECT stored FROM tenants") == 0
    whole = await create(http, 0)
    refused(await http.delete(whole, headers=TUS), 409, "conflict")


async def test_an_upload_that_got_no_bytes_for_long_is_gone(
    http: httpx.AsyncClient, database: asyncpg.Connection
) -> None:
    path = await create(http, 10)
    await database.execute("UPDATE files SET expires_at = now()")
    refused(await http.get(path), 404, "not-found")
    refused(await patch(http, path, 0, b"0123456789"), 404, "not-found")


async def test_what_is_no_tus_is_refused(http: httpx.AsyncClient, settings: Settings) -> None:
    path = await create(http, 10)
    length = {**TUS, "Upload-Length": "10"}

    async def post(headers: dict[str, str], data: bytes = b"") -> httpx.Response:
        return await http.post(UPLOADS, headers=headers, content=data)

    for version in ({}, {"Tus-Resumable": "0.2.2"}):
        for call in (
            post({**version, "Upload-Length": "1"}),
            http.patch(path, headers={**BYTES, "Upload-Offset": "0", "Tus-Resumable": "2"}),
            http.head(path, headers=version),
            http.delete(path, headers=version),
        ):
            answer = await call
            assert (answer.status_code, answer.headers["Tus-Version"]) == (412, "1.0.0")
    for value in ("", "-1", "1e3", "ten", "9" * 30):
        refused(await post({**TUS, "Upload-Length": value}), 400, "bad-request")
        answer = await http.patch(path, headers={**BYTES, "Upload-Offset": value})
        refused(answer, 400, "bad-request")
    refused(await post({**TUS, "Upload-Defer-Length": "1"}), 400, "bad-request")
    refused(await post({**TUS, "Upload-Length": str(64 * MIB + 1)}), 413, "too-large")
    refused(await patch(http, path, 0, b"x", **{"Content-Type": "text/csv"}), 415, "wrong-type")
    assert (
        refused(await patch(http, path, 1, b"x"), 409, "conflict")["detail"]
        == "The upload is at 0, not at 1; go on there."
    )
    refused(await patch(http, path, 0, b"01234567890"), 413, "too-large")
    for checksum in ("md5 AA==", "sha1 AA==", "sha256", "sha1 no base64", ""):
        refused(await patch(http, path, 0, b"x", **{"Upload-Checksum": checksum}), 400, "bad-request")
    for metadata in ("filename x", f"filename {b64(bytes([255]))}", "f " + b64("x" * 4000)):
        refused(await post({**length, "Upload-Metadata": metadata}), 400, "bad-request")
    for name in ("../up", "..", "a/b", "a\\b", "a\nb", "\x1b[1m"):
        answer = await post({**length, "Upload-Metadata": f"filename {b64(name)}"})
        assert refused(answer, 422, "invalid-request")["errors"][0]["field"] == "name"
    for expires in ("yesterday", "2001-01-01T00:00:00Z", "2999-01-01T00:00:00Z"):
        answer = await post({**length, "Upload-Metadata": f"expires {b64(expires)}"})
        assert refused(answer, 422, "invalid-request")["errors"][0]["field"] == "expires"
    refused(await http.post(f"{UPLOADS}?x=1", headers=length), 422, "invalid-request")
    assert await offset(http, path) == 0
    assert kept(settings) == []


async def test_nobody_sees_the_uploads_of_another_tenant(http: httpx.AsyncClient, database: asyncpg.Connection) -> None:
    path = await create(http, 10)
    stranger = {"Authorization": f"Bearer {(await make_tenant(database, 'stranger')).api_key}"}
    for method in ("GET", "HEAD", "PATCH", "DELETE"):
        answer = await http.request(method, path, headers={**BYTES, "Upload-Offset": "0", **stranger})
        assert answer.status_code == 404
    assert (await http.get(FILES, headers=stranger)).json()["files"] == []


async def test_memory_stays_flat_however_large_the_upload(settings: Settings, tenant: Tenant) -> None:
    piece, count, resident = os.urandom(MIB), 200, []

    async def large() -> AsyncIterator[bytes]:
        for _ in range(count):
            resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
            yield piece

    async with idle(settings, tenant) as http:
        path = await create(http, count * MIB)
        length = {"Content-Length": str(count * MIB), "Upload-Offset": "0"}
        answer = await http.patch(path, content=large(), headers={**BYTES, **length}, timeout=60)
        assert answer.headers["Headway-File"]
    assert max(resident) - resident[0] < 64 * MIB


async def test_a_public_client_of_tus_uploads_and_resumes(http: httpx.AsyncClient) -> None:
    data = os.urandom(2_500_000)
    client = TusClient(f"{http.base_url}{UPLOADS}", headers={"Authorization": http.headers["Authorization"]})

    def begin() -> str:
        uploader = client.uploader(
            file_stream=io.BytesIO(data), chunk_size=400_000, metadata={"filename": "a.bin"}, upload_checksum=True
        )
        uploader.upload(stop_at=1_000_000)
        return uploader.url

    def resume(url: str) -> int:
        uploader = client.uploader(file_stream=io.BytesIO(data), chunk_size=400_000, url=url)
        begun_at = uploader.offset
        uploader.upload()
        return begun_at

    url = await asyncio.to_thread(begin)
    assert await asyncio.to_thread(resume, url) == 1_000_000
    assert await content(http, urlsplit(url).path) == data

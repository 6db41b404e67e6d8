"""Files and artifacts in a bucket: the same promises, kept by what speaks like S3."""

import asyncio
import hashlib
import logging
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import boto3
import httpx
import pytest
from moto.server import ThreadedMotoServer
from pydantic import SecretStr
from redis.asyncio import Redis

from headway.errors import InvalidSettings
from headway.files import Files
from headway.places import PIECE
from headway.settings import Settings
from tests.conftest import Service, Tenant, run, web, worker
from tests.engine import Engine
from tests.engine import engine as make_engine
from tests.integration.test_api_bad_input import refused
from tests.integration.test_api_files import FILES, MIB, pieces
from tests.integration.test_api_uploads import create, offset, patch

KEY = {"aws_access_key_id": "access", "aws_secret_access_key": "secret", "region_name": "us-east-1"}


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(endpoint: str) -> Any:
    """An empty bucket, seen with a client that is not ours."""
    bucket = boto3.resource("s3", endpoint_url=endpoint, **KEY).Bucket(f"b{uuid4().hex}")
    bucket.create()
    return bucket


@pytest.fixture
def changed(endpoint: str, bucket: Any) -> dict[str, Any]:
    """Settings of the bucket."""
    return {
        "files_url": f"s3://{bucket.name}/some/prefix",
        "s3_endpoint": endpoint,
        "s3_access_key": SecretStr("access"),
        "s3_secret_key": SecretStr("secret"),
    }


@pytest.fixture
def files(changed: dict[str, Any]) -> Files:
    options = {"endpoint": changed["s3_endpoint"], "access_key_id": "access", "secret_access_key": "secret"}
    return Files(changed["files_url"], max_size=64 * MIB, options=options)


@pytest.fixture
async def http(
    settings: Settings, changed: dict[str, Any], redis: Redis, tenant: Tenant
) -> AsyncIterator[httpx.AsyncClient]:
    """Web and worker with a bucket in place of a folder."""
    settings = settings.model_copy(update=changed)
    headers = {"Authorization": f"Bearer {tenant.api_key}"}
    async with (
        worker(settings),
        web(settings) as url,
        httpx.AsyncClient(base_url=url, headers=headers, trust_env=False, verify=False) as http,
    ):
        yield http


def keys(bucket: Any) -> list[str]:
    return [found.key for found in bucket.objects.all()]


def unfinished(bucket: Any) -> list[Any]:
    return list(bucket.multipart_uploads.all())


async def test_a_file_goes_up_comes_down_in_ranges_and_is_deleted(http: httpx.AsyncClient, bucket: Any) -> None:
    data = os.urandom(2 * PIECE + 17)
    answer = await http.post(FILES, content=pieces(data, MIB))
    assert answer.status_code == 201, answer.text
    assert answer.json()["sha256"] == hashlib.sha256(data).hexdigest()
    [key] = keys(bucket)
    assert key.startswith("some/prefix/files/")
    path = f"{answer.headers['Location']}/content"
    assert (await http.get(path)).content == data
    for start, end in ((0, 0), (5 * MIB - 1, 9 * MIB), (len(data) - 5, len(data) - 1)):
        part = await http.get(path, headers={"Range": f"bytes={start}-{end}"})
        assert (part.status_code, part.content) == (206, data[start : end + 1])
    assert (await http.delete(answer.headers["Location"])).status_code == 204
    assert keys(bucket) == unfinished(bucket) == []


async def test_an_upload_is_resumed(http: httpx.AsyncClient, bucket: Any) -> None:
    data = os.urandom(PIECE + 1000)
    path = await create(http, len(data))
    await patch(http, path, 0, data[:5_000_000])
    assert await offset(http, path) == 5_000_000
    file = (await patch(http, path, 5_000_000, data[5_000_000:])).headers["Headway-File"]
    assert (await http.get(f"{FILES}/{file}/content")).content == data
    assert len(keys(bucket)) == 2


async def test_what_breaks_off_leaves_nothing(files: Files, bucket: Any) -> None:
    async def breaks() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield bytes(MIB)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await files.put("a", breaks())
    assert keys(bucket) == unfinished(bucket) == []


async def test_a_jobs_artifact_is_kept_in_the_bucket_and_goes_with_the_job(
    servers: Any, tmp_path: Path, changed: dict[str, Any], bucket: Any
) -> None:
    async with make_engine(servers, tmp_path, **changed) as engine:
        await finish_one(engine)
        job_id = (await engine.database.fetchrow("SELECT job_id FROM artifacts"))["job_id"]
        assert sorted(key.split("/")[2] for key in keys(bucket)) == ["artifacts"]
        await engine.files.delete_job(job_id)
    assert keys(bucket) == []


async def finish_one(engine: Engine) -> None:
    """A job with a part, an artifact of an attempt that failed, and an artifact."""
    from tests.engine import worker as engine_worker

    async def handler(job: Any) -> None:
        async with job.artifact("out.txt") as out:
            await out.write(b"text")
        part = await job.save_part(b"part")
        assert b"".join([piece async for piece in job.read_part(part)]) == b"part"
        if job.attempt == 1:
            raise ValueError

    async with engine_worker(engine.settings):
        job_id = await engine.submit(handler, max_attempts=2)
        await engine.database.execute("UPDATE jobs SET run_at = now() WHERE state = 'scheduled'")
        await engine.ended(job_id)
    [artifact] = await engine.store.artifacts(job_id, engine.tenant.id)
    assert b"".join([piece async for piece in engine.files.read(artifact.key)]) == b"text"


async def test_a_csv_in_the_bucket_is_read_by_the_worker(http: httpx.AsyncClient, source: Any) -> None:
    answer = await http.post(FILES, content=b"a,b\n1,2\n3,4\n")
    service = Service("", "", None, None, http, None)  # type: ignore[arg-type]  # `run` needs no more
    job = await run(service, "csv.import", {"file": answer.json()["id"], "table": "t"})
    assert job["state"] == "succeeded", job["error"]
    assert await source.fetchval("SELECT sum(b) FROM t") == 6


async def test_a_sweep_leaves_only_the_parts_of_whole_files(
    servers: Any, tmp_path: Path, changed: dict[str, Any], bucket: Any
) -> None:
    async with make_engine(servers, tmp_path, **changed) as engine:
        kept, gone = await engine.upload(b"kept"), await engine.upload(b"gone")
        folder = kept.parts[0][0].rpartition("/")[0]
        await engine.files.save(f"{folder}/lost", b"of a request that died")
        await engine.database.execute("UPDATE files SET tidied = false WHERE id = $1", kept.id)
        await engine.database.execute("UPDATE files SET expires_at = now() WHERE id = $1", gone.id)
        assert await engine.uploads.sweep() == 1
        assert keys(bucket) == [f"some/prefix/{kept.parts[0][0]}"]


async def test_a_bucket_that_is_not_there_is_the_operators_matter(
    settings: Settings, tenant: Tenant, changed: dict[str, Any]
) -> None:
    lost = {**changed, "files_url": "s3://no-such-bucket"}
    async with (
        web(settings.model_copy(update=lost)) as url,
        httpx.AsyncClient(base_url=url, headers={"Authorization": f"Bearer {tenant.api_key}"}) as http,
    ):
        problem = refused(await http.post(FILES, content=b"x"), 507, "no-storage")
        assert "bucket" not in problem["detail"]
        path = await create(http, 10)
        refused(await patch(http, path, 0, b"0123456789"), 507, "no-storage")


async def test_memory_stays_flat(files: Files) -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    async with files.writer("a") as out:
        # What moto keeps in this process is no more than this; what we hold beside it is.
        for _ in range(3 * PIECE // MIB):
            await out.write(bytes(MIB))
    before, most = resident(), 0
    async for _ in files.read("a", 0, 3 * PIECE):
        most = max(most, resident())
        await asyncio.sleep(0)
    assert most - before < 64 * MIB


def test_a_bucket_that_cannot_be_used_ends_the_process_at_start(endpoint: str) -> None:
    with pytest.raises(InvalidSettings, match="HEADWAY_FILES_URL"):
        Files("s3://", max_size=1)
    with pytest.raises(InvalidSettings, match="SecretAccessKey"):
        Files("s3://bucket", max_size=1, options={"endpoint": endpoint, "access_key_id": "access"})

"""What sweeps delete: files and uploads whose time is over, and what requests that died have left. Nothing else."""

import asyncio
import hashlib
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import pytest_asyncio
from uuid_utils.compat import uuid7

from headway import uploads as uploads_module
from headway.embedded import Embedded
from headway.errors import Conflict, NoStorage, NotFound
from headway.job import File, Upload
from headway.store import OUTAGES
from tests.conftest import files_below, make_tenant, until
from tests.engine import Engine, behind_proxy, parts
from tests.engine import engine as make_engine


@pytest_asyncio.fixture
async def engine(servers: Embedded, tmp_path: Path) -> AsyncIterator[Engine]:
    async with make_engine(servers, tmp_path) as engine:
        yield engine


async def chunks(*pieces: bytes) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece


async def begun(engine: Engine, data: bytes = b"01234", size: int = 10) -> Upload:
    """An upload of which `data` has arrived."""
    upload = await engine.uploads.create(engine.tenant.id, "a", "text/plain", size)
    return await engine.uploads.append(upload, chunks(data))


async def expire(engine: Engine, what: File | Upload) -> None:
    await engine.database.execute("UPDATE files SET expires_at = now() WHERE id = $1", what.id)


def kept(engine: Engine) -> set[str]:
    """Every file in storage, by its key."""
    top = engine.settings.home / "files"
    return {path.relative_to(top).as_posix() for path in files_below(top)}


def keys(*files: File | Upload) -> set[str]:
    return {key for file in files for key, _ in file.parts}


async def stored(engine: Engine) -> int:
    return await engine.database.fetchval("SELECT stored FROM tenants WHERE id = $1", engine.tenant.id)


async def test_what_is_over_goes_with_its_bytes_and_makes_room(engine: Engine) -> None:
    other = await make_tenant(engine.database, "other")
    file, upload = await engine.upload(b"stays"), await begun(engine)
    over = [await engine.upload(b"goes"), await engine.upload(b"goes too", other.id), await begun(engine)]
    for each in over:
        await expire(engine, each)
    assert sum(await asyncio.gather(*(engine.uploads.sweep() for _ in range(3)))) == 3
    assert kept(engine) == keys(file, upload)
    left = await engine.database.fetch("SELECT id FROM files")
    assert {row["id"] for row in left} == {file.id, upload.id}
    assert await stored(engine) == 5 + 10
    assert await engine.database.fetchval("SELECT stored FROM tenants WHERE id = $1", other.id) == 0
    assert await engine.uploads.sweep() == 0


async def test_more_than_fit_into_one_statement_go_too(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads_module, "SWEPT_AT_ONCE", 2)
    for _ in range(5):
        await expire(engine, await engine.upload(b"goes"))
    assert await engine.uploads.sweep() == 5
    assert kept(engine) == set()


async def test_files_of_before_there_were_times_stay(engine: Engine) -> None:
    await engine.database.execute(
        "INSERT INTO files (id, tenant_id, name, content_type, size, sha256) VALUES ($1, $2, 'old', 'a/b', 3, 'x')",
        uuid7(),
        engine.tenant.id,
    )
    assert await engine.uploads.sweep() == 0


async def test_what_dead_requests_left_beside_a_file_goes(engine: Engine) -> None:
    upload = await begun(engine)
    folder = engine.settings.home / "files" / Path(upload.parts[0][0]).parent
    for name in ("half#1", "lost"):
        (folder / name).write_bytes(b"of a request that died")
    assert await engine.uploads.sweep() == 0
    assert len(kept(engine)) == 3, "an upload that goes on may be writing"
    whole = await engine.uploads.append(upload, chunks(b"56789"))
    await engine.uploads.sweep()
    assert kept(engine) == keys(whole)
    assert await engine.database.fetchval("SELECT tidied FROM files")


async def test_an_upload_whose_process_died_before_its_first_byte_counted_leaves_nothing(engine: Engine) -> None:
    upload = await engine.uploads.create(engine.tenant.id, "a", "text/plain", 10)
    folder = engine.settings.home / "files" / "files" / str(engine.tenant.id) / str(upload.id)
    folder.mkdir(parents=True)
    (folder / "half#1").write_bytes(b"0123")
    await expire(engine, upload)
    assert await engine.uploads.sweep() == 1
    assert not folder.exists()


@pytest.mark.parametrize("swept", [False, True])
async def test_bytes_that_come_after_an_upload_was_given_up_are_not_kept(engine: Engine, swept: bool) -> None:
    upload = await begun(engine)

    async def late() -> AsyncIterator[bytes]:
        yield b"567"
        # The sweep is to meet what is being written.
        await until(lambda: any("#" in key for key in kept(engine)))
        await expire(engine, upload)
        if swept:
            await engine.uploads.sweep()
        yield b"89"

    with pytest.raises(NoStorage if swept else Conflict):
        await engine.uploads.append(upload, late())
    await engine.uploads.sweep()
    with pytest.raises(NotFound):
        await engine.uploads.get(upload.id, engine.tenant.id)
    assert kept(engine) == set()
    assert await stored(engine) == 0


@pytest.mark.parametrize("swept", [False, True])
async def test_a_file_in_one_request_that_was_given_up_meanwhile_is_refused(engine: Engine, swept: bool) -> None:
    async def late() -> AsyncIterator[bytes]:
        yield b"0123"
        await engine.database.execute("UPDATE files SET expires_at = now()")
        if swept:
            await engine.uploads.sweep()
        yield b"4567"

    # The sweep comes before or after its storage has begun to write.
    with pytest.raises((NoStorage, Conflict) if swept else Conflict):
        await engine.uploads.receive(engine.tenant.id, "a", "a/b", late(), size=None)
    assert kept(engine) == set()
    assert await engine.database.fetchval("SELECT count(*) FROM files") == 0
    assert await stored(engine) == 0


async def test_a_slow_upload_in_one_request_is_not_given_up(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads_module, "RENEW_EVERY", 0.0)

    async def slow() -> AsyncIterator[bytes]:
        yield b"0"
        await engine.database.execute("UPDATE files SET expires_at = now() + interval '1 minute'")
        yield b"1"
        left = await engine.database.fetchval("SELECT expires_at - now() FROM files")
        assert left > timedelta(minutes=4)

    file = await engine.uploads.receive(engine.tenant.id, "a", "a/b", slow(), size=2)
    assert file.size == 2


async def test_an_outage_while_an_upload_comes_does_not_end_it(
    servers: Embedded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads_module, "RENEW_EVERY", 0.0)
    async with (
        make_engine(servers, tmp_path) as engine,
        behind_proxy(engine.settings) as (proxy, settings),
        parts(settings, engine.tenant, engine.database) as cut,
    ):

        async def slow() -> AsyncIterator[bytes]:
            yield b"0"
            lost = proxy.cut_reply()
            yield b"1"
            assert lost.done()
            yield b"2"

        file = await cut.uploads.receive(engine.tenant.id, "a", "a/b", slow(), size=3)
        assert file.size == 3


async def test_a_file_may_name_its_time_also_when_it_arrives_in_pieces(engine: Engine) -> None:
    until = datetime(2099, 1, 1, tzinfo=UTC)
    upload = await engine.uploads.create(engine.tenant.id, "a", "a/b", 2, keep_until=until)
    await engine.uploads.append(upload, chunks(b"01"))
    file = await engine.store.get_file(upload.id, engine.tenant.id)
    assert file is not None
    assert file.expires_at == until


async def test_a_part_is_closed_after_a_time(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads_module, "PART_TIME", 0.0)
    upload = await engine.uploads.create(engine.tenant.id, "a", "a/b", 3)
    whole = await engine.uploads.append(upload, chunks(b"0", b"1", b"2"))
    assert [size for _, size in whole.parts] == [1, 1, 1]
    file = await engine.store.get_file(upload.id, engine.tenant.id)
    assert file is not None
    read = engine.files.read_parts(file.parts, 1, 3)
    assert b"".join([piece async for piece in read]) == b"12"


async def test_a_file_whose_answer_of_postgres_was_lost_is_not_deleted(servers: Embedded, tmp_path: Path) -> None:
    async with make_engine(servers, tmp_path) as engine, behind_proxy(engine.settings) as (proxy, settings):
        async with parts(settings, engine.tenant, engine.database) as cut:
            await cut.store.ready_check()
            lost = proxy.cut_reply(hashlib.sha256(b"0123").hexdigest().encode())

            with pytest.raises(OUTAGES):
                await cut.uploads.receive(engine.tenant.id, "a", "a/b", chunks(b"0123"), size=4)
            await lost
        [file] = await engine.store.list_files(engine.tenant.id, before=None, limit=9)
        file = await engine.store.get_file(file.id, engine.tenant.id)
        assert b"".join([piece async for piece in engine.files.read_parts(file.parts, 0, 4)]) == b"0123"

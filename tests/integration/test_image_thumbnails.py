"""image.thumbnails on real files: what is made, and over interruptions."""

import hashlib
import io
import json
import os
import signal
import struct
import time
import zipfile
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from PIL import Image

from headway.embedded import Embedded
from headway.job import Job
from headway.states import JobState
from services.worker import process as child_process
from services.worker.kinds.image_archive import Archive
from services.worker.kinds.image_pool import room
from services.worker.kinds.image_sheet import Sheet
from tests.conftest import Service, files_below, run, until
from tests.engine import Engine, worker
from tests.engine import engine as make_engine
from tests.faults.conftest import Spawner
from tests.images import COLOURS, FORMATS, PHOTO, alike, corners, encoded, opened, quarters, zipped
from tests.integration.test_image_pool import makers, started_by
from tests.integration.test_process_kinds import lives


@pytest.fixture
async def engine(servers: Embedded, tmp_path: Path) -> AsyncIterator[Engine]:
    async with make_engine(servers, tmp_path, drain=0.0) as engine:
        yield engine


async def content(engine: Engine, job: Job, name: str) -> bytes:
    [artifact] = [each for each in await engine.store.artifacts(job.id, engine.tenant.id) if each.name == name]
    return b"".join([chunk async for chunk in engine.files.read(artifact.key)])


async def artifacts(engine: Engine, job: Job) -> list[str]:
    return sorted(each.name for each in await engine.store.artifacts(job.id, engine.tenant.id))


async def made(engine: Engine, files: Sequence[bytes], **input: Any) -> Job:
    """The job of these files, once it has ended."""
    ids = [str((await engine.upload(data)).id) for data in files]
    async with worker(engine.settings):
        job_id = await engine.submit_kind("image.thumbnails", {"file": ids, **input})
        return await engine.ended(job_id, 30)


def encrypted() -> bytes:
    """A zip with one member that says that it is encrypted."""
    data = bytearray(zipped({"secret.png": PHOTO}))
    for place in (6, data.index(b"PK\x01\x02") + 8):
        data[place] |= 1
    return bytes(data)


def flood() -> bytes:
    """A PNG of some bytes whose header claims 40 billion pixels."""
    data = bytearray(encoded(quarters(8, 8)))
    data[16:24] = struct.pack("!II", 200_000, 200_000)
    data[29:33] = struct.pack("!I", zipfile.crc32(data[12:29]))  # type: ignore[attr-defined]
    return bytes(data)


def lying() -> bytes:
    """A member that unpacks to more than its directory says."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("lying.png", bytes(50 << 20))
        archive.infolist()[-1].file_size = 900_000
    return out.getvalue()


async def test_thumbnails_of_all_that_can_be_read_and_a_list_of_all_that_cannot(engine: Engine) -> None:
    good = {f"{format}/photo.{format.lower()}": encoded(quarters(), format) for format in FORMATS}
    good["moving.gif"] = encoded(quarters(), "GIF", save_all=True, append_images=[Image.new("RGB", (400, 300))])
    bad = {
        "cut.jpg": PHOTO[: len(PHOTO) // 2],
        "flood.png": flood(),
        "inner.zip": zipped({"x.png": PHOTO}),
        "readme.txt": b"Hello.",
    }
    files = [zipped(good | bad, zipfile.ZIP_DEFLATED), PHOTO, encrypted(), lying(), zipped({"x": bytes(65 << 20)})]

    job = await made(engine, files, sizes=["200x100", "50x50"], format="webp")

    assert (job.state, job.error) == (JobState.SUCCEEDED, None)
    rejected = {each["name"]: each["reason"] for each in job.result["first_rejected"]}
    assert {name: reason[:24] for name, reason in rejected.items()} == {
        "cut.jpg": "It cannot be decoded: OSE"[:24],
        "flood.png": "It has more than 100,000",
        "inner.zip": "It is a zip in a zip; un",
        "readme.txt": "It is not an image in PN",
        "secret.png": "It is encrypted; make th",
        "lying.png": "It is not what its size ",
        "x": "It has 68,157,440 bytes,",
    }
    lines = [json.loads(line) for line in (await content(engine, job, "rejected.jsonl")).splitlines()]
    assert lines == job.result["first_rejected"]
    archive = zipfile.ZipFile(io.BytesIO(await content(engine, job, "thumbnails.zip")))
    assert archive.testzip() is None
    stems = [name.rpartition(".")[0] for name in good] + ["in"]
    assert archive.namelist() == [f"{size}/{stem}.webp" for stem in stems for size in ("200x100", "50x50")]
    for info in archive.infolist():
        image = opened(archive.read(info))
        assert image.format == "WEBP"
        assert image.size == ((133, 100) if info.filename.startswith("200") else (50, 38))
        assert alike(corners(image), COLOURS)
    written = sum(info.file_size for info in archive.infolist())
    given = sum(len(data) for data in (*good.values(), PHOTO))
    assert {name: job.result[name] for name in ("images", "rejected", "thumbnails", "animated")} == {
        **{"images": 7, "rejected": 7, "thumbnails": 14, "animated": 1}
    }
    assert (job.result["bytes_in"], job.result["bytes_out"]) == (given, written)
    assert job.result["seconds"] > 0
    assert job.progress is not None
    assert [job.progress[name] for name in ("done", "total", "unit")] == [14, 14, "images"]
    assert job.progress["counts"] == {"rejected": 7, "bytes": written}
    sheet = opened(await content(engine, job, "contact-sheet.jpg"))
    assert sheet.size == (4 * 240, 4 * 240)
    first = sheet.crop((7, 35, 233, 205))
    assert alike(corners(first), COLOURS)
    # The first that cannot be read is crossed out.
    assert sheet.getpixel((2 * 240 + 120, 240 + 30)) == (255, 255, 255)


async def test_the_input_is_held_against_the_schema_and_a_single_id_is_enough(service: Service) -> None:
    sent = await service.http.post("/api/v1/files", params={"name": "Übung 1.png"}, content=encoded(quarters()))
    file = sent.json()["id"]
    for wrong in (
        {"sizes": ["0x5"]},
        {"sizes": []},
        {"format": "gif"},
        {"quality": 101},
        {"file": []},
        {"size": "5x5"},
    ):
        refused = await service.http.post(
            "/api/v1/jobs", json={"kind": "image.thumbnails", "input": {"file": file, **wrong}}
        )
        assert refused.status_code == 422, wrong
    job = await run(service, "image.thumbnails", {"file": file, "sizes": ["5x5", "5x5"]})
    assert (job["error"]["type"], job["error"]["message"]) == (
        "input-refused",
        "input.sizes: one of the sizes is there twice; name each once.",
    )
    job = await run(service, "image.thumbnails", {"file": file, "sizes": ["2049x5"]})
    assert "at most 2048 pixels" in job["error"]["message"]

    job = await run(service, "image.thumbnails", {"file": file})

    assert job["state"] == "succeeded", job
    data = b"".join([chunk async for chunk in service.client.read(job["id"], "thumbnails.zip")])
    archive = zipfile.ZipFile(io.BytesIO(data))
    assert archive.namelist() == ["320x320/Übung 1.jpg"]
    assert opened(archive.read("320x320/Übung 1.jpg")).size == (320, 240)


async def test_more_than_half_that_cannot_be_read_fail_the_job_which_says_what_to_do(engine: Engine) -> None:
    job = await made(engine, [zipped({"a.png": PHOTO, "b.png": b"b", "c.png": PHOTO[:500]})])

    assert job.state == JobState.FAILED
    assert job.error is not None
    assert job.error["type"] == "fatal"
    assert job.error["message"].startswith("2 of 3 images cannot be read: 'b.png': It is not an image in PNG")
    assert job.error["message"].endswith("rejected.jsonl. Repair them or leave them out, and upload the rest.")
    assert await artifacts(engine, job) == ["rejected.jsonl"]


async def test_more_than_a_thousand_that_cannot_be_read_fail_the_job_at_once(engine: Engine) -> None:
    members = {"0.jpg": PHOTO} | {f"{number}.txt": b"x" for number in range(5000)}

    job = await made(engine, [zipped(members)])

    assert job.error is not None
    assert job.error["message"].startswith("More than 1,000 images cannot be read: '0.txt': ")
    assert job.progress is not None
    assert job.progress["done"] < 1500
    assert len((await content(engine, job, "rejected.jsonl")).splitlines()) == 1001


def test_the_same_files_make_the_same_zip_which_others_can_read(tmp_path: Path) -> None:
    files = {f"320x320/Übung {number}.jpg": os.urandom(number * 100) for number in range(50)}
    archives = []
    for _ in range(2):
        archive = Archive()
        archives.append(b"".join([archive.add(name, data) for name, data in files.items()] + [archive.end()]))

    assert archives[0] == archives[1]
    with zipfile.ZipFile(io.BytesIO(archives[0])) as archive:
        assert {name: archive.read(name) for name in archive.namelist()} == files
        # Sizes stand before the bytes, for programs that unpack a stream.
        assert not any(info.flag_bits & 8 for info in archive.infolist())


@pytest.mark.parametrize("count", [1, 2, 5, 16, 300, 10_000, 20_000])
def test_a_contact_sheet_has_a_place_for_each_and_is_never_a_giant(count: int) -> None:
    sheet = Sheet(count)
    width, height = sheet.cell
    for index in {0, count // 2, count - 1}:
        sheet.show(index, sheet.cell, bytes((9, 90, 9)) * (width * height))

    image = opened(sheet.as_jpeg())

    assert max(image.size) <= 4000
    assert min(sheet.cell) >= 24
    assert image.getpixel((width // 2, height // 2))[1] > 60  # type: ignore[index]


# -- interruptions -------------------------------------------------------------------------------------------------

# Takes a maker about 50 ms an image.
SLOW = {"format": "avif", "sizes": ["400x300", "300x300"]}


def family(worker: int) -> list[int]:
    """The processes of the one job that a worker runs: the handler's and its makers'."""
    [child] = started_by(worker, "services.worker.child")
    return [child, *makers(child)]


def album(count: int) -> bytes:
    members = {f"{number:04}.jpg": encoded(quarters(300 + number, 300), "JPEG") for number in range(count)}
    return zipped(members | {"broken.jpg": b"broken"})


async def digests(engine: Engine, job: Job) -> dict[str, str]:
    return {name: hashlib.sha256(await content(engine, job, name)).hexdigest() for name in await artifacts(engine, job)}


def count_of(result: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in result.items() if name != "seconds"}


async def reported(engine: Engine, job_id: UUID, done: int) -> None:
    async def so_many() -> bool:
        progress = (await engine.job(job_id)).progress
        return bool(progress) and progress["done"] >= done

    await until(so_many, 30)


@pytest.mark.timeout(120)
async def test_a_job_that_is_drained_goes_on_and_makes_the_same_to_the_byte(engine: Engine) -> None:
    file = str((await engine.upload(album(40))).id)
    async with worker(engine.settings):
        whole = await engine.ended(
            await engine.submit_kind("image.thumbnails", {"file": file, **SLOW}, timeout=300), 60
        )
    job_id = await engine.submit_kind("image.thumbnails", {"file": file, **SLOW}, timeout=300)
    for done in (10, 25):
        async with worker(engine.settings):
            await reported(engine, job_id, done)
    async with worker(engine.settings):
        job = await engine.ended(job_id, 60)

    assert (job.state, job.interruptions, job.attempt) == (JobState.SUCCEEDED, 2, 1)
    assert count_of(job.result) == count_of(whole.result)
    assert job.result["images"] == 40
    assert await digests(engine, job) == await digests(engine, whole)
    assert not (engine.settings.home / "files" / "parts" / str(job_id)).exists()


@pytest.mark.timeout(120)
async def test_a_job_whose_worker_is_killed_goes_on_from_what_was_saved(engine: Engine, tmp_path: Path) -> None:
    # Longer than it takes to the first save, on any number of cores.
    count = 60 * room()
    file = str((await engine.upload(album(count))).id)
    spawner = Spawner(engine, tmp_path)
    try:
        process = await spawner(lease=3.0)
        job_id = await engine.submit_kind("image.thumbnails", {"file": file, **SLOW}, timeout=300)

        async def saved() -> bool:
            return (await engine.row(job_id))["checkpoint"] is not None

        await until(saved, 30)
        family_of_it = family(process.process.pid)
        assert len(family_of_it) == 1 + room()
        process.signal(signal.SIGKILL)
        await process.ended()
        await until(lambda: not any(map(lives, family_of_it)), 3)
        kept = (await engine.row(job_id))["checkpoint"]["parts"]
        assert kept
        await spawner(lease=3.0)
        job = await engine.ended(job_id, 60)
    finally:
        await spawner.end()

    assert (job.state, job.result["images"], job.result["rejected"]) == (JobState.SUCCEEDED, count, 1)
    assert (await engine.row(job_id))["crashes"] == 1
    archive = zipfile.ZipFile(io.BytesIO(await content(engine, job, "thumbnails.zip")))
    wanted = [f"{size}/{number:04}.avif" for number in range(count) for size in SLOW["sizes"]]
    assert archive.namelist() == wanted
    assert archive.testzip() is None


async def test_a_cancel_ends_the_job_and_all_its_processes_at_once(engine: Engine) -> None:
    file = str((await engine.upload(album(300))).id)
    async with worker(engine.settings):
        job_id = await engine.submit_kind("image.thumbnails", {"file": file, **SLOW}, timeout=300)
        await reported(engine, job_id, 5)
        running = family(os.getpid())
        assert len(running) == 1 + room()
        began = time.monotonic()
        await engine.lifecycle.cancel(job_id, engine.tenant.id)
        job = await engine.ended(job_id)
        # It has ended by itself: it would be killed later.
        assert time.monotonic() - began < child_process.GRACE
        assert job.state == JobState.CANCELLED
        assert not any(map(lives, running))
        await until(lambda: not files_below(engine.settings.home / "files" / "artifacts"))

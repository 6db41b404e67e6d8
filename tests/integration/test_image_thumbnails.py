"""image.thumbnails on real files: what is found in them, what is refused, what is made, and over interruptions."""

import asyncio
import hashlib
import io
import json
import os
import signal
import stat
import struct
import time
import zipfile
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from headway import Fatal
from headway.embedded import Embedded
from headway.job import Job
from headway.states import JobState
from services.worker.context import Context, Parts
from services.worker.kinds import image_files, image_pool
from services.worker.kinds.image_archive import Archive
from services.worker.kinds.image_files import Picture, find, names, read
from services.worker.kinds.image_pool import Pool, room
from services.worker.kinds.image_sheet import Sheet
from services.worker.runner import Attempt
from tests.conftest import Service, files_below, run, until
from tests.engine import Engine, worker
from tests.engine import engine as make_engine
from tests.faults.conftest import Spawner
from tests.images import COLOURS, FORMATS, alike, corners, encoded, opened, quarters, zipped
from tests.integration.test_process_kinds import lives

BOXES = {"boxes": [(100, 100)], "cell": (30, 30), "format": "jpeg", "quality": 80}
PHOTO = encoded(quarters(), "JPEG")


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


# -- what is found -------------------------------------------------------------------------------------------------


async def context(engine: Engine) -> Context:
    claim = await engine.claim(await engine.submit_kind("image.thumbnails", {}), "image.thumbnails")
    return Context(claim, Parts(engine.settings, engine.store, engine.lifecycle, engine.files), Attempt())


async def found(engine: Engine, *files: bytes) -> list[Picture]:
    job = await context(engine)
    return await find(job, [(await engine.upload(data)).id for data in files])


async def test_images_are_found_in_files_and_zips_and_read_as_they_are(engine: Engine) -> None:
    members = {f"trip/{number}.jpg": os.urandom(200_000 + number) for number in range(20)}
    litter = {
        **{"trip/": b"", "__MACOSX/trip/._1.jpg": b"x", "trip/._2.jpg": b"x", "trip/.DS_Store": b"x", "Thumbs.db": b"x"}
    }
    before = b"A program that unpacks itself."

    pictures = await found(
        engine, PHOTO, zipped(members | litter), b"", before + zipped({"a\\b\\.\\c.png": PHOTO}, zipfile.ZIP_DEFLATED)
    )

    # What comes before a zip makes it another file than a zip.
    assert [picture.name for picture in pictures] == ["in.csv", *members, "in.csv", "in.csv"]
    read_back = [data async for _, data in read(pictures)]
    assert read_back[:-1] == [PHOTO, *members.values(), b""]
    some = [pictures[place] for place in (3, 9, 18)]
    assert [data async for _, data in read(some)] == [members[picture.name] for picture in some]


async def test_names_of_windows_are_folders(engine: Engine) -> None:
    [picture] = await found(engine, zipped({"a\\b\\.\\c.png": PHOTO}))

    assert picture.name == "a/b/c.png"


def link(name: str) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        info = zipfile.ZipInfo(name)
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(info, "/etc/passwd")
    return out.getvalue()


def twice(name: str) -> bytes:
    out = io.BytesIO()
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(out, "w") as archive:
        archive.writestr(name, PHOTO)
        archive.writestr(name, PHOTO)
    return out.getvalue()


def overlapping() -> bytes:
    """Two entries of the directory that are one and the same member: the trick of the densest bombs."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("1.jpg", PHOTO)
        archive.writestr("2.jpg", PHOTO)
        archive.infolist()[1].header_offset = 0
    return out.getvalue()


def many(count: int) -> bytes:
    return zipped(dict.fromkeys(map(str, range(count)), b""))


HARMFUL: dict[str, tuple[Callable[[], bytes], str]] = {
    "parent": (lambda: zipped({"../../etc/cron.d/x.png": PHOTO}), r"member '../../etc/cron.d/x.png' has an absolute"),
    "parent within": (lambda: zipped({"a/../../x.png": PHOTO}), r"with \.\."),
    "parent of Windows": (lambda: zipped({"a\\..\\..\\x.png": PHOTO}), r"with \.\."),
    "absolute": (lambda: zipped({"/etc/x.png": PHOTO}), "absolute name"),
    "drive": (lambda: zipped({"C:\\x.png": PHOTO}), "absolute name"),
    "share": (lambda: zipped({"\\\\host\\x.png": PHOTO}), "absolute name"),
    "control": (lambda: zipped({"x\n.png": PHOTO}), "control characters"),
    "long": (lambda: zipped({"x" * 501: PHOTO}), "more than 500 characters"),
    "twice": (lambda: twice("x.png"), "is there twice"),
    "twice, in other words": (lambda: zipped({"a/x.png": PHOTO, "a/./x.png": PHOTO}), "is there twice"),
    "link": (lambda: link("x.png"), "is a symbolic link"),
    "bomb": (lambda: zipped({"x.png": bytes(3 << 20)}, zipfile.ZIP_DEFLATED), "grows more than 100-fold"),
    "overlap": (overlapping, "its members overlap"),
    "nothing": (lambda: zipped({}), "holds no files"),
    "litter": (lambda: zipped({"__MACOSX/._x.png": b"x", "a/": b""}), "holds no files"),
    "too many": (lambda: many(20_001), "more than 20,000 images"),
    "far too many": (lambda: many(40_001), "40,001 members"),
    "cut off": (lambda: zipped({"x.png": PHOTO})[:-30], "cannot be read: File is not a zip file"),
    "directory": (lambda: zipped({"x.png": PHOTO}).replace(b"PK\x01\x02", b"PK\x01\x03"), "cannot be read: Bad magic"),
    "huge directory": (
        lambda: zipped({"x.png": PHOTO})[:-10] + struct.pack("<IIH", 2**31, 100, 0),
        "cannot be read",
    ),
}


@pytest.mark.parametrize("what", HARMFUL)
async def test_a_zip_that_is_damaged_or_made_to_harm_is_refused_as_a_whole(engine: Engine, what: str) -> None:
    make, reason = HARMFUL[what]

    with pytest.raises(Fatal, match=reason):
        await found(engine, make())


async def test_a_zip_with_more_bytes_than_may_be_is_refused(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_files, "MAX_TOTAL", 3 * len(PHOTO))

    assert len(await found(engine, zipped(dict.fromkeys("abc", PHOTO)))) == 3
    with pytest.raises(Fatal, match="bytes unpacked, more than"):
        await found(engine, zipped(dict.fromkeys("abcd", PHOTO)))


async def test_an_image_that_is_packed_larger_than_may_be_is_not_read(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the directory says that it is small once it is unpacked."""
    monkeypatch.setattr(image_files, "MAX_IMAGE", 1000)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("1.jpg", os.urandom(5000))
        archive.infolist()[0].file_size = 100

    [picture] = await found(engine, out.getvalue())

    assert picture.refusal is not None
    assert picture.refusal.endswith("bytes, more than 1,000.")
    assert [data async for _, data in read([picture])] == [b""]


async def test_a_directory_that_is_longer_than_may_be_is_refused(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_files, "DIRECTORY", 1000)

    with pytest.raises(Fatal, match="its directory is longer than 1,000 bytes"):
        await found(engine, many(50))


async def test_the_directory_of_a_zip_of_any_size_is_read_from_its_end(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_files, "DIRECTORY", 4000)
    members = {f"{number}.jpg": os.urandom(30_000) for number in range(30)}

    pictures = await found(engine, zipped(members))

    assert [data async for _, data in read(pictures)] == list(members.values())


async def test_a_file_that_does_not_exist_is_named(engine: Engine) -> None:
    with pytest.raises(Fatal, match="There is no file"):
        await find(await context(engine), [UUID(int=7)])


# -- what it is called ---------------------------------------------------------------------------------------------

words = st.text(st.sampled_from("aAbß.-2"), min_size=1, max_size=4).filter(lambda word: word.strip("."))


@given(st.lists(st.lists(words, min_size=1, max_size=3).map("/".join), max_size=30))
def test_names_are_those_of_the_images_and_no_two_are_alike(paths: list[str]) -> None:
    pictures = [Picture(path, None, 0, 0) for path in paths]  # type: ignore[arg-type]

    called = names(pictures, "jpg")

    assert called == names(pictures, "jpg")
    assert len({name.casefold() for name in called}) == len(paths)
    assert all(name.endswith(".jpg") for name in called)
    for path, name in zip(paths, called, strict=True):
        assert PurePosixPath(name).parent == PurePosixPath(path).parent


def test_names_that_would_be_alike_get_a_number() -> None:
    pictures = [Picture(name, None, 0, 0) for name in ("a.png", "A.gif", "a-2.webp", "b/a.png", "a.jpg")]  # type: ignore[arg-type]

    assert names(pictures, "jpg") == ["a.jpg", "A-2.jpg", "a-2-2.jpg", "b/a.jpg", "a-3.jpg"]


# -- what is made --------------------------------------------------------------------------------------------------


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
        "input.sizes: Value error, one of the sizes is there twice; name each once.",
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


# -- the processes -------------------------------------------------------------------------------------------------


async def pictures_of(data: bytes, count: int) -> AsyncIterator[tuple[Picture, bytes]]:
    for number in range(count):
        yield Picture(f"{number}.jpg", None, len(data), len(data)), data  # type: ignore[arg-type]


def started_by(parent: int, module: str) -> list[int]:
    """The processes that another has started to run a module."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            its_parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if its_parent == parent and module.encode() in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def makers(parent: int | None = None) -> list[int]:
    return started_by(parent or os.getpid(), "services.worker.kinds.image_maker")


def family(worker: int) -> list[int]:
    """The processes of the one job that a worker runs: the handler's and its makers'."""
    [child] = started_by(worker, "services.worker.child")
    return [child, *makers(child)]


async def test_a_maker_that_dies_is_replaced_and_its_image_is_made() -> None:
    async with Pool(BOXES, 2) as pool:
        answers = []
        async for head, _ in pool.make(pictures_of(PHOTO, 20)):
            answers.append(head)
            if len(answers) == 5:
                for pid in makers():
                    os.kill(pid, signal.SIGKILL)
    assert [set(head) for head in answers] == [{"thumbnails", "cell", "animated"}] * 20
    assert not makers()


async def test_an_image_that_kills_its_makers_is_rejected_and_harms_no_other() -> None:
    """The one with the most pixels is so slow that there is time to kill."""
    slow = encoded(Image.new("L", (9999, 9999)), "PNG")

    async def images() -> AsyncIterator[tuple[Picture, bytes]]:
        async for image in pictures_of(PHOTO, 3):
            yield image
        async for image in pictures_of(slow, 1):
            yield image

    async with Pool(BOXES, 1) as pool:
        answers = aiter(pool.make(images()))
        for _ in range(3):
            await anext(answers)
        poisoned = asyncio.ensure_future(anext(answers))
        dead = set[int]()
        while not poisoned.done():
            for pid in set(makers()) - dead:
                dead.add(pid)
                # Once it is ready: before that, it would be one that does not start.
                await until(lambda pid=pid: poisoned.done() or busy(pid))
                os.kill(pid, signal.SIGKILL)
            await asyncio.sleep(0.01)
        head, _ = poisoned.result()
        assert head == {"reason": "The process that reads it dies of it."}
        again = pool.make(pictures_of(PHOTO, 2))
        assert [set(head) async for head, _ in again] == [{"thumbnails", "cell", "animated"}] * 2


def busy(pid: int) -> bool:
    """Whether a maker has begun with the slow image: it holds the pixels."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return any(line.startswith("VmRSS") and int(line.split()[1]) > 100_000 for line in status.splitlines())


async def test_an_image_that_takes_too_long_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    # Up to the next full second.
    monkeypatch.setattr(image_pool, "SECONDS", 0.0)
    slow = encoded(Image.new("RGBA", (9999, 9999)), "PNG", compress_level=1)
    async with Pool(BOXES, 1) as pool:
        assert [head async for head, _ in pool.make(pictures_of(slow, 1))] == [
            {"reason": "It takes more than 0 seconds of a core."}
        ]


async def test_makers_that_cannot_start_are_no_fault_of_the_images() -> None:
    with pytest.raises(RuntimeError, match="does not start"):
        async with Pool({"no": "orders"}, 2) as pool:
            async for _ in pool.make(pictures_of(PHOTO, 3)):
                pass


async def test_a_maker_has_ended_when_the_pool_is_left_though_its_end_was_broken_off() -> None:
    async with Pool(BOXES, 1) as pool:
        assert len([head async for head, _ in pool.make(pictures_of(PHOTO, 1))]) == 1
        [maker] = pool._makers
        process = maker._process
        ending = asyncio.create_task(maker.end())
        await asyncio.sleep(0)
        ending.cancel()
        await asyncio.wait({ending})
    assert process is not None
    assert process.returncode == -signal.SIGKILL


def test_there_are_as_many_makers_as_a_container_has_room_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_pool, "CONTAINER", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    rooms = {}
    for cpu, memory in (("max 100000", "max"), ("250000 100000", "max"), ("50000 100000", "max")):
        (tmp_path / "cpu.max").write_text(f"{cpu}\n")
        (tmp_path / "memory.max").write_text(f"{memory}\n")
        rooms[cpu] = room()
    assert list(rooms.values()) == [16, 3, 1]
    (tmp_path / "cpu.max").unlink()
    for memory, makers in ((64 << 30, 16), (2 << 30, 2), (300 << 20, 1)):
        (tmp_path / "memory.max").write_text(f"{memory}\n")
        assert room() == makers


async def test_an_image_that_needs_more_memory_than_a_container_has_is_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_pool, "CONTAINER", tmp_path)
    (tmp_path / "memory.max").write_text(str(400 << 20))
    large = encoded(Image.new("RGB", (8000, 8000)), "PNG", compress_level=1)

    async def images() -> AsyncIterator[tuple[Picture, bytes]]:
        for data in (large, PHOTO):
            async for image in pictures_of(data, 1):
                yield image

    async with Pool(BOXES, 1) as pool:
        answers = [head async for head, _ in pool.make(images())]
    assert answers[0] == {"reason": "It needs more memory than an image may take."}
    assert set(answers[1]) == {"thumbnails", "cell", "animated"}


# -- interruptions -------------------------------------------------------------------------------------------------

# Takes a maker about 50 ms an image.
SLOW = {"format": "avif", "sizes": ["400x300", "300x300"]}


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
    file = str((await engine.upload(album(100))).id)
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

    assert (job.state, job.result["images"], job.result["rejected"]) == (JobState.SUCCEEDED, 100, 1)
    assert (await engine.row(job_id))["crashes"] == 1
    archive = zipfile.ZipFile(io.BytesIO(await content(engine, job, "thumbnails.zip")))
    wanted = [f"{size}/{number:04}.avif" for number in range(100) for size in SLOW["sizes"]]
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
        assert time.monotonic() - began < 2
        assert job.state == JobState.CANCELLED
        assert not any(map(lives, running))
        await until(lambda: not files_below(engine.settings.home / "files" / "artifacts"))

"""What image.thumbnails finds in files and zips, what it refuses, and what the images are called."""

import io
import os
import stat
import struct
import zipfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path, PurePosixPath
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headway import Fatal
from headway.embedded import Embedded
from services.worker.context import Context, Parts
from services.worker.kinds import image_files
from services.worker.kinds.image_files import Picture, find, names, read
from services.worker.runner import Attempt
from tests.engine import Engine
from tests.engine import engine as make_engine
from tests.images import PHOTO, zipped


@pytest.fixture
async def engine(servers: Embedded, tmp_path: Path) -> AsyncIterator[Engine]:
    async with make_engine(servers, tmp_path, drain=0.0) as engine:
        yield engine


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

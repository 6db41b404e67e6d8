"""Files in a folder: whole or not at all, in constant memory, at any size."""

import asyncio
import hashlib
import os
import random
import resource
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from uuid_utils.compat import uuid7

from headway.errors import InvalidSettings, NotFound, TooLarge
from headway.files import CHUNK, Files, artifact_key, part_key
from tests.conftest import files_below

LIMIT = 64 << 20


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files((tmp_path / "a folder").as_uri(), max_size=LIMIT)


@pytest.fixture
def kept(tmp_path: Path) -> Callable[[], list[Path]]:
    """What lies in the folder, unfinished files included."""
    return lambda: files_below(tmp_path / "a folder")


async def stream(chunks: Sequence[bytes]) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk


async def content(files: Files, key: str, *span: int) -> bytes:
    return b"".join([chunk async for chunk in files.read(key, *span)])


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sizes=st.lists(st.sampled_from([0, 1, 7, 1000, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK]), max_size=5))
def test_what_is_read_is_what_was_written(files: Files, sizes: list[int]) -> None:
    pieces = [random.Random(n).randbytes(size) for n, size in enumerate(sizes)]
    whole = b"".join(pieces)

    async def live() -> None:
        for key, stored in (
            ("put", await files.put("put", stream(pieces))),
            ("written", await written(files, "written", pieces)),
        ):
            assert stored.size == len(whole)
            assert stored.sha256 == hashlib.sha256(whole).hexdigest()
            assert await content(files, key) == whole

    async def written(files: Files, key: str, pieces: list[bytes]):
        async with files.writer(key) as out:
            for piece in pieces:
                await out.write(piece)
        assert out.stored is not None
        return out.stored

    asyncio.run(live())


@pytest.mark.parametrize("span", [(0, 1), (0, 10), (3, 4), (999_999, 2_000_000), (1_999_999, 2_000_000), (5,)])
async def test_a_part_is_read(files: Files, span: tuple[int, ...]) -> None:
    whole = random.Random(1).randbytes(2_000_000)
    await files.put("a", stream([whole]))

    assert await content(files, "a", *span) == whole[slice(*(*span, None)[:2])]


async def test_pieces_are_about_as_large_as_asked_for(files: Files) -> None:
    await files.put("a", stream([b"x" * 1_000_000]))

    sizes = [len(chunk) async for chunk in files.read("a", chunk=100_000)]

    assert sum(sizes) == 1_000_000
    assert len(sizes) > 5


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sizes=st.lists(st.integers(1, 20), max_size=5), span=st.tuples(st.integers(0, 100), st.integers(0, 100)))
def test_a_span_of_a_file_in_parts_is_that_of_the_whole(files: Files, sizes: list[int], span: tuple[int, int]) -> None:
    whole = random.Random(1).randbytes(sum(sizes))
    start, end = sorted(min(place, len(whole)) for place in span)

    async def live() -> bytes:
        parts, first = [], 0
        for number, size in enumerate(sizes):
            await files.save(f"part/{number}", whole[first : first + size])
            parts.append((f"part/{number}", size))
            first += size
        return b"".join([piece async for piece in files.read_parts(parts, start, end, chunk=3)])

    assert asyncio.run(live()) == whole[start:end]


async def test_what_is_not_there_is_not_found(files: Files) -> None:
    with pytest.raises(NotFound, match="gone"):
        await content(files, "files/none")


async def test_a_stream_past_the_limit_is_refused_and_leaves_nothing(
    files: Files, kept: Callable[[], list[Path]]
) -> None:
    with pytest.raises(TooLarge, match="67,108,864"):
        await files.put("a", stream([b"x" * CHUNK] * 65))

    assert kept() == []
    with pytest.raises(NotFound):
        await content(files, "a")


class Broken(Exception):
    pass


async def breaks_off(good: int) -> AsyncIterator[bytes]:
    for _ in range(good):
        yield b"x" * CHUNK
    raise Broken


@pytest.mark.parametrize("good", [0, 1, 5, 20])
async def test_a_stream_that_breaks_off_leaves_nothing(files: Files, kept: Callable[[], list[Path]], good: int) -> None:
    with pytest.raises(Broken):
        await files.put("a", breaks_off(good))

    assert kept() == []


@pytest.mark.parametrize("good", [0, 1, 20])
async def test_an_upload_that_is_cancelled_leaves_nothing(
    files: Files, kept: Callable[[], list[Path]], good: int
) -> None:
    reached = asyncio.Event()

    async def hangs() -> AsyncIterator[bytes]:
        for _ in range(good):
            yield b"x" * CHUNK
        reached.set()
        await asyncio.Event().wait()
        yield b""

    putting = asyncio.create_task(files.put("a", hangs()))
    await reached.wait()
    putting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await putting

    assert kept() == []
    assert await is_missing(files, "a")


async def is_missing(files: Files, key: str) -> bool:
    try:
        await content(files, key)
    except NotFound:
        return True
    return False


async def test_nothing_is_to_be_seen_before_the_end(files: Files) -> None:
    async with files.writer("a") as out:
        await out.write(b"x" * (5 * CHUNK))
        assert await is_missing(files, "a")

    assert len(await content(files, "a")) == 5 * CHUNK


@pytest.mark.parametrize("size", [10, 5 * CHUNK])
async def test_a_writer_whose_block_fails_leaves_nothing(
    files: Files, kept: Callable[[], list[Path]], size: int
) -> None:
    with pytest.raises(Broken):
        async with files.writer("a") as out:
            await out.write(b"x" * size)
            raise Broken

    assert kept() == []


async def test_a_writer_past_the_limit_says_so_and_leaves_nothing(files: Files, kept: Callable[[], list[Path]]) -> None:
    with pytest.raises(TooLarge):
        async with files.writer("a") as out:
            while True:
                await out.write(b"x" * CHUNK)

    assert kept() == []


async def test_a_writer_that_is_cancelled_while_the_disk_is_slow_leaves_no_task_behind(tmp_path: Path) -> None:
    files = Files(tmp_path.as_uri(), max_size=LIMIT)
    before = asyncio.all_tasks()

    async def fill() -> None:
        async with files.writer("a") as out:
            while True:
                await out.write(b"x" * CHUNK)

    for ticks in range(20):
        filling = asyncio.create_task(fill())
        for _ in range(ticks):
            await asyncio.sleep(0)
        filling.cancel()
        await asyncio.gather(filling, return_exceptions=True)

    async with asyncio.timeout(5):
        while asyncio.all_tasks() != before:
            await asyncio.sleep(0.01)


async def test_a_large_file_passes_through_little_memory(files: Files) -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    piece = b"x" * CHUNK
    await files.put("warm", stream([piece] * 8))
    before, most = resident(), 0
    async with files.writer("a") as out:
        for _ in range(60):
            await out.write(piece)
            most = max(most, resident())
    async for _ in files.read("a"):
        most = max(most, resident())

    assert most - before < 30 << 20


async def test_an_attempt_writes_over_no_other_attempts_files() -> None:
    job = uuid7()
    for key in artifact_key, part_key:
        assert len({key(job, token, number) for token in (1, 2) for number in (1, 2)}) == 4


async def test_what_is_saved_is_on_disk_with_the_folders_that_lead_to_it(
    files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = []
    sync = os.fsync

    def watch(descriptor: int) -> None:
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink())
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", watch)
    await files.save("parts/job/1/1", b"data")

    top = tmp_path / "a folder"
    path = top / "parts" / "job" / "1" / "1"
    assert synced == [path, *path.parents[:4]]
    assert path.parents[3] == top
    assert await content(files, "parts/job/1/1") == b"data"


async def test_deleting_passes_over_what_is_not_there(files: Files, kept: Callable[[], list[Path]]) -> None:
    await files.put("a/b/c", stream([b"1"]))

    await files.delete(["a/b/c", "a/b/other"])
    await files.delete(["a/b/c"])

    assert kept() == []


def test_a_place_that_is_no_folder_is_refused() -> None:
    for location in ("ftp://bucket", "s3:///prefix"):
        with pytest.raises(InvalidSettings, match=r"HEADWAY_FILES_URL.*s3://"):
            Files(location, max_size=1)

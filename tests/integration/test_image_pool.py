"""The processes that make thumbnails: they die, hang, do not start or need too much memory."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from PIL import Image

from services.worker.kinds import image_pool
from services.worker.kinds.image_files import Picture
from services.worker.kinds.image_pool import Pool, room
from tests.conftest import until
from tests.images import PHOTO, encoded

BOXES = {"boxes": [(100, 100)], "cell": (30, 30), "format": "jpeg", "quality": 80}


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

"""`image.thumbnails`: uploaded images, or zips of them, to small ones in a zip, and a contact sheet."""

import asyncio
import io
from collections.abc import Sequence
from contextlib import aclosing, suppress
from typing import Annotated, Any, Literal
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field, field_validator
from pydantic_core import to_json

from headway import Fatal, JobContext, kind
from headway.context import ArtifactWriter
from services.worker import frames
from services.worker.kinds.image_archive import Archive
from services.worker.kinds.image_files import Picture, find, names, read
from services.worker.kinds.image_pool import Pool, room
from services.worker.kinds.image_sheet import Sheet
from services.worker.kinds.saved import Saved

MAX_SIDE = 2048
MAX_REJECTED = 1000
# Rejected images that the result itself lists.
SHOWN = 20
LAST_SAVE = 3.0
EXTENSIONS = {"jpeg": "jpg", "png": "png", "webp": "webp", "avif": "avif"}

Box = Annotated[str, Field(pattern=r"^[1-9][0-9]{0,3}x[1-9][0-9]{0,3}$")]


class ThumbnailsInput(BaseModel):
    model_config = ConfigDict(extra="forbid")

    file: UUID | Annotated[list[UUID], Field(min_length=1, max_length=1000)] = Field(
        description="The id of an uploaded image or zip of images, or a list of such ids."
    )
    sizes: list[Box] = Field(
        ["320x320"],
        min_length=1,
        max_length=5,
        description="Boxes of width and height in pixels, at most 2048, such as 320x240: one thumbnail to fit each.",
    )
    format: Literal["jpeg", "png", "webp", "avif"] = Field("jpeg", description="The format of the thumbnails.")
    quality: int = Field(80, ge=1, le=100, description="Of jpeg, webp and avif: 100 is best and largest.")

    @field_validator("sizes")
    @classmethod
    def _sizes_differ_and_are_small(cls, sizes: list[str]) -> list[str]:
        if len(set(sizes)) < len(sizes):
            raise ValueError("one of the sizes is there twice; name each once")
        if any(side > MAX_SIDE for size in sizes for side in _box(size)):
            raise ValueError(f"thumbnails are at most {MAX_SIDE} pixels wide and high; ask for smaller ones")
        return sizes


class Rejected(BaseModel):
    index: int = Field(description="Place among the images, from 0.")
    name: str
    reason: str


class ThumbnailsResult(BaseModel):
    images: int = Field(description="Images that thumbnails were made of.")
    rejected: int = Field(description="Images that could not be read; the artifact rejected.jsonl lists them.")
    first_rejected: list[Rejected] = Field(description=f"The first {SHOWN} of them.")
    thumbnails: int = Field(description="Files in the artifact thumbnails.zip.")
    animated: int = Field(description="Images with several frames, of which the first was taken.")
    bytes_in: int = Field(description="Bytes of the images that thumbnails were made of.")
    bytes_out: int = Field(description="Bytes of their thumbnails.")
    seconds: float


@kind("image.thumbnails", timeout="4h", runs="process")
async def make_thumbnails(job: JobContext, input: ThumbnailsInput) -> ThumbnailsResult:
    """Make thumbnails of images, or of the images in a zip, in chosen sizes and a chosen format, and a contact sheet.

    An image that cannot be read is listed in the result, not a failed job.
    """
    pictures = await find(job, input.file if isinstance(input.file, list) else [input.file])
    output = _Output(job, input, pictures)
    try:
        async with job.artifact("thumbnails.zip", "application/zip") as out:
            await output.go_on(out)
            await _make_rest(job, input, output, out)
            output.check()
            await out.write(output.archive.end())
    except Fatal:
        await output.list_rejected()
        raise
    except asyncio.CancelledError:
        if job.interruption == "drained":
            # The worker waits a while for this; what is not saved by then is made again.
            with suppress(TimeoutError):
                async with asyncio.timeout(LAST_SAVE):
                    await output.saved.save()
        raise
    await output.list_rejected()
    async with job.artifact("contact-sheet.jpg", "image/jpeg") as out:
        await out.write(output.sheet.as_jpeg())
    return output.result()


async def _make_rest(job: JobContext, input: ThumbnailsInput, output: "_Output", out: ArtifactWriter) -> None:
    left = [index for index in range(len(output.pictures)) if index not in output.done]
    orders = {
        "boxes": [_box(size) for size in input.sizes],
        "cell": output.sheet.cell,
        "format": input.format,
        "quality": input.quality,
    }
    await output.report()
    async with (
        Pool(orders, min(room(), len(left))) as pool,
        aclosing(read([output.pictures[index] for index in left])) as images,
        aclosing(pool.make(images)) as answers,
    ):
        indexes = iter(left)
        async for head, body in answers:
            await output.add({"index": next(indexes), **head}, body, out)
            await output.report()
            if output.saved.due:
                await output.saved.save()


class _Output:
    """What was made, and what it adds up to."""

    def __init__(self, job: JobContext, input: ThumbnailsInput, pictures: Sequence[Picture]) -> None:
        self.pictures = pictures
        self.saved = Saved(job)
        self.archive = Archive()
        self.sheet = Sheet(len(pictures))
        self.done: set[int] = set()
        self._job = job
        self._sizes = input.sizes
        self._names = names(pictures, EXTENSIONS[input.format])
        self._rejected: list[Rejected] = []
        self._made = {"images": 0, "thumbnails": 0, "animated": 0, "bytes_in": 0, "bytes_out": 0}

    async def go_on(self, out: ArtifactWriter) -> None:
        """Write what earlier attempts have saved; `done` are the places of those images."""
        async for records in self.saved.earlier():
            for head, body in frames.split(records):
                await self._take(head, body, out)

    async def add(self, head: dict[str, Any], body: bytes, out: ArtifactWriter) -> None:
        """Write what was made of an image, and have the next save hold it. Raises Fatal when too many are rejected."""
        record = io.BytesIO()
        frames.send(record, head, body)
        self.saved.add(record.getvalue())
        await self._take(head, body, out)
        if len(self._rejected) > MAX_REJECTED:
            raise Fatal(f"More than {MAX_REJECTED:,} images cannot be read: {self._examples()}")

    def check(self) -> None:
        """Raises Fatal if more than half of the images are rejected."""
        if 2 * len(self._rejected) > len(self.pictures):
            raise Fatal(f"{len(self._rejected):,} of {len(self.pictures):,} images cannot be read: {self._examples()}")

    async def report(self) -> None:
        counts = {"rejected": len(self._rejected), "bytes": self._made["bytes_out"]}
        await self._job.report(len(self.done), len(self.pictures), "making thumbnails", unit="images", counts=counts)

    async def list_rejected(self) -> None:
        """Write them to an artifact, if there are any."""
        if self._rejected:
            async with self._job.artifact("rejected.jsonl", "application/x-ndjson") as out:
                for each in self._rejected:
                    await out.write(to_json(each, ensure_ascii=True) + b"\n")

    def result(self) -> ThumbnailsResult:
        return ThumbnailsResult(
            **self._made,
            rejected=len(self._rejected),
            first_rejected=self._rejected[:SHOWN],
            seconds=round(self.saved.seconds, 3),
        )

    async def _take(self, head: dict[str, Any], body: bytes, out: ArtifactWriter) -> None:
        index = head["index"]
        self.done.add(index)
        picture = self.pictures[index]
        if "reason" in head:
            self._rejected.append(Rejected(index=index, name=picture.name, reason=head["reason"]))
            return
        place = 0
        for size, length in zip(self._sizes, head["thumbnails"], strict=True):
            await out.write(self.archive.add(f"{size}/{self._names[index]}", body[place : place + length]))
            place += length
        self.sheet.show(index, head["cell"], body[place:])
        self._made["images"] += 1
        self._made["thumbnails"] += len(self._sizes)
        self._made["animated"] += head["animated"]
        self._made["bytes_in"] += picture.size
        self._made["bytes_out"] += place

    def _examples(self) -> str:
        """The first few in words, and what to do."""
        few = "; ".join(f"{each.name[:100]!r}: {each.reason}" for each in self._rejected[:3])
        return f"{few} All are in the artifact rejected.jsonl. Repair them or leave them out, and upload the rest."


def _box(size: str) -> tuple[int, int]:
    width, height = map(int, size.split("x"))
    return width, height

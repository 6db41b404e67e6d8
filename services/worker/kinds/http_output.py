"""What `http.fetch` has made: its lines, the archive of bodies, and what they add up to."""

import asyncio
from collections import Counter
from collections.abc import Iterator
from math import ceil, log
from mimetypes import MimeTypes

from pydantic import BaseModel, Field
from pydantic_core import from_json, to_json

from headway.context import ArtifactWriter
from headway.fetching.fetcher import Record
from services.worker.kinds.image_archive import Archive
from services.worker.kinds.saved import Saved

# Between so many lines it is others' turn.
AT_A_TIME = 500
# Times are counted in steps of a hundredth: there may be a million of them.
STEP = log(1.01)
# Python's own table, the same on every machine.
TYPES = MimeTypes()


class Latency(BaseModel):
    """Milliseconds from the start of a URL's last request to the end of its body, to a hundredth of them."""

    p50: float
    p90: float
    p99: float


class FetchResult(BaseModel):
    total: int
    ok: int = Field(description="URLs whose last answer was 2xx or 3xx.")
    http_error: int = Field(description="URLs whose last answer was any other status.")
    failed: int = Field(description="URLs without a usable answer; their `error` says why.")
    retries: int = Field(description="How often a URL was tried again.")
    statuses: dict[str, int] = Field(description="Answers by class of status, such as 2xx.")
    errors: dict[str, int] = Field(description="Failures by type of error.")
    latency_ms: Latency | None = Field(description="Of the URLs that were answered; null if none was.")
    bytes: int = Field(description="Bytes of bodies received, once decompressed.")
    seconds: float


class Output:
    """Records in, lines and bodies out. `done` says of each place whether it has its line."""

    def __init__(self, saved: Saved, total: int, lines: ArtifactWriter, archive: ArtifactWriter | None) -> None:
        self.saved = saved
        self.done = bytearray(total)
        self.left = total
        self.counts = {"ok": 0, "http_error": 0, "failed": 0, "bytes": 0}
        self._lines = lines
        self._archive = archive
        self._zip = Archive() if archive is not None else None
        self._retries = 0
        self._statuses: Counter[int] = Counter()
        self._errors: Counter[str] = Counter()
        self._steps: Counter[int] = Counter()

    async def go_on(self) -> None:
        """Write what earlier attempts have saved."""
        async for many in self.saved.earlier():
            lines = list[bytes]()
            for line, record, body in _records(many):
                self._count(record)
                lines.append(line)
                await self._keep(record, body)
                if len(lines) == AT_A_TIME:
                    await self._lines.write(b"".join(lines))
                    lines.clear()
                    await asyncio.sleep(0)
            await self._lines.write(b"".join(lines))

    def save_later(self, record: Record) -> tuple[bytes, Record, bytes]:
        """The record as a line and its body, which the next save will hold."""
        body = b""
        if self._archive is not None:
            body = record.pop("body") or b""
            record["file"] = None if record["error"] else _name(record)
        # ASCII only, for some readers take line separators of Unicode for the end of a line.
        line = to_json(record, ensure_ascii=True) + b"\n"
        self._count(record)
        self.saved.add(line + body)
        return line, record, body

    async def write(self, made: list[tuple[bytes, Record, bytes]]) -> None:
        """Write lines and bodies."""
        for line, record, body in made:
            await self._lines.write(line)
            await self._keep(record, body)

    async def end(self) -> None:
        """Write what makes the archive whole."""
        if self._archive is not None and self._zip is not None:
            await self._archive.write(self._zip.end())

    def result(self) -> FetchResult:
        """What the lines add up to."""
        answered = self.counts["ok"] + self.counts["http_error"]
        return FetchResult(
            total=answered + self.counts["failed"],
            **self.counts,
            retries=self._retries,
            statuses={f"{hundreds}xx": count for hundreds, count in sorted(self._statuses.items())},
            errors=dict(sorted(self._errors.items())),
            latency_ms=Latency(p50=self._latency(0.5), p90=self._latency(0.9), p99=self._latency(0.99))
            if answered
            else None,
            seconds=round(self.saved.seconds, 3),
        )

    async def _keep(self, record: Record, body: bytes) -> None:
        if self._archive is not None and self._zip is not None and record["file"]:
            await self._archive.write(self._zip.add(record["file"], body))

    def _count(self, record: Record) -> None:
        self.done[record["index"]] = 1
        self.left -= 1
        self.counts["bytes"] += record["bytes"]
        if (tries := record["tries"]) > 1:
            self._retries += tries - 1
        if error := record["error"]:
            self.counts["failed"] += 1
            self._errors[error["type"]] += 1
            return
        status = record["status"]
        self.counts["ok" if 200 <= status < 400 else "http_error"] += 1
        self._statuses[status // 100] += 1
        self._steps[ceil(log(record["ms"] or 0.001) / STEP)] += 1

    def _latency(self, share: float) -> float:
        before = share * self._steps.total()
        for step in sorted(self._steps):
            before -= self._steps[step]
            if before <= 0:
                break
        return round(1.01**step, 3)


def _records(many: bytes) -> Iterator[tuple[bytes, Record, bytes]]:
    """Saved records: each a line, and where that names a file, its bytes."""
    place = 0
    while place < len(many):
        end = many.index(b"\n", place) + 1
        record = from_json(many[place:end])
        size = record["bytes"] if record.get("file") else 0
        yield many[place:end], record, many[end : end + size]
        place = end + size


def _name(record: Record) -> str:
    kind = record["headers"].get("content-type", "").partition(";")[0].strip().lower()
    return f"{record['index']:06d}{TYPES.guess_extension(kind) or ''}"

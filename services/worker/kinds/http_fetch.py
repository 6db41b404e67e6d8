"""`http.fetch`: many URLs, a few at a time, one line of JSON for each."""

import asyncio
from array import array
from collections import Counter
from contextlib import suppress
from math import ceil
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import from_json, to_json

from headway import JobContext, kind, settings
from headway.fetching.deadlines import Deadlines
from headway.fetching.fetcher import Fetcher, Record
from headway.fetching.requests import Request
from headway.fetching.session import open_session
from headway.kinds import ArtifactWriter
from services.worker.kinds.http_turns import Turns
from services.worker.kinds.saved import Saved

TEXT_BYTES = 1 << 20
BODY_BYTES = 16 << 20
LAST_SAVE = 3.0

Url = Annotated[str, Field(max_length=2048, pattern=r"^[Hh][Tt][Tt][Pp][Ss]?://\S+$")]


class FetchInput(BaseModel):
    model_config = ConfigDict(extra="forbid")

    urls: list[Url] = Field(min_length=1, max_length=10_000, description="What to fetch, http or https.")
    concurrency: int = Field(20, ge=1, le=100, description="Requests under way at a time.")
    per_host: int = Field(5, ge=1, le=50, description="Requests under way at a time to one host and port.")
    timeout: float = Field(10, ge=0.1, le=120, description="Seconds for one URL, redirects and body included.")
    body: Literal["none", "text", "digest"] = Field(
        "digest", description="What a line says of the body: nothing, its text, or its SHA-256."
    )
    max_bytes: int | None = Field(
        None,
        ge=1,
        le=BODY_BYTES,
        description="Largest body in bytes, once decompressed; 1 MiB for text and 16 MiB else, which is also the most.",
    )

    @model_validator(mode="after")
    def _text_fits_in_memory(self) -> "FetchInput":
        if self.body == "text" and self.body_limit > TEXT_BYTES:
            raise ValueError(f'max_bytes must be at most {TEXT_BYTES} with body "text"; larger ones fit body "digest".')
        return self

    @property
    def body_limit(self) -> int:
        return self.max_bytes or (TEXT_BYTES if self.body == "text" else BODY_BYTES)


class Latency(BaseModel):
    """Milliseconds from the start of a URL to the end of its body, redirects included."""

    p50: float
    p90: float
    p99: float


class FetchResult(BaseModel):
    total: int
    ok: int = Field(description="URLs whose last answer was 2xx or 3xx.")
    http_error: int = Field(description="URLs whose last answer was any other status.")
    failed: int = Field(description="URLs without a usable answer; their `error` says why.")
    statuses: dict[str, int] = Field(description="Answers by class of status, such as 2xx.")
    errors: dict[str, int] = Field(description="Failures by type of error.")
    latency_ms: Latency | None = Field(description="Of the URLs that were answered; null if none was.")
    bytes: int = Field(description="Bytes of bodies received, once decompressed.")
    seconds: float


@kind("http.fetch", timeout="2h")
async def fetch(job: JobContext, input: FetchInput) -> FetchResult:
    """Fetch many URLs side by side, within limits for all and for each host, into a JSONL artifact.

    A URL that cannot be fetched is a line with an error, not a failed job.
    """
    # In a thread, for settings may be in files.
    allow = (await asyncio.to_thread(settings.load)).fetch_allow
    output = _Output(Saved(job))
    try:
        async with (
            job.artifact("results.jsonl", "application/x-ndjson") as out,
            open_session(allow, input.concurrency, input.per_host) as session,
        ):
            await output.go_on(out)
            fetcher = Fetcher(session, Deadlines(input.timeout), input.body, input.body_limit)
            await _fetch_rest(job, input, fetcher, output, out)
    except asyncio.CancelledError:
        if job.interruption == "drained":
            # The worker waits a while for this; what is not saved by then is fetched again.
            with suppress(TimeoutError):
                async with asyncio.timeout(LAST_SAVE):
                    await output.lines.save()
        raise
    return output.result()


async def _fetch_rest(
    job: JobContext, input: FetchInput, fetcher: Fetcher, output: "_Output", out: ArtifactWriter
) -> None:
    total, left = len(input.urls), len(input.urls) - len(output.done)
    turns = Turns(input.urls, input.per_host, output.done)
    # The bound makes fetching wait when the artifact's store is slower than the web.
    finished: asyncio.Queue[Record] = asyncio.Queue(maxsize=input.concurrency)

    async def work() -> None:
        while True:
            index, host = await turns.take()
            await finished.put(await fetcher.fetch(Request(index, input.urls[index])))
            turns.give_back(host)

    async def report() -> None:
        await job.report(total - left, total, "fetching", unit="urls", counts=output.counts)

    await report()
    tasks = [asyncio.create_task(work()) for _ in range(min(input.concurrency, left))]
    tasks.append(asyncio.create_task(fetcher.deadlines.watch()))
    try:
        while left:
            # Wait for one, then take whatever else is there: one report serves them all.
            batch = [output.add(await finished.get())]
            while not finished.empty():
                batch.append(output.add(finished.get_nowait()))
            for line in batch:
                await out.write(line)
            left -= len(batch)
            await report()
            if left and output.lines.due:
                await output.lines.save()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        # For the last save.
        while not finished.empty():
            output.add(finished.get_nowait())


class _Output:
    """The lines, and what they add up to."""

    def __init__(self, lines: Saved) -> None:
        self.lines = lines
        self.done: set[int] = set()
        self.counts = {"ok": 0, "http_error": 0, "failed": 0, "bytes": 0}
        self._statuses: Counter[str] = Counter()
        self._errors: Counter[str] = Counter()
        self._latencies = array("d")

    async def go_on(self, out: ArtifactWriter) -> None:
        """Write the lines that earlier attempts have saved; `done` are the places of their URLs."""
        async for many in self.lines.earlier():
            for line in many.splitlines():
                record = from_json(line)
                self._count(record)
                self.done.add(record["index"])
            await out.write(many)

    def add(self, record: Record) -> bytes:
        """The line of a record."""
        self._count(record)
        # ASCII only, for some readers take line separators of Unicode for the end of a line.
        line = to_json(record, ensure_ascii=True) + b"\n"
        self.lines.add(line)
        return line

    def _count(self, record: Record) -> None:
        self.counts["bytes"] += record["bytes"]
        if record["error"]:
            self.counts["failed"] += 1
            self._errors[record["error"]["type"]] += 1
            return
        self.counts["ok" if 200 <= record["status"] < 400 else "http_error"] += 1
        self._statuses[f"{record['status'] // 100}xx"] += 1
        self._latencies.append(record["ms"])

    def result(self) -> FetchResult:
        ms = sorted(self._latencies)

        def percentile(share: float) -> float:
            return ms[ceil(share * len(ms)) - 1]

        return FetchResult(
            total=self.counts["ok"] + self.counts["http_error"] + self.counts["failed"],
            **self.counts,
            statuses=dict(sorted(self._statuses.items())),
            errors=dict(sorted(self._errors.items())),
            latency_ms=Latency(p50=percentile(0.5), p90=percentile(0.9), p99=percentile(0.99)) if ms else None,
            seconds=round(self.lines.seconds, 3),
        )

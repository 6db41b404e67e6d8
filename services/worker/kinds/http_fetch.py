"""`http.fetch`: many URLs, a few at a time, one line of JSON for each."""

import asyncio
import time
from array import array
from collections import Counter
from math import ceil
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import to_json

from headway import JobContext, kind, settings
from services.worker.kinds.http_client import Fetcher, Record, open_session
from services.worker.kinds.http_turns import Deadlines, Turns

TEXT_BYTES = 1 << 20
BODY_BYTES = 16 << 20

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
    tally = _Tally()
    total = len(input.urls)
    turns = Turns(input.urls, input.per_host)
    # The bound makes fetching wait when the artifact's store is slower than the web.
    finished: asyncio.Queue[Record] = asyncio.Queue(maxsize=input.concurrency)

    async with (
        job.artifact("results.jsonl", "application/x-ndjson") as out,
        open_session(allow, input.concurrency, input.per_host) as session,
    ):
        deadlines = Deadlines(input.timeout)
        fetcher = Fetcher(session, deadlines, input.body, input.body_limit)

        async def work() -> None:
            while True:
                index, host = await turns.take()
                await finished.put(await fetcher.fetch(index, input.urls[index]))
                turns.give_back(host)

        await job.report(0, total, "fetching", unit="urls", counts=tally.counts)
        tasks = [asyncio.create_task(work()) for _ in range(min(input.concurrency, total))]
        tasks.append(asyncio.create_task(deadlines.watch()))
        try:
            done = 0
            while done < total:
                # Wait for one, then take whatever else is there: one report serves them all.
                records = [await finished.get()]
                while not finished.empty():
                    records.append(finished.get_nowait())
                for record in records:
                    tally.add(record)
                    # ASCII only, for some readers take line separators of Unicode for the end of a line.
                    await out.write(to_json(record, ensure_ascii=True) + b"\n")
                done += len(records)
                await job.report(done, total, "fetching", unit="urls", counts=tally.counts)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
    return tally.result()


class _Tally:
    """What the lines add up to."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._statuses: Counter[str] = Counter()
        self._errors: Counter[str] = Counter()
        self._latencies = array("d")
        self.counts = {"ok": 0, "http_error": 0, "failed": 0, "bytes": 0}

    def add(self, record: Record) -> None:
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
            seconds=round(time.perf_counter() - self._started, 3),
        )

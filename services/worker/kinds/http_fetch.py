"""`http.fetch`: many URLs, a few at a time, one line of JSON for each."""

import asyncio
from contextlib import AsyncExitStack, aclosing, suppress
from typing import Any
from uuid import UUID

from pydantic import ConfigDict, Field, model_validator

from headway import Fatal, JobContext, kind, settings
from headway.fetching.deadlines import Deadlines
from headway.fetching.failures import FetchError
from headway.fetching.fetcher import Fetcher, Record, blank
from headway.fetching.requests import Asking, Kept, Request, Url
from headway.fetching.session import open_session
from services.worker.kinds.http_output import FetchResult, Output
from services.worker.kinds.http_requests import Requests
from services.worker.kinds.http_retries import wait_before
from services.worker.kinds.http_robots import Robots
from services.worker.kinds.http_rows import Format
from services.worker.kinds.http_turns import Host, Turns
from services.worker.kinds.saved import Saved

TEXT_BYTES = 1 << 20
BODY_BYTES = 16 << 20
# Bodies for the archive that are in memory at a time.
ARCHIVE_BYTES = 128 << 20
# An archive's directory is held in memory.
ARCHIVE_FILES = 10_000
LAST_SAVE = 3.0
# Lines are written so often: what is done meanwhile shares a write and a report, which cost a tenth of a fetch each.
WRITE_EVERY = 0.01
# Lines that wait for it, where they hold no bodies.
MOST_LINES = 1000


def _for_readers(schema: dict[str, Any]) -> None:
    """What to fetch comes first. The API holds inputs against the schema, so that it says that one of two is needed."""
    properties = schema["properties"]
    first = {name: properties.pop(name) for name in ("urls", "file", "format", "url")}
    schema["properties"] = first | properties
    schema["oneOf"] = [{"required": ["urls"]}, {"required": ["file"]}]


class FetchInput(Asking):
    model_config = ConfigDict(extra="forbid", json_schema_extra=_for_readers)

    urls: list[Url] = Field(
        default_factory=list,
        min_length=1,
        max_length=10_000,
        description="What to fetch, http or https. Give these or `file`.",
    )
    file: UUID | None = Field(
        None,
        description="The id of an uploaded file of up to 1,000,000 URLs, as it is or compressed with gzip, zstd or as "
        "ZIP. `{name}` in `url`, in values of `headers`, in `data` and in `json` stands for a row's value of that "
        "column.",
    )
    format: Format | None = Field(
        None,
        description="What `file` is: a URL a line (its column is `url`), CSV with a header, or a JSON object a line. "
        "Told by the ending of its name if left out.",
    )
    url: str = Field(
        "{url}",
        min_length=1,
        max_length=2048,
        description="The URL of a row of `file`, such as `https://api.example/items/{id}`; there values are "
        "percent-encoded. By default the column `url` as it is.",
    )
    concurrency: int = Field(20, ge=1, le=100, description="Requests under way at a time.")
    per_host: int = Field(5, ge=1, le=50, description="Requests under way at a time to one host and port.")
    rate: float | None = Field(
        None, ge=0.01, le=10_000, description="Requests a second to one host and port at most; any number if left out."
    )
    timeout: float = Field(10, ge=0.1, le=120, description="Seconds for one try of a URL, redirects and body included.")
    tries: int = Field(
        3,
        ge=1,
        le=10,
        description="How often a URL is tried at most: again after 429, 500, 502, 503, 504, a timeout or a broken "
        "connection, with growing waits, and not before `Retry-After`. POST and PATCH only if the server did nothing.",
    )
    robots: bool = Field(False, description="Ask each host for its robots.txt first, and leave out what that forbids.")
    body: Kept = Field(
        "digest",
        description="What a line says of the body: nothing, its SHA-256, its text, its bytes in base64, or its file in "
        "the artifact `bodies.zip`.",
    )
    max_bytes: int | None = Field(
        None,
        ge=1,
        le=BODY_BYTES,
        description="Largest body in bytes, once decompressed; 1 MiB for text and base64, which is also the most, "
        "4 MiB for archive, and 16 MiB else.",
    )

    @model_validator(mode="after")
    def _has_one_list(self) -> "FetchInput":
        if bool(self.urls) == (self.file is not None):
            raise ValueError("give urls or file, one of them")
        if self.file is None and (self.format is not None or self.url != "{url}"):
            raise ValueError("format and url are for a file; leave them out with urls")
        return self

    @model_validator(mode="after")
    def _bodies_fit_in_memory(self) -> "FetchInput":
        if self.body in ("text", "base64") and self.body_limit > TEXT_BYTES:
            raise ValueError(f'max_bytes is at most {TEXT_BYTES} with body "{self.body}"; larger ones fit "archive"')
        if self.body == "archive" and self.body_limit * self.concurrency > ARCHIVE_BYTES:
            raise ValueError(f'concurrency times max_bytes is at most {ARCHIVE_BYTES} with body "archive"')
        return self

    @property
    def body_limit(self) -> int:
        if self.max_bytes is not None:
            return self.max_bytes
        return {"text": TEXT_BYTES, "base64": TEXT_BYTES, "archive": 4 << 20}.get(self.body, BODY_BYTES)


@kind("http.fetch", timeout="6h")
async def fetch(job: JobContext, input: FetchInput) -> FetchResult:
    """Fetch many URLs side by side, within limits for all and for each host, into a JSONL artifact.

    A URL that cannot be fetched is a line with an error, not a failed job.
    """
    # In a thread, for settings may be in files.
    given = await asyncio.to_thread(settings.load)
    requests = await Requests.open(job, input)
    if input.body == "archive" and requests.total > ARCHIVE_FILES:
        raise Fatal(f'body "archive" takes at most {ARCHIVE_FILES:,} URLs; split the file, or choose another body.')
    async with AsyncExitStack() as stack:
        lines = await stack.enter_async_context(job.artifact("results.jsonl", "application/x-ndjson"))
        archive = None
        if input.body == "archive":
            archive = await stack.enter_async_context(job.artifact("bodies.zip", "application/zip"))
        session = await stack.enter_async_context(open_session(given.fetch_allow, input.concurrency, input.per_host))
        output = Output(Saved(job), requests.total, lines, archive)
        fetcher = Fetcher(session, Deadlines(input.timeout), input.body, input.body_limit, given.credentials)
        try:
            await output.go_on()
            await _Work(job, input, requests, fetcher, output).run()
        except asyncio.CancelledError:
            if job.interruption == "drained":
                # The worker waits a while for this; what is not saved by then is fetched again.
                with suppress(TimeoutError):
                    async with asyncio.timeout(LAST_SAVE):
                        await output.saved.save()
            raise
        await output.end()
    return output.result()


class _Work:
    """The requests that are left: read, made and written side by side."""

    def __init__(
        self, job: JobContext, input: FetchInput, requests: Requests, fetcher: Fetcher, output: Output
    ) -> None:
        self._job = job
        self._input = input
        self._requests = requests
        self._fetcher = fetcher
        self._output = output
        self._turns = Turns(input.per_host, input.rate)
        self._robots = Robots(fetcher) if input.robots else None
        self._tries: dict[int, int] = {}
        # The bound makes fetching wait when the artifact's store is slower than the web, and with bodies bounds memory.
        bounds = {"archive": 1, "text": input.concurrency, "base64": input.concurrency}
        self._finished: asyncio.Queue[Record] = asyncio.Queue(bounds.get(input.body, MOST_LINES))
        self._pause = 0.0 if input.body == "archive" else WRITE_EVERY

    async def run(self) -> None:
        """Returns once every request has its line."""
        output = self._output
        await self._report()
        async with asyncio.TaskGroup() as tasks:
            beside = [
                tasks.create_task(self._feed()),
                tasks.create_task(self._fetcher.deadlines.watch()),
                *(tasks.create_task(self._make()) for _ in range(min(self._input.concurrency, output.left))),
            ]
            try:
                while output.left:
                    # Wait for one, then take whatever else is there: one report serves them all.
                    made = [output.save_later(await self._finished.get())]
                    while not self._finished.empty():
                        made.append(output.save_later(self._finished.get_nowait()))
                    await output.write(made)
                    await self._report()
                    if output.left and output.saved.due:
                        await output.saved.save()
                    if output.left:
                        await asyncio.sleep(self._pause)
            finally:
                for task in beside:
                    task.cancel()
                # For the last save.
                while not self._finished.empty():
                    output.save_later(self._finished.get_nowait())

    async def _feed(self) -> None:
        async with aclosing(self._requests.read()) as requests:
            async for request, error in requests:
                if self._output.done[request.index]:
                    continue
                if error is None:
                    await self._turns.add(request)
                else:
                    await self._finished.put(self._refused(request, error))

    async def _make(self) -> None:
        while True:
            request, host = await self._turns.take()
            record = await self._fetch(request, host)
            if record is not None:
                await self._finished.put(record)
            self._turns.give_back(host)

    async def _fetch(self, request: Request, host: Host) -> Record | None:
        """The record of a request; None if it is to be made again."""
        if self._robots and not await self._robots.allow(request.url):
            return self._refused(request, FetchError("robots", "The host's robots.txt asks to leave this alone."))
        record = await self._fetcher.fetch(request)
        tries = self._tries.pop(request.index, 0) + 1
        if tries < self._input.tries and (wait := wait_before(request, record, tries)):
            until, pause = wait
            if pause:
                self._turns.pause(host, pause)
            self._tries[request.index] = tries
            self._turns.again(request, until)
            return None
        record["tries"] = tries
        return record

    def _refused(self, request: Request, error: FetchError) -> Record:
        return blank(request, self._input.body) | {"error": error.as_json(), "tries": 0}

    async def _report(self) -> None:
        total = len(self._output.done)
        await self._job.report(total - self._output.left, total, "fetching", unit="urls", counts=self._output.counts)

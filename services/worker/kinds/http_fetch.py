"""`http.fetch`: many URLs, a few at a time, one line of JSON for each."""

import asyncio
import hashlib
import os
import re
import time
from array import array
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from math import ceil
from socket import AF_INET, AddressFamily
from typing import Annotated, Any, Literal

import aiohttp
import structlog
from aiohttp.abc import ResolveResult
from aiohttp.http_exceptions import ContentEncodingError
from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import to_json
from yarl import URL

from headway import JobContext, kind, metrics, settings
from headway.addresses import AddressRefused, Network, dialable, guard

log = structlog.get_logger(__name__)

MAX_REDIRECTS = 5
REDIRECTS = frozenset({301, 302, 303, 307, 308})
TEXT_BYTES = 1 << 20
BODY_BYTES = 16 << 20
HEADERS_LENGTH = 16 << 10
# Those of the web. Python's other codecs are slow on hostile bytes, run code, or make strings that are not Unicode,
# and it remembers every unknown name for good.
CHARSET = re.compile(
    r"utf-?8|utf-16(le|be)?|(us-)?ascii|latin-?1|iso-8859-([1-9]|1[013-6])|windows-125[0-8]|koi8-[ru]|macintosh|"
    r"big5|gb2312|gbk|gb18030|euc-jp|euc-kr|iso-2022-jp|shift_jis",
    re.IGNORECASE | re.ASCII,
)
HOST = re.compile(r"[^:]*://([^/?#]*)")

Url = Annotated[str, Field(max_length=2048, pattern=r"^[Hh][Tt][Tt][Pp][Ss]?://\S+$")]
Record = dict[str, Any]


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
        description="Largest body in bytes, once decompressed. Text: 1 MiB, at most 1 MiB. Else: 16 MiB.",
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
    turns = _Turns(input.urls, input.per_host)
    # The bound makes fetching wait when the artifact's store is slower than the web.
    finished: asyncio.Queue[Record] = asyncio.Queue(maxsize=input.concurrency)

    async with (
        job.artifact("results.jsonl", "application/x-ndjson") as out,
        _session(allow, input.concurrency, input.per_host) as session,
    ):
        fetcher = _Fetcher(session, input.timeout, input.body, input.body_limit)

        async def work() -> None:
            while True:
                index, host = await turns.take()
                await finished.put(await fetcher.fetch(index, input.urls[index]))
                turns.give_back(host)

        await job.report(0, total, "fetching", unit="urls", counts=tally.counts)
        workers = [asyncio.create_task(work()) for _ in range(min(input.concurrency, total))]
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
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
    return tally.result()


def _session(allow: Sequence[Network], concurrency: int, per_host: int) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(
            limit=concurrency, limit_per_host=per_host, resolver=_Resolver(allow), socket_factory=guard(allow)
        ),
        cookie_jar=aiohttp.DummyCookieJar(),
        headers={"User-Agent": f"Headway/{version('headway')}"},
        # One deadline covers a URL with all its hops; aiohttp's own start anew with each.
        timeout=aiohttp.ClientTimeout(total=None, connect=None, sock_connect=None, sock_read=None),
        trust_env=False,
    )


class _Resolver(aiohttp.ThreadedResolver):
    """Refuses a name as a whole if any of its addresses is refused; the guard alone would try the others."""

    def __init__(self, allow: Sequence[Network]) -> None:
        super().__init__()
        self._allow = allow

    async def resolve(self, host: str, port: int = 0, family: AddressFamily = AF_INET) -> list[ResolveResult]:
        try:
            found = await super().resolve(host, port, family)
        except UnicodeError as error:  # a label that is empty or too long
            raise OSError(f"not a host name: {error}") from None
        if not all(dialable(each["host"], self._allow) for each in found):
            raise AddressRefused
        return found


class _Turns:
    """Whose URL is next: hosts in turn, none with more than `per_host` under way, so that a slow one holds up no other.

    A host stands in the queue once for each request that it may have under way.
    """

    def __init__(self, urls: Sequence[str], per_host: int) -> None:
        self._waiting: dict[str, deque[int]] = {}
        self._ready: asyncio.Queue[str] = asyncio.Queue()
        for index, url in enumerate(urls):
            self._waiting.setdefault(_host(url), deque()).append(index)
        for nth in range(per_host):
            for host, indexes in self._waiting.items():
                if nth < len(indexes):
                    self._ready.put_nowait(host)

    async def take(self) -> tuple[int, str]:
        """The place of the next URL, and its host, which must be given back."""
        while True:
            host = await self._ready.get()
            if waiting := self._waiting[host]:
                return waiting.popleft(), host

    def give_back(self, host: str) -> None:
        if self._waiting[host]:
            self._ready.put_nowait(host)


def _host(url: str) -> str:
    """Host and port as written: enough to tell hosts apart, at a tenth of the cost of parsing."""
    match = HOST.match(url)
    return match[1].lower() if match else ""


class FetchError(Exception):
    """Why a URL has no usable answer, as its line says it."""

    def __init__(self, type: str, message: str) -> None:
        super().__init__(message)
        self.type = type


@dataclass(frozen=True, slots=True)
class _Fetcher:
    """Fetches one URL. Whatever goes wrong becomes the record's `error`."""

    session: aiohttp.ClientSession
    timeout: float
    body: str
    max_bytes: int

    async def fetch(self, index: int, url: str) -> Record:
        record: Record = {
            "index": index,
            "url": url,
            "final_url": None,
            "status": None,
            "headers": {},
            "ms": 0.0,
            "bytes": 0,
        }
        if self.body != "none":
            record["sha256" if self.body == "digest" else "body"] = None
        record["error"] = None
        started = time.perf_counter()
        try:
            async with asyncio.timeout(self.timeout):
                await self._follow(url, record)
        except Exception as error:
            failure = _explain(error, self.timeout)
            if failure.type == "refused-address":
                metrics.ssrf_blocked.inc()
            elif failure.type == "internal":
                log.exception("fetch failed in an unforeseen way", index=index)
            record["error"] = {"type": failure.type, "message": str(failure)}
        record["ms"] = round((time.perf_counter() - started) * 1000, 3)
        return record

    async def _follow(self, url: str, record: Record) -> None:
        try:
            target = _checked(URL(url))
        except ValueError as error:
            raise FetchError("invalid-url", str(error)[:200]) from None
        for _ in range(MAX_REDIRECTS + 1):
            record["final_url"] = str(target)
            async with self.session.get(target, allow_redirects=False) as response:
                location = response.headers.get("Location") if response.status in REDIRECTS else None
                if location is None:
                    record["status"], record["headers"] = response.status, _headers(response)
                    await self._read(response, record)
                    return
            try:
                target = _checked(target.join(URL(location)))
            except ValueError as error:
                raise FetchError("bad-redirect", f"The server redirects to a bad URL. {str(error)[:200]}") from None
        raise FetchError("too-many-redirects", f"More than {MAX_REDIRECTS} redirects.")

    async def _read(self, response: aiohttp.ClientResponse, record: Record) -> None:
        if (response.content_length or 0) > self.max_bytes:
            raise _too_large(self.max_bytes)
        kept = bytearray()
        digest = hashlib.sha256()
        while chunk := await response.content.readany():
            record["bytes"] += len(chunk)
            if record["bytes"] > self.max_bytes:
                raise _too_large(self.max_bytes)
            if self.body == "digest":
                digest.update(chunk)
            elif self.body == "text":
                kept += chunk
        if self.body == "digest":
            record["sha256"] = digest.hexdigest()
        elif self.body == "text":
            record["body"] = _text(kept, response.charset or "utf-8")


def _too_large(limit: int) -> FetchError:
    return FetchError("too-large", f"The body is over the limit of {limit:,} bytes.")


def _checked(url: URL) -> URL:
    """The URL without its fragment. Raises ValueError, saying why, if it is not one to ask for."""
    if url.scheme not in ("http", "https") or not url.raw_host or not url.port:
        raise ValueError("Only http and https URLs with a host can be fetched.")
    if "@" in url.raw_authority:
        raise ValueError("A user name or password in the URL is refused.")
    return url.with_fragment(None)


def _headers(response: aiohttp.ClientResponse) -> dict[str, str]:
    """Lower-case names to values, repeated ones joined by a comma; the first 16 KiB, for the server chooses them."""
    headers: dict[str, str] = {}
    room = HEADERS_LENGTH
    for name, value in response.headers.items():
        room -= len(name) + len(value)
        if room < 0:
            break
        key = name.lower()
        text = value if value.isascii() else value.encode(errors="surrogateescape").decode(errors="replace")
        headers[key] = f"{headers[key]}, {text}" if key in headers else text
    return headers


def _text(body: bytearray, charset: str) -> str:
    if not CHARSET.fullmatch(charset):
        raise FetchError("decode", 'The charset of the body is not known; use body "digest".')
    try:
        return body.decode(charset)
    except UnicodeDecodeError:
        raise FetchError("decode", 'The body is not text in its charset; use body "digest".') from None


def _explain(error: Exception, timeout: float) -> FetchError:  # noqa: PLR0911 - a table with an order
    """The error in stable words. None of them tells what a name resolved to."""
    match error:
        case FetchError():
            return error
        case aiohttp.ClientConnectorError(os_error=AddressRefused()):
            return FetchError("refused-address", "The address is not public, so it is not fetched.")
        case aiohttp.ClientConnectorDNSError():
            return FetchError("dns", "The host name could not be resolved.")
        case aiohttp.ClientConnectorCertificateError(certificate_error=cause):
            return FetchError("tls", f"The certificate was refused: {getattr(cause, 'verify_message', 'invalid')}.")
        case aiohttp.ClientSSLError():
            return FetchError("tls", "The server does not speak TLS as it should.")
        case aiohttp.ClientConnectorError(os_error=cause):
            return FetchError(
                "connect", f"No connection: {os.strerror(cause.errno) if cause.errno else 'no reason known'}."
            )
        case TimeoutError():
            return FetchError("timeout", f"Not finished within {timeout:g} s.")
        case aiohttp.InvalidURL():
            return FetchError("invalid-url", "The URL cannot be asked for.")
        case aiohttp.ClientPayloadError() if isinstance(error.__cause__, ContentEncodingError):
            return FetchError("decode", "The body is not compressed as its headers say.")
        case aiohttp.ClientResponseError():
            return FetchError("bad-response", "The answer is not valid HTTP.")
        case aiohttp.ClientPayloadError() | aiohttp.ClientConnectionError():
            return FetchError("disconnected", "The connection ended before the answer was complete.")
    return FetchError("internal", "Something broke here; the worker's log has the details.")


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

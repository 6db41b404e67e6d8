"""One URL fetched: over redirects, past no address that is refused, within bounds; and what went wrong in a word."""

import hashlib
import re
import time
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import structlog
from yarl import URL

from headway import metrics
from headway.fetching.deadlines import Deadlines
from headway.fetching.failures import FetchError, explain
from headway.fetching.requests import Kept, Request

log = structlog.get_logger(__name__)

MAX_REDIRECTS = 5
REDIRECTS = frozenset({301, 302, 303, 307, 308})
HEADERS_LENGTH = 16 << 10
# What goes along to another origin: nothing that could be a secret or is about the resource.
ANYWHERE = frozenset({"accept", "accept-language", "user-agent"})
# Those of the web. Python's other codecs are slow on hostile bytes, run code, or make strings that are not Unicode,
# and it remembers every unknown name for good.
CHARSET = re.compile(
    r"utf-?8|utf-16(le|be)?|(us-)?ascii|latin-?1|iso-8859-([1-9]|1[013-6])|windows-125[0-8]|koi8-[ru]|macintosh|"
    r"big5|gb2312|gbk|gb18030|euc-jp|euc-kr|iso-2022-jp|shift_jis",
    re.IGNORECASE | re.ASCII,
)

Record = dict[str, Any]
# Headers by origin, as `https://api.example`.
Credentials = Mapping[str, Mapping[str, str]]
FIELDS = {"digest": "sha256", "text": "body", "base64": "body", "archive": "body"}


def blank(request: Request, kept: Kept) -> Record:
    """The record of a request that has not been made."""
    record: Record = {
        "index": request.index,
        "url": request.url,
        "final_url": None,
        "status": None,
        "headers": {},
        "ms": 0.0,
        "bytes": 0,
    }
    if kept in FIELDS:
        record[FIELDS[kept]] = None
    record["error"] = None
    return record


@dataclass(slots=True)
class Fetcher:
    """Makes requests. Whatever goes wrong becomes the record's `error`.

    `room` is how many bytes of bodies all its records together may still hold; None is any number.
    """

    session: aiohttp.ClientSession
    deadlines: Deadlines
    kept: Kept
    max_bytes: int
    credentials: Credentials = field(default_factory=dict)
    room: int | None = None

    async def fetch(self, request: Request) -> Record:
        """The record of one request, as its line says it; with `archive` its `body` is bytes."""
        record = blank(request, self.kept)
        started = time.perf_counter()
        try:
            with self.deadlines:
                await self._follow(request, record)
        except Exception as error:
            failure = explain(error)
            if failure.type == "refused-address":
                metrics.ssrf_blocked.inc()
            elif failure.type == "internal":
                log.exception("fetch failed in an unforeseen way", index=request.index)
            record["error"] = failure.as_json()
        record["ms"] = round((time.perf_counter() - started) * 1000, 3)
        return record

    async def _follow(self, request: Request, record: Record) -> None:
        try:
            target = first = _target(request.url)
        except ValueError as error:
            raise FetchError("invalid-url", str(error)) from None
        method, data = str(request.method), request.data
        headers = self._headers(request, first)
        for _ in range(MAX_REDIRECTS + 1):
            record["final_url"] = str(target)
            async with self.session.request(
                method, target, headers=headers, data=data, allow_redirects=False
            ) as response:
                location = response.headers.get("Location") if response.status in REDIRECTS else None
                if location is None:
                    record["status"], record["headers"] = response.status, _headers(response)
                    await self._read(response, record)
                    return
            try:
                target = _target(location, target)
            except ValueError as error:
                raise FetchError("bad-redirect", f"The server redirects to a URL that is refused. {error}") from None
            if response.status == 303 or (response.status in (301, 302) and method == "POST"):
                method, data = "HEAD" if method == "HEAD" else "GET", None
            if headers and target.origin() != first.origin():
                # Once elsewhere, for good: a redirect back is the other's wish, not the client's.
                headers = {name: value for name, value in headers.items() if name.lower() in ANYWHERE}
        raise FetchError("too-many-redirects", f"More than {MAX_REDIRECTS} redirects.")

    def _headers(self, request: Request, target: URL) -> Mapping[str, str] | None:
        secret = self.credentials.get(str(target.origin())) if self.credentials else None
        if not secret:
            return request.headers
        taken = {name.lower() for name in secret}
        asked = (request.headers or {}).items()
        return {**{name: value for name, value in asked if name.lower() not in taken}, **secret}

    async def _read(self, response: aiohttp.ClientResponse, record: Record) -> None:
        if response.method != "HEAD" and (response.content_length or 0) > self.max_bytes:
            raise _too_large(self.max_bytes)
        keeps = self.kept in ("text", "base64", "archive")
        kept = bytearray()
        digest = hashlib.sha256()
        content = response.content
        while not content.at_eof():
            chunk = await content.readany()
            record["bytes"] += len(chunk)
            if record["bytes"] > self.max_bytes:
                raise _too_large(self.max_bytes)
            if self.kept == "digest":
                digest.update(chunk)
            elif keeps:
                self._take(len(chunk))
                kept += chunk
        if self.kept == "digest":
            record["sha256"] = digest.hexdigest()
        elif self.kept == "text":
            record["body"] = _text(kept, response.charset or "utf-8")
        elif self.kept == "base64":
            record["body"] = b64encode(kept).decode()
        elif self.kept == "archive":
            record["body"] = bytes(kept)

    def _take(self, size: int) -> None:
        if self.room is not None:
            if size > self.room:
                raise FetchError("too-large", "The bodies of this request together are over its limit.")
            self.room -= size


def _too_large(limit: int) -> FetchError:
    return FetchError("too-large", f"The body is over the limit of {limit:,} bytes.")


def _target(url: str, base: URL | None = None) -> URL:
    """The URL to ask for, without its fragment. Raises ValueError, whose message repeats nothing of the URL."""
    try:
        target = base.join(URL(url)) if base else URL(url)
        host = target.raw_host or ""
        if ":" in host:
            target.origin()  # what is no address of IPv6 may be found out only here
        reachable = target.scheme in ("http", "https") and host and target.port
    except ValueError:
        raise ValueError("The URL is not well-formed.") from None
    if not reachable:
        raise ValueError("Only http and https URLs with a host can be fetched.")
    if "@" in url and "@" in target.raw_authority:
        raise ValueError("A user name or password in the URL is refused.")
    return target.with_fragment(None) if target.raw_fragment else target


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
        raise FetchError("decode", 'The charset of the body is not known; use body "base64" or "digest".')
    try:
        return body.decode(charset)
    except UnicodeDecodeError:
        raise FetchError("decode", 'The body is not text in its charset; use body "base64" or "digest".') from None

"""One URL fetched: over redirects, past no address that is refused, within bounds; and what went wrong in a word."""

import hashlib
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from socket import AF_INET, AddressFamily
from typing import Any

import aiohttp
import structlog
from aiohttp.abc import ResolveResult
from aiohttp.http_exceptions import ContentEncodingError
from yarl import URL

from headway import metrics
from headway.addresses import AddressRefused, Network, dialable, guard
from services.worker.kinds.http_turns import Deadlines

log = structlog.get_logger(__name__)

MAX_REDIRECTS = 5
REDIRECTS = frozenset({301, 302, 303, 307, 308})
HEADERS_LENGTH = 16 << 10
# Those of the web. Python's other codecs are slow on hostile bytes, run code, or make strings that are not Unicode,
# and it remembers every unknown name for good.
CHARSET = re.compile(
    r"utf-?8|utf-16(le|be)?|(us-)?ascii|latin-?1|iso-8859-([1-9]|1[013-6])|windows-125[0-8]|koi8-[ru]|macintosh|"
    r"big5|gb2312|gbk|gb18030|euc-jp|euc-kr|iso-2022-jp|shift_jis",
    re.IGNORECASE | re.ASCII,
)

Record = dict[str, Any]


def open_session(allow: Sequence[Network], concurrency: int, per_host: int) -> aiohttp.ClientSession:
    """A session that connects to public addresses and those of `allow` only, and keeps nothing from URL to URL."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(
            limit=concurrency, limit_per_host=per_host, resolver=_Resolver(allow), socket_factory=guard(allow)
        ),
        cookie_jar=aiohttp.DummyCookieJar(),
        headers={"User-Agent": f"Headway/{version('headway')}"},
        # One deadline covers a URL with all its hops; aiohttp's own start anew with each.
        timeout=aiohttp.ClientTimeout(total=None),
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


class FetchError(Exception):
    """Why a URL has no usable answer, as its line says it."""

    def __init__(self, type: str, message: str) -> None:
        super().__init__(message)
        self.type = type


@dataclass(frozen=True, slots=True)
class Fetcher:
    """Fetches one URL. Whatever goes wrong becomes the record's `error`."""

    session: aiohttp.ClientSession
    deadlines: Deadlines
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
            with self.deadlines:
                await self._follow(url, record)
        except Exception as error:
            failure = _explain(error)
            if failure.type == "refused-address":
                metrics.ssrf_blocked.inc()
            elif failure.type == "internal":
                log.exception("fetch failed in an unforeseen way", index=index)
            record["error"] = {"type": failure.type, "message": str(failure)}
        record["ms"] = round((time.perf_counter() - started) * 1000, 3)
        return record

    async def _follow(self, url: str, record: Record) -> None:
        try:
            target = _target(url)
        except ValueError as error:
            raise FetchError("invalid-url", str(error)) from None
        for _ in range(MAX_REDIRECTS + 1):
            record["final_url"] = str(target)
            async with self.session.get(target, allow_redirects=False) as response:
                location = response.headers.get("Location") if response.status in REDIRECTS else None
                if location is None:
                    record["status"], record["headers"] = response.status, _headers(response)
                    await self._read(response, record)
                    return
            try:
                target = _target(location, target)
            except ValueError as error:
                raise FetchError("bad-redirect", f"The server redirects to a URL that is refused. {error}") from None
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


def _target(url: str, base: URL | None = None) -> URL:
    """The URL to ask for, without its fragment. Raises ValueError, whose message repeats nothing of the URL."""
    try:
        target = base.join(URL(url)) if base else URL(url)
    except ValueError:
        raise ValueError("The URL is not well-formed.") from None
    if target.scheme not in ("http", "https") or not target.raw_host or not target.port:
        raise ValueError("Only http and https URLs with a host can be fetched.")
    if "@" in target.raw_authority:
        raise ValueError("A user name or password in the URL is refused.")
    return target.with_fragment(None)


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


def _explain(error: Exception) -> FetchError:  # noqa: PLR0911 - a table with an order
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
            return FetchError("timeout", "Not finished in the time that each URL has.")
        case aiohttp.InvalidURL():
            return FetchError("invalid-url", "The URL cannot be asked for.")
        case aiohttp.ClientPayloadError() if isinstance(error.__cause__, ContentEncodingError):
            return FetchError("decode", "The body is not compressed as its headers say.")
        case aiohttp.ClientResponseError():
            return FetchError("bad-response", "The answer is not valid HTTP.")
        case aiohttp.ClientPayloadError() | aiohttp.ClientConnectionError():
            return FetchError("disconnected", "The connection ended before the answer was complete.")
    return FetchError("internal", "Something broke here; the worker's log has the details.")

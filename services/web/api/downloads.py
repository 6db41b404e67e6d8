"""Bytes to clients: uploaded files and artifacts, whole or in part."""

import re
from collections.abc import Sequence
from urllib.parse import quote

from django.http import HttpResponse, StreamingHttpResponse

from headway.errors import NoSuchRange
from headway.job import Artifact, File, Part
from services.web.api.answers import not_modified, nothing
from services.web.api.jobs import known
from services.web.api.request import ApiRequest

# One range; a header that is anything else is passed over, as RFC 9110 permits, and the whole is sent.
RANGE = re.compile(r"bytes=(?:(?P<start>\d{1,18})-(?P<end>\d{1,18})?|-(?P<last>\d{1,18}))", re.ASCII)
UNSAFE = re.compile(r'[^ -~]|["\\%]')


def send(request: ApiRequest, kept: File | Artifact, parts: Sequence[Part]) -> HttpResponse | StreamingHttpResponse:
    """What is kept in these parts, or the range of it that the request asks for."""
    etag = f'"{kept.sha256}"'
    headers = {
        "ETag": etag,
        "Accept-Ranges": "bytes",
        "Content-Disposition": disposition(kept.name),
        "X-Content-Type-Options": "nosniff",
    }
    if known(request, etag):
        return not_modified(headers)
    status, start, end = 200, 0, kept.size
    # A range is a matter of GET alone.
    asked = RANGE.fullmatch(request.headers.get("Range", "")) if request.scope["method"] == "GET" else None
    if asked and asked["end"] and int(asked["end"]) < int(asked["start"]):
        asked = None
    if asked and request.headers.get("If-Range", etag) == etag:
        start, end = _span(asked, kept.size)
        if start >= end:
            raise NoSuchRange(
                f"{kept.name} has {kept.size:,} bytes; ask for some of these, or leave Range out.",
                headers={"Content-Range": f"bytes */{kept.size}"},
            )
        status = 206
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{kept.size}"
    headers["Content-Length"] = str(end - start)
    content = request.app.files.read_parts(parts, start, end) if end > start else nothing()
    return StreamingHttpResponse(content, status=status, content_type=kept.content_type, headers=headers)


def disposition(name: str) -> str:
    """A Content-Disposition that saves under this name, with one in ASCII for clients that know no other."""
    plain = UNSAFE.sub("_", name)
    header = f'attachment; filename="{plain}"'
    return header if plain == name else f"{header}; filename*=UTF-8''{quote(name, safe='')}"


def _span(asked: re.Match[str], size: int) -> tuple[int, int]:
    """The half-open span that one range asks for; an empty one cannot be met."""
    if asked["last"]:
        return max(0, size - int(asked["last"])), size
    return int(asked["start"]), min(size, int(asked["end"]) + 1) if asked["end"] else size

"""`/jobs/{id}/artifacts`: what jobs made."""

import re
from urllib.parse import quote
from uuid import UUID

from django.http import HttpResponse, StreamingHttpResponse
from ninja import Router

from headway.errors import NotFound
from headway.job import Artifact
from services.web.api.answers import answer, not_modified, nothing
from services.web.api.jobs import find_job, known
from services.web.api.request import ApiRequest

# One range; a header that is anything else is passed over, as RFC 9110 permits, and the whole is sent.
RANGE = re.compile(r"bytes=(?:(?P<start>\d{1,18})-(?P<end>\d{1,18})?|-(?P<last>\d{1,18}))", re.ASCII)

router = Router(tags=["jobs"])


@router.get("/{uuid:job_id}/artifacts", summary="The files that a job made")
async def list_artifacts(request: ApiRequest, job_id: UUID) -> HttpResponse:
    """Artifacts become visible when the job ends."""
    return answer({"artifacts": [artifact.as_json() for artifact in await _artifacts(request, job_id)]})


@router.get("/{uuid:job_id}/artifacts/{name}", summary="Download an artifact")
async def download(request: ApiRequest, job_id: UUID, name: str) -> HttpResponse | StreamingHttpResponse:
    """The bytes, streamed. One range, `Range: bytes=a-b`, answers 206; `ETag` is the SHA-256."""
    for artifact in await _artifacts(request, job_id):
        if artifact.name == name:
            return _send(request, artifact)
    raise NotFound(f"Job {job_id} has no artifact {name[:100]!r}; GET /api/v1/jobs/{job_id}/artifacts lists them.")


def _send(request: ApiRequest, artifact: Artifact) -> HttpResponse | StreamingHttpResponse:
    etag = f'"{artifact.sha256}"'
    headers = {
        "ETag": etag,
        "Accept-Ranges": "bytes",
        "Content-Disposition": f"attachment; filename*=UTF-8''{quote(artifact.name)}",
        "X-Content-Type-Options": "nosniff",
    }
    if known(request, etag):
        return not_modified(headers)
    status, start, end = 200, 0, artifact.size
    asked = RANGE.fullmatch(request.headers.get("Range", ""))
    if asked and request.headers.get("If-Range", etag) == etag:
        start, end = _span(asked, artifact.size)
        if start >= end:
            return HttpResponse(status=416, headers={"Content-Range": f"bytes */{artifact.size}"})
        status = 206
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{artifact.size}"
    headers["Content-Length"] = str(end - start)
    content = request.app.files.read(artifact.key, start, end) if end > start else nothing()
    return StreamingHttpResponse(content, status=status, content_type=artifact.content_type, headers=headers)


def _span(asked: re.Match[str], size: int) -> tuple[int, int]:
    """The half-open span that one range asks for; an empty one cannot be met."""
    if asked["last"]:
        return max(0, size - int(asked["last"])), size
    return int(asked["start"]), min(size, int(asked["end"]) + 1) if asked["end"] else size


async def _artifacts(request: ApiRequest, job_id: UUID) -> list[Artifact]:
    await find_job(request, job_id)
    return await request.app.store.artifacts(job_id, request.auth.tenant_id)

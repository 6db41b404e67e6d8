"""`/jobs/{id}/artifacts`: what jobs made."""

from uuid import UUID

from django.http import HttpResponse, StreamingHttpResponse
from ninja import Router

from headway.errors import NotFound
from headway.job import Artifact
from services.web.api import schemas
from services.web.api.answers import answer
from services.web.api.downloads import send
from services.web.api.jobs import find_job
from services.web.api.request import ApiRequest

router = Router(tags=["jobs"])


@router.get("/{uuid:job_id}/artifacts", summary="The files that a job made", response=schemas.Artifacts)
async def list_artifacts(request: ApiRequest, job_id: UUID) -> HttpResponse:
    """Artifacts become visible when the job ends."""
    return answer({"artifacts": [artifact.as_json() for artifact in await _artifacts(request, job_id)]})


@router.get("/{uuid:job_id}/artifacts/{name}", summary="Download an artifact", openapi_extra=schemas.DOWNLOAD)
async def download(request: ApiRequest, job_id: UUID, name: str) -> HttpResponse | StreamingHttpResponse:
    """The bytes, streamed. One range, `Range: bytes=a-b`, answers 206; `ETag` is the SHA-256."""
    for artifact in await _artifacts(request, job_id):
        if artifact.name == name:
            return send(request, artifact, [(artifact.key, artifact.size)])
    raise NotFound(f"Job {job_id} has no artifact {name[:100]!r}; GET /api/v1/jobs/{job_id}/artifacts lists them.")


async def _artifacts(request: ApiRequest, job_id: UUID) -> list[Artifact]:
    await find_job(request, job_id)
    return await request.app.store.artifacts(job_id, request.auth.tenant_id)

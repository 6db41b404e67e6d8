"""`/files`: uploads in one request, streamed to storage as they arrive, and what becomes of them."""

import re
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from django.http import HttpResponse, StreamingHttpResponse
from ninja import Field, Query, Router, Schema
from pydantic import ConfigDict, ValidationError, field_validator

from headway.errors import InvalidRequest, NotFound
from headway.job import File
from services.web.api import schemas
from services.web.api.answers import answer
from services.web.api.digests import checked, expected
from services.web.api.downloads import send
from services.web.api.forms import open_form
from services.web.api.jobs import cursor_of, id_before
from services.web.api.request import ApiRequest
from services.web.api.submissions import FARTHEST, Moment

CONTENT_TYPE = re.compile(r"[\w.+-]+/[\w.+-]+(\s*;\s*[\w.+-]+=[\w.+-]+)*", re.ASCII)
FORM = "multipart/form-data"

router = Router(tags=["files"])


class Named(Schema):
    """What the uploaded file is called, and how long it is kept."""

    model_config = ConfigDict(extra="forbid")

    name: str | None = Field(
        default=None,
        min_length=1,
        max_length=255,
        pattern=r"^[^\x00-\x1f\x7f-\x9f/\\]+$",
        description="What the file is called; else as the form says, or `file`.",
    )
    expires: Moment | None = Field(
        default=None,
        description="When it is to be deleted, with a time zone; after HEADWAY_KEEP_DAYS if left out.",
    )

    @field_validator("name")
    @classmethod
    def _no_folder(cls, name: str | None) -> str | None:
        if name in (".", ".."):
            raise ValueError("this names a folder")
        return name

    @field_validator("expires")
    @classmethod
    def _ahead(cls, expires: datetime | None) -> datetime | None:
        if expires is not None and not 0 < (expires - datetime.now(UTC)).total_seconds() <= FARTHEST:
            raise ValueError("the time must lie ahead, by at most 400 days")
        return expires


class Page(Schema):
    """Which files to list."""

    model_config = ConfigDict(extra="forbid")

    limit: int = Field(default=50, ge=1, le=500)
    cursor: str | None = Field(default=None, max_length=100, description="`next_cursor` of the page before.")


@router.post(
    "",
    summary="Upload a file",
    response={201: schemas.File},
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {
                "*/*": {"schema": {"type": "string", "format": "binary"}},
                FORM: {"schema": {"type": "object", "properties": {"file": {"type": "string", "format": "binary"}}}},
            },
        },
    },
)
async def upload(request: ApiRequest, wanted: Query[Named]) -> HttpResponse:
    """The body is the file, or a form with one. It exists once it is whole; an upload that breaks off leaves nothing.

    A `Content-Digest` (or the older `Digest`) of SHA-256 is held against the body: 422 if they differ. For what is
    large or may break off there is `/uploads`.
    """
    request.only(Named)
    body, given = request.incoming, request.headers.get("Content-Type", "")
    digests = expected(request.headers)
    chunks = checked(body.chunks(), digests) if digests else body.chunks()
    name, size = wanted.name, body.length
    if given.partition(";")[0].strip().lower() == FORM:
        form = await open_form(given, chunks)
        # The form around the file is counted in, so how large that is shows at the end.
        name, given, chunks, size = name or named(name=form.name).name, form.content_type, form.chunks(), None
    file = await request.app.uploads.receive(
        request.auth.tenant_id, name or "file", media_type(given), chunks, size=size, keep_until=wanted.expires
    )
    return answer(file.as_json(), 201, {"Location": f"/api/v1/files/{file.id}"})


@router.get("", summary="List files, newest first", response=schemas.Files)
async def list_files(request: ApiRequest, wanted: Query[Page]) -> HttpResponse:
    """A page of files, and the cursor of the next page, or null."""
    request.only(Page)
    files = await request.app.store.list_files(
        request.auth.tenant_id,
        before=id_before(wanted.cursor) if wanted.cursor else None,
        limit=wanted.limit + 1,
    )
    page = files[: wanted.limit]
    return answer(
        {
            "files": [file.as_json() for file in page],
            "next_cursor": cursor_of(page[-1].id) if len(files) > len(page) else None,
        }
    )


@router.get("/{uuid:file_id}", summary="One file", response=schemas.File)
async def get_file(request: ApiRequest, file_id: UUID) -> HttpResponse:
    """Name, type, size and SHA-256 of an uploaded file."""
    return answer((await _find(request, file_id)).as_json())


@router.get("/{uuid:file_id}/content", summary="Download a file", openapi_extra=schemas.DOWNLOAD)
async def get_content(request: ApiRequest, file_id: UUID) -> HttpResponse | StreamingHttpResponse:
    """The bytes, streamed. One range, `Range: bytes=a-b`, answers 206; `ETag` is the SHA-256."""
    file = await _find(request, file_id)
    return send(request, file, file.parts)


@router.delete("/{uuid:file_id}", summary="Delete a file", response={204: None})
async def delete_file(request: ApiRequest, file_id: UUID) -> HttpResponse:
    """A job that still needs the file fails, and says so: nobody looks into the inputs of open jobs."""
    await request.app.uploads.delete(await _find(request, file_id))
    return HttpResponse(status=204)


def named(**values: Any) -> Named:
    """What a form or Upload-Metadata says of a file. Raises InvalidRequest."""
    try:
        return Named(**values)
    except ValidationError as error:
        errors = [{"field": str(item["loc"][0]), "message": item["msg"]} for item in error.errors()]
        raise InvalidRequest(f"{errors[0]['field']}: {errors[0]['message']}.", errors=errors) from None


def media_type(given: str) -> str:
    """The content type that a client gives, if it is one."""
    return given if CONTENT_TYPE.fullmatch(given) and len(given) <= 200 else "application/octet-stream"


async def _find(request: ApiRequest, file_id: UUID) -> File:
    """The tenant's file, for a request without parameters. Raises NotFound."""
    request.only()
    file = await request.app.store.get_file(file_id, request.auth.tenant_id)
    if file is None:
        raise NotFound(f"There is no file {file_id}.")
    return file

"""`/files`: uploads, streamed to storage as they arrive."""

import re
from datetime import UTC, datetime
from uuid import UUID

from django.http import HttpResponse
from ninja import Field, Query, Router, Schema
from pydantic import ConfigDict
from uuid_utils.compat import uuid7

from headway.errors import NotFound, TooLarge
from headway.files import file_key
from headway.job import File
from services.web.api.answers import answer
from services.web.api.request import ApiRequest

CONTENT_TYPE = re.compile(r"[\w.+-]+/[\w.+-]+(\s*;\s*[\w.+-]+=[\w.+-]+)*", re.ASCII)

router = Router(tags=["files"])


class Named(Schema):
    """What the uploaded file is called."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(default="file", min_length=1, max_length=255, pattern=r"^[^\x00-\x1f\x7f-\x9f/\\]+$")


@router.post(
    "",
    summary="Upload a file",
    response={201: None},
    openapi_extra={
        "requestBody": {"content": {"*/*": {"schema": {"type": "string", "format": "binary"}}}, "required": True},
    },
)
async def upload(request: ApiRequest, named: Query[Named]) -> HttpResponse:
    """The body is the file. It exists once it is whole; an upload that breaks off leaves nothing."""
    request.only(Named)
    app, tenant_id = request.app, request.auth.tenant_id
    body, file_id = request.incoming, uuid7()
    if body.length is not None and body.length > app.settings.max_file:
        raise TooLarge(f"The file is over the limit of {app.settings.max_file:,} bytes.")
    key = file_key(tenant_id, file_id)
    stored = await app.files.put(key, body.chunks())
    content_type = request.headers.get("Content-Type", "")
    if not CONTENT_TYPE.fullmatch(content_type):
        content_type = "application/octet-stream"
    try:
        file = await app.store.add_file(
            File(file_id, tenant_id, named.name, content_type, stored.size, stored.sha256, datetime.now(UTC))
        )
    except BaseException:
        await app.files.delete([key])
        raise
    return answer(file.as_json(), 201, {"Location": f"/api/v1/files/{file.id}"})


@router.get("/{uuid:file_id}", summary="One file")
async def get_file(request: ApiRequest, file_id: UUID) -> HttpResponse:
    """Name, type, size and SHA-256 of an uploaded file."""
    request.only()
    file = await request.app.store.get_file(file_id, request.auth.tenant_id)
    if file is None:
        raise NotFound(f"There is no file {file_id}.")
    return answer(file.as_json())

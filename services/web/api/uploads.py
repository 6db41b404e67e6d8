"""`/uploads`: uploads that can be resumed, by version 1.0.0 of the tus protocol (https://tus.io)."""

import base64
import binascii
import hashlib
import re
from collections.abc import Awaitable, Callable
from functools import wraps
from typing import Any
from uuid import UUID

from django.http import HttpResponse
from django.utils.http import http_date
from ninja import Router

from headway.errors import BadRequest, Conflict, Problem, WrongType, WrongVersion
from headway.files import CutOff
from headway.job import Upload
from headway.uploads import Checksum
from services.web.api import schemas
from services.web.api.answers import answer, refuse
from services.web.api.digests import decoded
from services.web.api.files import media_type, named
from services.web.api.request import ApiRequest

VERSION = "1.0.0"
EXTENSIONS = "creation,creation-with-upload,checksum,expiration,termination"
CHECKSUMS = ("sha1", "sha256")
BYTES = "application/offset+octet-stream"
NUMBER = re.compile(r"\d{1,18}", re.ASCII)
LONGEST_METADATA = 4096
# What clients call the name and the type of a file.
NAMES, TYPES = ("name", "filename"), ("filetype", "type", "content_type")
RESUMABLE = schemas.header("Tus-Resumable", "The version of tus.", required=True, enum=[VERSION])

router = Router(tags=["uploads"])

View = Callable[..., Awaitable[HttpResponse]]


def tus(view: View) -> View:
    """A view that speaks tus, also where it refuses. Who only looks, by GET, need not know of tus."""

    @wraps(view)
    async def answered(request: ApiRequest, *args: Any, **kwargs: Any) -> HttpResponse:
        try:
            version = request.headers.get("Tus-Resumable")
            if version != VERSION and (version is not None or request.scope["method"] not in ("GET", "OPTIONS")):
                raise WrongVersion(f"Send `Tus-Resumable: {VERSION}`.", headers={"Tus-Version": VERSION})
            request.only()
            response = await view(request, *args, **kwargs)
        except Problem as error:
            response = refuse(error)
        response.headers["Tus-Resumable"] = VERSION
        return response

    return answered


@router.api_operation(["OPTIONS"], "", summary="What of tus is spoken here", response={204: None})
@tus
async def tus_options(request: ApiRequest) -> HttpResponse:
    """The versions and extensions of tus, and the largest file that is taken."""
    return HttpResponse(
        status=204,
        headers={
            "Tus-Version": VERSION,
            "Tus-Extension": EXTENSIONS,
            "Tus-Max-Size": str(request.app.settings.max_file),
            "Tus-Checksum-Algorithm": ",".join(CHECKSUMS),
        },
    )


@router.post(
    "",
    summary="Begin an upload",
    response={201: None},
    openapi_extra=schemas.headers(
        RESUMABLE,
        schemas.header("Upload-Length", "The size of the file in bytes.", required=True, pattern="^[0-9]+$"),
        schemas.header("Upload-Metadata", "`filename`, `filetype`, `expires`: each with a space and its base64."),
    ),
)
@tus
async def create_upload(request: ApiRequest) -> HttpResponse:
    """`Upload-Length` is the size of the file; `Upload-Metadata` may say `filename`, `filetype` and `expires`.

    `Location` is where to send the bytes; the first of them may be the body of this request.
    """
    length = _number(request, "Upload-Length")
    text = request.headers.get("Upload-Metadata", "")
    metadata = _metadata(text)
    wanted = named(
        name=next((metadata[key] for key in NAMES if key in metadata), None), expires=metadata.get("expires")
    )
    first = request.headers.get("Content-Type") == BYTES
    checksum = _checksum(request) if first else None
    upload = await request.app.uploads.create(
        request.auth.tenant_id,
        wanted.name or "file",
        media_type(next((metadata[key] for key in TYPES if key in metadata), "")),
        length,
        metadata=text,
        keep_until=wanted.expires,
    )
    if first:
        try:
            upload = await request.app.uploads.append(upload, request.incoming.chunks(), checksum=checksum)
        except (Problem, CutOff):
            # The client never learns where it is, so nobody will go on with it.
            await request.app.uploads.delete(upload)
            raise
    else:
        await request.load()
    return HttpResponse(status=201, headers={"Location": f"/api/v1/uploads/{upload.id}", **_headers(upload)})


@router.get("/{uuid:upload_id}", summary="How far an upload is", response=schemas.Upload)
@tus
async def get_upload(request: ApiRequest, upload_id: UUID) -> HttpResponse:
    """`offset` of `size` bytes have arrived; `file` is the id of the file once it is whole. HEAD is tus' question."""
    upload = await request.app.uploads.get(upload_id, request.auth.tenant_id)
    headers = {"Upload-Length": str(upload.size), "Cache-Control": "no-store", **_headers(upload)}
    if upload.metadata:
        headers["Upload-Metadata"] = upload.metadata
    return answer(upload.as_json(), headers=headers)


@router.patch(
    "/{uuid:upload_id}",
    summary="Send bytes of an upload",
    response={204: None},
    openapi_extra=schemas.headers(
        RESUMABLE,
        schemas.header("Upload-Offset", "Where in the file the body begins.", required=True, pattern="^[0-9]+$"),
        schemas.header("Upload-Checksum", "A hash's name, a space, and the body's hash in base64."),
    )
    | {"requestBody": {"required": True, "content": {BYTES: {"schema": {"type": "string", "format": "binary"}}}}},
)
@tus
async def append(request: ApiRequest, upload_id: UUID) -> HttpResponse:
    """The body goes on at `Upload-Offset`. What arrives is kept also if the connection breaks.

    `Headway-File` is the id of the file once it is whole. With `Upload-Checksum` the body is kept only if it has that.
    """
    if request.headers.get("Content-Type") != BYTES:
        raise WrongType(f"Send the bytes as `Content-Type: {BYTES}`.")
    offset, checksum = _number(request, "Upload-Offset"), _checksum(request)
    upload = await request.app.uploads.get(upload_id, request.auth.tenant_id)
    if offset != upload.received:
        raise Conflict(
            f"The upload is at {upload.received}, not at {offset}; go on there.",
            headers={"Upload-Offset": str(upload.received)},
        )
    upload = await request.app.uploads.append(upload, request.incoming.chunks(), checksum=checksum)
    return HttpResponse(status=204, headers=_headers(upload))


@router.delete("/{uuid:upload_id}", summary="Give up an upload", response={204: None})
@tus
async def delete_upload(request: ApiRequest, upload_id: UUID) -> HttpResponse:
    """Its bytes are deleted. One that is whole is a file: 409, delete that."""
    upload = await request.app.uploads.get(upload_id, request.auth.tenant_id)
    if upload.sha256 is not None:
        raise Conflict(f"The upload is whole; DELETE /api/v1/files/{upload.id} deletes the file.")
    await request.app.uploads.delete(upload)
    return HttpResponse(status=204)


def _headers(upload: Upload) -> dict[str, str]:
    headers = {"Upload-Offset": str(upload.received)}
    if upload.sha256 is None:
        headers["Upload-Expires"] = http_date(upload.expires_at.timestamp())
    else:
        headers["Headway-File"] = str(upload.id)
    return headers


def _number(request: ApiRequest, name: str) -> int:
    given = request.headers.get(name, "")
    if not NUMBER.fullmatch(given):
        raise BadRequest(f"{name} must be a number of bytes.")
    return int(given)


def _metadata(text: str) -> dict[str, str]:
    """Pairs of a key and a value in base64, between commas. Raises BadRequest."""
    if len(text) > LONGEST_METADATA:
        raise BadRequest(f"Upload-Metadata is over the limit of {LONGEST_METADATA} bytes.")
    found = {}
    for pair in text.split(",") if text.strip() else ():
        key, _, value = pair.strip().partition(" ")
        try:
            found[key] = base64.b64decode(value, validate=True).decode()
        except (binascii.Error, ValueError):
            raise BadRequest(f"Upload-Metadata: the value of {key[:100]!r} is not UTF-8 in base64.") from None
    return found


def _checksum(request: ApiRequest) -> Checksum | None:
    given = request.headers.get("Upload-Checksum")
    if given is None:
        return None
    algorithm, _, value = given.partition(" ")
    if algorithm not in CHECKSUMS:
        raise BadRequest(f"Upload-Checksum must be one of {', '.join(CHECKSUMS)}, then a space and base64.")
    size = hashlib.new(algorithm, usedforsecurity=False).digest_size
    return Checksum(algorithm, decoded(value.strip(), "Upload-Checksum", size))

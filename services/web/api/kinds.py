"""`/kinds`: what can be run."""

from django.http import HttpResponse
from ninja import Router

from services.web.api import schemas
from services.web.api.answers import answer
from services.web.api.request import ApiRequest

router = Router(tags=["kinds"])


@router.get("", summary="All kinds", response=schemas.Kinds)
async def list_kinds(request: ApiRequest) -> HttpResponse:
    """Name, description, timeout in seconds, and the JSON Schemas of input and result of each kind."""
    request.only()
    return answer(await request.app.catalog.encoded())


@router.get("/{name}", summary="One kind", response=schemas.Kind)
async def get_kind(request: ApiRequest, name: str) -> HttpResponse:
    """The same for one kind."""
    request.only()
    return answer((await request.app.catalog.get(name)).encoded)

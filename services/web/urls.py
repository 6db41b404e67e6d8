"""Paths of the API and the pages. `services.web.asgi` decides which handler serves which."""

from typing import Any

from django.contrib import admin
from django.http import HttpRequest, HttpResponse
from django.urls import path
from django.views.generic import RedirectView
from ninja import NinjaAPI
from ninja.errors import HttpError, ValidationError
from ninja.openapi.schema import OpenAPISchema
from ninja.operation import Operation
from ninja.parser import Parser

from services.web.api import (
    artifacts,
    events,
    fetches,
    files,
    kinds,
    queries,
    rooms,
    schedules,
    submissions,
    tickets,
    uploads,
)
from services.web.api.answers import on_exception
from services.web.api.bodies import parse
from services.web.api.schemas import Problem
from services.web.live import page


class Api(NinjaAPI):
    """django-ninja, of which only routes, validation and the description of the API are used."""

    _unused = HttpResponse()

    def create_temporal_response(self, request: HttpRequest) -> HttpResponse:
        """Every view makes its own answer."""
        return self._unused

    def get_openapi_operation_id(self, operation: Operation) -> str:
        """`submit`, `get_job`: generated clients make methods of them."""
        return operation.view_func.__name__

    def get_openapi_schema(self, **options: Any) -> OpenAPISchema:
        """`services.web.handler` asks for the key, before any view."""
        schema = super().get_openapi_schema(**options)
        components = schema["components"]
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        schema["security"] = [{"key": []}]
        problem = Problem.model_json_schema(ref_template="#/components/schemas/{model}")
        components["schemas"] |= problem.pop("$defs") | {"Problem": problem}
        content = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
        for operations in schema["paths"].values():
            for operation in operations.values():
                operation["responses"]["default"] = {"description": str(Problem.__doc__), "content": content}
        return schema


class StrictParser(Parser):
    """Reads bodies as `services.web.api.bodies` does."""

    def parse_body(self, request: HttpRequest) -> Any:
        return parse(request.body)


api = Api(
    title="Headway",
    version="1",
    description="Long jobs over HTTP, with progress you can trust. Errors are problem+json (RFC 9457).",
    urls_namespace="api",
    parser=StrictParser(),
    docs_url="/docs",
)
for error in (Exception, HttpError, ValidationError):
    api.add_exception_handler(error, on_exception)  # type: ignore[arg-type]  # it is given instances only
api.add_router("/jobs", submissions.router)
api.add_router("/jobs", artifacts.router)
api.add_router("", events.router)
api.add_router("/files", files.router)
api.add_router("/uploads", uploads.router)
api.add_router("/kinds", kinds.router)
api.add_router("/schedules", schedules.router)
api.add_router("/rooms", rooms.router)
api.add_router("/ws-tickets", tickets.router)
api.add_router("/query", queries.router)
api.add_router("/fetch", fetches.router)

admin.site.site_header = admin.site.site_title = "Headway"
admin.site.index_title = "Operations"
# It would take the room that the list of jobs needs, for a handful of links.
admin.site.enable_nav_sidebar = False

urlpatterns = [
    path("api/v1/live", page.page),
    path("api/v1/asyncapi.json", page.document),
    path("api/v1/", api.urls),
    path("admin/", admin.site.urls),
    path("", RedirectView.as_view(url="/admin/")),
    path("favicon.ico", RedirectView.as_view(url="/static/ninja/favicon.png")),
]

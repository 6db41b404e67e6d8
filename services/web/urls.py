"""Paths of the API and the pages. `services.web.asgi` decides which handler serves which."""

from django.contrib import admin
from django.urls import path
from django.views.generic import RedirectView
from ninja import NinjaAPI
from ninja.errors import AuthenticationError, HttpError, ValidationError

from services.web.api import files, jobs, kinds
from services.web.api.answers import on_exception
from services.web.api.auth import Bearer
from services.web.api.bodies import StrictParser

api = NinjaAPI(
    title="Headway",
    version="1",
    description="Long jobs over HTTP, with progress you can trust. Errors are problem+json (RFC 9457).",
    urls_namespace="api",
    auth=Bearer(),
    parser=StrictParser(),
    docs_url="/docs",
)
for error in (Exception, AuthenticationError, HttpError, ValidationError):
    api.add_exception_handler(error, on_exception)  # type: ignore[arg-type]  # it is given instances only
api.add_router("/jobs", jobs.router)
api.add_router("/files", files.router)
api.add_router("/kinds", kinds.router)

admin.site.site_header = admin.site.site_title = "Headway"
admin.site.index_title = "Operations"

urlpatterns = [
    path("api/v1/", api.urls),
    path("admin/", admin.site.urls),
    path("", RedirectView.as_view(url="/admin/")),
]

"""The pages: Django's admin as operators use it, and the documentation of the API."""

import asyncio
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from uuid import UUID

import asyncpg
import httpx
import pytest
from uuid_utils.compat import uuid7

from headway import keys
from headway.errors import Unauthenticated
from headway.settings import Settings
from tests.conftest import Tenant, web

if TYPE_CHECKING:
    from django.test import Client


@pytest.fixture
def site(settings: Settings) -> Iterator["Client"]:
    """A browser in which the administrator is logged in; Django works on the database of the test."""
    from django.contrib.auth.models import User  # Django must be set up
    from django.db import connections
    from django.test import Client

    connection = connections["default"]
    connection.close()
    template = connection.settings_dict["NAME"]
    connection.settings_dict["NAME"] = urlsplit(settings.database_url.get_secret_value()).path.lstrip("/")
    try:
        client = Client(SERVER_NAME="localhost")
        client.force_login(User.objects.create_superuser("root", password="correct horse battery"))
        yield client
    finally:
        connection.close()
        connection.settings_dict["NAME"] = template


def accepted(settings: Settings, key: str) -> UUID | None:
    """The tenant that the API lets in with this key."""
    from services.web.asgi import Application

    async def ask() -> UUID | None:
        application = Application(settings)
        try:
            return (await (await application.open()).keyring.authenticate(key)).tenant_id
        except Unauthenticated:
            return None
        finally:
            await application.close()

    return asyncio.run(ask())


def page(site: "Client", path: str, **form: Any) -> str:
    """The page after a form was sent, or as it is."""
    answer = site.post(path, form, follow=True) if form else site.get(path)
    assert answer.status_code == 200, f"{path}: {answer.status_code}"
    shown = answer.content.decode()
    assert " object at 0x" not in shown
    return shown


def test_a_tenant_and_a_key_are_made_and_the_secret_is_shown_once(site: "Client", settings: Settings) -> None:
    from services.web.accounts.models import ApiKey, Tenant

    page(site, "/admin/headway/tenant/add/")
    page(site, "/admin/headway/tenant/add/", name="shop")
    tenant = Tenant.objects.get(name="shop")
    page(site, "/admin/headway/apikey/add/")
    made = page(site, "/admin/headway/apikey/add/", tenant=str(tenant.pk), name="checkout")
    key = re.search(r"hw_live_\w+", made)
    assert key
    assert "not shown again" in made
    assert accepted(settings, key[0]) == tenant.pk

    row, secret = ApiKey.objects.get(), key[0].split("_")[3]
    for path in ("", f"{row.pk}/change/", f"{row.pk}/history/"):
        assert secret not in page(site, f"/admin/headway/apikey/{path}")
    assert secret not in str(ApiKey.objects.values_list())
    # A change of name changes nothing else.
    page(site, f"/admin/headway/apikey/{row.pk}/change/", name="till", expires_at_0="", expires_at_1="")
    assert ApiKey.objects.get().name == "till"
    assert accepted(settings, key[0]) == tenant.pk


def test_a_key_is_revoked_and_not_deleted(site: "Client", settings: Settings) -> None:
    from services.web.accounts.models import ApiKey, Tenant

    tenant = Tenant.objects.create(name="shop")
    live = [keys.new(), keys.new()]
    for key in live:
        pepper = settings.key_pepper.get_secret_value()
        ApiKey.objects.create(id=key.id, tenant=tenant, name="k", digest=key.digest(pepper))
    listed = "/admin/headway/apikey/"
    assert "1 key revoked;" in page(site, listed, action="revoke", _selected_action=live[0].id)
    assert accepted(settings, live[0].text) is None
    assert accepted(settings, live[1].text) == tenant.pk
    revoked_at = ApiKey.objects.get(pk=live[0].id).revoked_at
    page(site, listed, action="revoke", _selected_action=live[0].id)
    assert ApiKey.objects.get(pk=live[0].id).revoked_at == revoked_at
    assert site.post(f"{listed}{live[1].id}/delete/", {"post": "yes"}).status_code == 403
    page(site, listed, action="delete_selected", _selected_action=live[1].id, post="yes")
    assert ApiKey.objects.count() == 2


def test_who_may_only_look_at_keys_revokes_none(site: "Client") -> None:
    from django.contrib.auth.models import Permission, User

    from services.web.accounts.models import ApiKey, Tenant

    key = ApiKey.objects.create(id="k" * 16, tenant=Tenant.objects.create(name="shop"), name="k", digest=b"")
    viewer = User.objects.create_user("viewer", is_staff=True)
    viewer.user_permissions.add(Permission.objects.get(codename="view_apikey"))
    site.force_login(viewer)
    listed = "/admin/headway/apikey/"
    assert "Revoke the selected keys" not in page(site, listed)
    page(site, listed, action="revoke", _selected_action=key.pk)
    assert ApiKey.objects.get().revoked_at is None


def test_jobs_are_shown_and_cannot_be_touched(site: "Client") -> None:
    from services.web.accounts.models import Job, Tenant

    job = Job.objects.create(
        id=uuid7(),
        tenant=Tenant.objects.create(name="shop"),
        kind="demo.countdown",
        state="queued",
        input={"seconds": "<script>alert(1)</script>"},
        timeout=1,
    )
    listed, one = "/admin/headway/job/", f"/admin/headway/job/{job.pk}/change/"
    assert str(job.pk) in page(site, listed)
    shown = page(site, one)
    assert "<script>alert" not in shown
    assert "alert(1)" in shown
    assert 'name="_save"' not in shown
    assert str(job.pk) in page(site, f"{listed}?q={job.pk}")
    assert "0 jobs" in page(site, f"{listed}?q=nothing")
    assert "0 jobs" in page(site, f"{listed}?state=failed")
    assert site.get(f"{listed}add/").status_code == 403
    assert site.post(one, {"state": "succeeded"}).status_code == 403
    assert site.post(f"{listed}{job.pk}/delete/", {"post": "yes"}).status_code == 403
    page(site, listed, action="delete_selected", _selected_action=str(job.pk), post="yes")
    assert Job.objects.get().state == "queued"


def test_the_admin_wants_a_login(site: "Client") -> None:
    site.logout()
    for path in ("/admin/", "/admin/headway/apikey/", "/admin/headway/job/"):
        answer = site.get(path)
        assert (answer.status_code, answer.headers["Location"]) == (302, f"/admin/login/?next={path}")
    assert site.get("/").headers["Location"] == "/admin/"


async def test_a_key_does_not_open_the_pages(settings: Settings, tenant: Tenant) -> None:
    headers = {"Authorization": f"Bearer {tenant.api_key}"}
    async with (
        web(settings) as url,
        httpx.AsyncClient(base_url=url, headers=headers, trust_env=False, verify=False) as http,
    ):
        assert (await http.get("/admin/headway/job/")).status_code == 302


async def test_pages_bring_their_own_scripts_and_styles(settings: Settings, database: asyncpg.Connection) -> None:
    async with web(settings) as url, httpx.AsyncClient(base_url=url, trust_env=False, verify=False) as http:
        for path in ("/admin/login/", "/api/v1/docs"):
            shown = (await http.get(path)).text
            linked = re.findall(r'<(?:link|script|img)[^>]+(?:src|href)="([^"]+)"', shown)
            assert linked
            for link in linked:
                assert link.startswith("/"), f"{path} loads {link}"
                answer = await http.get(link)
                assert answer.status_code == 200, link
                assert answer.content


async def test_the_api_describes_itself(settings: Settings, database: asyncpg.Connection) -> None:
    async with web(settings) as url, httpx.AsyncClient(base_url=url, trust_env=False, verify=False) as http:
        answer = await http.get("/api/v1/openapi.json")
    api = answer.json()
    assert api["openapi"].startswith("3.1")
    assert {(method, path) for path, operations in api["paths"].items() for method in operations} == {
        ("get", "/api/v1/jobs"),
        ("post", "/api/v1/jobs"),
        ("get", "/api/v1/jobs/{job_id}"),
        ("post", "/api/v1/jobs/{job_id}/cancel"),
        ("get", "/api/v1/jobs/{job_id}/events"),
        ("get", "/api/v1/rooms"),
        ("get", "/api/v1/rooms/{room}/messages"),
        ("post", "/api/v1/rooms/{room}/messages"),
        ("get", "/api/v1/rooms/{room}/presence"),
        ("post", "/api/v1/ws-tickets"),
        ("post", "/api/v1/jobs/{job_id}/retry"),
        ("post", "/api/v1/jobs/bulk"),
        ("post", "/api/v1/jobs/batch"),
        ("get", "/api/v1/jobs/{job_id}/failures"),
        ("get", "/api/v1/jobs/{job_id}/artifacts"),
        ("get", "/api/v1/jobs/{job_id}/artifacts/{name}"),
        ("post", "/api/v1/files"),
        ("get", "/api/v1/files"),
        ("get", "/api/v1/files/{file_id}"),
        ("delete", "/api/v1/files/{file_id}"),
        ("get", "/api/v1/files/{file_id}/content"),
        ("options", "/api/v1/uploads"),
        ("post", "/api/v1/uploads"),
        ("get", "/api/v1/uploads/{upload_id}"),
        ("patch", "/api/v1/uploads/{upload_id}"),
        ("delete", "/api/v1/uploads/{upload_id}"),
        ("get", "/api/v1/kinds"),
        ("get", "/api/v1/kinds/{name}"),
        ("get", "/api/v1/schedules"),
        ("post", "/api/v1/schedules"),
        ("get", "/api/v1/schedules/{schedule_id}"),
        ("patch", "/api/v1/schedules/{schedule_id}"),
        ("delete", "/api/v1/schedules/{schedule_id}"),
        ("post", "/api/v1/schedules/{schedule_id}/pause"),
        ("post", "/api/v1/schedules/{schedule_id}/resume"),
        ("post", "/api/v1/schedules/{schedule_id}/run"),
        ("get", "/api/v1/events"),
        ("post", "/api/v1/query"),
        ("post", "/api/v1/fetch"),
    }
    for path, operations in api["paths"].items():
        for method, operation in operations.items():
            answers = operation["responses"]
            assert "application/problem+json" in answers.pop("default")["content"], path
            assert all(answer.get("content") for status, answer in answers.items() if status in ("200", "202")), path
            assert "{" not in path or operation["parameters"], f"{method} {path}"
    (scheme,) = api["components"]["securitySchemes"].values()
    assert scheme == {"type": "http", "scheme": "bearer"}
    assert api["security"]


def test_a_kind_is_paused_and_resumed_and_otherwise_left_as_it_is(site: "Client") -> None:
    from django.utils import timezone

    from services.web.accounts.models import Kind

    schemas: dict[str, Any] = {"input_schema": {}, "result_schema": {}}
    Kind.objects.create(name="report.build", description="", timeout=1, announced_at=timezone.now(), **schemas)
    listed = "/admin/headway/kind/"
    assert "1 paused: jobs are accepted and wait" in page(site, listed, action="pause", _selected_action="report.build")
    assert Kind.objects.get().paused_at is not None
    page(site, f"{listed}report.build/change/")
    assert site.post(f"{listed}report.build/change/", {"timeout": 5}).status_code == 403
    assert "1 resumed." in page(site, listed, action="resume", _selected_action="report.build")
    assert Kind.objects.get().paused_at is None

"""No request to the API leaves the event loop, and no middleware that would is let in."""

import asyncio
import json
import threading
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from asgiref.sync import SyncToAsync, markcoroutinefunction

from headway import kinds
from headway.settings import Settings
from headway.store import Store
from tests.conftest import Tenant

COUNTDOWN = {"kind": "demo.countdown", "input": {"seconds": 1}}
NOWHERE = "00000000-0000-0000-0000-000000000000"


@contextmanager
def hops(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Counts what takes a request off the event loop: calls of `sync_to_async`, of executors, and new threads."""
    counted: Counter[str] = Counter()

    def count(owner: type, name: str) -> None:
        original = getattr(owner, name)

        def counting(*args: Any, **kwargs: Any) -> Any:
            counted[name] += 1
            return original(*args, **kwargs)

        patch.setattr(owner, name, counting)

    with monkeypatch.context() as patch:
        count(SyncToAsync, "__call__")
        count(asyncio.BaseEventLoop, "run_in_executor")
        count(threading.Thread, "start")
        yield counted


class Api:
    """The application as a server calls it."""

    def __init__(self, application: Any, key: str) -> None:
        self.application = application
        self.key = key

    async def __call__(
        self, method: str, path: str, body: bytes = b"", *, key: str | None = None, headers: Any = ()
    ) -> tuple[int, bytes]:
        """The status and the body of the answer."""
        messages = [{"type": "http.request", "body": body, "more_body": False}]
        sent: list[dict[str, Any]] = []
        complete = asyncio.Event()

        async def receive() -> dict[str, Any]:
            if messages:
                return messages.pop()
            await complete.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)
            if message["type"] == "http.response.body" and not message.get("more_body"):
                complete.set()

        path, _, query = path.partition("?")
        bearer = f"Bearer {self.key if key is None else key}".encode()
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "path": path,
            "raw_path": path.encode(),
            "query_string": query.encode(),
            "root_path": "",
            "scheme": "http",
            "headers": [(b"host", b"localhost"), (b"authorization", bearer), *headers],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 2),
        }
        await self.application(scope, receive, send)
        return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:])


@pytest.fixture
async def api(settings: Settings, tenant: Tenant) -> AsyncIterator[Api]:
    from services.web.asgi import Application  # Django must be set up

    store = Store(settings.database_url.get_secret_value(), pool=2)
    await store.open()
    await store.announce_kinds([kind.as_json() for kind in kinds.discover().values()])
    await store.close()
    application = Application(settings)
    yield Api(application, tenant.api_key)
    await application.close()


@pytest.mark.usefixtures("source")
async def test_a_thousand_requests_of_all_sorts_make_no_hop(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    _, job = await api("POST", "/api/v1/jobs", json.dumps(COUNTDOWN).encode())
    path = f"/api/v1/jobs/{json.loads(job)['id']}"
    _, made = await api("POST", "/api/v1/files", b"a,b\n1,2\n")
    file = f"/api/v1/files/{json.loads(made)['id']}"
    mixed: list[tuple[int, Any]] = [
        (200, ("GET", "/api/v1/kinds")),
        (200, ("GET", "/api/v1/kinds/demo.countdown")),
        (200, ("GET", "/api/v1/jobs?limit=5&state=queued")),
        (200, ("GET", path)),
        (200, ("HEAD", path)),
        (200, ("GET", f"{path}?wait=0.001")),
        (200, ("GET", f"{path}/artifacts")),
        (200, ("GET", f"{path}/events")),
        (404, ("GET", f"/api/v1/jobs/{NOWHERE}/events")),
        (202, ("POST", "/api/v1/jobs", json.dumps(COUNTDOWN).encode())),
        (201, ("POST", "/api/v1/files?name=a.csv", b"a,b\n1,2\n")),
        (201, ("POST", "/api/v1/rooms/lobby/messages", b'{"message": "hi"}')),
        (200, ("GET", "/api/v1/rooms/lobby/messages?after=1")),
        (200, ("GET", "/api/v1/rooms/lobby/presence")),
        (200, ("GET", "/api/v1/rooms")),
        (201, ("POST", "/api/v1/ws-tickets", b'{"origin": "http://localhost"}')),
        (200, ("GET", "/api/v1/files?limit=5")),
        (200, ("GET", f"{file}/content")),
        (200, ("HEAD", f"{file}/content")),
        (404, ("DELETE", f"/api/v1/files/{NOWHERE}")),
        (204, ("OPTIONS", "/api/v1/uploads")),
        (412, ("POST", "/api/v1/uploads")),
        (400, ("POST", "/api/v1/jobs", b"{")),
        (400, ("GET", "/api/v1/jobs?cursor=x")),
        (404, ("GET", "/api/v1/nothing")),
        (404, ("GET", "/api/v1/")),
        (404, ("GET", f"/api/v1/jobs/{NOWHERE}")),
        (404, ("GET", f"{path}/artifacts/none")),
        (404, ("POST", f"/api/v1/jobs/{NOWHERE}/cancel")),
        (405, ("DELETE", "/api/v1/jobs")),
        (413, ("POST", "/api/v1/jobs", bytes(1 << 21))),
        (422, ("POST", "/api/v1/jobs", b'{"kind": "no.such", "input": 1}')),
        (422, ("GET", "/api/v1/jobs?limit=x")),
        (200, ("POST", "/api/v1/query", b'{"sql": "SELECT 1"}')),
        (422, ("POST", "/api/v1/query", b'{"sql": "SELECT 1; SELECT 2"}')),
        (200, ("POST", "/api/v1/fetch", b'{"urls": ["http://10.0.0.1/", "https://[::1]:1/"]}')),
    ]
    with hops(monkeypatch) as counted:
        for _ in range(53):
            for expected, request in mixed:
                assert (await api(*request))[0] == expected, request
        for _ in range(10):
            assert (await api("GET", "/api/v1/jobs", key="wrong"))[0] == 401
        assert (await api("POST", f"{path}/cancel"))[0] == 200
        for _ in range(10):
            await upload_in_two(api)
    assert counted == {}


async def upload_in_two(api: Api) -> None:
    """A file that arrives in two requests, and is deleted."""
    tus = [(b"tus-resumable", b"1.0.0"), (b"content-type", b"application/offset+octet-stream")]
    assert (await api("POST", "/api/v1/uploads", b"01234", headers=[*tus, (b"upload-length", b"10")]))[0] == 201
    [upload] = await api.application.app.store.rows("SELECT id FROM files WHERE sha256 IS NULL AND expires_at > now()")
    path = f"/api/v1/uploads/{upload['id']}"
    assert (await api("HEAD", path, headers=tus))[0] == 200
    assert (await api("PATCH", path, b"56789", headers=[*tus, (b"upload-offset", b"5")]))[0] == 204
    assert (await api("GET", path.replace("uploads", "files") + "/content"))[1] == b"0123456789"
    assert (await api("DELETE", path.replace("uploads", "files")))[0] == 204


async def test_streams_make_no_hop(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    _, job = await api("POST", "/api/v1/jobs", json.dumps(COUNTDOWN).encode())
    path = f"/api/v1/jobs/{json.loads(job)['id']}"
    accept = [(b"accept", b"text/event-stream")]
    await api("POST", f"{path}/cancel")
    with hops(monkeypatch) as counted:
        assert (await api("GET", f"{path}/events", headers=accept))[1].count(b"event: ") == 2
        assert (await api("GET", f"{path}/events?last_event_id=1-2", headers=accept))[0] == 204
        assert (await api("HEAD", f"{path}/events", headers=accept))[0] == 200
        assert (await api("GET", f"/api/v1/jobs/{NOWHERE}/events", headers=accept))[0] == 404
        assert (await api("GET", "/api/v1/events?last_event_id=x", headers=accept))[0] == 400
    assert counted == {}


async def test_the_counter_counts(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    with hops(monkeypatch) as counted:
        status, page = await api("GET", "/admin/login/")
    assert status == 200
    assert b"Log in" in page
    assert counted["__call__"] > 0
    assert counted["start"] > 0


class SyncOnly:
    """Middleware as it was before Django knew asyncio."""

    def __init__(self, get_response: Any) -> None:
        self.get_response = get_response

    def __call__(self, request: Any) -> Any:
        return self.get_response(request)


class Both(SyncOnly):
    """Says that it is asynchronous, and is not."""

    async_capable = True


class AsyncOnly:
    """As ours are."""

    sync_capable = False
    async_capable = True

    def __init__(self, get_response: Any) -> None:
        self.get_response = get_response
        markcoroutinefunction(self)

    async def __call__(self, request: Any) -> Any:
        return await self.get_response(request)


@pytest.mark.usefixtures("servers")
def test_middleware_that_would_hop_is_refused() -> None:
    from django.conf import settings as django  # Django must be set up
    from django.core.checks import run_checks
    from django.test import override_settings

    def found(*middleware: str) -> list[str]:
        with override_settings(API_MIDDLEWARE=[*django.API_MIDDLEWARE, *middleware]):
            return [str(message.msg).split()[0] for message in run_checks() if message.id == "headway.E001"]

    assert found() == []
    assert found(f"{__name__}.AsyncOnly") == []
    for refused in ("django.middleware.common.CommonMiddleware", f"{__name__}.SyncOnly", f"{__name__}.Both"):
        assert found(refused, f"{__name__}.AsyncOnly") == [refused]


async def test_the_routes_are_read_when_a_process_starts(settings: Settings) -> None:
    """Django would read them at the first request, and hold up all others for a tenth of a second."""
    from django.urls import clear_url_caches, get_resolver

    from services.web.asgi import Application

    clear_url_caches()
    assert "url_patterns" not in vars(get_resolver())
    application = Application(settings)
    assert "url_patterns" in vars(get_resolver())
    await application.close()

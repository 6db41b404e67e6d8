"""`/fetch`: a few URLs side by side, answered at once. Its long form is the kind `http.fetch`."""

import asyncio
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal
from uuid import UUID

from django.http import HttpResponse
from ninja import Router
from pydantic import ConfigDict, Field
from pydantic_core import to_json

from headway.errors import TooMany
from headway.fetching.deadlines import Deadlines
from headway.fetching.fetcher import Fetcher, Record
from headway.fetching.requests import Asking, Request, Url
from headway.fetching.session import open_session
from headway.settings import Settings
from services.web.api import schemas
from services.web.api.answers import answer
from services.web.api.request import ApiRequest

MOST_URLS = 20
MOST_BYTES = 1 << 20
# Of the whole process: more than the limits of a few tenants, fewer than the files that a process may open.
CONNECTIONS = 500

router = Router(tags=["fetch"])


class Fetch(Asking):
    """A few URLs, and what is wanted of their answers."""

    model_config = ConfigDict(extra="forbid", strict=True)

    urls: list[Url] = Field(min_length=1, max_length=MOST_URLS, description="What to fetch side by side.")
    timeout: float | None = Field(
        None,
        gt=0,
        description="Seconds for all of them. What is not done by then has the error `timeout`. "
        "HEADWAY_FETCH_TIMEOUT if left out, which is also the most.",
    )
    body: Literal["none", "digest", "text", "base64"] = Field(
        "text", description="What is answered of a body: nothing, its SHA-256, its text, or its bytes in base64."
    )
    max_bytes: int = Field(MOST_BYTES, ge=1, le=MOST_BYTES, description="Largest body in bytes, once decompressed.")


class Fetching:
    """The session of the process, and how many calls each tenant has under way."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._credentials = settings.credentials
        self._session = open_session(settings.fetch_allow, CONNECTIONS, 0)
        self._under_way: Counter[UUID] = Counter()

    async def fetch(self, asked: Fetch) -> list[Record]:
        """The record of each URL, in their order, within the time that was asked for."""
        settings = self._settings
        deadlines = Deadlines(min(asked.timeout or settings.fetch_timeout, settings.fetch_timeout))
        fetcher = Fetcher(
            self._session,
            deadlines,
            asked.body,
            asked.max_bytes,
            credentials=self._credentials,
            room=settings.fetch_bytes,
        )
        headers, sent = asked.sent_headers, asked.sent
        async with asyncio.TaskGroup() as tasks:
            watching = tasks.create_task(deadlines.watch())
            fetching = [
                tasks.create_task(fetcher.fetch(Request(index, url, asked.method, headers, sent)))
                for index, url in enumerate(asked.urls)
            ]
            records = [await each for each in fetching]
            watching.cancel()
        return records

    @contextmanager
    def turn(self, tenant_id: UUID) -> Iterator[None]:
        """Raises TooMany if the tenant has as many calls under way as it may."""
        if self._under_way[tenant_id] >= (most := self._settings.fetch_requests):
            raise TooMany(
                f"{most} calls of this tenant are under way here; wait for one, or submit the kind http.fetch.",
                headers={"Retry-After": "1"},
            )
        self._under_way[tenant_id] += 1
        try:
            yield
        finally:
            self._under_way[tenant_id] -= 1
            if not self._under_way[tenant_id]:
                del self._under_way[tenant_id]

    async def close(self) -> None:
        await self._session.close()


@router.post("", summary="Fetch a few URLs side by side", response=schemas.FetchResults)
async def fetch(request: ApiRequest, fetch: Fetch) -> HttpResponse:
    """One result for each URL, in their order, as soon as all are done or the time is over.

    A URL that cannot be fetched has an `error` in its result. `complete` is false if the time was over before all were
    done. Addresses that are not public are refused.
    """
    request.only()
    fetching, began = request.app.fetching, time.perf_counter()
    with fetching.turn(request.auth.tenant_id):
        records = await request.unless_left(fetching.fetch(fetch))
    ms = round((time.perf_counter() - began) * 1000)
    complete = not any(record["error"] and record["error"]["type"] == "timeout" for record in records)
    return answer(to_json({"results": records, "complete": complete, "ms": ms}))

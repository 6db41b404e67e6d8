"""The HTTP half of the client."""

import asyncio
import hashlib
import mimetypes
import os
import random
import re
import secrets
import stat
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import IO, Any
from urllib.parse import quote
from uuid import UUID, uuid4

import httpx

from headway.client import credentials, uploads
from headway.client.errors import BY_STATUS, ApiError, CannotBeSent, ClientError, ConnectionFailed, Unavailable
from headway.client.follow import follow
from headway.client.live import Live
from headway.client.watch import Room, SetSubscription, watch

TRIES = 4
FIRST_PAUSE = 0.25
LONGEST_PAUSE = 10.0
CHUNK = 1 << 20
# Files of this size and more are uploaded so that they can go on after a broken connection.
RESUMED = 8 << 20
PAGE = 100
SHA256 = re.compile(r'"([0-9a-f]{64})"')

Json = dict[str, Any]
JobId = str | UUID
OnProgress = Callable[[int, int | None], None]


class Client:
    """A connection to one Headway server, for one API key. Use it as `async with`.

    Jobs, files, kinds and envelopes are dicts, as the API has them. Every method may raise ConnectionFailed, or
    ApiError with what the server said. All but uploads is tried four times when there is no answer or a 503.
    """

    def __init__(self, url: str, api_key: str, *, timeout: float = 60) -> None:
        self.url = credentials.check_url(url)
        self.headers = {"Authorization": f"Bearer {credentials.check_key(api_key)}"}
        self._http = httpx.AsyncClient(
            base_url=f"{self.url}/api/v1",
            headers=self.headers,
            # Reading the certificates takes 0.1 s. Redirects are not followed, so plain HTTP stays so.
            verify=self.url.startswith("https:"),
            timeout=httpx.Timeout(timeout, connect=10),
            # uvicorn hangs up after 5 s of silence: be first, so that no request meets a closing connection.
            limits=httpx.Limits(keepalive_expiry=3),
        )
        self.live = Live(self)

    @classmethod
    def from_environment(cls, *, url: str | None = None, api_key: str | None = None) -> "Client":
        """A client for HEADWAY_URL and HEADWAY_API_KEY, or for what `$HEADWAY_HOME/credentials.json` names.

        Arguments come before both. Raises NotConfigured.
        """
        return cls(*credentials.find(url, api_key))

    async def __aenter__(self) -> "Client":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        await self.live.close()
        await self._http.aclose()

    async def submit(
        self,
        kind: str,
        input: Any,
        *,
        tags: Sequence[str] = (),
        priority: str = "normal",
        run_at: datetime | None = None,
        delay: float | None = None,
        timeout: float | None = None,  # noqa: ASYNC109 - the job's, not the call's
        max_attempts: int | None = None,
        concurrency_key: str | None = None,
        concurrency_limit: int | None = None,
        idempotency_key: str | None = None,
    ) -> Json:
        """Submit a job; it is durable when this returns.

        `delay` and `timeout` are seconds; `run_at` has a time zone. The request carries an Idempotency-Key, your own or
        one that is made here, so it is repeated over broken connections and still makes one job.
        """
        body: Json = {"kind": kind, "input": input, "tags": list(tags), "priority": priority}
        optional = {
            "run_at": run_at and run_at.isoformat(),
            "delay": delay,
            "timeout": timeout,
            "max_attempts": max_attempts,
            "concurrency_key": concurrency_key,
            "concurrency_limit": concurrency_limit,
        }
        body |= {name: value for name, value in optional.items() if value is not None}
        headers = {"Idempotency-Key": uuid4().hex if idempotency_key is None else idempotency_key}
        return await self._json("POST", "/jobs", repeatable=True, json=body, headers=headers)

    async def submit_batch(self, jobs: Sequence[Json], *, idempotency_key: str | None = None) -> list[Json]:
        """Submit up to 1,000 jobs together: all are durable when this returns, in this order, or none is.

        Each of `jobs` is what `POST /jobs` takes, such as `{"kind": …, "input": …}`. Repeated as `submit` is.
        """
        headers = {"Idempotency-Key": uuid4().hex if idempotency_key is None else idempotency_key}
        answer = await self._json("POST", "/jobs/batch", repeatable=True, json={"jobs": jobs}, headers=headers)
        return list(answer["jobs"])

    async def get(self, job_id: JobId) -> Json:
        """The job as it is now. Raises NotFound."""
        return await self._json("GET", f"/jobs/{_part(job_id)}")

    async def list(
        self, *, state: str | None = None, kind: str | None = None, tag: str | None = None, limit: int | None = None
    ) -> AsyncGenerator[Json, None]:
        """Jobs that fit, newest first: all of them, or the first `limit`. Pages are read as they are needed."""
        left, cursor = limit, None
        while left is None or left > 0:
            size = PAGE if left is None else min(PAGE, left)
            asked = {"state": state, "kind": kind, "tag": tag, "limit": size, "cursor": cursor}
            page = await self._json(
                "GET", "/jobs", params={name: value for name, value in asked.items() if value is not None}
            )
            for job in page["jobs"]:
                yield job
            if left is not None:
                left -= len(page["jobs"])
            cursor = page["next_cursor"]
            if cursor is None:
                return

    async def cancel(self, job_id: JobId) -> Json:
        """Ask for a job to be cancelled; the job after that. One that runs ends within a moment. Raises NotFound."""
        return await self._json("POST", f"/jobs/{_part(job_id)}/cancel", repeatable=True)

    async def retry(self, job_id: JobId) -> Json:
        """Run an ended job again: the new job, or the one that was made before. Raises NotFound, or a 409 ApiError."""
        return await self._json("POST", f"/jobs/{_part(job_id)}/retry", repeatable=True)

    async def bulk(self, action: str, *, state: str, kind: str | None = None, tag: str | None = None) -> int:
        """`cancel` or `retry` all jobs that fit; how many that changed. A job that was retried is not retried again."""
        changed, cursor = 0, None
        while True:
            asked = {"action": action, "state": state, "kind": kind, "tag": tag, "cursor": cursor}
            body = {name: value for name, value in asked.items() if value is not None}
            answer = await self._json("POST", "/jobs/bulk", repeatable=True, json=body)
            changed += int(answer["changed"])
            cursor = answer["next_cursor"]
            if cursor is None:
                return changed

    async def kinds(self) -> Sequence[Json]:
        """The kinds that can be submitted, with the JSON Schemas of input and result."""
        return (await self._json("GET", "/kinds"))["kinds"]  # type: ignore[no-any-return]

    async def kind(self, name: str) -> Json:
        """One kind. Raises NotFound, naming those there are."""
        return await self._json("GET", f"/kinds/{_part(name)}")

    async def upload(
        self, path: str | Path, *, content_type: str | None = None, on_progress: OnProgress | None = None
    ) -> Json:
        """Upload a local file, whatever its size; its `id` is what the input of a kind takes.

        One of 8 MiB or more goes on after a broken connection, and is given up when no byte arrives for five minutes.
        `on_progress(done, total)` is called in bytes; `total` is None for what has no size, such as a pipe.
        """
        path = Path(path)
        with await asyncio.to_thread(path.open, "rb") as file:
            status = os.fstat(file.fileno())
            size = status.st_size if stat.S_ISREG(status.st_mode) else None
            name = path.name.encode(errors="replace").decode()
            content_type = content_type or _guess(path)
            if size is not None and size >= RESUMED:
                return await self._upload_resumably(uploads.Source(file, size, on_progress), name, content_type)
            headers = {"Content-Type": content_type}
            if size is not None:
                headers["Content-Length"] = str(size)
            return await self._json(
                "POST",
                "/files",
                params={"name": name},
                headers=headers,
                content=_chunks(file, size, on_progress),
            )

    async def _upload_resumably(self, source: uploads.Source, name: str, content_type: str) -> Json:
        file = await self._json(
            "GET", f"/files/{await uploads.upload(self, source, name=name, content_type=content_type)}"
        )
        if file["sha256"] != source.sha256:
            raise ClientError(f"{name} was damaged on its way, or changed while it was read; upload it again.")
        return file

    async def artifacts(self, job_id: JobId) -> Sequence[Json]:
        """Name, content type, size and SHA-256 of each file that the job made."""
        return (await self._json("GET", f"/jobs/{_part(job_id)}/artifacts"))["artifacts"]  # type: ignore[no-any-return]

    async def read(
        self, job_id: JobId, name: str, *, on_progress: OnProgress | None = None
    ) -> AsyncGenerator[bytes, None]:
        """The bytes of an artifact as they arrive. Raises ClientError at the end if they are not what was kept."""
        response = await self.send(
            "GET",
            f"/jobs/{_part(job_id)}/artifacts/{_part(name)}",
            headers={"Accept-Encoding": "identity"},
            repeatable=True,
            stream=True,
        )
        length = response.headers.get("Content-Length", "")
        total = int(length) if length.isdecimal() else None
        digest, done = hashlib.sha256(), 0
        try:
            async for chunk in response.aiter_bytes(CHUNK):
                digest.update(chunk)
                done += len(chunk)
                yield chunk
                if on_progress:
                    on_progress(done, total)
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        finally:
            await response.aclose()
        expected = SHA256.fullmatch(response.headers.get("ETag", ""))
        if expected and expected[1] != digest.hexdigest():
            raise ClientError(
                f"{name} was damaged on its way: its SHA-256 is not the one announced. Download it again."
            )

    async def download(
        self, job_id: JobId, name: str, path: str | Path, *, on_progress: OnProgress | None = None
    ) -> Path:
        """Write an artifact to `path`, or into the folder that `path` is; the path of the file.

        The file appears once it is whole, in the place of one that was there.
        """
        path = Path(path)
        if path.is_dir():
            path /= Path(name).name
        partial = path.with_name(f".{path.name[:100]}.{secrets.token_hex(4)}.part")
        try:
            with await asyncio.to_thread(partial.open, "xb") as file:
                async with aclosing(self.read(job_id, name, on_progress=on_progress)) as chunks:
                    async for chunk in chunks:
                        await asyncio.to_thread(file.write, chunk)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        return path

    def follow(self, job_id: JobId) -> AsyncGenerator[Json, None]:
        """Every envelope of a job, from a snapshot of how it is now to its terminal state.

        Lost connections are made again, and what was missed meanwhile is sent again, or a new snapshot. Nothing comes
        twice or out of order. Raises NotFound, Unauthenticated, and ConnectionFailed if the server stays away for five
        minutes. All that a client follows shares one socket.
        """
        return follow(self, str(job_id))

    def watch(
        self, *, tag: str | None = None, kind: str | None = None, parent: JobId | None = None, since: str | None = None
    ) -> AsyncGenerator[Json, None]:
        """Every envelope of all jobs that fit, without an end: snapshots of those that are open, then what happens.

        `since` is the `cursor` of an envelope of before: what happened after it comes, in place of the snapshots. A
        `resync` in between says that it is too old, or not of this database; snapshots follow. Raises as `follow` does.
        """
        fitting = {"tag": tag, "kind": kind, "parent": parent and str(parent)}
        subscription = SetSubscription({name: value for name, value in fitting.items() if value is not None}, since)
        return watch(self, subscription)

    def room(self, name: str, *, since: int | None = None) -> Room:
        """A room to listen and talk in. With `since` the messages after that seq come first; 0 is all that is kept."""
        return Room(self, name, since)

    async def ticket(
        self,
        origin: str,
        *,
        user: str | None = None,
        jobs: Sequence[JobId] | None = None,
        rooms: Sequence[str] | None = None,
        publish: bool = True,
    ) -> Json:
        """A ticket with which a page of `origin` may connect, once, within 30 seconds: `{"ticket", "expires_at"}`.

        `user` is the name that others in rooms see; `jobs` and `rooms` are all that the page may follow and join, and
        `publish` is whether it may speak.
        """
        body: Json = {"origin": origin, "publish": publish}
        if user is not None:
            body["user"] = user
        if jobs is not None:
            body["jobs"] = [str(job_id) for job_id in jobs]
        if rooms is not None:
            body["rooms"] = [*rooms]
        return await self._json("POST", "/ws-tickets", repeatable=True, json=body)

    async def post_message(self, room: str, message: str) -> Json:
        """See Room.send."""
        headers = {"Idempotency-Key": uuid4().hex}
        return await self._json(
            "POST", f"/rooms/{_part(room)}/messages", repeatable=True, json={"message": message}, headers=headers
        )

    async def wait(
        self,
        job_id: JobId,
        timeout: float | None = None,  # noqa: ASYNC109 - also for callers that know no asyncio.timeout
    ) -> Json:
        """The job once it is in a terminal state. Raises TimeoutError after `timeout` seconds."""
        async with asyncio.timeout(timeout):
            async with aclosing(self.follow(job_id)) as envelopes:
                async for _ in envelopes:
                    pass
            return await self.get(job_id)

    async def _json(self, method: str, path: str, *, repeatable: bool | None = None, **request: Any) -> Json:
        repeatable = method == "GET" if repeatable is None else repeatable
        response = await self.send(method, path, repeatable=repeatable, **request)
        try:
            return response.json()  # type: ignore[no-any-return]
        except ValueError:
            raise ConnectionFailed(f"{self.url} does not answer as Headway does; is the URL right?") from None

    async def send(
        self, method: str, path: str, *, repeatable: bool, stream: bool = False, **request: Any
    ) -> httpx.Response:
        """An answer of the API that is a success. `request` is what httpx takes; `repeatable` tries four times."""
        tries, pause = TRIES if repeatable else 1, FIRST_PAUSE
        while True:
            tries -= 1
            failure: ClientError
            try:
                response = await self._http.send(self._request(method, path, request), stream=True)
                if response.is_success and stream:
                    return response
                async with aclosing(response):
                    await response.aread()
                if response.is_success:
                    return response
                failure = _refusal(response)
            except httpx.HTTPError as error:
                failure = self._unreachable(error)
            if tries == 0 or not isinstance(failure, ConnectionFailed | Unavailable):
                raise failure
            asked = failure.retry_after if isinstance(failure, Unavailable) else None
            await asyncio.sleep(min(LONGEST_PAUSE, asked or random.uniform(pause / 2, pause)))  # noqa: S311
            pause *= 2

    def _request(self, method: str, path: str, given: Json) -> httpx.Request:
        try:
            return self._http.build_request(method, path, **given)
        except (TypeError, ValueError, RecursionError) as error:
            raise CannotBeSent(f"This cannot be sent: {error}.") from error

    def _unreachable(self, error: httpx.HTTPError) -> ConnectionFailed:
        return ConnectionFailed(f"No answer from {self.url}: {str(error) or type(error).__name__}.")


async def _chunks(file: IO[bytes], size: int | None, on_progress: OnProgress | None) -> AsyncIterator[bytes]:
    done = 0
    while chunk := await asyncio.to_thread(file.read, CHUNK if size is None else min(CHUNK, size - done)):
        yield chunk
        done += len(chunk)
        if on_progress:
            on_progress(done, size)
    if size is not None and done < size:
        raise ClientError(f"{file.name} became shorter while it was read; upload it again.")


def _refusal(response: httpx.Response) -> ApiError:
    try:
        problem = response.json()
        detail = str(problem["detail"])
    except (ValueError, KeyError, TypeError):
        problem, detail = {}, f"{response.url} answered {response.status_code} {response.reason_phrase}."
        if response.has_redirect_location:
            detail = f"{response.url} redirects to {response.headers['Location']}; give the URL it leads to."
    asked = response.headers.get("Retry-After", "")
    return BY_STATUS.get(response.status_code, ApiError)(
        detail,
        status=response.status_code,
        type=str(problem.get("type", "about:blank")),
        title=str(problem.get("title", "")),
        errors=problem.get("errors", ()),
        retry_after=float(asked) if asked.isdecimal() else None,
    )


def _part(name: object) -> str:
    """One segment of a path."""
    return quote(str(name), safe="", errors="surrogatepass")


def _guess(path: Path) -> str:
    kind, encoding = mimetypes.guess_type(path.name)
    return kind if kind and not encoding else "application/octet-stream"

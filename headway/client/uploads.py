"""Large uploads: they go on after a broken connection, by version 1.0.0 of tus."""

import asyncio
import base64
import hashlib
import logging
import random
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import IO, TYPE_CHECKING, Any

from headway.client.errors import ApiError, ClientError, ConnectionFailed
from headway.client.follow import PATIENCE
from headway.client.live import FIRST_PAUSE, LONGEST_PAUSE

if TYPE_CHECKING:
    from headway.client.http import Client, OnProgress

CHUNK = 1 << 20
TUS = {"Tus-Resumable": "1.0.0"}
# Seconds that giving up an upload may take.
GIVE_UP = 2.0

log = logging.getLogger("headway.client")


class Source:
    """The bytes of a local file from any offset, and the SHA-256 of all of them once all were read."""

    def __init__(self, file: IO[bytes], size: int, on_progress: "OnProgress | None") -> None:
        self.size = size
        self._file = file
        self._on_progress = on_progress
        self._digest = hashlib.sha256()
        self._digested = 0

    async def read(self, offset: int) -> AsyncIterator[bytes]:
        """Raises ClientError if the file becomes shorter meanwhile."""
        await asyncio.to_thread(self._file.seek, offset)
        while offset < self.size:
            chunk = await asyncio.to_thread(self._file.read, min(CHUNK, self.size - offset))
            if not chunk:
                raise ClientError(f"{self._file.name} became shorter while it was read; upload it again.")
            # What is sent again has been digested already.
            self._digest.update(chunk[self._digested - offset :])
            offset += len(chunk)
            self._digested = max(self._digested, offset)
            yield chunk
            if self._on_progress:
                self._on_progress(offset, self.size)

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()


async def upload(client: "Client", source: Source, *, name: str, content_type: str) -> str:
    """The id of the file. Gives up once no byte has arrived for five minutes, and raises what was in the way."""
    metadata = ",".join(
        f"{key} {base64.b64encode(value.encode()).decode()}"
        for key, value in (("filename", name), ("filetype", content_type))
    )
    headers = {**TUS, "Upload-Length": str(source.size), "Upload-Metadata": metadata}
    created = await client.send("POST", "/uploads", repeatable=True, headers=headers)
    path = f"/uploads/{created.headers['Location'].rpartition('/')[2]}"
    try:
        return await _send_all(client, path, source)
    except BaseException:
        # Its room would be kept for a day.
        with suppress(ClientError, TimeoutError):
            async with asyncio.timeout(GIVE_UP):
                await client.send("DELETE", path, repeatable=False, headers=TUS)
        raise


async def _send_all(client: "Client", path: str, source: Source) -> str:
    loop = asyncio.get_running_loop()
    offset, failures, moved = 0, 0, loop.time()
    while True:
        headers = {
            **TUS,
            "Content-Type": "application/offset+octet-stream",
            "Content-Length": str(source.size - offset),
            "Upload-Offset": str(offset),
        }
        try:
            answer = await client.send("PATCH", path, repeatable=False, headers=headers, content=source.read(offset))
        except (ConnectionFailed, ApiError) as error:
            if not _passing(error) or loop.time() - moved > PATIENCE:
                raise
            log.log(logging.DEBUG if failures else logging.WARNING, "The upload broke off (%s); going on.", error)
            await asyncio.sleep(random.uniform(0, min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** min(failures, 10))))  # noqa: S311
            failures += 1
            with suppress(ConnectionFailed):
                answer = await client.send("HEAD", path, repeatable=True, headers=TUS)
                arrived = int(answer.headers["Upload-Offset"])
                if arrived > offset:
                    failures, moved = 0, loop.time()
                offset = arrived
        else:
            offset = int(answer.headers["Upload-Offset"])
        if offset == source.size:
            return str(answer.headers["Headway-File"])


def _passing(error: Any) -> bool:
    """Whether the same may succeed a little later: no answer, too slow, another offset, the server in trouble."""
    return isinstance(error, ConnectionFailed) or error.status in (408, 409) or error.status in (500, 502, 503, 504)

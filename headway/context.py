"""What a handler is given: JobContext, and the files and artifacts that it opens."""

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import AbstractAsyncContextManager
from math import isfinite
from typing import Any, Protocol
from uuid import UUID

from headway.errors import Fatal
from headway.job import Child, ChildEnding, File, Progress


class InputFile(Protocol):
    """A file of the job's tenant, opened for reading."""

    @property
    def file(self) -> File: ...

    def chunks(self, size: int = 1 << 20, *, start: int = 0) -> AsyncIterator[bytes]:
        """The bytes from `start` on, about `size` at a time."""


class ArtifactWriter(Protocol):
    """An artifact being written."""

    async def write(self, data: bytes) -> None: ...


class JobContext(ABC):
    """What a handler is given: the job's facts and the ways to say how it goes.

    Every method may raise LeaseLost, or be interrupted by `asyncio.CancelledError` when the job is cancelled, times
    out or the worker shuts down: let both pass.
    """

    id: UUID
    kind: str
    attempt: int
    checkpoint: Any

    @property
    @abstractmethod
    def interruption(self) -> str | None:
        """Why the handler is interrupted: `cancelled`, `timed-out`, `drained`, `waiting`, `lost`; None if it is not.

        It is there before `asyncio.CancelledError` is, so that a handler can drop what only a next attempt would need.
        """

    @property
    def cancelled(self) -> bool:
        """Whether the handler is to stop, for whatever reason; `interruption` says which."""
        return self.interruption is not None

    @abstractmethod
    async def report(
        self,
        done: float,
        total: float | None = None,
        message: str = "",
        *,
        unit: str = "items",
        counts: Mapping[str, int] | None = None,
    ) -> None:
        """Say how far the job is. Cheap: call it as often as you like, at most ten a second are written.

        `done` and `total` are in `unit`; `counts` are further numbers worth showing, such as `{"rows": 1200}`.
        Rate and ETA are worked out from `done`, `total` and the clock.
        """

    @abstractmethod
    async def log(self, message: str, *, level: str = "info") -> None:
        """Add a line to the job's own log, which its owner sees as an event. At most 2,000 characters are kept.

        Waits out an outage of the database, after which the line may stand there twice.
        """

    @abstractmethod
    async def save_checkpoint(self, value: Any) -> None:
        """Keep a small JSON value; `checkpoint` holds it when the job is run again after an interruption.

        Each call is a write to Postgres, which is done when it returns: call it every few seconds, not for every item.
        Raises Fatal if the value is not JSON or is over HEADWAY_MAX_CHECKPOINT.
        """

    @abstractmethod
    async def save_part(self, data: bytes) -> str:
        """Keep bytes with the job until it ends; they are on disk when this returns. For what a checkpoint cannot hold.

        The answer is the part's key, to be put into the checkpoint: nothing else leads back to the part.
        """

    @abstractmethod
    def read_part(self, key: str) -> AsyncIterator[bytes]:
        """The bytes of a part that this or an earlier attempt saved.

        Raises ValueError if the key is not one of this job, and headway.errors.NotFound if the bytes are gone.
        """

    @abstractmethod
    async def open_file(self, file_id: UUID) -> InputFile:
        """A file of the job's tenant. Raises Fatal if there is none."""

    @abstractmethod
    def artifact(
        self, name: str, content_type: str = "application/octet-stream"
    ) -> AbstractAsyncContextManager[ArtifactWriter]:
        """Write a file that belongs to the job: `async with job.artifact("bad.csv", "text/csv") as out`.

        It becomes visible when the job succeeds, or fails by Fatal; an attempt that ends otherwise leaves nothing.
        """

    async def children(self, children: Iterable[Child]) -> list[ChildEnding]:
        """Submit jobs as parts of this one, and answer how they ended, in their order.

        The job waits without a slot: the handler is interrupted here by CancelledError, and called anew once all
        children have ended; then this answers at once. What comes before it therefore runs twice, and must ask for the
        same children again; keep what it found in a checkpoint. Meanwhile the job's progress is how many have ended.
        A further call submits further children. A child that fails does not fail its parent, but if the parent is
        cancelled or fails its open children are cancelled. The parent's timeout does not count the waiting.

        Raises Fatal for more than 10,000 children of a job, an unknown kind, children more than 5 generations deep, and
        in a kind that runs as a process.
        """
        raise Fatal("A kind that runs as a process cannot have children; submit them from one that runs in the worker.")

    @abstractmethod
    def source(self, name: str, *, reading: bool = False) -> str:
        """The URL of a source from the settings, with `reading` the one for what only reads.

        Raises Fatal if there is none that the job's tenant may use, naming those that it may.
        """


def as_progress(
    done: float, total: float | None, message: str, unit: str, counts: Mapping[str, int] | None
) -> Progress:
    """What a handler reports, in plain numbers whatever kind it counts in. Raises ValueError if one is not finite."""
    if not isfinite(done) or not (total is None or isfinite(total)):
        raise ValueError(f"report() takes finite numbers, not done={done} and total={total}.")
    return Progress(
        done=_plain(done),
        total=None if total is None else _plain(total),
        unit=str(unit),
        message=str(message),
        counts={str(name): int(number) for name, number in counts.items()} if counts else {},
    )


def _plain(number: float) -> float:
    return number if type(number) in (int, float) else float(number)

"""Kinds of work: the `@kind` decorator, the registry, and how the modules that hold them are found."""

import importlib
import inspect
import math
import random
import re
import typing
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, Literal, Protocol, TypeVar
from uuid import UUID

from pydantic import PydanticUserError, TypeAdapter

from headway.errors import Fatal, InvalidSettings
from headway.job import Child, ChildEnding, File

ENTRY_POINTS = "headway.kinds"
NAME = re.compile(r"[a-z][a-z0-9_]*(\.[a-z][a-z0-9_]*)+")
DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")
UNITS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400}


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

    async def run_children(self, children: Iterable[Child]) -> list[ChildEnding]:
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

        Raises Fatal, naming those that exist, if there is none.
        """


Handler = Callable[[JobContext, Any], Awaitable[Any]]
Runs = Literal["worker", "process"]
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of work: its name, its handler and what goes in and out."""

    name: str
    handler: Handler
    input: TypeAdapter[Any]
    result: TypeAdapter[Any]
    timeout: float
    max_attempts: int
    backoff_base: float
    backoff_cap: float
    runs: Runs
    description: str

    def backoff(self, attempt: int) -> float:
        """Seconds to wait after this attempt failed: exponential with full jitter, so that retries spread out."""
        return random.uniform(0, min(self.backoff_cap, self.backoff_base * 2 ** (attempt - 1)))  # noqa: S311

    def as_json(self) -> dict[str, Any]:
        """What workers announce and `GET /kinds` shows: name, description, timeout (s), attempts, JSON Schemas."""
        return {
            "name": self.name,
            "description": self.description,
            "timeout": self.timeout,
            "max_attempts": self.max_attempts,
            "input_schema": self.input.json_schema(),
            "result_schema": self.result.json_schema(mode="serialization"),
        }


_registry: dict[str, Kind] = {}


def seconds(duration: str | float) -> float:
    """`"30m"`, `"1.5h"`, `"500ms"` or a number of seconds, as seconds."""
    if isinstance(duration, int | float):
        return float(duration)
    match = DURATION.fullmatch(duration)
    if match is None:
        raise InvalidSettings(f'{duration!r} is not a duration; write a number and ms, s, m, h or d, such as "30m".')
    return float(match[1]) * UNITS[match[2]]


def kind(
    name: str,
    *,
    timeout: str | float = "1h",
    max_attempts: int = 3,
    backoff: str | float = "2s",
    backoff_cap: str | float = "10m",
    runs: Runs = "worker",
) -> Callable[[F], F]:
    """Make an async function a kind: `@kind("report.build", timeout="30m", max_attempts=5)`.

    An attempt that fails or takes longer than `timeout` is run again, until there were `max_attempts`, after a random
    time of at most `backoff`, which doubles with each attempt up to `backoff_cap`. Raise Fatal for what can never
    succeed, Retry(after=…) to choose the time. Interruptions by a deploy do not count.

    With `runs="process"` the handler has a process of its own, where it may block, use a core, or crash; it is killed
    if it does not end when it is interrupted. Otherwise it shares the worker's event loop and must not block.

    The function takes a JobContext and one pydantic model (or anything that pydantic can validate), and returns
    another; both are read from its annotations. The first paragraph of its docstring describes the kind to clients.
    Raises InvalidSettings if the name is taken, or the name, the timeout or the signature does not fit.
    """
    limit = seconds(timeout)
    if not 0 < limit < math.inf:
        raise InvalidSettings(f'The timeout of {name} is {timeout!r}; write a time above zero, such as "30m".')
    if not 1 <= max_attempts <= 100:
        raise InvalidSettings(f"max_attempts of {name} is {max_attempts}; write a number from 1 to 100.")
    if runs not in typing.get_args(Runs):
        raise InvalidSettings(f'runs of {name} is {runs!r}; write "worker" or "process".')

    def register(handler: F) -> F:
        if not NAME.fullmatch(name):
            raise InvalidSettings(f"{name!r} is not a kind's name; write two or more words with dots: report.build.")
        if name in _registry and (other := _place(_registry[name].handler)) != _place(handler):
            raise InvalidSettings(f"The kind {name} is defined twice: by {other} and by {_place(handler)}.")
        if not inspect.iscoroutinefunction(handler):
            raise InvalidSettings(f"The handler of {name} must be an `async def` function.")
        try:
            hints = typing.get_type_hints(handler)
            parameters = list(inspect.signature(handler).parameters)
            if len(parameters) != 2 or parameters[1] not in hints or "return" not in hints:
                raise InvalidSettings(
                    f"The handler of {name} must look like `async def build(job: JobContext, input: In) -> Out`."
                )
            made = Kind(
                name=name,
                handler=handler,
                input=TypeAdapter(hints[parameters[1]]),
                result=TypeAdapter(hints["return"]),
                timeout=limit,
                max_attempts=max_attempts,
                backoff_base=seconds(backoff),
                backoff_cap=seconds(backoff_cap),
                runs=runs,
                description=(inspect.getdoc(handler) or "").split("\n\n")[0].replace("\n", " "),
            )
            made.as_json()
        except (PydanticUserError, NameError) as error:
            raise InvalidSettings(f"The annotations of {name} have no JSON Schema: {error}.") from error
        _registry[name] = made
        return handler

    return register


def _place(handler: Callable[..., Any]) -> str:
    return f"{handler.__module__}.{handler.__qualname__}"


def discover(modules: Iterable[str] = ()) -> dict[str, Kind]:
    """Import the kinds of installed packages (entry points `headway.kinds`) and of `modules`; return all by name.

    Raises InvalidSettings, naming the module, if one cannot be imported.
    """
    for module in [*(point.value for point in entry_points(group=ENTRY_POINTS)), *modules]:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise InvalidSettings(f"The kinds module {module!r} cannot be imported: {error}.") from error
    return dict(_registry)


def find(name: str, module: str, modules: Iterable[str]) -> Kind:
    """One kind, by importing nothing but `module`; if it is not there, as `discover` does with `modules`.

    Raises KeyError if no module defines it.
    """
    importlib.import_module(module)
    return _registry[name] if name in _registry else discover(modules)[name]

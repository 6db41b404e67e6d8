"""Kinds of work: the `@kind` decorator, the registry, and how the modules that hold them are found."""

import importlib
import inspect
import math
import random
import re
import traceback
import typing
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union

from pydantic import PydanticUserError, TypeAdapter

from headway import startup
from headway.blocking import SyncJobContext
from headway.context import JobContext
from headway.errors import InvalidSettings
from headway.job import Progress
from headway.startup import Dependency

Handler = Callable[..., Any]
F = TypeVar("F", bound=Handler)
Runs = Literal["worker", "thread", "process"]
Form = Literal["coroutine", "async generator", "function", "generator"]

ENTRY_POINTS = "headway.kinds"
NAME = re.compile(r"[a-z][a-z0-9_]*(\.[a-z][a-z0-9_]*)+")
DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")
LOOKS: Mapping[Form, str] = {
    "coroutine": "async def build(job: JobContext, input: In) -> Out",
    "async generator": "async def build(job: JobContext, input: In) -> AsyncIterator[Progress | Out]",
    "function": "def build(job: SyncJobContext, input: In) -> Out",
    "generator": "def build(job: SyncJobContext, input: In) -> Iterator[Progress | Out]",
}
PLAIN = ("function", "generator")
ITERATORS = (AsyncIterator, AsyncGenerator, Iterator, Generator)
UNITS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400}


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of work: its name, its handler and what goes in and out."""

    name: str
    handler: Handler
    form: Form
    needs: Mapping[str, Dependency]
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
    runs: Runs | None = None,
) -> Callable[[F], F]:
    """Make a function a kind: `@kind("report.build", timeout="30m", max_attempts=5)`.

    An attempt that fails or takes longer than `timeout` is run again, until there were `max_attempts`, after a random
    time of at most `backoff`, which doubles with each attempt up to `backoff_cap`. Raise Fatal for what can never
    succeed, Retry(after=…) to choose the time. Interruptions by a deploy do not count.

    An async function shares the worker's event loop and must not block. With `runs="process"` it has a process of its
    own, where it may block, use a core, or crash; it is killed if it does not end when it is interrupted. A plain
    function says where it runs: in a process, or with `runs="thread"` in a thread, which cannot be killed.

    The function takes a JobContext, or a SyncJobContext if it is plain, and one pydantic model (or anything that
    pydantic can validate), and returns another; both are read from its annotations. A generator yields Progress, and as
    its last the result. Further parameters are what functions with `@on_startup` yield, found by their types. The first
    paragraph of the docstring describes the kind to clients.

    Raises InvalidSettings if the name is taken, or the name, the timeout or the signature does not fit.
    """
    limit = seconds(timeout)
    if not 0 < limit < math.inf:
        raise InvalidSettings(f'The timeout of {name} is {timeout!r}; write a time above zero, such as "30m".')
    if not 1 <= max_attempts <= 100:
        raise InvalidSettings(f"max_attempts of {name} is {max_attempts}; write a number from 1 to 100.")
    if runs is not None and runs not in typing.get_args(Runs):
        raise InvalidSettings(f'runs of {name} is {runs!r}; write "thread" or "process", or leave it out.')

    def register(handler: F) -> F:
        if not NAME.fullmatch(name):
            raise InvalidSettings(f"{name!r} is not a kind's name; write two or more words with dots: report.build.")
        if name in _registry and (other := _place(_registry[name].handler)) != _place(handler):
            raise InvalidSettings(f"The kind {name} is defined twice: by {other} and by {_place(handler)}.")
        form = _form(handler)
        where = _runs(name, form, runs)
        try:
            plain = typing.get_type_hints(handler)
            # What Annotated says of the input and the result is part of their schemas.
            hints = typing.get_type_hints(handler, include_extras=True)
            parameters = list(inspect.signature(handler).parameters)
            if len(parameters) < 2 or parameters[1] not in hints or "return" not in hints:
                raise InvalidSettings(f"The handler of {name} must look like `{LOOKS[form]}`.")
            if plain.get(parameters[0]) is (JobContext if form in PLAIN else SyncJobContext):
                raise InvalidSettings(
                    f"The handler of {name} has the context of another form; it must look like `{LOOKS[form]}`."
                )
            made = Kind(
                name=name,
                handler=handler,
                form=form,
                needs={given: _dependency(name, given, plain.get(given)) for given in parameters[2:]},
                input=TypeAdapter(hints[parameters[1]]),
                result=TypeAdapter(_result(name, form, hints["return"])),
                timeout=limit,
                max_attempts=max_attempts,
                backoff_base=seconds(backoff),
                backoff_cap=seconds(backoff_cap),
                runs=where,
                description=(inspect.getdoc(handler) or "").split("\n\n")[0].replace("\n", " "),
            )
            made.as_json()
        except (PydanticUserError, NameError) as error:
            raise InvalidSettings(f"The annotations of {name} have no JSON Schema: {error}.") from error
        _registry[name] = made
        return handler

    return register


def _form(handler: Handler) -> Form:
    if inspect.iscoroutinefunction(handler):
        return "coroutine"
    if inspect.isasyncgenfunction(handler):
        return "async generator"
    return "generator" if inspect.isgeneratorfunction(handler) else "function"


def _runs(name: str, form: Form, runs: Runs | None) -> Runs:
    """Where a handler runs of which its author has said `runs`."""
    if form in PLAIN:
        if runs not in ("thread", "process"):
            raise InvalidSettings(
                f'The handler of {name} is a plain function, which would hold up the other jobs: write runs="thread" '
                'if it waits, for files or a server, runs="process" if it computes or might crash or hang, or make it '
                "an `async def`."
            )
    elif runs == "thread":
        raise InvalidSettings(
            f'The handler of {name} is async and needs no thread: leave runs out, write runs="process" if it blocks, '
            "or make it a plain `def`."
        )
    return runs or "worker"


def _dependency(name: str, parameter: str, wanted: Any) -> Dependency:
    try:
        return startup.find(wanted)
    except LookupError as error:
        shown = getattr(wanted, "__name__", wanted)
        raise InvalidSettings(f"The handler of {name} takes {parameter}: {shown}, but {error.args[0]}.") from None


def _result(name: str, form: Form, hint: Any) -> Any:
    """The type of the result: of a generator, what it yields that is not Progress."""
    if form in ("coroutine", "function"):
        return hint
    yields, *more = typing.get_args(hint) or (None,)
    if typing.get_origin(hint) not in ITERATORS or any(returns not in (None, NoneType) for returns in more):
        raise InvalidSettings(f"The handler of {name} must look like `{LOOKS[form]}`: its result is yielded last.")
    found = typing.get_args(yields) if typing.get_origin(yields) in (Union, UnionType) else (yields,)
    results = tuple(part for part in found if part is not Progress)
    return Union[results] if results else None  # noqa: UP007


def _place(handler: Handler) -> str:
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
        except InvalidSettings:
            raise
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            raise InvalidSettings(
                f"The kinds module {module!r} cannot be imported: {type(error).__name__}: {error} "
                f"({last.filename}, line {last.lineno})."
            ) from error
    return dict(_registry)


def find(name: str, module: str, modules: Iterable[str]) -> Kind:
    """One kind, by importing nothing but `module`; if it is not there, as `discover` does with `modules`.

    Raises KeyError if no module defines it.
    """
    importlib.import_module(module)
    return _registry[name] if name in _registry else discover(modules)[name]

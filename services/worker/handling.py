"""A handler's call, the same in the worker and in a child process: input checked, result as JSON, errors as kept."""

import json
import traceback
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import ValidationError

from headway.context import JobContext
from headway.errors import JOB_ERRORS, Fatal, HandlerFailed, InputRefused, JobError
from headway.kinds import Kind
from headway.startup import Dependency
from services.worker.performing import perform

# How much of a traceback's end is kept.
TRACEBACK = 20_000

T = TypeVar("T")


class Failed(HandlerFailed):
    """An exception of a handler; `trace` is what the handler's author wants to know of it."""

    def __init__(self, message: str, trace: Mapping[str, str]) -> None:
        super().__init__(message)
        self.trace = trace


async def handle(kind: Kind, job: JobContext, input: Any, max_result: int, opened: Mapping[Dependency, Any]) -> Any:
    """The handler's result as JSON values. `opened` has what the kind needs.

    Raises InputRefused, what the handler raises, HandlerFailed for a result that is not what the kind declares, and
    Fatal for one of more than `max_result` bytes.
    """
    try:
        value = kind.input.validate_python(input)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in ("input", *first["loc"]))
        raise InputRefused(f"{where}: {first['msg'].removeprefix('Value error, ')}.") from None
    try:
        returned = await perform(kind, job, value, opened)
    except (SystemExit, KeyboardInterrupt) as error:
        # Either would end the process, and with it every other job that runs here.
        raise HandlerFailed(message(error)) from error
    try:
        if returned is None:
            # The serializer below lets None pass for anything.
            kind.result.validate_python(None)
        result = kind.result.dump_python(returned, mode="json", warnings="error")
        size = len(json.dumps(result, allow_nan=False))
    except Exception as error:
        raise HandlerFailed(f"The result is not what the kind declares, or not JSON: {message(error)}") from error
    if size > max_result:
        raise Fatal(
            f"The result has {size:,} bytes, over the limit of {max_result:,}; write large results to an artifact."
        )
    return result


def find_source(sources: Mapping[str, T], name: str) -> T:
    """Raises Fatal, naming those that exist, if there is none."""
    if name not in sources:
        there = ", ".join(sorted(sources)) or "none; the operator names them in HEADWAY_SOURCES"
        raise Fatal(f"There is no source {name!r}; there are: {there}.")
    return sources[name]


def as_job_error(error: BaseException) -> JobError:
    """What is kept of anything that a handler raises."""
    if isinstance(error, JOB_ERRORS):
        return error
    lines = "".join(traceback.format_exception(error))[-TRACEBACK:]
    trace = {
        "class": f"{type(error).__module__}.{type(error).__qualname__}",
        "traceback": lines.replace("\0", "").encode(errors="replace").decode(),
    }
    return Failed(message(error), trace)


def message(error: BaseException) -> str:
    """Class and message of an exception."""
    return f"{type(error).__name__}: {text(error)}"


def text(error: BaseException) -> str:
    """The message of an exception, also of one that fails to give it."""
    try:
        return str(error)
    except Exception as failure:
        return f"(its message cannot be shown: {type(failure).__name__})"

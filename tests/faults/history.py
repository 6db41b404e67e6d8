"""Histories: what clients asked and were told, what handlers ran, and how the database looked at the end.

Each process appends JSON lines to a file of its own, one `write` a line, so that SIGKILL takes nothing that was
written. `at` is CLOCK_MONOTONIC in nanoseconds, which the processes of one machine share, so files merge by it.

Lines by `type`:
invoke, ok, fail, unknown   a client's operation: about to be sent; answered; surely without effect; nobody knows
start, saved, end           a handler's run of a job, and the checkpoints whose save it saw succeed
frame                       what a WebSocket received
fault, exit                 what was done to the system, and how a process ended that nobody had killed
job, event, artifact        the final read: rows of the database, and the digest of each artifact's stored bytes
"""

import itertools
import json
import os
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from headway.states import JobState

Line = dict[str, Any]
Outcome = Literal["ok", "fail", "unknown"]


class Recorder:
    """Appends the lines of one process to `<folder>/<name>.jsonl`."""

    def __init__(self, folder: Path, name: str) -> None:
        self._name = name
        self._numbers = itertools.count(1)
        self._file = os.open(folder / f"{name}.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def write(self, type: str, **fields: Any) -> None:
        line = json.dumps({"at": time.monotonic_ns(), "type": type, **fields}, separators=(",", ":"), default=str)
        os.write(self._file, line.encode() + b"\n")

    def invoke(self, name: str, client: int, **asked: Any) -> "Invocation":
        """Write that an operation is about to be sent."""
        invocation = Invocation(self, f"{self._name}-{next(self._numbers)}")
        self.write("invoke", id=invocation.id, name=name, client=client, asked=asked)
        return invocation

    @contextmanager
    def run(self, **fields: Any) -> Iterator[Line]:
        """Write a handler's start and end; what is put into the line that is yielded goes into the end."""
        ending: Line = {"outcome": "returned"}
        self.write("start", **fields)
        try:
            yield ending
        except BaseException as error:
            ending |= {"outcome": "raised", "error": repr(error)[:200]}
            raise
        finally:
            self.write("end", run=fields["run"], **ending)

    def close(self) -> None:
        os.close(self._file)


@dataclass(frozen=True, slots=True)
class Invocation:
    """An operation under way."""

    recorder: Recorder
    id: str

    def end(self, outcome: Outcome, **answer: Any) -> None:
        self.recorder.write(outcome, id=self.id, answer=answer)


def merge(folder: Path) -> list[Line]:
    """The lines of all files in the order in which they were written. Half a line at the end is left out."""
    lines = []
    for path in sorted(folder.glob("*.jsonl")):
        complete = path.read_bytes().split(b"\n")[:-1]
        lines += [json.loads(line) for line in complete]
    return sorted(lines, key=lambda line: line["at"])


@dataclass(frozen=True, slots=True)
class Operation:
    """What a client asked and was told; times in ns. An operation without an answer is unknown and has no end."""

    id: str
    name: str
    client: int
    asked: Line
    began: int
    ended: int | None
    outcome: Outcome
    answer: Line


@dataclass(frozen=True, slots=True)
class Run:
    """A handler's run. `outcome` is returned, raised, or None where the process died under it."""

    id: str
    job: str
    token: int
    began: int
    outcome: str | None
    started: Line
    saved: Sequence[int]
    ended: Line


@dataclass(frozen=True, slots=True)
class History:
    """Lines, sorted into what the checks look at."""

    operations: Sequence[Operation]
    runs: Sequence[Run]
    frames: dict[str, list[Line]]
    exits: Sequence[Line]
    jobs: Sequence[Line]
    events: dict[str, list[Line]]
    artifacts: dict[str, list[Line]]
    faults: Sequence[Line] = field(default=())

    @classmethod
    def of(cls, lines: Iterable[Line]) -> "History":
        by_type: defaultdict[str, list[Line]] = defaultdict(list)
        for line in lines:
            by_type[line["type"]].append(line)
        endings = {line["id"]: line for outcome in ("ok", "fail", "unknown") for line in by_type[outcome]}
        run_ends = {line["run"]: line for line in by_type["end"]}
        saved = _by(by_type["saved"], "run")
        return cls(
            operations=[_operation(line, endings.get(line["id"])) for line in by_type["invoke"]],
            runs=[_run(line, saved.get(line["run"], ()), run_ends.get(line["run"])) for line in by_type["start"]],
            frames=_by(by_type["frame"], "socket"),
            exits=by_type["exit"],
            jobs=by_type["job"],
            events=_by(by_type["event"], "job"),
            artifacts=_by(by_type["artifact"], "job"),
            faults=by_type["fault"],
        )

    def named(self, name: str) -> list[Operation]:
        """The operations of one name."""
        return [operation for operation in self.operations if operation.name == name]


def states(history: History, job: Line) -> list[Line]:
    """The events by which a job changed its state."""
    return [event for event in history.events.get(job["id"], ()) if event["kind"] == "state"]


def asks(event: Line) -> bool:
    """Whether the event is the request to cancel a running job: the state stays."""
    return event["data"]["state"] == JobState.RUNNING and "cancel_requested_at" in event["data"]


def claims(event: Line) -> bool:
    """Whether the event is a claim."""
    return event["data"]["state"] == JobState.RUNNING and not asks(event)


def _operation(begun: Line, ended: Line | None) -> Operation:
    return Operation(
        id=begun["id"],
        name=begun["name"],
        client=begun["client"],
        asked=begun["asked"],
        began=begun["at"],
        ended=ended["at"] if ended else None,
        outcome=ended["type"] if ended else "unknown",
        answer=ended["answer"] if ended else {},
    )


def _run(begun: Line, saved: Sequence[Line], ended: Line | None) -> Run:
    return Run(
        id=begun["run"],
        job=begun["job"],
        token=begun["token"],
        began=begun["at"],
        outcome=ended["outcome"] if ended else None,
        started=begun,
        saved=[line["step"] for line in saved],
        ended=ended or {},
    )


def _by(lines: Iterable[Line], name: str) -> dict[str, list[Line]]:
    found: defaultdict[str, list[Line]] = defaultdict(list)
    for line in lines:
        found[line[name]].append(line)
    return dict(found)

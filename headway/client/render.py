"""How a job is shown while it runs: a bar in a terminal, plain lines elsewhere. Both write to standard error."""

import logging
import os
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TextIO

from headway.client.text import facts, inert, took
from headway.states import TERMINAL

if TYPE_CHECKING:
    pass

Json = Mapping[str, Any]

EVERY = 1.0
LONGEST_MESSAGE = 60


class View(ABC):
    """Shows uploads and envelopes. Use it as `with`; nothing that it is given can act on the terminal."""

    def __init__(self) -> None:
        self._state = ""
        self._handler = _Notes(self)

    def __enter__(self) -> "View":
        logging.getLogger("headway.client").addHandler(self._handler)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger("headway.client").removeHandler(self._handler)

    @abstractmethod
    def note(self, text: str) -> None:
        """A line that stays."""

    @abstractmethod
    def progress(self, label: str, progress: Json) -> None:
        """The newest progress, in place of the one before."""

    def clear(self) -> None:
        """Forget the progress that is shown: what follows is something else."""
        return

    @abstractmethod
    def state(self, text: str, progress: Json | None, *, ended: bool) -> None:
        """The job is now in this state, and got as far as `progress`."""

    def meter(self, label: str) -> "Meter":
        """For the `on_progress` of a transfer."""
        return Meter(self, label)

    def envelope(self, envelope: Json) -> None:
        """Show what happened to the job."""
        data = envelope["d"]
        if envelope["t"] == "progress":
            self.progress(_label(data, self._state), data)
        elif envelope["t"] == "log":
            level = "" if data["level"] == "info" else f"{data['level']}: "
            self.note(inert(level + data["message"]))
        elif envelope["t"] in ("snapshot", "state"):
            progress, text = data.get("progress"), _state(data)
            if text != self._state:
                self._state = text
                self.state(text, progress, ended=data["state"] in TERMINAL)
            elif progress:
                self.progress(_label(progress, text), progress)


class Lines(View):
    """A line for each change of state and each log line; progress at most once a second."""

    def __init__(self, out: TextIO) -> None:
        super().__init__()
        self._out = out
        self._next = time.monotonic() + EVERY

    def note(self, text: str) -> None:
        print(text, file=self._out, flush=True)

    def progress(self, label: str, progress: Json) -> None:
        if (now := time.monotonic()) >= self._next:
            self._next = now + EVERY
            self.note(f"{label}: {', '.join(facts(progress)).strip()}")

    def state(self, text: str, progress: Json | None, *, ended: bool) -> None:
        reached = f": {', '.join(facts(progress, ended=True)).strip()}" if ended and progress else ""
        self.note(text + reached)


class Bar(View):
    """One bar that moves; notes scroll past above it."""

    def __init__(self, out: TextIO) -> None:
        from rich.console import Console  # noqa: PLC0415 - rich is slow to import
        from rich.progress import BarColumn, Progress, TextColumn  # noqa: PLC0415
        from rich.table import Column  # noqa: PLC0415

        super().__init__()
        self._console = Console(file=out)
        self._bar: Progress = Progress(
            TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
            BarColumn(bar_width=30 if self._console.width >= 100 else 15),
            TextColumn("{task.fields[facts]}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis")),
            console=self._console,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._task = self._bar.add_task("connecting", total=None, facts="")

    def __enter__(self) -> "View":
        self._bar.start()
        return super().__enter__()

    def __exit__(self, *exception: object) -> None:
        super().__exit__(*exception)
        self._bar.stop()

    def note(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, emoji=False, soft_wrap=True)

    def progress(self, label: str, progress: Json) -> None:
        self._show(label, progress, ended=False)

    def clear(self) -> None:
        self._bar.update(self._task, description="", completed=0, total=None, facts="")

    def state(self, text: str, progress: Json | None, *, ended: bool) -> None:
        if progress:
            self._show(text, progress, ended=ended)
        self._bar.update(self._task, description=text)
        if ended and not progress:
            # An empty bar, not one that still moves.
            self._bar.update(self._task, total=1)

    def _show(self, label: str, progress: Json, *, ended: bool) -> None:
        self._bar.update(
            self._task,
            description=label,
            completed=progress["done"],
            total=progress.get("total"),
            facts="  ".join(facts(progress, ended=ended)),
        )


class Meter:
    """Turns `on_progress(done, total)` into progress with rate and time left."""

    def __init__(self, view: View, label: str) -> None:
        self._view = view
        self._label = inert(label)
        self._started = time.monotonic()

    def __call__(self, done: int, total: int | None) -> None:
        rate = done / max(time.monotonic() - self._started, 1e-3)
        eta = (total - done) / rate if total else None
        self._view.progress(self._label, {"done": done, "total": total, "unit": "bytes", "rate": rate, "eta": eta})


class _Notes(logging.Handler):
    """What the client warns about, shown where the job is."""

    def __init__(self, view: View) -> None:
        super().__init__(logging.WARNING)
        self._view = view

    def emit(self, record: logging.LogRecord) -> None:
        self._view.note(inert(record.getMessage()))


def view() -> View:
    """A bar if standard error is a terminal that can move its cursor, else lines."""
    moving = sys.stderr.isatty() and os.environ.get("TERM", "dumb") != "dumb"
    return Bar(sys.stderr) if moving else Lines(sys.stderr)


def _label(progress: Json, state: str) -> str:
    message = inert(progress.get("message") or state or "running")
    return message if len(message) <= LONGEST_MESSAGE else message[: LONGEST_MESSAGE - 1] + "…"


def _state(data: Json) -> str:
    """A snapshot or a state event in a few words."""
    state = inert(data["state"])
    if data["state"] in TERMINAL:
        after = took(data) if "started_at" in data else None
        return f"{state} after {after}" if after else state
    if data.get("cancel_requested_at"):
        return f"{state}, to be cancelled"
    if reason := data.get("reason"):
        return f"{state} again ({inert(reason)})"
    return f"{state}, attempt {data['attempt']}" if data.get("attempt", 0) > 1 else state

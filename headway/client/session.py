"""What the commands share: running against a server, exit codes, and arguments that are read from files."""

import errno
import json
import re
import sys
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from headway.client import pages
from headway.client.errors import ApiError, CannotBeSent, ClientError
from headway.client.render import View
from headway.client.text import as_json as json_line
from headway.client.text import inert, readable
from headway.states import JobState

if TYPE_CHECKING:
    from headway.client.http import Client

FAILED, WRONG_USAGE, CANCELLED, REFUSED, INTERRUPTED = 1, 2, 3, 4, 130
OUTCOMES = {JobState.SUCCEEDED: 0, JobState.FAILED: FAILED, JobState.CANCELLED: CANCELLED}
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, each object on a line of its own.")
NAMED_FILE = re.compile(r"([A-Za-z_]\w*)=(.+)", re.DOTALL)


@dataclass
class Session:
    """What one invocation works with. `left` is what Ctrl-C leaves behind."""

    url: str | None
    api_key: str | None
    left: str = ""

    def run(self, work: Callable[["Client"], Awaitable[int]]) -> NoReturn:
        """Do the work and exit with its code, or with that of its failure."""

        import asyncio  # noqa: PLC0415 - `--help` needs none of it

        async def main() -> int:
            from headway.client.http import Client  # noqa: PLC0415 - slow to import, as httpx is

            async with Client.from_environment(url=self.url, api_key=self.api_key) as client:
                return await work(client)

        try:
            code = asyncio.run(main())
        except KeyboardInterrupt:
            click.echo(f"\n{self.left}".rstrip(), err=True)
            code = INTERRUPTED
        except ClientError as error:
            complain(error)
            code = WRONG_USAGE if isinstance(error, CannotBeSent) else REFUSED
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise
            click.echo(f"Error: {inert(error)}", err=True)
            code = FAILED
        sys.exit(code)

    async def watch(self, client: "Client", job_id: str, shown: View) -> None:
        """Show a job until it ends."""
        self.goes_on(job_id)
        shown.clear()
        async with aclosing(client.follow(job_id)) as envelopes:
            async for envelope in envelopes:
                shown.envelope(envelope)

    async def outcome(self, client: "Client", job_id: str, *, as_json: bool) -> int:
        """Print how a job ended; its exit code."""
        job = await client.get(job_id)
        state = JobState(job["state"])
        if as_json:
            click.echo(json_line(job))
        else:
            made = await client.artifacts(job_id)
            for line in [*readable(job["result"]), *(pages.artifact(job, artifact) for artifact in made)]:
                click.echo(line)
        if state is JobState.FAILED:
            click.echo(f"Error: {pages.error(job)}", err=True)
        return OUTCOMES[state]

    def goes_on(self, job_id: object) -> None:
        """From now on Ctrl-C leaves this job running."""
        self.left = f"The job goes on. See it again: headway follow {job_id}. Stop it: headway cancel {job_id}."


def complain(error: ClientError) -> None:
    """The message, and a line for each field that is wrong."""
    click.echo(f"Error: {inert(error)}", err=True)
    if isinstance(error, ApiError) and len(error.errors) > 1:
        for item in error.errors:
            click.echo(f"  {inert(item.get('field', ''))}: {inert(item.get('message', ''))}", err=True)


class Input(click.ParamType[Any]):
    """JSON, `@file` or `-`."""

    name = "json"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            if value == "-":
                value = sys.stdin.read()
            elif value.startswith("@"):
                value = Path(value[1:]).read_text()
            return json.loads(value, parse_constant=_no_constant)
        except OSError as error:
            self.fail(f"{value[1:]} cannot be read: {error.strerror}.", param, ctx)
        except (ValueError, RecursionError) as error:
            self.fail(f"this is not JSON: {error}.", param, ctx)


class Moment(click.ParamType[datetime]):
    """A time with its zone, as RFC 3339 has it."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> datetime:
        try:
            moment = datetime.fromisoformat(value)
        except ValueError:
            moment = None
        if moment is None or moment.tzinfo is None:
            self.fail(f"{value!r} is no time with its zone, such as 2027-01-31T18:00:00Z.", param, ctx)
        return moment


class Upload(click.ParamType[tuple[str, Path]]):
    """`PATH` or `@PATH` for the input's field `file`, `name=PATH` for another."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, Path]:
        named = NAMED_FILE.fullmatch(value)
        field, path = (named[1], named[2]) if named else ("file", value)
        path = Path(path.removeprefix("@"))
        if not path.exists() or path.is_dir():
            self.fail(f"there is no file {path}.", param, ctx)
        return field, path


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number of JSON")

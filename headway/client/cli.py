"""The command `headway`. Results go to standard output, everything else to standard error.

Exit codes: 0 success, 1 the job failed or the command could not do what it says, 2 wrong usage, 3 the job was
cancelled, 4 the server cannot be reached or refuses, 130 Ctrl-C.
"""

import io
import os
import sys
from contextlib import aclosing
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

import click

from headway.client import actions, kinds, pages, text
from headway.client.render import Lines, view
from headway.client.session import OUTCOMES, Input, Moment, Session, Upload, json_option
from headway.states import JobState

if TYPE_CHECKING:
    from headway.client.http import Client

COLOURS = {JobState.SUCCEEDED: "green", JobState.FAILED: "red", JobState.CANCELLED: "yellow", JobState.RUNNING: "cyan"}

job_argument = click.argument("job_id", metavar="ID", type=click.UUID)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--url", metavar="URL", help="The server; default $HEADWAY_URL, then the credentials file.")
@click.option(
    "--api-key", metavar="KEY", help="Better set HEADWAY_API_KEY: command lines can be seen by others on this machine."
)
@click.version_option(package_name="headway", prog_name="headway")
@click.pass_context
def cli(context: click.Context, url: str | None, api_key: str | None) -> None:
    """Submit long jobs, follow them live, and fetch what they made.

    The server and the key come from HEADWAY_URL and HEADWAY_API_KEY, or from $HEADWAY_HOME/credentials.json (default
    .headway), which `make run` writes.
    """
    if os.environ.get("NO_COLOR"):
        context.color = False
    context.obj = Session(url, api_key)


@cli.command()
@click.argument("kind")
@click.option(
    "--input",
    "value",
    type=Input(),
    default="{}",
    metavar="JSON|@FILE|-",
    help="The input, {} if left out; - reads standard input.",
)
@click.option(
    "--file",
    "files",
    type=Upload(),
    multiple=True,
    metavar="[NAME=]PATH",
    help="Upload a file and put its id into the input's field NAME (default: file).",
)
@click.option("--tag", "tags", multiple=True, help="A word to find the job by; may be repeated.")
@click.option("--priority", type=click.Choice(["high", "normal", "low"]), default="normal", show_default=True)
@click.option("--delay", type=click.FloatRange(min=0), metavar="SECONDS", help="Run it this much later.")
@click.option("--run-at", type=Moment(), metavar="TIME", help="Run it then: 2027-01-31T18:00:00Z.")
@click.option("--timeout", type=click.FloatRange(min=0, min_open=True), help="Seconds an attempt may run.")
@click.option("--max-attempts", type=click.IntRange(1, 100), help="Attempts it may take, if they fail.")
@click.option("--concurrency-key", metavar="KEY", help="Jobs with the same key share places to run in.")
@click.option("--concurrency-limit", type=click.IntRange(1, 100), help="How many places the key has.  [default: 1]")
@click.option("--idempotency-key", metavar="KEY", help="Submitting again with the same key makes no second job.")
@click.option("--follow", "follow_it", is_flag=True, help="Show progress until the job ends, then its result.")
@json_option
@click.pass_obj
def submit(
    session: Session,
    *,
    kind: str,
    value: Any,
    files: tuple[tuple[str, Path], ...],
    tags: tuple[str, ...],
    priority: str,
    delay: float | None,
    run_at: datetime | None,
    timeout: float | None,
    max_attempts: int | None,
    concurrency_key: str | None,
    concurrency_limit: int | None,
    idempotency_key: str | None,
    follow_it: bool,
    as_json: bool,
) -> None:
    """Submit a job of KIND and print its id.

    With --follow the job is shown until it ends; the exit code is 0 only if it succeeded.
    """
    if files and not isinstance(value, dict):
        raise click.UsageError("--file needs an --input that is a JSON object.")
    for field, _ in files:
        if field in value or [name for name, _ in files].count(field) > 1:
            raise click.UsageError(f"The field {field!r} of the input is given twice.")

    async def work(client: "Client") -> int:
        session.left = "Stopped; nothing was submitted."
        with view() if files or follow_it else Lines(sys.stderr) as shown:
            if files:
                await client.kind(kind)  # a wrong name is told before a long upload
            for field, path in files:
                file = await client.upload(path, on_progress=shown.meter(f"uploading {path.name}"))
                value[field] = file["id"]
                shown.note(f"Uploaded {text.inert(path.name)}, {text.size(file['size'])}.")
            session.left = "Stopped while submitting; `headway list` shows whether the job is there."
            job = await client.submit(
                kind,
                value,
                tags=tags,
                priority=priority,
                delay=delay,
                run_at=run_at,
                timeout=timeout,
                max_attempts=max_attempts,
                concurrency_key=concurrency_key,
                concurrency_limit=concurrency_limit,
                idempotency_key=idempotency_key,
            )
            if follow_it:
                shown.note(f"Job {text.inert(job['id'])}")
                await session.watch(client, job["id"], shown)
        if follow_it:
            return await session.outcome(client, job["id"], as_json=as_json)
        click.echo(text.as_json(job) if as_json else text.inert(job["id"]))
        if sys.stderr.isatty() and not as_json:
            click.echo(f"See it run: headway follow {text.inert(job['id'])}", err=True)
        return 0

    session.run(work)


@cli.command()
@click.argument("path", metavar="FILE", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@json_option
@click.pass_obj
def upload(session: Session, path: Path, as_json: bool) -> None:
    """Upload FILE and print its id, for the inputs of jobs. A broken connection is no matter if the file is large."""

    async def work(client: "Client") -> int:
        session.left = "Stopped; nothing was uploaded."
        with view() as shown:
            file = await client.upload(path, on_progress=shown.meter(f"uploading {path.name}"))
        click.echo(text.as_json(file) if as_json else text.inert(file["id"]))
        return 0

    session.run(work)


@cli.command()
@job_argument
@json_option
@click.pass_obj
def follow(session: Session, job_id: UUID, as_json: bool) -> None:
    """Show a job until it ends, then its result. With --json: every envelope as it arrives."""

    async def work(client: "Client") -> int:
        if not as_json:
            with view() as shown:
                await session.watch(client, str(job_id), shown)
            return await session.outcome(client, str(job_id), as_json=False)
        session.goes_on(job_id)
        state = ""
        async with aclosing(client.follow(job_id)) as envelopes:
            async for envelope in envelopes:
                click.echo(text.as_json(envelope))
                state = envelope["d"].get("state", state)
        return OUTCOMES[JobState(state)]

    session.run(work)


@cli.command("list")
@click.option("--state", type=click.Choice([state.value for state in JobState]), help="Only jobs in this state.")
@click.option("--kind", help="Only jobs of this kind.")
@click.option("--tag", help="Only jobs with this tag.")
@click.option("--limit", type=click.IntRange(min=1), default=20, show_default=True, help="At most so many.")
@json_option
@click.pass_obj
def list_jobs(
    session: Session, *, state: str | None, kind: str | None, tag: str | None, limit: int, as_json: bool
) -> None:
    """List jobs, newest first."""

    async def work(client: "Client") -> int:
        jobs = client.list(state=state, kind=kind, tag=tag, limit=limit)
        if as_json:
            async for job in jobs:
                click.echo(text.as_json(job))
            return 0
        found = [job async for job in jobs]
        lines = pages.jobs(found)
        click.echo(lines[0])
        for line, job in zip(lines[1:], found, strict=True):
            shown = text.inert(job["state"])
            click.echo(line.removesuffix(shown) + click.style(shown, fg=COLOURS.get(job["state"])))
        return 0

    session.run(work)


@cli.command()
@job_argument
@json_option
@click.pass_obj
def get(session: Session, job_id: UUID, as_json: bool) -> None:
    """Show a job as it is now."""

    async def work(client: "Client") -> int:
        job = await client.get(job_id)
        for line in [text.as_json(job)] if as_json else pages.job(job):
            click.echo(line)
        return 0

    session.run(work)


cli.add_command(actions.cancel)
cli.add_command(actions.retry)
cli.add_command(kinds.kinds)


@cli.command()
@job_argument
@json_option
@click.pass_obj
def artifacts(session: Session, job_id: UUID, as_json: bool) -> None:
    """List the files that a job made."""

    async def work(client: "Client") -> int:
        found = await client.artifacts(job_id)
        for line in [text.as_json(artifact) for artifact in found] if as_json else pages.artifacts(found):
            click.echo(line)
        return 0

    session.run(work)


@cli.command()
@job_argument
@click.argument("name")
@click.option("-o", "--output", metavar="PATH|-", help="Where to write it; - is standard output. Default: ./NAME.")
@click.pass_obj
def download(session: Session, job_id: UUID, name: str, output: str | None) -> None:
    """Download the artifact NAME of a job. The file appears once it is whole."""
    if output == "-" and sys.stdout.isatty():
        raise click.UsageError("-o - is for pipes and files; a terminal might obey what the artifact holds.")
    if output is None and Path(Path(name).name).exists():
        raise click.UsageError(f"{Path(name).name} exists already; -o {Path(name).name} replaces it.")

    async def work(client: "Client") -> int:
        session.left = "Stopped; nothing was written."
        if output == "-":
            session.left = "Stopped half-way."
            async with aclosing(client.read(job_id, name)) as chunks:
                async for chunk in chunks:
                    sys.stdout.buffer.write(chunk)
            return 0
        with view() as shown:
            meter = shown.meter(f"downloading {Path(name).name}")
            path = await client.download(job_id, name, output or Path(), on_progress=meter)
        click.echo(text.inert(path))
        return 0

    session.run(work)


def main() -> None:
    """The entry point."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    cli(prog_name="headway")


if __name__ == "__main__":
    main()

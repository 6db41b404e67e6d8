"""Commands that act on jobs that are there: cancel and retry, one by one or all that match."""

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import UUID

import click

from headway.client import text
from headway.client.errors import ApiError
from headway.client.session import FAILED, REFUSED, Session, complain
from headway.states import TERMINAL, JobState

if TYPE_CHECKING:
    from headway.client.http import Client

F = TypeVar("F", bound=Callable[..., Any])


def _chosen(states: list[str]) -> Callable[[F], F]:
    """Arguments that choose jobs: ids, or a state and what narrows it."""

    def decorate(command: F) -> F:
        for option in (
            click.option("--tag", help="Only jobs with this tag."),
            click.option("--kind", help="Only jobs of this kind."),
            click.option("--state", type=click.Choice(states), help="All jobs in this state, in place of ids."),
            click.argument("job_ids", metavar="[ID]...", type=click.UUID, nargs=-1),
        ):
            command = option(command)
        return command

    return decorate


@click.command()
@_chosen([state.value for state in JobState if state not in TERMINAL])
@click.pass_obj
def cancel(session: Session, job_ids: tuple[UUID, ...], state: str | None, kind: str | None, tag: str | None) -> None:
    """Cancel jobs. One that has already succeeded or failed stays as it is, and the exit code is 1."""

    async def one(client: "Client", job_id: UUID) -> int:
        job = await client.cancel(job_id)
        if job["state"] in (JobState.SUCCEEDED, JobState.FAILED):
            click.echo(f"{job_id} had already {text.inert(job['state'])}.", err=True)
            return FAILED
        click.echo(f"{job_id} {'is cancelled' if job['state'] == JobState.CANCELLED else 'will be cancelled'}.")
        return 0

    _act(session, "cancel", job_ids, one, state=state, kind=kind, tag=tag)


@click.command()
@_chosen([state.value for state in JobState if state in TERMINAL])
@click.pass_obj
def retry(session: Session, job_ids: tuple[UUID, ...], state: str | None, kind: str | None, tag: str | None) -> None:
    """Run ended jobs again and print the ids of the new jobs. A job is retried once; after that, retry the new job."""

    async def one(client: "Client", job_id: UUID) -> int:
        click.echo(text.inert((await client.retry(job_id))["id"]))
        return 0

    _act(session, "retry", job_ids, one, state=state, kind=kind, tag=tag)


def _act(
    session: Session,
    action: str,
    job_ids: tuple[UUID, ...],
    one: Callable[["Client", UUID], Awaitable[int]],
    *,
    state: str | None,
    kind: str | None,
    tag: str | None,
) -> None:
    """Act on each job that is named, or on all that match. The worst exit code stays."""
    if bool(job_ids) == bool(state):
        raise click.UsageError("Name jobs by their ids, or all in a state with --state.")
    if job_ids and (kind or tag):
        raise click.UsageError("--kind and --tag narrow --state; they do not go with ids.")

    async def work(client: "Client") -> int:
        if state:
            changed = await client.bulk(action, state=state, kind=kind, tag=tag)
            done = {"cancel": "cancelled, or will be", "retry": "retried"}[action]
            click.echo(f"{changed:,} job{'' if changed == 1 else 's'} {done}.")
            return 0
        code = 0
        for job_id in job_ids:
            try:
                code = await one(client, job_id) or code
            except ApiError as error:
                complain(error)
                code = REFUSED
        return code

    session.run(work)

"""`headway kinds`: which kinds there are, what one takes and gives, and a new one to begin with."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

import click

from headway.client import pages, text
from headway.client.scaffold import MODULE, TEST
from headway.client.session import Session, json_option

if TYPE_CHECKING:
    from headway.client.http import Client

# As @kind takes it, which takes too long to import for a command.
NAME = re.compile(r"[a-z][a-z0-9_]*(\.[a-z][a-z0-9_]*)+")
LONGEST_NAME = 100


class Kinds(click.Group):
    """A group that takes what is no command for the name of a kind; those have dots."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] in self.commands:
            return super().resolve_command(ctx, args)
        return "show", show, args


@click.group(cls=Kinds, invoke_without_command=True, subcommand_metavar="[NAME | new NAME]")
@json_option
@click.pass_context
def kinds(context: click.Context, as_json: bool) -> None:
    """List the kinds of job there are, or show what the kind NAME takes and gives."""
    if context.invoked_subcommand is None:
        _show(context.obj, None, as_json=as_json)


@click.command(hidden=True)
@click.argument("name")
@json_option
@click.pass_context
def show(context: click.Context, name: str, as_json: bool) -> None:
    """Show what the kind NAME takes and gives."""
    assert context.parent is not None
    _show(context.obj, name, as_json=as_json or context.parent.params["as_json"])


@kinds.command()
@click.argument("name")
def new(name: str) -> None:
    """Write a module with a kind of this NAME, such as report.build, and its test, into this folder."""
    if not NAME.fullmatch(name) or len(name) > LONGEST_NAME:
        raise click.BadParameter(
            f"{name!r} is not a kind's name; write two or more words with dots, such as report.build: small letters, "
            f"digits and _, at most {LONGEST_NAME}.",
            param_hint="NAME",
        )
    module = name.replace(".", "_")
    words = {"name": name, "module": module, "model": "".join(map(str.capitalize, re.split(r"[._]", name)))}
    files = {Path(f"{module}.py"): MODULE, Path(f"test_{module}.py"): TEST}
    if there := [str(path) for path in files if path.exists()]:
        raise click.ClickException(f"{' and '.join(there)} would be overwritten; move that away, or choose a name.")
    try:
        for path, template in files.items():
            with path.open("x", encoding="utf-8") as file:
                file.write(template.substitute(words))
    except OSError as error:
        raise click.ClickException(f"{path} cannot be written: {error.strerror}.") from None
    click.echo(
        f"Wrote {module}.py and test_{module}.py. They work as they are:\n"
        f"  python -m pytest test_{module}.py\n"
        f"Let a worker run it: HEADWAY_KINDS={module} PYTHONPATH={Path.cwd()} make run"
    )


def _show(session: Session, name: str | None, *, as_json: bool) -> None:
    async def work(client: "Client") -> int:
        found = [await client.kind(name)] if name else await client.kinds()
        if as_json:
            lines = [text.as_json(kind) for kind in found]
        elif name:
            lines = pages.kind(found[0])
        else:
            lines = pages.kinds(found)
        for line in lines:
            click.echo(line)
        return 0

    session.run(work)

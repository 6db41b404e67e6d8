"""`python -m services.run`: servers, migrations, the worker, the web service, and on the first start a job.

All of these are children in sessions of their own, so Ctrl-C reaches the supervisor only. It then stops the web
service, the worker and the servers, in this order.
"""

import logging
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

import click

from headway.embedded import Embedded
from headway.errors import HeadwayError, StartFailed
from services.run.child import Child, ending, spawn
from services.run.setup import Setup

log = logging.getLogger(__name__)

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "orders.csv"
READY_WITHIN = 60.0


class Stopped(Exception):
    """Ctrl-C, SIGTERM or SIGHUP came."""


class Supervisor:
    """What `make run` starts, keeps running and stops."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._environment: dict[str, str] = {}
        self._servers: Embedded | None = None
        self._children: list[Child] = []
        self._signals = 0

    def on_signal(self, _number: int, _frame: FrameType | None) -> None:
        """The first signal stops everything in order; one more while that lasts kills the services."""
        self._signals += 1

    def start(self) -> None:
        """Returns when the web service answers. The worker is ready before that, so every kind is known."""
        began = time.monotonic()
        self._setup.check_ports()
        self._setup.make_folders()
        click.echo("Starting PostgreSQL, Redis, the worker and the web service ...")
        self._environment = self._setup.environment(self._start_servers())
        self._manage("migrate", "--skip-checks")
        web, worker = self._children = [self._child("web", "web service"), self._child("worker", "worker")]
        worker.start()
        self._manage(
            "first_start", "--skip-checks", "--url", self._setup.url, "--credentials", str(self._setup.credentials)
        )
        self._setup.point_credentials_here()
        self._wait_until_ready(worker)
        web.start()
        self._wait_until_ready(web)
        self._greet(time.monotonic() - began)

    def show_first_job(self) -> None:
        """Imports the example with the real command line on the very first start, if the source is our own."""
        shown = self._setup.home / "first-job-shown"
        if shown.exists():
            return
        shown.touch()
        if self._setup.has("database_url") or self._setup.has("sources"):
            click.echo("The first job, an import of an example, is left out: it would write into a database of yours.")
            return
        table = ["--input", '{"table": "orders"}']
        arguments = ["submit", "csv.import", "--file", os.path.relpath(EXAMPLE), *table, "--follow"]
        click.echo(f"The first job imports 50,000 orders into a table:\n\n$ {self._command(*arguments)}")
        process = spawn(["-m", "headway.client.cli", *arguments], self._environment)
        self._wait_for(process)
        if process.returncode:
            click.echo(f"It did not succeed ({ending(process.returncode)}); the log of the worker may say why.\n")
        else:
            click.echo(f"\nLook at it again: {self._command('list', '--kind', 'csv.import')}\n")

    def supervise(self) -> None:
        """Keeps everything running until a signal comes."""
        countdown = ["submit", "demo.countdown", "--input", '{"seconds": 5}', "--follow"]
        click.echo(f"Try:   {self._command(*countdown)}\nStop:  Ctrl-C")
        while True:
            self._pause()

    def stop(self) -> None:
        """Stops what runs and returns when it is gone."""
        for child in self._children:
            child.signal(signal.SIGTERM)
            deadline = time.monotonic() + self._setup.drain + 5
            while child.running:
                if self._signals > 1 or time.monotonic() > deadline:
                    log.warning("Killing the %s, which has not stopped yet.", child.name)
                    child.signal(signal.SIGKILL)
                time.sleep(0.05)
        if self._servers:
            self._servers.stop()

    def _start_servers(self) -> dict[str, str]:
        """Starts the servers that were not given; returns the settings that lead to them."""
        postgres, redis = not self._setup.has("database_url"), not self._setup.has("redis_url")
        if not (postgres or redis):
            return {}
        servers = self._servers = Embedded(self._setup.home, postgres=postgres, redis=redis)
        servers.start()
        found = {"redis_url": servers.redis_url} if redis else {}
        if postgres:
            servers.create_database("headway")
            servers.create_database("headway_source", owner="headway_source")
            source = servers.postgres_url("headway_source", role="headway_source")
            found |= {
                "database_url": servers.postgres_url("headway"),
                "sources": f'{{"default": "{source.replace("postgresql", "postgresql+asyncpg", 1)}"}}',
            }
        return found

    def _manage(self, *arguments: str) -> None:
        """Runs a management command to its end."""
        path = self._setup.log_folder / "manage.log"
        with path.open("wb") as output:
            process = spawn(["-m", "services.web.manage", *arguments], self._environment, output)
        self._wait_for(process)
        if process.returncode:
            raise StartFailed(f"`manage {arguments[0]}` failed ({ending(process.returncode)}).\n{_end_of(path)}")

    def _child(self, service: str, name: str) -> Child:
        path = self._setup.log_folder / f"{service}.log"
        if path.exists():
            path.replace(path.with_suffix(".log.1"))
        environment = self._setup.service_environment(service, self._environment)
        return Child(name, f"services.{service}", environment, self._setup.ops_url(service), path)

    def _wait_until_ready(self, child: Child) -> None:
        deadline = time.monotonic() + READY_WITHIN
        while not child.ready():
            if not child.running:
                raise StartFailed(f"The {child.name} ended while it started.\n{_end_of(child.log_file)}")
            if time.monotonic() > deadline:
                raise StartFailed(
                    f"The {child.name} is not ready after {READY_WITHIN:.0f} s.\n{_end_of(child.log_file)}"
                )
            self._pause()

    def _wait_for(self, process: "subprocess.Popen[bytes]") -> None:
        try:
            while process.poll() is None:
                self._pause()
        finally:
            process.terminate()
            process.wait()

    def _pause(self) -> None:
        """A moment in which what died is started again. Raises Stopped once a signal has come."""
        if self._signals:
            raise Stopped
        if self._servers and (ended := self._servers.ended()):
            log.warning("%s ended by itself; starting it again.", ended)
            self._servers.start()
        for child in self._children:
            child.keep_running()
        time.sleep(0.1)

    def _greet(self, seconds: float) -> None:
        setup = self._setup
        credentials = _shown(setup.credentials)
        # They are written once for a database: it may have been set up from elsewhere, or the file is gone.
        password = f"as admin; the password is in {credentials}"
        if not setup.credentials.exists():
            password = f"with the password that you have: there is no {credentials}"
        click.echo(
            f"\nHeadway runs at {setup.url} (started in {seconds:.1f} s)\n"
            f"  API      {setup.url}/api/v1/docs\n"
            f"  Admin    {setup.url}/admin/ {password}\n"
            f"  Metrics  {setup.ops_url('web')}/metrics and {setup.ops_url('worker')}/metrics\n"
            f"  Logs     {_shown(setup.log_folder)}/\n"
        )

    def _command(self, *arguments: str) -> str:
        """A line to paste that runs the command line against this home folder."""
        home = _shown(self._setup.home)
        prefix = "" if home == ".headway" else f"HEADWAY_HOME={shlex.quote(home)} "
        return prefix + shlex.join([_shown(Path(sys.executable).with_name("headway")), *arguments])


def _shown(path: Path) -> str:
    """The path as one would type it here."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def _end_of(path: Path) -> str:
    tail = "\n".join(path.read_text(errors="replace").splitlines()[-15:])
    return f"The last lines of {_shown(path)}:\n{tail}"


def main() -> int:
    """Runs until Ctrl-C or SIGTERM; 0 then, 1 if something cannot be started."""
    logging.basicConfig(format="headway: %(message)s", level=logging.WARNING)
    os.umask(0o077)
    try:
        supervisor = Supervisor(Setup(os.environ))
    except HeadwayError as error:
        click.echo(f"headway: {error}", err=True)
        return 1
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, supervisor.on_signal)
    try:
        supervisor.start()
        supervisor.show_first_job()
        supervisor.supervise()
    except Stopped:
        click.echo("\nStopping ...")
    except (HeadwayError, OSError) as error:
        click.echo(f"headway: {error}", err=True)
        return 1
    finally:
        supervisor.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())

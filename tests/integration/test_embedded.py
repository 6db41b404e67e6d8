"""The embedded servers: what survives a stop, a kill and a second start, and what is said when they cannot start."""

import contextlib
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest
import redis

from headway.embedded import Embedded
from headway.embedded import process as starting
from headway.errors import StartFailed

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are read from /proc")

HOLD = """
import sys
from pathlib import Path
from headway.embedded import Embedded
servers = Embedded(Path(sys.argv[1]), durable=False)
servers.start()
print(servers.postgres_url("postgres"), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """A folder outside pytest's own: that one is closed to all but root whenever another pytest starts as root,
    and so to the servers, which root runs as another user."""
    with tempfile.TemporaryDirectory(prefix="headway-test-") as folder:
        yield Path(folder)


def eventually(condition: Callable[[], bool], within: float = 10) -> None:
    deadline = time.monotonic() + within
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.02)


def command_lines(within: Path = Path("/")) -> dict[int, str]:
    """The command lines, by process id, of all that work in a folder or below it."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if process.joinpath("cwd").readlink().is_relative_to(within):
                found[int(process.name)] = process.joinpath("cmdline").read_text()
    return found


def write_and_read(servers: Embedded) -> int:
    servers.create_database("kept")
    with psycopg.connect(servers.postgres_url("kept"), autocommit=True) as connection:
        connection.execute("CREATE TABLE IF NOT EXISTS starts (at timestamptz DEFAULT now())")
        connection.execute("INSERT INTO starts DEFAULT VALUES")
        row = connection.execute("SELECT count(*) FROM starts").fetchone()
    assert row
    return int(row[0])


def starting_elsewhere(home: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", HOLD, str(home)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def started_elsewhere(home: Path, statement: str) -> "subprocess.Popen[str]":
    """A process that has started the servers; the statement was run on them."""
    holder = starting_elsewhere(home)
    assert holder.stdout
    with psycopg.connect(holder.stdout.readline().strip(), autocommit=True) as connection:
        connection.execute(statement)
    assert command_lines(home)
    return holder


def killed(holder: "subprocess.Popen[str]") -> None:
    with holder:
        holder.kill()


def test_both_answer_soon_and_leave_nothing_running(tmp_path: Path) -> None:
    began = time.monotonic()
    with Embedded(tmp_path / "home", durable=False) as servers:
        assert time.monotonic() - began < 20
        with redis.Redis.from_url(servers.redis_url) as connection:
            assert connection.ping()
        assert write_and_read(servers) == 1
        assert len(command_lines(tmp_path)) > 2
    assert not command_lines(tmp_path)


def test_a_second_start_finds_data_ports_and_password(tmp_path: Path) -> None:
    with Embedded(tmp_path / "home") as servers:
        assert write_and_read(servers) == 1
        with redis.Redis.from_url(servers.redis_url) as connection:
            connection.set("kept", "yes")
        urls = servers.postgres_url("kept"), servers.redis_url
    with Embedded(tmp_path / "home") as servers:
        assert (servers.postgres_url("kept"), servers.redis_url) == urls
        assert write_and_read(servers) == 2
        with redis.Redis.from_url(servers.redis_url) as connection:
            assert connection.get("kept") == b"yes"


def test_only_the_password_opens_them(tmp_path: Path) -> None:
    with Embedded(tmp_path / "home", durable=False) as servers:
        state = tmp_path / "home" / "servers.json"
        assert stat.S_IMODE(state.stat().st_mode) == 0o600
        password = json.loads(state.read_text())["password"]
        with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
            psycopg.connect(servers.postgres_url("postgres").replace(password, "wrong"))
        with (
            redis.Redis.from_url(servers.redis_url.replace(f":{password}@", "")) as connection,
            pytest.raises(redis.AuthenticationError),
        ):
            connection.ping()
        assert not [line for line in command_lines(tmp_path).values() if password in line]


def test_the_owner_of_one_database_cannot_open_another(tmp_path: Path) -> None:
    with Embedded(tmp_path / "home", durable=False, redis=False) as servers:
        servers.create_database("headway")
        servers.create_database("shop", owner="shop")
        with psycopg.connect(servers.postgres_url("shop", "shop")) as connection:
            connection.execute("CREATE TABLE orders ()")
        with pytest.raises(psycopg.OperationalError, match="permission denied"):
            psycopg.connect(servers.postgres_url("headway", "shop"))


def test_kill_9_of_the_parent_leaves_no_process_and_loses_nothing(tmp_path: Path) -> None:
    home = tmp_path / "home"
    killed(started_elsewhere(home, "CREATE TABLE kept ()"))
    eventually(lambda: not command_lines(home))
    with Embedded(home, durable=False) as servers, psycopg.connect(servers.postgres_url("postgres")) as connection:
        connection.execute("SELECT FROM kept")


def test_a_start_waits_for_servers_of_a_killed_run_that_are_still_ending(tmp_path: Path) -> None:
    home = tmp_path / "home"
    holder = started_elsewhere(home, "CREATE TABLE kept ()")
    ending = [int((home / name).read_text()) for name in ("postgres.lock", "redis.lock")]
    for pid in ending:
        os.kill(pid, signal.SIGSTOP)
    killed(holder)
    timers = [threading.Timer(0.5, os.kill, (pid, signal.SIGCONT)) for pid in ending]
    for timer in timers:
        timer.start()
    with Embedded(home, durable=False) as servers:
        assert not command_lines(home).keys() & set(ending)
        with psycopg.connect(servers.postgres_url("postgres")) as connection:
            connection.execute("SELECT FROM kept")
    for timer in timers:
        timer.join()


def test_a_stale_process_id_that_another_program_has_now_is_no_obstacle(tmp_path: Path) -> None:
    home = tmp_path / "home"
    with Embedded(home, durable=False, redis=False) as servers:
        assert write_and_read(servers) == 1
        pid_file = home / "postgres" / "postmaster.pid"
        lines = pid_file.read_text().splitlines()
    other = subprocess.Popen(["sleep", "60"], user=pid_file.parent.stat().st_uid)
    try:
        pid_file.write_text("\n".join([str(other.pid), *lines[1:], ""]))
        with Embedded(home, durable=False, redis=False) as servers:
            assert write_and_read(servers) == 2
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


def test_an_initdb_that_was_killed_is_repeated(tmp_path: Path) -> None:
    holder = starting_elsewhere(tmp_path)
    eventually(lambda: [*tmp_path.glob("postgres*/PG_VERSION")] != [])
    for pid in [pid for pid, line in command_lines().items() if f"initdb\0-D\0{tmp_path}" in line]:
        os.kill(pid, signal.SIGKILL)
    killed(holder)
    with Embedded(tmp_path, durable=False) as servers:
        assert write_and_read(servers) == 1


def test_a_home_in_use_is_refused(tmp_path: Path) -> None:
    with Embedded(tmp_path, durable=False, postgres=False):
        with pytest.raises(StartFailed, match=r"Another Headway runs on .*HEADWAY_HOME"):
            Embedded(tmp_path, durable=False, postgres=False).start()
        assert command_lines(tmp_path)


def test_a_port_that_is_taken_meanwhile_is_replaced(tmp_path: Path) -> None:
    with Embedded(tmp_path, durable=False, postgres=False) as servers:
        url = servers.redis_url
    port = json.loads((tmp_path / "servers.json").read_text())["redis"]
    with socket.create_server(("127.0.0.1", port)), Embedded(tmp_path, durable=False, postgres=False) as servers:
        assert servers.redis_url != url


@pytest.mark.parametrize("server", ["redis", "postgres"])
def test_a_port_that_is_taken_while_a_server_starts_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: str
) -> None:
    """It is free when it is chosen, and taken when the server comes to use it: Postgres makes its folder meanwhile."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port, free = other.getsockname()[1], starting._free_port
        ports = [port]
        monkeypatch.setattr(starting, "_free_port", lambda wanted: ports.pop() if ports else free(wanted))
        with Embedded(tmp_path, durable=False, redis=server == "redis", postgres=server == "postgres") as servers:
            assert servers.ended() is None
        assert json.loads((tmp_path / "servers.json").read_text())[server] != port


@pytest.mark.parametrize(("written", "named"), [("15\n", "15"), ("9.6\n", r"9\.6"), ("", r"\?")])
def test_data_of_another_major_version_is_named(tmp_path: Path, written: str, named: str) -> None:
    data = tmp_path / "postgres"
    data.mkdir()
    (data / "PG_VERSION").write_text(written)
    with pytest.raises(StartFailed, match=rf"written by PostgreSQL {named}, and .* is PostgreSQL 18.*HEADWAY_HOME"):
        Embedded(tmp_path, durable=False).start()
    assert not command_lines(tmp_path)


def test_a_missing_wheel_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(StartFailed, match=r"Install redis-server or valkey-server.*HEADWAY_REDIS_URL"):
        Embedded(tmp_path, postgres=False).start()
    with pytest.raises(StartFailed, match=r"Install PostgreSQL 17 or newer.*HEADWAY_DATABASE_URL"):
        Embedded(tmp_path, redis=False).start()


def test_a_server_that_ends_at_its_start_shows_its_last_log_lines(tmp_path: Path) -> None:
    with Embedded(tmp_path, durable=False, redis=False):
        pass
    with (tmp_path / "postgres" / "postgresql.conf").open("a") as configuration:
        configuration.write("no_such_option = on\n")
    with pytest.raises(StartFailed, match=r"(?s)PostgreSQL ended while it started.*postgres.log.*no_such_option"):
        Embedded(tmp_path, durable=False, redis=False).start()


def test_a_home_that_cannot_be_written_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StartFailed, match=r"Check the owner of .*HEADWAY_HOME"):
        Embedded(tmp_path / "file", durable=False).start()


def test_a_server_that_ended_by_itself_is_told_and_brought_back_at_the_same_address(tmp_path: Path) -> None:
    with Embedded(tmp_path, durable=False) as servers:
        assert servers.ended() is None
        url = servers.redis_url
        os.kill(int((tmp_path / "redis.lock").read_text()), signal.SIGKILL)
        eventually(lambda: servers.ended() == "Redis")
        servers.start()
        assert servers.ended() is None
        assert servers.redis_url == url
        with redis.Redis.from_url(url) as connection:
            assert connection.ping()

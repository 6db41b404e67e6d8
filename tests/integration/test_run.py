"""`make run` as its user meets it: one process that brings everything up, keeps it up and takes it down."""

import contextlib
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest

from headway.embedded import Embedded
from tests.ports import free_ports

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="processes are read from /proc"),
    pytest.mark.timeout(180),
]

T = TypeVar("T")
ROOT = Path(__file__).resolve().parents[2]


def eventually(condition: Callable[[], T | None], within: float = 60) -> T:
    """The first true answer."""
    deadline = time.monotonic() + within
    while not (answer := condition()):
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.05)
    return answer


def processes(home: Path, command: str = "") -> list[int]:
    """The processes that have the home in their environment, or work in it."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            ours = os.fsencode(f"HEADWAY_HOME={home}\0") in process.joinpath("environ").read_bytes()
            ours = ours or process.joinpath("cwd").readlink().is_relative_to(home)
            if ours and command in process.joinpath("cmdline").read_text().replace("\0", " "):
                found.append(int(process.name))
    return found


def environment(home: Path, port: int | str, **more: str) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("HEADWAY_", "DJANGO_"))}
    return clean | {"HEADWAY_HOME": str(home), "HEADWAY_PORT": str(port)} | more


class Run:
    """A `make run` that writes into a file."""

    def __init__(self, home: Path, **more: str) -> None:
        self.home = home
        self.output = home.with_suffix(".out")
        with self.output.open("w") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "services.run"],
                cwd=ROOT,
                env=environment(home, free_ports(3), **more),
                stdout=out,
                stderr=out,
                start_new_session=True,
            )

    def says(self, text: str) -> None:
        """Returns once the text was printed."""
        eventually(lambda: text in self.output.read_text() or self.process.poll() is not None)
        assert text in self.output.read_text()

    def client(self) -> httpx.Client:
        credentials = json.loads((self.home / "credentials.json").read_text())
        headers = {"Authorization": f"Bearer {credentials['api_key']}"}
        return httpx.Client(base_url=credentials["url"], headers=headers, trust_env=False, verify=False)

    def stop(self, number: signal.Signals) -> int:
        began = time.monotonic()
        self.process.send_signal(number)
        code = self.process.wait(20)
        assert time.monotonic() - began < 15
        return code


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """A folder outside pytest's own: that one is closed to all but root whenever another pytest starts as root,
    and so to the servers, which root runs as another user."""
    with tempfile.TemporaryDirectory(prefix="headway-test-") as folder:
        yield Path(folder)


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    home = tmp_path / "home"
    yield home
    for pid in processes(home):
        os.kill(pid, signal.SIGKILL)


def finished(client: httpx.Client, job: dict[str, Any]) -> dict[str, Any]:
    def look() -> dict[str, Any] | None:
        now: dict[str, Any] = client.get(f"/api/v1/jobs/{job['id']}").raise_for_status().json()
        return now if now["state"] in ("succeeded", "failed", "cancelled") else None

    return eventually(look)


def countdown(client: httpx.Client) -> dict[str, Any]:
    submitted = client.post("/api/v1/jobs", json={"kind": "demo.countdown", "input": {"seconds": 0.2}})
    assert submitted.status_code == 202
    return finished(client, submitted.json())


def restarted(home: Path, name: str, pid: int) -> bool:
    return processes(home, f"-m services.{name}") not in ([], [pid])


def answers(client: httpx.Client) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return client.get("/api/v1/kinds").status_code == 200
    return False


def test_from_an_empty_home_to_a_job_and_back_to_nothing(home: Path) -> None:
    run = Run(home)
    # As a script does it: wait for the credentials, then for an answer, and submit at once.
    eventually((home / "credentials.json").exists)
    assert stat.S_IMODE((home / "credentials.json").stat().st_mode) == 0o600
    with run.client() as client:
        eventually(lambda: answers(client))
        assert countdown(client)["state"] == "succeeded"

        run.says("Stop:  Ctrl-C")
        (imported,) = client.get("/api/v1/jobs", params={"kind": "csv.import"}).json()["jobs"]
        assert imported["state"] == "succeeded"
        assert imported["result"]["rows"] == 50_000
        assert {"name": "ordered_at", "type": "timestamptz"}.items() <= imported["result"]["columns"][1].items()

        for name in ("worker", "web"):
            (pid,) = processes(home, f"-m services.{name}")
            os.kill(pid, signal.SIGKILL)
            eventually(partial(restarted, home, name, pid))
        eventually(lambda: answers(client))
        assert countdown(client)["state"] == "succeeded"
    assert "it starts again in 0.5 s" in run.output.read_text()
    assert run.stop(signal.SIGINT) == 0
    assert processes(home) == []


def test_a_second_start_on_another_port_finds_its_jobs_and_a_kill_9_leaves_nothing(home: Path) -> None:
    home.mkdir()
    (home / "first-job-shown").touch()
    run = Run(home)
    run.says("Stop:  Ctrl-C")
    with run.client() as client:
        job = countdown(client)
    assert run.stop(signal.SIGTERM) == 0

    run = Run(home)
    run.says("Stop:  Ctrl-C")
    assert "The first job" not in run.output.read_text()
    with run.client() as client:
        assert client.get(f"/api/v1/jobs/{job['id']}").json() == job
    run.process.kill()
    run.process.wait()
    eventually(lambda: processes(home) == [], within=20)


def test_given_servers_are_used_and_nothing_is_written_into_them_unasked(home: Path, tmp_path: Path) -> None:
    with Embedded(tmp_path / "given", durable=False) as servers:
        servers.create_database("given")
        run = Run(home, HEADWAY_DATABASE_URL=servers.postgres_url("given"), HEADWAY_REDIS_URL=servers.redis_url)
        run.says("Stop:  Ctrl-C")
        assert "The first job, an import of an example, is left out" in run.output.read_text()
        assert not (home / "postgres").exists()
        assert not (home / "redis").exists()
        with run.client() as client:
            assert countdown(client)["state"] == "succeeded"
        assert run.stop(signal.SIGTERM) == 0


def refused(home: Path, port: int | str, **more: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "services.run"],
        cwd=ROOT,
        env=environment(home, port, **more),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    return done.stderr


@pytest.mark.parametrize("offset", [0, 1, 2])
def test_a_port_in_use_is_a_sentence_before_anything_starts(home: Path, offset: int) -> None:
    first = free_ports(3)
    with socket.create_server(("127.0.0.1", first + offset)):
        said = refused(home, first)
    assert f"Port {first + offset} is in use" in said
    assert "Set HEADWAY_PORT to another port" in said
    assert not home.exists()


def test_a_wrong_setting_is_a_sentence(home: Path) -> None:
    assert refused(home, "eight").startswith("headway: Settings are missing or wrong. HEADWAY_PORT: ")


def test_data_of_another_postgres_is_a_sentence(home: Path) -> None:
    (home / "postgres").mkdir(parents=True)
    (home / "postgres" / "PG_VERSION").write_text("15\n")
    assert "was written by PostgreSQL 15" in refused(home, free_ports(3))
    assert processes(home) == []


def test_a_given_postgres_that_does_not_answer_is_a_sentence(home: Path) -> None:
    said = refused(home, free_ports(3), HEADWAY_DATABASE_URL="postgresql://headway@127.0.0.1:1/headway")
    assert "The database of HEADWAY_DATABASE_URL cannot be used: " in said
    assert "Connection refused" in said


def test_credentials_that_are_gone_are_not_pointed_at_and_damaged_ones_are_a_sentence(home: Path) -> None:
    home.mkdir()
    (home / "first-job-shown").touch()
    run = Run(home)
    run.says("Stop:  Ctrl-C")
    assert run.stop(signal.SIGTERM) == 0
    (home / "credentials.json").unlink()

    run = Run(home)
    run.says("Stop:  Ctrl-C")
    run.says("with the password that you have: there is no ")
    assert run.stop(signal.SIGTERM) == 0

    (home / "credentials.json").write_text("{")
    assert "credentials.json is damaged." in refused(home, free_ports(3))
    assert processes(home) == []


def test_a_home_that_cannot_be_made_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "HEADWAY_HOME" in refused(tmp_path / "file" / "home", free_ports(3))

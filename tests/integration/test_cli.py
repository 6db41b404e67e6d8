"""The command `headway` as a process of its own, piped and in a terminal."""

import asyncio
import json
import os
import pty
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from pydantic import BaseModel

import tests.integration.test_client  # noqa: F401 - the kind test.copy
from headway import Fatal, JobContext, kind
from tests.conftest import Service, until

AHEAD = (datetime.now(UTC) + timedelta(days=1)).isoformat(timespec="seconds")
HEADWAY = [sys.executable, "-m", "headway.client.cli"]


released = asyncio.Event()


class Nothing(BaseModel):
    pass


@kind("test.fail")
async def fail(job: JobContext, input: Nothing) -> Nothing:
    """Fails with a message that would clear the screen, once it is released."""
    await released.wait()
    await job.log("about to fail \x1b[31m", level="warning")
    raise Fatal("Give it\x1b[2J\u202e something.\nError: else")


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str


class Shell:
    """Runs the CLI with the URL and key of a service."""

    def __init__(self, service: Service, folder: Path) -> None:
        self.folder = folder
        self.environment = {
            "PATH": os.environ["PATH"],
            "HEADWAY_URL": service.url,
            "HEADWAY_API_KEY": service.api_key,
            "TERM": "xterm-256color",
        }

    async def start(self, *arguments: str, **overrides: Any) -> Process:
        pipes = {"stdin": PIPE, "stdout": PIPE, "stderr": PIPE}
        return await asyncio.create_subprocess_exec(
            *HEADWAY, *arguments, cwd=self.folder, env=self.environment, **{**pipes, **overrides}
        )

    async def __call__(self, *arguments: str, stdin: str = "") -> Ran:
        process = await self.start(*arguments)
        out, err = await process.communicate(stdin.encode())
        assert process.returncode is not None
        assert b"Traceback" not in err
        return Ran(process.returncode, out.decode(), err.decode())

    async def in_terminal(
        self, *arguments: str, at: str | None = None, do: Callable[[Process], object] | None = None
    ) -> Ran:
        """In a terminal of 120 columns, which is both streams. Once the text `at` shows, `do` is called."""
        terminal, inside = pty.openpty()
        os.set_blocking(terminal, False)
        self.environment["COLUMNS"] = "120"
        process = await self.start(*arguments, stdin=inside, stdout=inside, stderr=inside)
        os.close(inside)
        shown = bytearray()
        closed = asyncio.Event()

        def read() -> None:
            try:
                shown.extend(os.read(terminal, 65536))
            except OSError:
                asyncio.get_running_loop().remove_reader(terminal)
                closed.set()

        asyncio.get_running_loop().add_reader(terminal, read)
        if at and do:
            await until(lambda: at in shown.decode(errors="replace"))
            do(process)
        code = await process.wait()
        await closed.wait()
        os.close(terminal)
        return Ran(code, shown.decode(), "")


@pytest.fixture
def headway(service: Service, tmp_path: Path) -> Shell:
    folder = tmp_path / "cli"
    folder.mkdir()
    return Shell(service, folder)


async def test_piped_the_progress_is_lines_and_the_result_goes_to_standard_output(headway: Shell) -> None:
    ran = await headway("submit", "demo.countdown", "--input", '{"seconds": 2.4}', "--follow")

    assert (ran.code, ran.out) == (0, "seconds: 2.4\n")
    lines = ran.err.splitlines()
    assert lines[0].startswith("Job ")
    progress = [line for line in lines if line.startswith("counting down: ")]
    assert 1 <= len(progress) <= 3
    assert "of 2.4 seconds" in progress[0]
    # As long as no rate is known, nothing is said of the time.
    assert any("left" in line for line in progress)
    assert lines[-1] == "succeeded: 100 %, 2.4 of 2.4 seconds"
    assert "\x1b" not in ran.err


async def test_in_a_terminal_a_bar_is_drawn(headway: Shell) -> None:
    ran = await headway.in_terminal("submit", "demo.countdown", "--input", '{"seconds": 3}', "--follow")

    assert ran.code == 0
    assert ran.out.count("━" * 5) > 5
    assert "counting down" in ran.out
    assert "100 %" in ran.out
    assert ran.out.rstrip().endswith("seconds: 3")
    assert ran.out.count("\x1b[?25l") == ran.out.count("\x1b[?25h") == 1


async def test_no_color_is_respected(headway: Shell) -> None:
    headway.environment["NO_COLOR"] = "1"
    followed = await headway.in_terminal("submit", "demo.countdown", "--input", '{"seconds": 0.3}', "--follow")
    listed = await headway.in_terminal("list")

    for ran in (followed, listed):
        assert ran.code == 0
        assert "succeeded" in ran.out
        assert "\x1b[3" not in ran.out
        assert "\x1b[9" not in ran.out


async def test_json_is_the_job_alone(headway: Shell) -> None:
    accepted = await headway(
        "submit", "demo.countdown", "--input", "-", "--tag", "a", "--tag", "b", "--json", stdin='{"seconds": 0}'
    )
    ended = await headway(
        "submit", "demo.countdown", "--input", '{"seconds": 0.2}', "--timeout", "7", "--follow", "--json"
    )

    assert (accepted.code, accepted.err) == (0, "")
    assert json.loads(accepted.out)["tags"] == ["a", "b"]
    assert ended.code == 0
    assert json.loads(ended.out)["result"] == {"seconds": 0.2}
    assert json.loads(ended.out)["timeout"] == 7


async def test_a_job_is_followed_listed_and_shown_by_its_id(headway: Shell) -> None:
    job_id = (await headway("submit", "demo.countdown", "--input", '{"seconds": 0.5}', "--tag", "mine")).out.strip()
    envelopes = await headway("follow", job_id, "--json")
    shown, listed, got = await asyncio.gather(
        headway("follow", job_id), headway("list", "--tag", "mine"), headway("get", job_id)
    )

    received = [json.loads(line) for line in envelopes.out.splitlines()]
    assert envelopes.code == 0
    assert received[0]["t"] == "snapshot"
    assert received[-1]["d"]["state"] == "succeeded"
    assert (shown.code, shown.out) == (0, "seconds: 0.5\n")
    assert [line.split()[0] for line in listed.out.splitlines()] == ["ID", job_id]
    assert "state: succeeded after" in got.out
    assert 'input: {"seconds": 0.5}' in got.out


async def test_a_failed_job_says_why_and_cannot_touch_the_terminal(headway: Shell) -> None:
    released.clear()
    shown = await headway.in_terminal("submit", "test.fail", "--follow", at="running", do=lambda _: released.set())
    piped = await headway("submit", "test.fail", "--follow")
    got = await headway("get", piped.err.split()[1])

    assert (shown.code, piped.code, got.code) == (1, 1, 0)
    assert r"warning: about to fail \x1b[31m" in shown.out
    assert "\x1b[2J" not in shown.out
    assert piped.out == ""
    assert piped.err.splitlines()[-2:] == [r"Error: Give it\x1b[2J\u202e something.", "  Error: else"]
    assert r"error: Give it\x1b[2J\u202e something." in got.out


async def test_a_cancelled_job_has_a_code_of_its_own(headway: Shell, service: Service) -> None:
    job = await service.client.submit("demo.countdown", {"seconds": 60})
    following = asyncio.create_task(headway("follow", job["id"]))
    await until(lambda: running(service, job["id"]))
    cancelled = await headway("cancel", job["id"])
    followed = await following
    again, unknown = await asyncio.gather(headway("cancel", job["id"]), headway("cancel", str(uuid4()), job["id"]))

    assert (cancelled.code, cancelled.out) == (0, f"{job['id']} will be cancelled.\n")
    assert followed.code == 3
    assert followed.err.splitlines()[-1].startswith("cancelled")
    assert (again.code, again.out) == (0, f"{job['id']} is cancelled.\n")
    assert unknown.code == 4
    assert unknown.out == again.out


async def running(service: Service, job_id: str) -> bool:
    return (await service.client.get(job_id))["state"] == "running"


async def test_cancelling_what_has_succeeded_is_a_failure(headway: Shell, service: Service) -> None:
    job = await service.client.submit("demo.countdown", {"seconds": 0})
    await service.client.wait(job["id"], timeout=10)
    ran = await headway("cancel", job["id"])

    assert (ran.code, ran.err) == (1, f"{job['id']} had already succeeded.\n")


async def test_an_ended_job_is_retried_once(headway: Shell, service: Service) -> None:
    job = await service.client.submit("demo.countdown", {"seconds": 0}, tags=["x"])
    await service.client.wait(job["id"], timeout=10)
    first = await headway("retry", job["id"])
    again = await headway("retry", job["id"])
    assert (first.code, again.out) == (0, first.out)
    new = await service.client.wait(first.out.strip(), timeout=10)
    assert (new["retry_of"], new["state"]) == (job["id"], "succeeded")
    everything = await headway("retry", "--state", "succeeded", "--tag", "x")
    assert (everything.code, everything.out) == (0, "1 job retried.\n")


async def test_all_that_match_are_cancelled(headway: Shell, service: Service) -> None:
    for _ in range(3):
        await service.client.submit("demo.countdown", {"seconds": 60}, delay=60, concurrency_key="k")
    ran = await headway("cancel", "--state", "scheduled", "--kind", "demo.countdown")
    assert (ran.code, ran.out) == (0, "3 jobs cancelled, or will be.\n")
    for wrong in (["cancel"], ["retry", "--state", "running"], ["cancel", str(uuid4()), "--kind", "demo.countdown"]):
        assert (await headway(*wrong)).code == 2


def interrupt(process: Process) -> None:
    process.send_signal(signal.SIGINT)


async def test_ctrl_c_leaves_the_job_running(headway: Shell, service: Service) -> None:
    ran = await headway.in_terminal(
        "submit", "demo.countdown", "--input", '{"seconds": 60}', "--follow", at="counting down", do=interrupt
    )
    (job,) = [job async for job in service.client.list()]

    assert ran.code == 130
    assert "The job goes on." in ran.out
    assert f"headway cancel {job['id']}" in ran.out
    assert "\x1b[?25h" in ran.out
    assert (job["state"], job["cancel_requested_at"]) == ("running", None)


async def test_refusals_have_a_code_and_a_sentence(headway: Shell) -> None:
    unknown_job, unknown_kind, wrong_input = await asyncio.gather(
        headway("get", str(uuid4())),
        headway("submit", "no.such", "--file", __file__),
        headway("submit", "demo.countdown", "--input", '{"minutes": 1}'),
    )
    headway.environment["HEADWAY_API_KEY"] = "hw_live_wrong"
    wrong_key = await headway("follow", str(uuid4()))
    headway.environment["HEADWAY_URL"] = "http://127.0.0.1:1"
    absent = await headway("follow", str(uuid4()))

    for ran, said in (
        (unknown_job, "There is no job"),
        (unknown_kind, "There is no kind 'no.such'; there are: "),
        (wrong_input, "  input: "),
        (wrong_key, "hw_live_…"),
        (absent, "No answer from http://127.0.0.1:1"),
    ):
        assert ran.code == 4, ran
        assert ran.out == ""
        assert ran.err.startswith("Error: ")
        assert said in ran.err


@pytest.mark.parametrize(
    "arguments",
    [
        ("--delay", "nan"),
        ("--timeout", "inf"),
        ("--input", '{"seconds": 1e999}'),
        ("--input", '"\\ud800"'),
        ("--input", "[" * 100_000),
        ("--run-at", "2027-01-31T18:00:00"),
        ("--idempotency-key", "ключ"),
    ],
    ids=lambda arguments: f"{arguments[0]} {arguments[1][:20]}",
)
async def test_what_cannot_be_sent_is_wrong_usage(headway: Shell, arguments: tuple[str, str]) -> None:
    ran = await headway("submit", "demo.countdown", *arguments)

    assert (ran.code, ran.out) == (2, "")
    assert "Error: " in ran.err


async def test_an_input_may_be_null_and_a_time_ahead(headway: Shell) -> None:
    refused = await headway("submit", "demo.countdown", "--input", "null")
    assert (refused.code, "input: null is not of type" in refused.err) == (4, True), refused
    later = await headway("submit", "demo.countdown", "--input", '{"seconds": 0}', "--run-at", AHEAD, "--json")
    assert datetime.fromisoformat(json.loads(later.out)["run_at"]) == datetime.fromisoformat(AHEAD)


async def test_an_empty_idempotency_key_is_refused_and_not_left_out(headway: Shell) -> None:
    ran = await headway("submit", "demo.countdown", "--input", '{"seconds": 0}', "--idempotency-key", "")

    assert (ran.code, ran.out) == (4, "")
    assert "Idempotency-Key" in ran.err


async def test_a_file_is_uploaded_for_jobs_to_come(headway: Shell) -> None:
    (headway.folder / "in.bin").write_bytes(os.urandom(9 << 20))
    printed, ran = await asyncio.gather(headway("upload", "in.bin", "--json"), headway("upload", "in.bin"))
    file = json.loads(printed.out)
    assert (ran.code, printed.code) == (0, 0), ran
    assert (file["name"], file["size"]) == ("in.bin", 9 << 20)
    UUID(ran.out.strip())
    assert (await headway("upload", "absent.bin")).code == 2


async def test_a_file_goes_up_and_its_artifact_comes_down(headway: Shell) -> None:
    (headway.folder / "in.bin").write_bytes(os.urandom(3 << 20))
    ran = await headway("submit", "test.copy", "--file", "in.bin", "--input", '{"name": "o u t"}', "--follow")
    job_id = ran.err.partition("Job ")[2].split()[0]
    listed, kept = await asyncio.gather(headway("artifacts", job_id), headway("download", job_id, "o u t"))
    piped = await (await headway.start("download", job_id, "o u t", "-o", "-")).communicate()
    again = await headway("download", job_id, "o u t")
    absent = await headway("download", job_id, "other")

    assert ran.code == 0, ran
    assert ran.err.startswith("Uploaded in.bin, 3.1 MB.")
    assert ran.out.splitlines() == [
        "size: 3,145,728",
        f"artifact: o u t, 3.1 MB (headway download {job_id} 'o u t')",
    ]
    assert listed.out.splitlines()[1].startswith("o u t  application/octet-stream  3.1 MB")
    assert (kept.code, kept.out) == (0, "o u t\n")
    assert (headway.folder / "o u t").read_bytes() == (headway.folder / "in.bin").read_bytes() == piped[0]
    assert again.code == 2
    assert absent.code == 4


async def test_kinds_are_explained(headway: Shell) -> None:
    every, one, schema = await asyncio.gather(
        headway("kinds"), headway("kinds", "demo.countdown"), headway("kinds", "demo.countdown", "--json")
    )

    assert "demo.countdown Counts down" in " ".join(every.out.split())
    assert "seconds  number  required  How long the job takes." in one.out
    assert json.loads(schema.out)["input_schema"]["required"] == ["seconds"]


async def test_a_reader_that_leaves_ends_it_quietly(headway: Shell, service: Service) -> None:
    job = await service.client.submit("demo.countdown", {"seconds": 60})
    process = await headway.start("follow", job["id"], "--json")
    assert process.stdout is not None
    assert process.stderr is not None
    await process.stdout.readline()
    process.stdout._transport.close()  # type: ignore[attr-defined]

    assert await asyncio.wait_for(process.wait(), 10) == 1
    assert await process.stderr.read() == b""

"""The running compose stack, reached as clients and operators reach it."""

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

ROOT = Path(__file__).parents[2]
TERMINAL = {"succeeded", "failed", "cancelled"}
T = TypeVar("T")


def wait_for(look: Callable[[], T | None], what: str, seconds: float = 60) -> T:
    """What `look` returns, once it is true."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := look():
            return found
        time.sleep(0.2)
    pytest.fail(f"{what}: not within {seconds:g} s")


class Stack:
    """The service by HTTP and WebSocket, its containers by `docker compose`."""

    def __init__(self, env_file: str, credentials: Path, prometheus: str) -> None:
        written = json.loads(credentials.read_text())
        self.prometheus = prometheus
        self._env_file = env_file
        self.url: str = written["url"]
        self.headers = {"Authorization": f"Bearer {written['api_key']}"}
        self.http = httpx.Client(base_url=self.url, headers=self.headers, timeout=30)

    def compose(self, *arguments: str) -> str:
        """The output of `docker compose …`."""
        command = ["docker", "compose", "--env-file", self._env_file, *arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{' '.join(arguments)}: {done.stderr}"
        return done.stdout

    def containers(self, service: str) -> list[str]:
        """The ids of the running containers."""
        return self.compose("ps", "--quiet", service).split()

    def scale(self, workers: int) -> None:
        self.compose("up", "--detach", "--wait", "--no-deps", "--no-recreate", "--scale", f"worker={workers}", "worker")

    def submit(self, kind: str, job_input: dict[str, Any], *tags: str) -> str:
        """The id of the new job."""
        answer = self.http.post("/api/v1/jobs", json={"kind": kind, "input": job_input, "tags": tags})
        assert answer.status_code == 202, answer.text
        job_id: str = answer.json()["id"]
        assert answer.headers["Location"] == f"/api/v1/jobs/{job_id}"
        return job_id

    def job(self, job_id: str) -> dict[str, Any]:
        answer = self.http.get(f"/api/v1/jobs/{job_id}")
        assert answer.status_code == 200, answer.text
        job: dict[str, Any] = answer.json()
        return job

    def finished(self, job_id: str, seconds: float = 60) -> dict[str, Any]:
        """The job, once it is terminal."""

        def look() -> dict[str, Any] | None:
            job = self.job(job_id)
            return job if job["state"] in TERMINAL else None

        return wait_for(look, f"the end of job {job_id}", seconds)

    def states(self, tag: str) -> dict[str, str]:
        """The state of each job that has the tag."""
        page = self.http.get("/api/v1/jobs", params={"tag": tag, "limit": 500}).json()
        assert page["next_cursor"] is None
        return {job["id"]: job["state"] for job in page["jobs"]}

    def follow(self, job_id: str) -> tuple[list[dict[str, Any]], int]:
        """Every frame about a job until the server closes, and the close code."""
        frames = []
        address = f"{self.url.replace('http', 'ws', 1)}/ws/jobs/{job_id}"
        with connect(address, additional_headers=self.headers, max_size=None) as socket:
            while True:
                try:
                    frames.append(json.loads(socket.recv(timeout=60)))
                except ConnectionClosed as closed:
                    assert closed.rcvd is not None, "the connection broke without a close frame"
                    return frames, closed.rcvd.code

    def measured(self, query: str) -> float:
        """The value that Prometheus has for the query; 0 where there is none."""
        answer = httpx.get(f"{self.prometheus}/api/v1/query", params={"query": query})
        result = answer.json()["data"]["result"]
        return float(result[0]["value"][1]) if result else 0

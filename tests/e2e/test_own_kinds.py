"""A kind of one's own on the worker image. Imports nothing of Headway."""

import subprocess
from pathlib import Path

import pytest
from stack import Stack, wait_for

IMAGE = "headway-e2e-own-worker"
DOCKERFILE = """\
FROM headway-worker
COPY reports.py /kinds/
"""
MODULE = """\
import os

from headway import SyncJobContext, kind


@kind("report.words", runs="process")
def words(job: SyncJobContext, input: str) -> list[int]:
    return [len(input.split()), os.getuid()]
"""


def test_two_lines_add_a_kind_to_the_worker_image(
    stack: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tmp_path.chmod(0o755)
    (tmp_path / "Dockerfile").write_text(DOCKERFILE)
    (tmp_path / "reports.py").write_text(MODULE)
    (tmp_path / "reports.py").chmod(0o644)
    subprocess.run(["docker", "build", "--quiet", "--tag", IMAGE, tmp_path], check=True, capture_output=True)
    monkeypatch.setenv("WORKER_IMAGE", IMAGE)
    monkeypatch.setenv("HEADWAY_KINDS", "reports")
    container = stack.compose("run", "--detach", "--no-deps", "worker").strip()
    try:
        wait_for(lambda: stack.http.get("/api/v1/kinds/report.words").is_success, "the kind announced")
        answer = stack.http.post("/api/v1/jobs", json={"kind": "report.words", "input": "five words and no more"})
        job = stack.finished(answer.json()["id"])
        assert (job["state"], job["result"]) == ("succeeded", [5, 10001])
    finally:
        subprocess.run(["docker", "rm", "--force", container], check=True, capture_output=True)
        subprocess.run(["docker", "image", "rm", IMAGE], check=False, capture_output=True)

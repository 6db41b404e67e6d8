"""What a team relies on once the containers run. Imports nothing of Headway."""

import subprocess
import time
from itertools import pairwise

import httpx
import pytest
from stack import ROOT, Stack, wait_for

ROWS = 50_000


def test_an_import_is_followed_frame_by_frame(stack: Stack) -> None:
    content = (ROOT / "examples/orders.csv").read_bytes()
    upload = stack.http.post(
        "/api/v1/files", params={"name": "orders.csv"}, content=content, headers={"Content-Type": "text/csv"}
    )
    assert upload.status_code == 201, upload.text
    assert upload.json()["size"] == len(content)

    job_id = stack.submit("csv.import", {"file": upload.json()["id"], "table": "orders"})
    frames, code = stack.follow(job_id)

    assert code == 1000
    assert frames[0]["t"] == "snapshot"
    assert frames[0]["prev"] is None
    assert frames[-1] == {"t": "bye", "job": job_id, "d": {"reason": "terminal"}}
    for before, after in pairwise(frames[:-1]):
        assert after["prev"] == before["seq"]
        assert after["seq"] > before["seq"]
    assert frames[-2]["d"]["state"] == "succeeded", frames[-2]
    assert "progress" in {frame["t"] for frame in frames}

    result = stack.job(job_id)["result"]
    assert (result["rows"], result["rejected"]) == (ROWS, 0)
    count = "SELECT count(*) FROM orders"
    in_postgres = stack.compose(
        "exec", "-T", "postgres", "psql", "-U", "postgres", "-d", "headway_source", "-Atc", count
    )
    assert int(in_postgres) == ROWS


def test_a_killed_worker_loses_no_job(stack: Stack) -> None:
    stack.scale(3)
    workers = stack.containers("worker")
    assert len(workers) == 3
    began = time.monotonic()
    jobs = {stack.submit("demo.countdown", {"seconds": 15}, "killed") for _ in range(60)}
    # 60 at once is all the slots there are, so the worker that dies has 20 of them.
    wait_for(lambda: list(stack.states("killed").values()) == ["running"] * 60, "all jobs running", 20)

    subprocess.run(["docker", "kill", "--signal", "KILL", workers[0]], check=True, capture_output=True)

    later = stack.submit("demo.countdown", {"seconds": 0.5})
    assert stack.finished(later, 20)["state"] == "succeeded"
    left = began + 90 - time.monotonic()
    wait_for(lambda: set(stack.states("killed").values()) == {"succeeded"}, "all 60 jobs succeeded", left)
    assert stack.states("killed").keys() == jobs
    wait_for(lambda: stack.measured("sum(headway_rescued_total)") == 20, "20 rescues counted", 15)


def test_a_restarted_worker_gives_its_jobs_back_and_uses_up_no_attempt(stack: Stack) -> None:
    stack.scale(1)
    job_id = stack.submit("demo.countdown", {"seconds": 22})
    wait_for(lambda: stack.job(job_id)["state"] == "running", "the job running", 20)
    stack.compose("restart", "worker")
    job = stack.finished(job_id)
    assert (job["state"], job["attempt"], job["interruptions"]) == ("succeeded", 1, 1)


def test_jobs_survive_a_restart_of_the_web_service(stack: Stack) -> None:
    done = stack.submit("demo.countdown", {"seconds": 0})
    before = stack.finished(done)
    running = stack.submit("demo.countdown", {"seconds": 8})
    stack.compose("restart", "web")

    def answers() -> bool:
        try:
            return bool(stack.http.get("/api/v1/kinds").status_code == httpx.codes.OK)
        except httpx.TransportError:
            return False

    wait_for(answers, "the web service after its restart")
    assert stack.job(done) == before
    assert stack.finished(running)["state"] == "succeeded"


def test_without_redis_jobs_are_accepted_and_run(stack: Stack) -> None:
    stack.compose("kill", "redis")
    try:
        job = stack.finished(stack.submit("demo.countdown", {"seconds": 0.5}), 20)
        assert job["state"] == "succeeded"
    finally:
        stack.compose("up", "--detach", "--wait", "--no-deps", "redis")
    assert stack.finished(stack.submit("demo.countdown", {"seconds": 0}), 20)["state"] == "succeeded"


def test_without_postgres_nothing_is_accepted_and_after_it_all_goes_on(stack: Stack) -> None:
    stack.compose("kill", "postgres")
    try:
        answer = stack.http.post("/api/v1/jobs", json={"kind": "demo.countdown", "input": {"seconds": 0}})
        assert answer.status_code == 503
        assert int(answer.headers["Retry-After"]) > 0
    finally:
        stack.compose("up", "--detach", "--wait", "--no-deps", "postgres")

    def accepted() -> str:
        answer = stack.http.post("/api/v1/jobs", json={"kind": "demo.countdown", "input": {"seconds": 0}})
        return answer.json()["id"] if answer.status_code == 202 else ""

    assert stack.finished(wait_for(accepted, "a submit accepted again", 20), 20)["state"] == "succeeded"


@pytest.mark.parametrize("key", ["", "Bearer", "Bearer hw_live_unknown", "Basic YWRtaW46YWRtaW4="])
def test_an_unknown_key_is_refused(stack: Stack, key: str) -> None:
    answer = httpx.get(f"{stack.url}/api/v1/jobs", headers={"Authorization": key})
    assert answer.status_code == 401
    assert answer.headers["content-type"] == "application/problem+json"


def test_the_admin_pages_come_with_their_style(stack: Stack) -> None:
    page = httpx.get(f"{stack.url}/admin/login/")
    assert page.status_code == 200
    assert httpx.get(f"{stack.url}/static/admin/css/base.css").status_code == 200


def test_prometheus_scrapes_every_process_and_loads_the_alerts(stack: Stack) -> None:
    workers = len(stack.containers("worker"))
    assert stack.finished(stack.submit("demo.countdown", {"seconds": 0}))["state"] == "succeeded"
    wait_for(lambda: stack.measured('sum(up{job="headway-web"})') == 1, "web scraped")
    wait_for(lambda: stack.measured('sum(up{job="headway-worker"})') == workers, "every worker scraped")
    finishes = 'sum(headway_jobs_finished_total{kind="demo.countdown", outcome="succeeded"})'
    wait_for(lambda: stack.measured(finishes) > 0, "finished jobs counted")

    def evaluated() -> bool:
        groups = httpx.get(f"{stack.prometheus}/api/v1/rules").json()["data"]["groups"]
        return all(rule["health"] == "ok" for group in groups for rule in group["rules"])

    wait_for(evaluated, "every alert evaluated without an error")


def test_containers_run_without_privileges(stack: Stack) -> None:
    for service in ("web", "worker"):
        ids = stack.compose("exec", "-T", service, "python", "-c", "import os; print(os.getuid(), os.getgid())")
        assert ids.split() == ["10001", "10001"]
        write = "import pathlib; pathlib.Path('/opt/headway/x').touch()"
        done = stack.compose("exec", "-T", service, "sh", "-c", f'python -c "{write}" 2>&1 || true')
        assert "Read-only file system" in done

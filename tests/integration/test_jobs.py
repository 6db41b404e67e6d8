import asyncio

from tests.conftest import Service


async def test_a_job_is_accepted_run_and_answered_with_its_result(service: Service) -> None:
    accepted = await service.http.post(
        "/api/v1/jobs", json={"kind": "demo.countdown", "input": {"seconds": 0.3}, "tags": ["a", "b"]}
    )

    assert accepted.status_code == 202
    assert accepted.json()["state"] == "queued"
    job = await finished(service, accepted.headers["Location"])
    assert job["state"] == "succeeded"
    assert job["result"] == {"seconds": 0.3}
    assert job["tags"] == ["a", "b"]
    assert job["attempt"] == 1
    assert job["progress"]["done"] == job["progress"]["total"] == 0.3
    assert job["created_at"] <= job["started_at"] <= job["finished_at"]


async def finished(service: Service, path: str) -> dict:
    async with asyncio.timeout(10):
        while True:
            job = (await service.http.get(path)).json()
            if job["state"] in ("succeeded", "failed", "cancelled"):
                return job
            await asyncio.sleep(0.02)

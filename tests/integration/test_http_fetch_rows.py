"""http.fetch from uploaded files, its retries, robots.txt, credentials and archive of bodies."""

import gzip
import io
import json
import zipfile
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest

from tests.conftest import Service, run, until
from tests.integration.test_http_fetch import Lines, ended, error_of, submit
from tests.site import Site, serving


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    async with serving() as site:
        yield site


async def upload(service: Service, name: str, content: str | bytes) -> str:
    answer = await service.http.post(f"/api/v1/files?name={name}", content=content)
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


async def fetched(service: Service, **input: Any) -> tuple[dict[str, Any], Lines]:
    """The job, which must succeed, and its lines by index."""
    path = await submit(service, **input)
    job = await ended(service, path)
    assert job["state"] == "succeeded", job["error"]
    artifact = await service.http.get(f"{path}/artifacts/results.jsonl")
    lines = [json.loads(line) for line in artifact.text.splitlines()]
    return job, {line["index"]: line for line in lines}


def seen(line: dict[str, Any]) -> dict[str, Any]:
    """What the site saw of a request."""
    assert line["error"] is None, line
    return json.loads(line["body"])


async def test_a_file_of_urls_is_fetched_line_by_line(service: Service, site: Site) -> None:
    urls = [site.url(f"/page/{number}") for number in range(300)]
    content = "\ufeff" + "\r\n".join([*urls[:100], "", " ", *urls[100:], "not a url", "file:///etc/passwd"])
    for name, packed in (("urls.txt", content.encode()), ("urls.txt.gz", gzip.compress(content.encode()))):
        job, lines = await fetched(service, file=await upload(service, name, packed), body="none")

        assert job["result"]["total"] == 302
        assert [lines[index]["url"] for index in range(300)] == urls
        assert {error_of(lines[index]) for index in (300, 301)} == {"invalid-url"}
        assert job["progress"]["total"] == 302


async def test_requests_are_made_from_columns(service: Service, site: Site) -> None:
    rows = 'id;name;note\r\n7;"Ada ""A"" L";x\r\n"8";"two\nlines";"a;b"\r\n9;é/?&=#;\r\n10;too few\r\n'
    asked: dict[str, Any] = {
        "file": await upload(service, "rows.csv", rows),
        "url": site.url("/echo?id={id}&name={name}"),
        "headers": {"X-Note": "note {note}"},
        "body": "text",
        "method": "POST",
    }
    job, lines = await fetched(service, **asked, json={"id": "{id}", "list": [1, "{name}!", "{not a place"]})

    assert lines[0]["url"] == site.url("/echo?id=7&name=Ada%20%22A%22%20L")
    assert json.loads(seen(lines[0])["body"]) == {"id": "7", "list": [1, 'Ada "A" L!', "{not a place"]}
    assert seen(lines[0])["headers"]["x-note"] == "note x"
    assert seen(lines[0])["headers"]["content-type"] == "application/json"
    assert json.loads(seen(lines[1])["body"])["list"][1] == "two\nlines!"
    assert lines[2]["url"] == site.url("/echo?id=9&name=%C3%A9%2F%3F%26%3D%23")
    assert error_of(lines[3]) == "bad-row"
    assert "Line 6" in lines[3]["error"]["message"]
    assert job["result"]["errors"] == {"bad-row": 1}

    _, lines = await fetched(service, **asked, data="{name}: {id} { }")
    assert seen(lines[1])["body"] == "two\nlines: 8 { }"
    # A line's end in a header would begin another one.
    _, lines = await fetched(service, **(asked | {"headers": {"X-Name": "{name}"}}))
    assert [line["error"] and error_of(line) for _, line in sorted(lines.items())] == [None, "bad-row", None, "bad-row"]


async def test_objects_keep_the_types_of_their_values(service: Service, site: Site) -> None:
    rows = [
        json.dumps({"url": site.url("/echo"), "n": 5, "deep": {"a": [None]}, "flag": True}),
        '{"url": "' + site.url("/echo") + '"}',
        "[1]",
        "{",
        '{"url": 7, "n": 1, "deep": 1, "flag": null}',
    ]
    _, lines = await fetched(
        service,
        file=await upload(service, "rows.jsonl", "\n".join(rows)),
        method="PUT",
        headers={"X-N": "{n} {flag}"},
        json={"n": "{n}", "deep": "{deep}", "text": "n={n}"},
        body="text",
    )

    assert json.loads(seen(lines[0])["body"]) == {"n": 5, "deep": {"a": [None]}, "text": "n=5"}
    assert seen(lines[0])["headers"]["x-n"] == "5 true"
    assert [error_of(lines[index]) for index in range(1, 5)] == ["bad-row", "bad-row", "bad-row", "invalid-url"]
    assert "'n'" in lines[1]["error"]["message"]


async def test_a_file_that_cannot_be_what_the_input_says_fails_before_any_request(
    service: Service, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.worker.kinds.http_rows.MOST_ROWS", 1000)
    monkeypatch.setattr("services.worker.kinds.http_fetch.ARCHIVE_FILES", 10)
    url = site.url("/page/1")
    for name, content, more, message in (
        ("a.txt", b"\n\n", {}, "no rows"),
        ("a.csv", b"", {}, "empty"),
        ("a.csv", b"url,id,url\n", {}, "name twice"),
        ("a.csv", f"link\n{url}\n".encode(), {}, "no column 'url'; there are: link"),
        ("a.csv", f"url\n{url}\n".encode(), {"headers": {"X-A": "{nope}"}}, "no column 'nope'"),
        ("a.txt", f"{url}\n".encode() + b"\xff\xfe\xfd\n", {}, "Line 2 is not UTF-8"),
        ("a.txt", f"{url}\n".encode() + b"x" * (2 << 20), {}, "over 1,048,576 bytes"),
        ("a.csv", f'url\n{url}\n"{url}'.encode() + b"\nx" * (1 << 20), {}, "quote never closed"),
        ("a.txt", f"{url}\n".encode() * 1001, {}, "more than 1,000 rows"),
        ("a.txt", f"{url}\n".encode() * 11, {"body": "archive"}, "at most 10 URLs"),
    ):
        job = await ended(service, await submit(service, file=await upload(service, name, content), **more))
        assert job["state"] == "failed", name
        assert job["error"]["type"] == "fatal"
        assert message in job["error"]["message"], job["error"]
    gone = "0190b2f4-0000-7000-8000-000000000000"
    assert "no file" in (await run(service, "http.fetch", {"file": gone}))["error"]["message"]
    assert site.order == []


async def test_what_fails_for_now_is_tried_again(service: Service, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.worker.kinds.http_retries.FIRST_WAIT", 0.01)
    urls = [site.url(f"/falter/{status}?status={status}&times=2") for status in (429, 500, 502, 503, 504, 0)]
    job, lines = await fetched(service, urls=[*urls, site.url("/falter/501?status=501"), site.url("/x")], tries=3)

    assert [lines[index]["status"] for index in range(8)] == [200] * 6 + [501, 404]
    assert [lines[index]["tries"] for index in (0, 1, 2, 3, 4, 6, 7)] == [3] * 5 + [1, 1]
    # The HTTP client itself repeats what a connection that it had kept open could not carry.
    assert lines[5]["tries"] in (2, 3)
    assert job["result"]["retries"] == 9 + lines[5]["tries"]
    # After the last try the answer is what it is.
    _, lines = await fetched(service, urls=[site.url("/falter/last?times=2")], tries=2)
    assert (lines[0]["status"], lines[0]["tries"]) == (503, 2)
    # What may have been done is not done twice.
    posted = [site.url(f"/falter/post{status}?status={status}") for status in (500, 0, 429, 503)]
    _, lines = await fetched(service, urls=posted, method="POST", tries=2)
    assert [lines[index]["tries"] for index in range(4)] == [1, 1, 2, 2]


async def test_a_server_is_left_alone_for_as_long_as_it_asks(
    service: Service, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.worker.kinds.http_retries.FIRST_WAIT", 0.01)
    date = (
        format_datetime(datetime.now(UTC) + timedelta(seconds=3), usegmt=True).replace(" ", "%20").replace(",", "%2C")
    )
    job, lines = await fetched(
        service,
        urls=[site.url("/falter/1?after=1"), site.url(f"/falter/2?after={date}"), site.url("/falter/3?after=301")],
        tries=2,
        per_host=1,
    )

    assert [lines[index]["tries"] for index in range(3)] == [2, 2, 1]
    assert lines[2]["status"] == 503
    assert job["result"]["seconds"] >= 1


async def test_robots_txt_is_kept_to_if_that_is_asked_for(service: Service, site: Site) -> None:
    site.robots = (200, "User-agent: *\nDisallow: /\n\nUser-agent: Headway\nDisallow: /page/*1\nAllow: /page/21$\n")
    urls = [site.url(f"/page/{number}") for number in (1, 2, 11, 21, 211)]
    job, lines = await fetched(service, urls=urls, robots=True)

    assert [line["error"] and error_of(line) for _, line in sorted(lines.items())] == [
        "robots",
        None,
        "robots",
        None,
        "robots",
    ]
    assert site.order.count("/robots.txt") == 1
    assert job["result"]["errors"] == {"robots": 3}
    for status, allowed in ((404, True), (403, True), (500, False), (302, True)):
        site.robots = (status, "")
        _, lines = await fetched(service, urls=urls[:1], robots=True)
        assert (lines[0]["error"] is None) == allowed, status


async def test_credentials_of_the_settings_are_sent_and_kept_nowhere(
    service: Service, site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HEADWAY_FETCH_CREDENTIALS", json.dumps({site.url(""): {"X-Key": "hunter2"}}))
    elsewhere = site.url("/status/204", "127.0.0.2")
    urls = [site.url("/page/1"), site.url(f"/to?url={elsewhere}"), "http://127.0.0.1:1/"]
    job, lines = await fetched(service, urls=urls)
    _, echoed = await fetched(service, urls=[site.url("/echo")], body="text")

    # The site answers with it, which is the site's to do.
    assert seen(echoed[0])["headers"]["x-key"] == "hunter2"
    assert lines[1]["final_url"] == elsewhere
    out = capsys.readouterr()
    assert "hunter2" not in json.dumps([job, lines]) + out.out + out.err
    answer = await service.http.post(
        "/api/v1/jobs", json={"kind": "http.fetch", "input": {"urls": urls, "headers": {"cOOkie": "hunter3"}}}
    )
    # It is refused before anything is kept.
    assert (answer.status_code, answer.json()["errors"][0]["field"]) == (422, "input.headers")
    assert "hunter3" not in answer.text


async def test_bodies_are_files_of_an_archive(service: Service, site: Site) -> None:
    urls = [site.url("/page/one"), site.url("/status/404"), site.url("/short"), site.url("/echo"), site.url("/bomb")]
    path = await submit(service, urls=urls, body="archive", max_bytes=1000)
    assert (await ended(service, path))["state"] == "succeeded"
    artifact = await service.http.get(f"{path}/artifacts/results.jsonl")
    lines = {line["index"]: line for line in map(json.loads, artifact.text.splitlines())}
    archive = zipfile.ZipFile(io.BytesIO((await service.http.get(f"{path}/artifacts/bodies.zip")).content))

    assert archive.testzip() is None
    assert {lines[index]["file"] for index in (0, 1, 3)} == set(archive.namelist())
    assert [lines[index]["file"] for index in (0, 2, 3, 4)] == ["000000.txt", None, "000003.json", None]
    assert archive.read("000000.txt") == b"page one"
    assert all("body" not in line for line in lines.values())


async def test_a_rate_is_kept_for_each_host(service: Service, site: Site) -> None:
    job, _ = await fetched(service, urls=[site.url(f"/page/{number}") for number in range(11)], rate=20, per_host=10)

    assert job["result"]["seconds"] >= 0.5


async def test_waits_for_another_try_hold_up_no_cancel(service: Service, site: Site) -> None:
    path = await submit(service, urls=[site.url("/falter/1?after=200")], tries=2)
    await until(lambda: site.tries["/falter/1"] == 1)
    await service.http.post(f"{path}/cancel")

    assert (await ended(service, path))["state"] == "cancelled"

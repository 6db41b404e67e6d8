"""What the CLI prints, reads and finds without a server."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from headway.client import ClientError, NotConfigured, credentials, pages
from headway.client.cli import cli
from headway.client.render import Lines
from headway.client.text import as_json, duration, facts, inert, percent, readable, size

DOCS = Path(__file__).parents[2] / "docs"
HOSTILE = "\x1b[2J\x9b31m[red]\u202eevil\u2066\x07\r\n\ud800"


@pytest.fixture(autouse=True)
def nothing_configured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("HEADWAY_URL", "HEADWAY_API_KEY", "HEADWAY_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


def test_nothing_from_a_server_acts_on_a_terminal() -> None:
    shown = inert(HOSTILE)

    assert shown == r"\x1b[2J\x9b31m[red]\u202eevil\u2066\x07\r\n\ud800"
    for harmless in ("Zürich", "東京", "नेपाल", "👩\u200d🚀"):
        assert inert(harmless) == harmless
    assert as_json({HOSTILE: "\x7f"}).isprintable()
    assert json.loads(as_json({HOSTILE: "\x7f"})) == {HOSTILE: "\x7f"}


def test_every_page_is_inert() -> None:
    job = {
        **dict.fromkeys(("id", "kind"), HOSTILE),
        "state": "failed",
        "created_at": "2025-01-01T00:00:00.000Z",
        "started_at": "2025-01-01T00:00:00.000Z",
        "finished_at": "2025-01-01T00:00:01.500Z",
        "cancel_requested_at": None,
        "retry_of": None,
        "parent_id": None,
        "attempt": 2,
        "tags": [HOSTILE],
        "progress": {"done": 1, "total": 2, "unit": HOSTILE, "counts": {HOSTILE: 1}},
        "input": {HOSTILE: HOSTILE},
        "result": {HOSTILE: [{HOSTILE: HOSTILE}]},
        "error": {"type": "fatal", "message": f"first\n{HOSTILE}"},
    }
    schema = {"properties": {HOSTILE: {"type": HOSTILE, "description": HOSTILE, "default": HOSTILE}}}
    kind = {"name": HOSTILE, "description": HOSTILE, "timeout": 1, "input_schema": schema, "result_schema": schema}
    artifact = {"name": HOSTILE, "content_type": HOSTILE, "size": 1, "sha256": HOSTILE}

    lines = [*pages.job(job), *pages.jobs([job]), *pages.kinds([kind]), *pages.kind(kind)]
    lines += [*pages.artifacts([artifact]), pages.artifact(job, artifact)]

    assert "\n".join(lines).replace("\n", "").isprintable()
    assert "error: first\n  " in "\n".join(lines)


@pytest.mark.parametrize(
    ("progress", "shown"),
    [
        (
            {
                "done": 1_200_000,
                "total": 2_900_000,
                "unit": "bytes",
                "counts": {"rows": 21000},
                "rate": 4.8e5,
                "eta": 3.6,
            },
            [" 41 %", "1.2 MB of 2.9 MB", "480 kB/s", "3.6 s left", "21,000 rows"],
        ),
        (
            {"done": 3, "total": 10, "unit": "urls", "rate": 1.5, "eta": 200},
            [" 30 %", "3 of 10 urls", "1.5 urls/s", "3 m 20 s left"],
        ),
        ({"done": 7, "total": None, "unit": "items", "counts": {}, "rate": None, "eta": None}, ["7 items"]),
        ({"done": 0, "total": 0, "unit": "bytes"}, ["0 bytes"]),
    ],
)
def test_progress_in_words(progress: dict[str, Any], shown: list[str]) -> None:
    assert facts(progress) == shown


def test_numbers_for_people() -> None:
    assert [size(value) for value in (0, 999, 1000, 123_456, 5 << 30)] == [
        "0 bytes",
        "999 bytes",
        "1.0 kB",
        "123 kB",
        "5.4 GB",
    ]
    assert [duration(value) for value in (0.04, 59.6, 3600, 90_000)] == ["0.0 s", "1 m", "1 h", "1 d 1 h"]
    assert percent(999_999, 1_000_000) == 99


def test_a_result_is_readable() -> None:
    columns = [{"name": "id", "type": "bigint", "title": None}, {"name": "名前", "type": "text", "title": None}]

    assert readable({"rows": 50000, "ok": True, "columns": columns, "more": {"a": [1]}}) == [
        "rows: 50,000",
        "ok: yes",
        "columns:",
        "  name  type",
        "  id    bigint",
        "  名前  text",
        'more: {"a": [1]}',
    ]


def test_lines_show_states_and_logs_at_once_and_progress_once_a_second() -> None:
    out = io.StringIO()
    running = {"state": "running", "attempt": 1}
    with Lines(out) as lines:
        lines.envelope({"t": "snapshot", "d": {"state": "queued", "progress": None}})
        lines.envelope({"t": "state", "d": running})
        for done in range(100):
            lines.envelope({"t": "progress", "d": {"done": done, "total": 100, "unit": "items"}})
        lines.envelope({"t": "log", "d": {"message": "half\x1b[0m way", "level": "warning"}})
        lines.envelope({"t": "state", "d": {**running, "cancel_requested_at": "2025-01-01T00:00:00Z"}})
        lines.envelope({"t": "state", "d": {"state": "cancelled", "progress": {"done": 99, "total": 100, "rate": 5}}})

    assert out.getvalue().splitlines() == [
        "queued",
        "running",
        r"warning: half\x1b[0m way",
        "running, to be cancelled",
        "cancelled: 99 %, 99 of 100 items",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["submit", "k.k", "--input", '{"a":'], "is not JSON"),
        (["submit", "k.k", "--input", '{"a": NaN}'], "NaN is not a number of JSON"),
        (["submit", "k.k", "--input", "@absent.json"], "absent.json cannot be read"),
        (["submit", "k.k", "--file", "absent.csv"], "there is no file absent.csv"),
        (["submit", "k.k", "--file", "here.csv", "--input", '{"file": 1}'], "'file' of the input is given twice"),
        (["submit", "k.k", "--file", "a=here.csv", "--file", "a=@here.csv"], "'a' of the input is given twice"),
        (["submit", "k.k", "--file", "here.csv", "--input", "[]"], "JSON object"),
        (["get", "7"], "not a valid UUID"),
        (["download", "01975e13-0000-7000-8000-000000000000", "here.csv"], "-o here.csv replaces it"),
    ],
)
def test_wrong_usage_is_told_before_a_server_is_asked(arguments: list[str], message: str) -> None:
    Path("here.csv").write_text("a\n1\n")

    result = CliRunner().invoke(cli, arguments)

    assert result.exit_code == 2
    assert message in result.output


def test_the_server_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotConfigured, match="HEADWAY_URL"):
        credentials.find()
    Path(".headway").mkdir()
    Path(".headway/compose-credentials.json").write_text('{"url": "http://compose", "api_key": "c"}')
    assert credentials.find() == ("http://compose", "c")
    Path(".headway/credentials.json").write_text('{"url": "http://run", "api_key": "r"}')
    assert credentials.find() == ("http://run", "r")
    assert credentials.find("http://RUN/") == ("http://RUN/", "r")
    assert credentials.find(None, "mine") == ("http://run", "mine")
    with pytest.raises(NotConfigured, match="is for http://run"):
        credentials.find("http://elsewhere")
    monkeypatch.setenv("HEADWAY_URL", "http://environment")
    monkeypatch.setenv("HEADWAY_API_KEY", "e")
    assert credentials.find() == ("http://environment", "e")
    assert credentials.find("http://argument", "a") == ("http://argument", "a")
    monkeypatch.delenv("HEADWAY_URL")
    monkeypatch.delenv("HEADWAY_API_KEY")
    Path(".headway/credentials.json").write_text("{")
    with pytest.raises(NotConfigured, match=r"credentials\.json cannot be used"):
        credentials.find()


@pytest.mark.parametrize(
    "url", ["", "jobs.example.com", "ftp://x", "http://", "http://a:b@c", "http://x?y", "http://x:0"]
)
def test_a_url_that_cannot_be_used_is_refused(url: str) -> None:
    with pytest.raises(NotConfigured, match="must look like"):
        credentials.check_url(url)


@pytest.mark.parametrize("key", ["", "hw_live_…", "hw live", "hw\n"])
def test_a_key_that_cannot_be_sent_is_refused(key: str) -> None:
    with pytest.raises(ClientError, match="API key"):
        credentials.check_key(key)


def test_help_imports_nothing_slow() -> None:
    slow = "httpx", "rich", "websockets", "asyncio"
    code = f"import headway.client.cli, sys; print([name for name in {slow} if name in sys.modules])"

    assert subprocess.check_output([sys.executable, "-c", code], text=True, env=os.environ) == "[]\n"


def test_the_documentation_names_every_command_and_option() -> None:
    page = (DOCS / "cli.md").read_text()
    sections = dict(re.findall(r"^## `headway (\w+)[^`]*`\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL))

    assert sections.keys() == cli.commands.keys()
    for name, command in cli.commands.items():
        assert f"headway {name} " in sections[name].split("```")[1] + " ", f"an example of {name} is missing"
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                for option in parameter.opts:
                    assert f"`{option}" in sections[name], f"{name} {option} is missing"
    for parameter in cli.params:
        assert f"`{parameter.opts[-1]}" in page

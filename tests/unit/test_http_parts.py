"""The parts of http.fetch that need no server: rules of robots.txt, Retry-After, templates."""

import asyncio
import csv
import io
import time
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from headway import Fatal
from services.worker.kinds.http_retries import retry_after
from services.worker.kinds.http_robots import Rules
from services.worker.kinds.http_rows import Format, Rows
from services.worker.kinds.http_templates import JsonTemplate, Template, url_template
from tests.unit.test_csv_text import InMemory


@pytest.mark.parametrize(
    ("rules", "path", "allowed"),
    [
        # The examples of RFC 9309, and what else servers write.
        ("", "/", True),
        ("Disallow:", "/x", True),
        ("Disallow: /", "/x", False),
        ("Disallow: /fish", "/fish.html", False),
        ("Disallow: /fish", "/fishheads/yummy.html", False),
        ("Disallow: /fish", "/Fish.asp", True),
        ("Disallow: /fish*", "/fish", False),
        ("Disallow: /fish/", "/fish", True),
        ("Disallow: /*.php", "/a/b.php?x", False),
        ("Disallow: /*.php$", "/a.php", False),
        ("Disallow: /*.php$", "/a.php?x", True),
        ("Disallow: /fish*.php", "/fishheads/catfish.php?x", False),
        ("Disallow: /$", "/", False),
        ("Disallow: /$", "/x", True),
        ("Allow: /p\nDisallow: /", "/page", True),
        ("Allow: /folder\nDisallow: /folder", "/folder/page", True),
        ("Allow: /page\nDisallow: /*.htm", "/page.htm", False),
        ("Allow: /$\nDisallow: /", "/", True),
        ("Disallow: /foo/bar?baz=http://foo.bar", "/foo/bar?baz=http://foo.bar", False),
        ("Disallow: /ツ", "/%E3%83%84", False),
        ("Disallow: /%E3%83%84", "/ツ", False),
        ("Disallow: /a%3cd", "/a%3Cd.html", False),
        ("disallow : /x # why", "/x", False),
        ("Crawl-delay: 5\nDisallow: /x", "/x", False),
    ],
)
def test_the_longest_rule_decides(rules: str, path: str, allowed: bool) -> None:
    assert Rules.parse(f"User-agent: *\n{rules}").allow(path) is allowed


@pytest.mark.parametrize(
    ("text", "allowed"),
    [
        ("User-agent: other\nDisallow: /\n", True),
        ("User-agent: other\nUser-agent: headway\nDisallow: /\n", False),
        ("User-agent: Headway/1.0\nDisallow: /\n", False),
        ("User-agent: *\nDisallow: /\n\nUser-agent: HEADWAY\nDisallow: /y\n", True),
        ("User-agent: headway\nDisallow: /y\n\nUser-agent: headway\nDisallow: /x\n", False),
        ("User-agent: headways\nDisallow: /\n", True),
        ("Disallow: /\nUser-agent: *\n", True),
        ("\ufeffUser-agent: *\r\nDisallow: /\r\n", False),
        ("<html>no such page</html>", True),
    ],
)
def test_the_group_that_names_us_counts(text: str, allowed: bool) -> None:
    assert Rules.parse(text).allow("/x") is allowed


@given(st.text(alphabet="ab*$/%:\n", max_size=200), st.text(alphabet="ab/%", max_size=100))
def test_any_file_is_read_and_any_path_is_judged(text: str, path: str) -> None:
    Rules.parse(f"User-agent: *\nDisallow: {text}").allow(path)


def test_a_rule_made_to_be_slow_is_not() -> None:
    rules = Rules.parse("User-agent: *\nDisallow: /" + "*a" * 900 + "b")
    began = time.process_time()

    assert rules.allow("/" + "a" * 2000)
    assert time.process_time() - began < 2


def test_retry_after_is_seconds_or_a_date() -> None:
    later = format_datetime(datetime.now(UTC) + timedelta(seconds=60), usegmt=True)
    assert 55 < (retry_after(later) or 0) <= 60
    assert retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    assert [retry_after(value) for value in ("7", " 0 ", "", "soon", "-1", "1.5", "\u0661", "9" * 400)] == [
        *(7, 0, None, None, None, None, None),
        9_999_999_999,
    ]


def test_templates_take_values_as_they_are_or_encoded() -> None:
    row = {"id": 7, "name": "a b/é", "none": None, "list": [1, "x"], "first name": "Ada"}

    assert url_template("https://x/{id}/{name}?{none}").fill(row) == "https://x/7/a%20b%2F%C3%A9?"
    assert url_template("{name}").fill(row) == "a b/é"
    assert Template("{list} {first name} {} {{id}} {1}").fill(row) == '[1,"x"] Ada {} {7} {1}'
    assert JsonTemplate({"a": "{list}", "{id}": ["{id}", "n {id}", 1]}).fill(row) == {
        "a": [1, "x"],
        "{id}": [7, "n 7", 1],
    }
    assert JsonTemplate({"a": ["{id} {name}", {"b": "{none}"}]}).names == ["id", "name", "none"]
    with pytest.raises(KeyError, match="nope"):
        Template("{nope}").fill(row)


cells = st.text(alphabet='ab,;"\n é{}', max_size=6)


@given(
    rows=st.lists(st.tuples(cells, cells, cells), min_size=1, max_size=12),
    delimiter=st.sampled_from(",;\t"),
    step=st.integers(1, 40),
)
def test_rows_of_csv_are_read_as_they_were_written_however_they_arrive(
    rows: list[tuple[str, str, str]], delimiter: str, step: int
) -> None:
    written = io.StringIO()
    writer = csv.writer(written, delimiter=delimiter, quoting=csv.QUOTE_ALL)
    writer.writerows([("id", "url", "last one"), *rows])

    async def read() -> tuple[int, list[object]]:
        found = await Rows.open(InMemory(written.getvalue().encode(), step), "csv")
        return await found.count(), [row async for row in found.read()]

    expected = [dict(zip(("id", "url", "last one"), row, strict=True)) for row in rows]
    assert asyncio.run(read()) == (len(rows), expected)


@given(st.binary(max_size=300), st.sampled_from(["text", "csv", "jsonl"]), st.integers(1, 50))
@example(b"\r\0", "csv", 1)
def test_any_bytes_are_rows_or_a_refusal(data: bytes, format: Format, step: int) -> None:
    async def read() -> None:
        with suppress(Fatal):
            await (await Rows.open(InMemory(data, step), format)).count()

    asyncio.run(read())

"""The live protocol is described, and what is sent is what is described."""

import re
from html.parser import HTMLParser
from pathlib import Path

import httpx

from headway.embedded import Embedded
from headway.settings import Settings
from tests.conftest import web

DOCS = Path(__file__).parents[2] / "docs"


async def test_the_description_is_served_to_anybody(settings: Settings) -> None:
    from tests.described import DOCUMENT

    async with web(settings) as url, httpx.AsyncClient(base_url=url, trust_env=False, verify=False) as http:
        answer = await http.get("/api/v1/asyncapi.json")
    assert answer.headers["content-type"] == "application/json"
    assert answer.json() == DOCUMENT
    assert answer.json()["asyncapi"] == "3.1.0"


async def test_every_frame_has_an_example_that_fits(servers: Embedded) -> None:
    from tests.described import DOCUMENT, validator

    for name, message in DOCUMENT["components"]["messages"].items():
        assert message["examples"], f"{name} has no example"
        for example in message["examples"]:
            validator(message["payload"]).validate(example["payload"])


async def test_frames_in_the_documentation_are_frames_of_the_protocol(servers: Embedded) -> None:
    from services.web.live import commands
    from tests.described import faults

    shown = re.findall(r"^(<|>|data:) (.*)$", (DOCS / "live.md").read_text(), re.MULTILINE)
    whole = [(mark, text) for mark, text in shown if "…" not in text]
    for mark, text in whole:
        if mark == ">":
            assert not isinstance(commands.read(text), tuple)
        else:
            assert faults(text) == []
    assert len(whole) >= 8


async def test_every_close_code_is_described(servers: Embedded) -> None:
    from services.web.live import session, writer
    from tests.described import DOCUMENT

    sent = {value for module in (session, writer) for value in vars(module).values() if type(value) is int}
    described = {row["code"] for row in DOCUMENT["x-close-codes"]}
    assert {code for code in sent if code in range(1000, 1016) or code in range(4000, 4600)} <= described
    page = (DOCS / "live.md").read_text()
    assert all(str(code) in page for code in described)


class Page(HTMLParser):
    """What a page loads, runs and names."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.ids: set[str] = set()
        self.anchors: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        assert tag not in ("script", "style")
        assert not [name for name in found if name == "style" or name.startswith("on")]
        self.ids |= {found["id"]} if "id" in found else set()
        if tag == "link":
            self.loads.append(found["href"])
        elif tag == "a" and found["href"].startswith("#"):
            self.anchors.add(found["href"][1:])


async def test_the_page_shows_every_frame_and_needs_nothing_from_elsewhere(settings: Settings) -> None:
    from tests.described import DOCUMENT

    async with web(settings) as url, httpx.AsyncClient(base_url=url, trust_env=False, verify=False) as http:
        answer = await http.get("/api/v1/live")
        page = Page()
        page.feed(answer.text)
        for path in page.loads:
            assert (await http.get(path)).status_code == 200
    assert page.ids >= DOCUMENT["components"]["messages"].keys()
    assert page.anchors <= page.ids
    assert all(path.startswith("/static/") for path in page.loads)
    assert re.search(r"4504.*too many sockets", answer.text)

"""The tutorial, run as it stands: its files are written, its commands are run, and what it shows is what they print."""

import asyncio
import os
import re
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from headway.embedded import Embedded
from tests.conftest import web
from tests.engine import Engine
from tests.engine import engine as make_engine
from tests.faults.conftest import Spawner

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture
async def engine(servers: Embedded, tmp_path: Path) -> AsyncIterator[Engine]:
    async with make_engine(servers, tmp_path / "home") as engine:
        yield engine


class Reader:
    """Someone who does what the tutorial says, in a folder of their own."""

    def __init__(self, engine: Engine, folder: Path) -> None:
        self._engine = engine
        self._folder = folder
        self._stack = AsyncExitStack()
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HEADWAY_", "PYTEST"))}
        self._environment = {**kept, "PATH": path, "PYTHONPATH": str(ROOT)}

    async def read(self, page: str) -> None:
        async with self._stack:
            for language, text in BLOCK.findall(page):
                if name := re.match(r"# (\S+\.(?:py|toml))\n", text):
                    (self._folder / name[1]).write_text(text)
                elif language == "console":
                    for command, shown in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", text, re.MULTILINE):
                        await self._do(command, shown)

    async def _do(self, command: str, shown: str) -> None:
        if command.endswith("make run"):
            await self._serve(command)
            return
        if command.startswith("pip install --quiet"):
            return
        # Not into the environment of these tests, and from what is there.
        site = self._folder / "site"
        command = command.replace("pip install", f"pip install -q --no-index --no-build-isolation --target {site}")
        process = await asyncio.create_subprocess_shell(
            command,
            cwd=self._folder,
            env=self._environment,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        output = (await process.communicate())[0].decode()
        assert (process.returncode == 0) == ("Error" not in shown), output
        printed = [_plain(line) for line in output.splitlines()]
        for line in filter(None, shown.splitlines()):
            assert _plain(line) in printed, f"{line!r} is not in:\n{output}"

    async def _serve(self, command: str) -> None:
        """What `make run` does, on the servers that there are."""
        given = dict(re.findall(r"(\w+)=(\S+)", command.replace("$PWD", str(self._folder))))
        spawner = Spawner(self._engine, self._folder)
        self._stack.push_async_callback(spawner.end)
        given["PYTHONPATH"] += f"{os.pathsep}{ROOT}"
        await spawner(**given)
        self._environment["HEADWAY_URL"] = await self._stack.enter_async_context(web(self._engine.settings))
        self._environment["HEADWAY_API_KEY"] = self._engine.tenant.api_key


def _plain(line: str) -> str:
    """A line that a command prints, without what is another each time: ids, seconds, widths."""
    return re.sub(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}|in [\d.]+s.*", "", " ".join(line.split()))


@pytest.mark.timeout(300)
async def test_the_tutorial_does_what_it_says(engine: Engine, tmp_path: Path) -> None:
    folder = tmp_path / "ours"
    folder.mkdir()
    (folder / "examples").symlink_to(ROOT / "examples")
    page = (ROOT / "docs" / "tutorial.md").read_text()

    await Reader(engine, folder).read(page)

    # Installed, its kind is found without a setting.
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-c", "from headway import kinds; print('report.build' in kinds.discover())"),
        env={**os.environ, "PYTHONPATH": f"{folder / 'site'}{os.pathsep}{ROOT}"},
        cwd=tmp_path,
        stdout=asyncio.subprocess.PIPE,
    )
    assert (await process.communicate())[0] == b"True\n"


def test_the_worker_image_finds_modules_where_the_pages_copy_them() -> None:
    """`make e2e` shows that it runs them."""
    pages = [(ROOT / "docs" / page).read_text() for page in ("tutorial.md", "deploy.md")]
    copied = [place for page in pages for place in re.findall(r"^FROM headway-worker\nCOPY \S+ (\S+)/$", page, re.M)]
    assert copied == ["/kinds", "/kinds"]
    worker = (ROOT / "Dockerfile").read_text().partition("AS worker\n")[2].partition("FROM ")[0]
    assert "ENV PYTHONPATH=/kinds\n" in worker


def test_the_modules_of_the_pages_about_kinds_can_be_imported(tmp_path: Path) -> None:
    """Their blocks stand in one module, in the order of the page."""
    page = (ROOT / "docs" / "writing-kinds.md").read_text()
    module = "\n".join(text for language, text in BLOCK.findall(page) if language == "python")
    code = compile(module, "writing-kinds.md", "exec")
    before = dict(_registries()[0]), dict(_registries()[1])
    try:
        exec(code, {"__name__": "writing_kinds"})
        assert len(_registries()[0]) > len(before[0])
    finally:
        for registry, kept in zip(_registries(), before, strict=True):
            registry.clear()
            registry.update(kept)


def _registries() -> tuple[dict[str, object], dict[str, object]]:
    from headway import kinds, startup

    return kinds._registry, startup._registry  # type: ignore[return-value]

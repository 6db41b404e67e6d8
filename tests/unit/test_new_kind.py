"""`headway kinds new`: what it writes, and what it refuses to. That it runs is shown by the tutorial's test."""

from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from headway import kinds
from headway.client.cli import cli
from headway.client.kinds import NAME


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def new(name: str) -> Result:
    return CliRunner().invoke(cli, ["kinds", "new", name])


def test_a_new_kind_has_the_name_that_was_asked_for(tmp_path: Path) -> None:
    result = new("import.class_2.x")

    assert result.exit_code == 0, result.output
    assert result.output.startswith("Wrote import_class_2_x.py and test_import_class_2_x.py.")
    module, test = (tmp_path / f"{prefix}import_class_2_x.py" for prefix in ("", "test_"))
    assert '@kind("import.class_2.x", ' in module.read_text()
    assert "class ImportClass2X(BaseModel):" in module.read_text()
    for written in (module, test):
        compile(written.read_text(), written, "exec")
        assert "$" not in written.read_text()


@pytest.mark.parametrize("there", ["report_build.py", "test_report_build.py"])
def test_a_new_kind_writes_over_nothing_and_leaves_no_half(there: str, tmp_path: Path) -> None:
    (tmp_path / there).write_text("mine")

    result = new("report.build")

    assert result.exit_code == 1
    assert there in result.output
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {there: "mine"}


@given(st.one_of(st.text(), st.from_regex(r"[a-zA-Z0-9_.]{1,12}", fullmatch=True)))
def test_a_name_that_is_refused_for_a_kind_is_refused_for_a_new_one(name: str) -> None:
    assert bool(NAME.fullmatch(name)) == bool(kinds.NAME.fullmatch(name))


@pytest.mark.parametrize("name", ["report", "Report.build", "../report.build", "report.build\n", "a." + "b" * 100])
def test_a_name_that_no_kind_can_have_writes_nothing(name: str, tmp_path: Path) -> None:
    result = new(name)
    assert result.exit_code == 2
    assert "two or more words with dots, such as report.build" in " ".join(result.output.split())
    assert list(tmp_path.iterdir()) == []

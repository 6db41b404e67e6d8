"""What a job author may write, and what is said to one who writes something else."""

import sys
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from headway import JobContext, Progress, SyncJobContext, kind, kinds, on_startup, startup
from headway.errors import InvalidSettings


class Input(BaseModel):
    model_config = ConfigDict(extra="forbid")

    rows: int = Field(ge=1, description="How many.")


class Result(BaseModel):
    total: Decimal


@pytest.fixture(autouse=True)
def registry() -> Iterator[None]:
    """What a test registers is forgotten after it."""
    before, opened_before = kinds.discover(), dict(startup._registry)
    yield
    kinds._registry.clear()
    kinds._registry.update(before)
    startup._registry.clear()
    startup._registry.update(opened_before)


def test_a_kind_is_announced_with_its_name_description_timeout_and_schemas() -> None:
    @kind("report.build", timeout="30m")
    async def build(job: JobContext, input: Input) -> Result:
        """Builds a report
        over two lines.

        This is for authors.
        """
        return Result(total=Decimal(0))

    announced = kinds.discover()["report.build"].as_json()

    assert announced["name"] == "report.build"
    assert announced["description"] == "Builds a report over two lines."
    assert announced["timeout"] == 1800
    assert announced["input_schema"]["properties"]["rows"]["minimum"] == 1
    assert announced["input_schema"]["additionalProperties"] is False
    assert announced["result_schema"]["properties"]["total"]["type"] == "string"


def test_what_annotated_says_of_input_and_result_is_in_the_schemas_and_checked() -> None:
    @kind("report.build")
    async def build(
        job: JobContext, input: Annotated[int, Field(ge=1)]
    ) -> list[Annotated[str, Field(max_length=3)]]: ...

    made = kinds.discover()["report.build"]

    assert made.as_json()["input_schema"]["minimum"] == 1
    assert made.as_json()["result_schema"]["items"]["maxLength"] == 3
    with pytest.raises(ValidationError, match="greater than or equal to 1"):
        made.input.validate_python(0)


@pytest.mark.parametrize(
    ("duration", "seconds"), [("500ms", 0.5), ("1.5h", 5400), ("2d", 172800), ("90s", 90), (7, 7.0), (0.25, 0.25)]
)
def test_durations_are_read(duration: str | float, seconds: float) -> None:
    assert kinds.seconds(duration) == seconds


@given(st.text())
def test_what_is_not_a_duration_is_said_to_be_none(text: str) -> None:
    if not kinds.DURATION.fullmatch(text):
        with pytest.raises(InvalidSettings, match="is not a duration; write"):
            kinds.seconds(text)


@pytest.mark.parametrize("timeout", ["0s", 0, -1, float("inf"), float("nan")])
def test_a_timeout_that_no_job_can_keep_is_refused(timeout: str | float) -> None:
    with pytest.raises(InvalidSettings, match=r"report\.build.*above zero"):
        kind("report.build", timeout=timeout)


@pytest.mark.parametrize("name", ["report", "Report.build", "report.", ".build", "report build", "report.1", ""])
def test_a_name_of_another_form_is_refused(name: str) -> None:
    async def build(job: JobContext, input: Input) -> Result: ...  # type: ignore[empty-body]

    with pytest.raises(InvalidSettings, match="two or more words with dots"):
        kind(name)(build)


async def no_result(job: JobContext, input: Input): ...  # type: ignore[no-untyped-def]
async def no_input(job: JobContext) -> None: ...
async def untyped_input(job: JobContext, input) -> None: ...  # type: ignore[no-untyped-def]


@pytest.mark.parametrize("handler", [no_result, no_input, untyped_input])
def test_a_handler_of_another_form_is_refused_and_shown_the_right_one(handler: Callable[..., Any]) -> None:
    with pytest.raises(InvalidSettings, match=r"async def build\(job: JobContext, input: In\) -> Out"):
        kind("report.build")(handler)


def plain(job: SyncJobContext, input: Input) -> Result: ...  # type: ignore[empty-body]
def plain_with_the_async_context(job: JobContext, input: Input) -> None: ...
async def with_the_plain_context(job: SyncJobContext, input: Input) -> None: ...
async def yields_untold(job: JobContext, input: Input) -> Result:  # type: ignore[misc]
    yield Result(total=Decimal(0))


def returns_its_result(job: SyncJobContext, input: Input) -> Generator[Progress, None, Result]:
    yield Progress(1)
    return Result(total=Decimal(0))


@pytest.mark.parametrize(
    ("handler", "runs", "said"),
    [
        (plain, None, 'a plain function, .*: write runs="thread" if it waits.*runs="process" if it computes'),
        (plain, "worker", 'write runs="thread"'),
        (no_result, "thread", "is async and needs no thread: leave runs out"),
        (plain, "elsewhere", 'write "thread" or "process", or leave it out'),
        (plain_with_the_async_context, "thread", r"look like `def build\(job: SyncJobContext, input: In\) -> Out`"),
        (with_the_plain_context, None, r"look like `async def build\(job: JobContext, input: In\) -> Out`"),
        (yields_untold, None, r"-> AsyncIterator\[Progress \| Out\]`: its result is yielded last"),
        (returns_its_result, "thread", r"-> Iterator\[Progress \| Out\]`: its result is yielded last"),
    ],
)
def test_a_handler_that_cannot_run_where_it_says_is_refused_with_what_to_do(
    handler: Callable[..., Any], runs: Any, said: str
) -> None:
    with pytest.raises(InvalidSettings, match=rf"report\.build.*{said}"):
        kind("report.build", runs=runs)(handler)
    assert "report.build" not in kinds.discover()


def test_a_plain_function_and_a_generator_are_announced_like_any_other() -> None:
    def build(job: SyncJobContext, input: Input) -> Iterator[Progress | Result]:
        """Builds."""
        yield Result(total=Decimal(0))

    kind("report.build", runs="thread")(build)
    kind("report.other", runs="process")(plain)

    announced = [kinds.discover()[name].as_json() for name in ("report.build", "report.other")]
    assert announced[0]["description"] == "Builds."
    assert announced[0]["result_schema"] == announced[1]["result_schema"]
    assert announced[0]["result_schema"]["properties"]["total"]["type"] == "string"
    assert announced[0]["input_schema"] == announced[1]["input_schema"]


class Pool: ...


class Cache: ...


async def pool() -> AsyncIterator[Pool]:
    yield Pool()


async def other_pool() -> AsyncIterator[Pool]:
    yield Pool()


async def needs_a_pool(job: JobContext, input: Input, pool: Pool) -> None: ...


def test_a_handler_takes_what_functions_of_on_startup_yield_by_its_type() -> None:
    on_startup(pool)
    kind("report.build")(needs_a_pool)

    assert [need.name.rpartition(".")[2] for need in kinds.discover()["report.build"].needs.values()] == ["pool"]
    assert kinds.discover()["report.build"].as_json()["input_schema"]["title"] == "Input"


def test_a_parameter_that_nothing_yields_is_refused_and_so_is_one_that_two_do() -> None:
    with pytest.raises(InvalidSettings, match=r"report\.build takes pool: Pool, but no function with @on_startup"):
        kind("report.build")(needs_a_pool)
    on_startup(pool)
    on_startup(other_pool)
    with pytest.raises(InvalidSettings, match=r"takes pool: Pool, but .*\.pool and .*\.other_pool yield that"):
        kind("report.build")(needs_a_pool)


async def no_generator() -> Pool: ...  # type: ignore[empty-body]
async def of_a_parameter(url: str) -> AsyncIterator[Pool]:
    yield Pool()


def plain_generator() -> Iterator[Pool]:
    yield Pool()


async def untold():  # type: ignore[no-untyped-def]
    yield Pool()


@pytest.mark.parametrize("function", [no_generator, of_a_parameter, plain_generator, untold])
def test_a_function_of_on_startup_of_another_form_is_refused_and_shown_the_right_one(function: Any) -> None:
    with pytest.raises(InvalidSettings, match=r"must look like `async def warehouse\(\) -> AsyncIterator\[Pool\]`"):
        on_startup(function)


class Opaque:
    pass


async def opaque_input(job: JobContext, input: Opaque) -> None: ...
async def no_schema(job: JobContext, input: Callable[[], None]) -> None: ...
async def unknown_name(job: JobContext, input: "Nowhere") -> None: ...  # type: ignore[name-defined]  # noqa: F821


@pytest.mark.parametrize("handler", [opaque_input, no_schema, unknown_name])
def test_annotations_without_a_schema_are_refused(handler: Callable[..., Any]) -> None:
    with pytest.raises(InvalidSettings, match=r"annotations of report\.build have no JSON Schema"):
        kind("report.build")(handler)
    assert "report.build" not in kinds.discover()


def test_a_name_that_is_taken_is_refused_also_within_one_module() -> None:
    async def first(job: JobContext, input: Input) -> None: ...
    async def second(job: JobContext, input: Input) -> None: ...

    kind("report.build")(first)
    kind("report.build")(first)
    with pytest.raises(InvalidSettings, match=r"defined twice: by .*first and by .*second"):
        kind("report.build")(second)


def test_the_kinds_in_the_box_and_those_of_a_module_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_kinds.py").write_text(
        "from headway import JobContext, kind\n"
        "@kind('my.own')\n"
        "async def own(job: JobContext, input: int) -> int:\n"
        "    return input\n"
    )
    monkeypatch.syspath_prepend(tmp_path)

    assert {"csv.import", "http.fetch", "demo.countdown", "my.own"} <= kinds.discover(["my_kinds"]).keys()
    sys.modules.pop("my_kinds")


def test_a_module_that_cannot_be_imported_is_named() -> None:
    with pytest.raises(InvalidSettings, match=r"'no_such_module' cannot be imported"):
        kinds.discover(["no_such_module"])


def test_a_module_that_fails_says_what_and_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_kinds.py").write_text("import math\n\nmath.no_such_name\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InvalidSettings, match=r"'broken_kinds'.*AttributeError.*broken_kinds\.py, line 3"):
        kinds.discover(["broken_kinds"])

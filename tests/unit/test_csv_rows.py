import csv
import io
import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from services.worker.kinds import csv_rows
from services.worker.kinds.csv_layout import RECORD_LIMIT, Dialect, Layout, read_layout
from services.worker.kinds.csv_rows import Rejected, RowReader
from services.worker.kinds.csv_types import PATTERNS, ColumnType

CELLS = st.one_of(
    st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8),
    st.text(',;"\n\r\\. a', max_size=5),
    st.integers().map(str),
    st.decimals(allow_nan=False, allow_infinity=False, places=2).map(str),
    st.dates().map(str),
    st.sampled_from(["", "true", "007", r"\.", "\\"]),
)
TABLES = st.integers(1, 4).flatmap(lambda width: st.lists(st.lists(CELLS, min_size=width, max_size=width), min_size=1))
DIALECTS = st.fixed_dictionaries(
    {
        "delimiter": st.sampled_from(",;\t|^ -:'\x1f"),
        "quotechar": st.sampled_from([None, '"', "'", "`", "^"]),
        "escapechar": st.sampled_from([None, "\\", "!", "^"]),
        "doublequote": st.booleans(),
        "lineterminator": st.sampled_from(["\n", "\r\n", "\r"]),
        "quoting": st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC, csv.QUOTE_NONE]),
    }
).filter(
    lambda dialect: (
        (dialect["quotechar"] or dialect["quoting"] == csv.QUOTE_NONE)
        and dialect["quotechar"] != dialect["escapechar"]
        and dialect["delimiter"] not in (dialect["quotechar"], dialect["escapechar"])
    )
)


def layout(width: int, delimiter: str = ",", line_end: bytes = b"\n") -> Layout:
    names = tuple(f"c{number}" for number in range(width))
    return Layout(Dialect(delimiter), line_end, titles=names, names=names, types=(None,) * width, start=0, lines=1)


def read(reader: RowReader, data: bytes, step: int = 1 << 16) -> bytes:
    """What the reader gives back for the data in pieces of `step` bytes."""
    given = []
    for place in range(0, len(data), step):
        given.append(reader.match(data[place : place + step]))
        if reader.stuck:
            given.append(reader.resolve())
    return b"".join([*given, reader.end()])


def parsed(data: bytes, delimiter: str = ",") -> list[list[str]]:
    text = io.StringIO(data.decode(), newline="")
    return [row for row in csv.reader(text, delimiter=delimiter, strict=True) if row]


def lines(reader: RowReader) -> list[tuple[int, str]]:
    return [(rejected.line, rejected.reason) for rejected in reader.rejected]


@given(TABLES, st.sampled_from(",;\t|"), st.sampled_from(["\n", "\r\n", "\r"]), st.integers(1, 50), st.booleans())
def test_what_the_csv_module_writes_is_given_back_the_same(
    table: list[list[str]], delimiter: str, line_end: str, step: int, ended: bool
) -> None:
    written = io.StringIO()
    csv.writer(written, delimiter=delimiter, lineterminator=line_end, quoting=csv.QUOTE_ALL).writerows(table)
    data = written.getvalue().encode()
    reader = RowReader(layout(len(table[0]), delimiter, line_end.encode()))

    given = read(reader, data if ended else data.removesuffix(line_end.encode()), step)

    assert parsed(given, delimiter) == table
    assert reader.rows == len(table)
    assert (reader.rejected, reader.fault) == ([], "")


@given(TABLES, DIALECTS, st.integers(1, 50))
def test_what_the_csv_module_writes_in_any_dialect_is_given_back_the_same(
    table: list[list[str]], dialect: dict[str, Any], step: int
) -> None:
    table = [[f"c{place}" for place in range(len(table[0]))], *table]
    written = io.StringIO()
    try:
        csv.writer(written, **dialect).writerows(table)
        # Some of what the module writes, such as a lone carriage return, not even the module can read.
        assume(list(csv.reader(io.StringIO(written.getvalue(), newline=""), **dialect)) == table)
    except csv.Error:
        assume(False)
    data = written.getvalue().encode()

    found = read_layout(
        data,
        whole=True,
        delimiter=dialect["delimiter"],
        quote="" if dialect["quoting"] == csv.QUOTE_NONE else dialect["quotechar"],
        escape=dialect["escapechar"],
    )
    reader = RowReader(found)
    given = read(reader, data[found.start :], step)

    assert found.titles == tuple(table[0])
    assert parsed(given, dialect["delimiter"]) == table[1:]
    assert (reader.rows, reader.rejected, reader.fault) == (len(table) - 1, [], "")


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"1,!\n2,b\n", [["1", "\n2", "b"]]),
        (b"1,'a,!'b!!'\n", [["1", "a,'b!"]]),
        (b"1,'a''b'\n", [["1", "a'b"]]),
    ],
)
def test_escapes_hold_in_quotes_and_outside(data: bytes, expected: list[list[str]]) -> None:
    reader = RowReader(replace(layout(len(expected[0])), dialect=Dialect(",", "'", "!")))

    assert parsed(read(reader, data)) == expected


@given(
    st.lists(st.sampled_from([*"'!,a\n", "''", "'a\nb'", "!\n"]), max_size=40),
    st.sampled_from(["'", ""]),
    st.sampled_from(["!", None]),
    st.integers(1, 9),
)
def test_rows_that_are_too_long_end_where_they_do_in_every_dialect(
    marks: list[str], quote: str, escape: str | None, step: int
) -> None:
    """Where a piece ends, also within quotes or after an escape, makes no difference."""
    dialect = replace(layout(1), dialect=Dialect(",", quote, escape))
    data = "".join(marks).encode() + b"\n"
    skipping = csv_rows._Skipping(dialect)
    skipping.begin(1, b"")
    whole = skipping.after(data)
    pieces = csv_rows._Skipping(dialect)
    pieces.begin(1, b"")
    rest = b""
    for place in range(0, len(data), step):
        piece = data[place : place + step]
        rest += pieces.after(piece) if pieces.line else piece
    assert (rest, pieces.line, pieces.in_quotes, pieces.escaping) == (
        whole,
        skipping.line,
        skipping.in_quotes,
        skipping.escaping,
    )


def test_rows_that_do_not_fit_a_given_type_are_rejected() -> None:
    given = replace(layout(3), types=(ColumnType.BIGINT, None, ColumnType.TEXT))
    reader = RowReader(given)

    read(reader, b"1,1,1\n" * 300 + b"x,1,1\n,,\n" + b"1,x,1\n" * 300 + b"9223372036854775808,1,1\n")

    assert [column_type.sql for column_type in reader.types] == ["bigint", "text", "text"]
    assert reader.rows == 601
    assert lines(reader) == [(302, "c0 is no bigint: x"), (604, "c0 is no bigint: 9223372036854775808")]


@given(
    st.integers(1, 3),
    st.lists(st.sampled_from([*'",;\n\r\0a1. \\', '""', ',"', '",', "\r\n", "é", "1,2\n", '"a\nb",3\n'])),
    st.lists(st.sampled_from([*'",\n\r\0a1', "é", "1,2\n", "2024-01-01,1\n"])),
    st.binary(max_size=3),
)
def test_pieces_of_any_size_give_the_same(width: int, first: list[str], second: list[str], bad: bytes) -> None:
    data = "".join(first).encode() + bad + "".join(second).encode()
    whole = RowReader(layout(width))
    rows = parsed(read(whole, data))
    # With the types known from the start, the regular expression and not the parser sees most rows.
    for step in (1, 2, 7):
        reader = RowReader(layout(width), whole.types)
        assert parsed(read(reader, data, step)) == rows
        assert (reader.rows, reader.rejected, reader.fault) == (len(rows), whole.rejected, whole.fault)


@given(
    st.integers(1, 3),
    st.lists(st.sampled_from([*'",;\n\0a1', '""', "é", "1,2\n", '"a\nb",3\n', "x" * 9]), max_size=30),
    st.binary(max_size=3),
    st.integers(1, 9),
)
def test_another_reader_goes_on_between_any_two_rows(width: int, data: list[str], bad: bytes, step: int) -> None:
    file = "".join(data).encode() + bad + b"\n1\n"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(csv_rows, "RECORD_LIMIT", 25)
        whole = RowReader(layout(width))
        rows = parsed(read(whole, file))
        first, given = RowReader(layout(width)), b""
        for place in range(0, len(file), step):
            given += first.match(file[place : place + step]) + first.resolve()
            if first.between_rows:
                second = RowReader(layout(width), first.types, offset=first.offset, lines=first.lines, rows=first.rows)
                rest = read(second, file[first.offset :])
                assert parsed(given) + parsed(rest) == rows
                assert first.rejected + second.rejected == whole.rejected
                assert (second.rows, second.types, second.fault) == (whole.rows, whole.types, whole.fault)


def test_clean_rows_are_passed_on_as_they_are() -> None:
    rows = b'1,"a ""b""",2.50\n2,"c\nd",\n'
    reader = RowReader(layout(3), [ColumnType.BIGINT, ColumnType.TEXT, ColumnType.NUMERIC])
    read(reader, rows * 100)

    assert reader.match(rows * 300) == rows * 300
    assert not reader.stuck
    assert reader.rows == 800


@pytest.mark.parametrize("before", [0, 99, 100, 5000])
def test_types_are_those_of_the_whole_file_and_not_of_the_first_rows(before: int) -> None:
    reader = RowReader(layout(4))

    read(reader, b"1,2024-01-01,,x\n" * before + b"1.5,unknown,7,x\n" + b"1,2024-01-01,,x\n" * 200)

    assert [column_type.sql for column_type in reader.types] == ["numeric", "text", "bigint", "text"]
    assert reader.rows == before + 201


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (b"1", "1 field, not 2 as in the header"),
        (b"1,2,3", "3 fields, not 2 as in the header"),
        (b"1,a\0b", "a NUL character"),
        (b"1,\xff", "not UTF-8; save the file as UTF-8"),
        (b'1,"a"b', "text after a closing quote"),
        (b"1,a\rb", "carriage return outside quotes"),
    ],
)
def test_rows_that_cannot_be_taken_are_rejected_with_their_line(row: bytes, reason: str) -> None:
    reader = RowReader(layout(2))

    given = read(reader, b'1,"a\nb"\n' * 200 + b"\n" + row + b"\n" + b"2,b\n" * 200)

    assert reader.rejected == [
        Rejected(200 * 8 + 1, 403, reason, row.decode("utf-8", "backslashreplace").replace("\0", "\\x00"))
    ]
    assert len(parsed(given)) == reader.rows == 400
    assert not reader.fault


def test_a_quote_inside_an_unquoted_field_is_a_character() -> None:
    assert parsed(read(RowReader(layout(2)), b'5" pipe,1\n6" pipe,2\n')) == [['5" pipe', "1"], ['6" pipe', "2"]]


@pytest.mark.parametrize(
    ("start", "end"), [(b"", b",x"), (b'"', b'",x'), (b'"a\n', b'",x'), (b'"', b'""",' + b"x" * 200_000 + b',"\n"')]
)
def test_a_row_that_is_too_long_is_passed_over_in_little_memory(start: bytes, end: bytes) -> None:
    data = b"1,a\n" + start + b"b" * (3 * RECORD_LIMIT) + end + b"\n2,c\n"
    reader = RowReader(layout(2))

    given = read(reader, data)

    assert parsed(given) == [["1", "a"], ["2", "c"]]
    assert lines(reader) == [(3, "longer than 1 MiB")]
    assert len(reader.rejected[0].row) <= 1000
    read(reader, b"1,2,3\n")
    assert reader.rejected[-1].line == 2 + data.count(b"\n")


@pytest.mark.parametrize("length", [10, 3 * RECORD_LIMIT])
def test_a_quote_that_is_never_closed_is_a_fault_of_the_file(length: int) -> None:
    reader = RowReader(layout(2))

    read(reader, b'1,a\n2,"b' + b"c,1\n" * (length // 4))

    assert "row on line 3 has no closing quote" in reader.fault


@pytest.mark.parametrize("row", [b"1", b"1,\xc3", b"1,2,3"])
def test_a_last_row_that_is_cut_off_is_a_fault_of_the_file(row: bytes) -> None:
    reader = RowReader(layout(2))

    read(reader, b"1,2\n" + row)

    assert "line 3" in reader.fault
    assert "cut off" in reader.fault


def test_long_fields_up_to_the_limit_are_taken() -> None:
    cell = "é" * (RECORD_LIMIT // 2 - 10)
    reader = RowReader(layout(1))

    assert parsed(read(reader, f'"{cell}"\nx\n'.encode())) == [[cell], ["x"]]


def test_many_columns_are_taken() -> None:
    row = [str(number) for number in range(1600)]
    reader = RowReader(layout(1600))

    assert parsed(read(reader, (",".join(row) + "\n").encode() * 300)) == [row] * 300


def test_a_single_column_skips_blank_lines_but_not_empty_values() -> None:
    reader = RowReader(layout(1))

    read(reader, b'a\n\n""\n\\.\nb\n' * 300)

    assert reader.rows == 4 * 300


@pytest.mark.parametrize("row", [r"\.", '"'])
def test_a_row_that_no_pattern_takes_does_not_run_into_the_next(row: str) -> None:
    """After so many rows as are looked at one by one, when the types are known."""
    rows = [["text"], *[[row], ["more"]] * 300]
    written = io.StringIO()
    csv.writer(written, lineterminator="\n").writerows(rows)

    reader = RowReader(layout(1))

    assert parsed(read(reader, written.getvalue().encode())) == rows
    assert reader.rows == len(rows)


def test_no_pattern_has_a_possessive_group() -> None:
    """Python before 3.11.5 loses its place in one, which the Pythons that this is tested on do not show."""
    kinds = [ColumnType.EMPTY, ColumnType.TEXT, *PATTERNS]
    patterns = [csv_rows._rows_pattern(layout(len(kinds)), kinds).decode()]
    patterns += [
        pattern.pattern.decode()
        for pattern in vars(csv_rows._Skipping(layout(1))).values()
        if isinstance(pattern, re.Pattern)
    ]
    assert len(patterns) == 3
    for pattern in patterns:
        assert not re.search(r"\)(\?|\*|\+|\{[0-9,]+\})\+", pattern), pattern

import pytest

from headway import Fatal
from services.worker.kinds.csv_layout import Dialect, Layout, column_names, read_layout


def layout(head: bytes) -> Layout:
    return read_layout(head, whole=True)


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_the_delimiter_is_found(delimiter: str) -> None:
    rows = [("name", "price, net", "a|b;c"), ("tea", "1", "2"), ('"x,y;z"', "3", "4")]
    quoted = [
        tuple(f'"{field}"' if set(field) & set(",;|") and '"' not in field else field for field in row) for row in rows
    ]

    found = layout("\n".join(delimiter.join(row) for row in quoted).encode())

    assert found.dialect.delimiter == delimiter
    assert found.titles == rows[0]


@pytest.mark.parametrize(
    ("rows", "quote", "escape"),
    [
        (b"1,'x,y'\n2,z\n", "'", None),
        (b'1,"x\\",y"\n2,z\n', '"', "\\"),
        (b"1,x\\,y\n2,z\n", '"', "\\"),
        (b"1,'it\\'s, x'\n", "'", "\\"),
        # Nothing is wrong with these as they are.
        (b"1,'x'\n2,z\n", '"', None),
        (b"C:\\,x\n", '"', None),
        (b'1,"it\'s, x"\n', '"', None),
        # Nothing makes rows of all of these.
        (b"1,'x,y'\n2\n", '"', None),
        (b'1,"x"y\n', '"', None),
    ],
)
def test_quote_and_escape_are_found_where_the_usual_ones_make_no_rows(
    rows: bytes, quote: str, escape: str | None
) -> None:
    found = layout(b"a,b\n" + rows)

    assert (found.dialect.delimiter, found.dialect.quote, found.dialect.escape) == (",", quote, escape)
    assert read_layout(b"a,b\n" + rows, whole=True, quote='"').dialect == Dialect()


def test_decimal_commas_are_not_delimiters() -> None:
    assert layout(b"name;price\ntea;1,50\nmilk;0,99\n").dialect.delimiter == ";"


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n", b"\r"])
def test_rows_begin_after_the_header_however_lines_end(line_end: bytes) -> None:
    head = b"\xef\xbb\xbf" + line_end * 2 + b'a,"b' + line_end + b'c"' + line_end + b"1,2" + line_end

    found = layout(head)

    assert head[found.start :] == b"1,2" + line_end
    assert found.line_end == line_end
    assert found.lines == 4


def test_without_a_header_the_first_row_is_one() -> None:
    found = read_layout(b"\n1,2,3\n4,5,6\n", whole=True, header=False)

    assert (found.names, found.start, found.lines) == (("column_1", "column_2", "column_3"), 1, 1)
    assert read_layout(b"a,b;c\n", whole=True, delimiter=";").titles == ("a,b", "c")


def test_a_header_alone_has_no_rows() -> None:
    found = layout(b"a,b")

    assert found.titles == ("a", "b")
    assert found.start == 3


@pytest.mark.parametrize(
    ("titles", "names"),
    [
        (["id", "Unit Price (EUR)", "Größe", "a-b"], ["id", "unit_price_eur", "größe", "a_b"]),
        (["", "%", "a"], ["column_1", "column_2", "a"]),
        (["a", "A", "a", "a_2"], ["a", "a_2", "a_3", "a_2_2"]),
        (["2024", "_id", "ctid"], ["_2024", "_id", "ctid_2"]),
        (["x" * 70, "x" * 70], ["x" * 63, "x" * 61 + "_2"]),
        (["é" * 40, 'a"; drop table b; --'], ["é" * 31, "a_drop_table_b"]),
    ],
)
def test_titles_become_names_of_columns(titles: list[str], names: list[str]) -> None:
    assert column_names(titles) == names


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (b"", "empty"),
        (b"\xef\xbb\xbf\r\n \r\n", "empty"),
        (b"PK\x03\x04rest", "Excel"),
        (b"\x1f\x8b\x08\x00", "twice"),
        ("a,b\n1,2\n".encode("utf-16"), "UTF-16"),
        ("größe,b\n".encode("latin-1"), "not UTF-8"),
        (b"\x7fELF\x02\x01\x00,", "binary"),
        (b'a,"b\n1,2\n', "quote"),
        (b'a,"b"c\n1,2\n', "quote"),
        (b",".join([b"a"] * 1601), "1,601 columns"),
    ],
)
def test_what_is_no_csv_file_is_refused_in_words(head: bytes, message: str) -> None:
    with pytest.raises(Fatal, match=message):
        layout(head)


def test_a_header_that_does_not_end_is_refused() -> None:
    with pytest.raises(Fatal, match="longer than"):
        read_layout(b"a" * 1000, whole=False)

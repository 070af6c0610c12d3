"""CSV tables as users spoil them: what is legal is read rightly, what is not is named."""

import csv
import gzip
import io
import sys
import tracemalloc
from functools import partial

import numpy as np
import pandas
import pytest
from conftest import refuses
from trees import lines, read, write

from readers import tables
from readers.tables import NUMBER, TEXT, one_of, positions, read_list, read_table, refuse_repeats

MARK = one_of({"": np.nan, "0": 0, "1.0": 1}, np.float32)
COLUMNS = {"name": TEXT, "number": NUMBER, "mark": MARK}
HEADER = "unread,name,number,view,mark"
ROWS = ("x,a 1.png,10000032,PA,1.0", "x,é,0,,", ",b.png,12,L,0", "1,b.png,999999999999999999,PA,")
EXPECTED = {
    "name": np.array([b"a 1.png", "é".encode(), b"b.png", b"b.png"]),
    "number": np.array([10000032, 0, 12, 999999999999999999]),
    "mark": np.array([1, np.nan, 0, np.nan], np.float32),
}


@pytest.fixture(params=["table.csv", "table.csv.gz"])
def table(tmp_path, request):
    write(tmp_path / request.param, lines(HEADER, ROWS))
    return tmp_path / request.param


@pytest.fixture
def packed(tmp_path):
    write(tmp_path / "table.csv.gz", lines(HEADER, ROWS))
    return tmp_path / "table.csv.gz"


def is_expected(path):
    for array, (name, expected) in zip(read_table(path, COLUMNS), EXPECTED.items()):
        assert array.dtype == expected.dtype, name
        np.testing.assert_array_equal(array, expected)


def refused(path, *words):
    refuses(ValueError, partial(read_table, path, COLUMNS), path, *words)


def change_lines(path, change):
    """change: a function of the list of lines (line 1 is the header) that changes it."""
    texts = read(path).splitlines()
    change(texts)
    write(path, "\n".join(texts) + "\n")


def change_field(path, line, column, text):
    def change(texts):
        fields = texts[line - 1].split(",")
        fields[HEADER.split(",").index(column)] = text
        texts[line - 1] = ",".join(fields)

    change_lines(path, change)


# What is legal


def noted(note):
    """A new first column of that text in each row."""

    def change(text):
        header, *rows = text.splitlines()
        return lines(f"Note,{header}", [f"{note},{row}" for row in rows])

    return change


def rewritten(change_rows=list, **dialect):
    """The same table, its list of rows changed, by the csv module's writer."""

    def change(text):
        out = io.StringIO()
        writer = csv.writer(out, **{"lineterminator": "\n"} | dialect)
        writer.writerows(change_rows(csv.reader(text.splitlines())))
        return out.getvalue()

    return change


LEGAL = {
    "as it is": str,
    "BOM": lambda text: "\ufeff" + text,
    "CR": lambda text: text.replace("\n", "\r"),
    "CRLF": lambda text: text.replace("\n", "\r\n"),
    "BOM, CRLF, quotes": lambda text: "\ufeff" + rewritten(quoting=1)(text).replace("\n", "\r\n"),
    "no last line end": lambda text: text.rstrip("\n"),
    "blank lines": lambda text: text.replace("\n", "\n\n") + "\n\n",
    "blank lines, CRLF": lambda text: text.replace("\n", "\r\n\r\n"),
    "blank lines first": lambda text: "\n\r\n" + text,
    "lines of blanks": lambda text: text.replace("\n", "\n  \n\t\n"),
    "all quoted": rewritten(quoting=csv.QUOTE_ALL),
    "quoted commas": noted('"CHEST (PA, LAT), 2 views"'),
    "quoted quotes": noted('"a ""b"", c"'),
    "quoted line ends": noted('"a\nb"'),
    "quoted CRLF": lambda text: noted('"a\r\nb"')(text).replace("\n", "\r\n"),
    "quoted blank lines": noted('"a\n\nb, c\n"'),
    "a quoted line end in the header": lambda text: text.replace("unread", '"un\nread"'),
    "not ASCII": noted("Zoë 𝄞 読影"),
    "a long text": noted('"' + "long, " * 10000 + '"'),
    "hashes": noted("# 1"),
    "columns in another order": rewritten(lambda rows: [row[::-1] for row in rows]),
    "an unknown column twice": lambda text: noted("1")(noted("2")(text)),
    "blanks around a number": lambda text: text.replace(",12,", ", 12 ,"),
}


@pytest.mark.parametrize("change", LEGAL.values(), ids=LEGAL)
def test_legal(table, change):
    write(table, change(read(table)))
    is_expected(table)


def test_columns_that_are_not_read_may_hold_anything(table):
    write(table, lines(HEADER, ROWS).encode().replace(b"x,", b"Zo\xeb \xff" * 100 + b","))
    is_expected(table)


def test_several_gzip_members(packed):
    """As `cat` joins them."""
    content = read(packed).encode()
    packed.write_bytes(gzip.compress(content[:60]) + gzip.compress(content[60:]))
    is_expected(packed)


def test_optional_columns(table):
    columns = {"view": TEXT, "else": NUMBER, "name": TEXT}
    view, missing, name = read_table(table, columns, optional=("else",))
    assert view.tolist() == [b"PA", b"", b"L", b"PA"] and missing is None
    np.testing.assert_array_equal(name, EXPECTED["name"])


def test_equals_pandas(tmp_path, rng):
    """Tables of any texts, quoted as the csv module quotes them."""
    letters = np.array(["a", "Z", " ", ",", '"', "'", "\n", "é", "漢", "#", ";", "|"])
    texts = ["".join(rng.choice(letters, rng.integers(1, 12))) for _ in range(3000)]
    frame = pandas.DataFrame({"text": texts, "number": rng.integers(10**18, size=3000)})
    for ending in ("csv", "csv.gz"):
        path = tmp_path / f"x.{ending}"
        frame.to_csv(path, index=False)
        reference = pandas.read_csv(path, keep_default_na=False)
        text, number = read_table(path, {"text": TEXT, "number": NUMBER})
        assert [value.decode() for value in text] == reference["text"].tolist()
        np.testing.assert_array_equal(number, reference["number"])


# What is not


@pytest.mark.parametrize("column", COLUMNS)
def test_missing_and_doubled_columns(table, column):
    write(table, lines(HEADER.replace(column, "other"), ROWS))
    refused(table, "no column", repr(column), "only: ", "view", "mend")
    write(table, lines(f"{HEADER},{column}", [row + ",1" for row in ROWS]))
    refused(table, "2 columns", repr(column), "keep one")


@pytest.mark.parametrize("delimiter", [";", "\t", "|"])
def test_other_delimiters(table, delimiter):
    text = read(table).replace(",", delimiter)
    write(table, text)
    refused(table, "no column", "separated by commas")
    # A comma in a text must not hide that the table's delimiter is another.
    write(table, text.replace("x", "1,5"))
    refused(table, "no column", "separated by commas")


@pytest.mark.parametrize("line", [2, 3, 5])
def test_short_and_long_rows(table, line):
    whole = read(table)
    change_lines(table, lambda rows: rows.__setitem__(line - 1, rows[line - 1].rpartition(",")[0]))
    refused(table, f", line {line}: 4 columns, the header has 5")
    write(table, whole)
    change_lines(table, lambda rows: rows.__setitem__(line - 1, rows[line - 1] + ",1"))
    refused(table, f", line {line}: 6 columns, the header has 5")


@pytest.mark.parametrize("text", ["x,", ""])
def test_all_rows_longer_or_shorter_than_the_header(table, text):
    change = [text + row if text else row.partition(",")[2] for row in ROWS]
    write(table, lines(HEADER, change))
    refused(table, f", line 2: {6 if text else 4} columns, the header has 5")


@pytest.mark.parametrize(
    "column, must, texts",
    [
        (
            *("mark", "be one of , 0, 1.0"),
            ["2", "yes", "-2", "1.5", "nan", " 1", "0 ", "+1", "01", "1.00000000", "é", "?"],
        ),
        (
            *("number", "be a whole number of at most 18 digits"),
            [
                *("", "p10", "1.5", "1.0", "-5", "9" * 19, "9" * 30, "1e3", "0x1", "1_000", "1 0"),
                *("nan", "١٢", "１", "²"),
            ],
        ),
        ("name", "be UTF-8 of less than 256 bytes", ["x" * 256, "é" * 128, "x" * 5000]),
    ],
)
def test_unknown_texts(table, column, must, texts):
    whole = read(table)
    for text in texts:
        write(table, whole)
        change_field(table, 4, column, text)
        refused(table, f", line 4: {column} {text!r} must {must}")


def test_texts_of_255_bytes(table):
    change_field(table, 4, "name", "é" * 127 + "x")
    assert read_table(table, COLUMNS)[0][2].decode() == "é" * 127 + "x"


@pytest.mark.skipif(sys.version_info < (3, 11), reason="csv itself refuses a NUL before 3.11")
@pytest.mark.parametrize("column", COLUMNS)
def test_a_nul_is_no_text(table, column):
    """numpy would drop it at the end of a text."""
    change_field(table, 4, column, "1.0\0")
    refused(table, f", line 4: {column} '1.0\\x00' must")


def test_the_first_bad_row_is_named(table):
    change_field(table, 5, "name", "x" * 300)  # an earlier column, but a later line
    change_field(table, 3, "mark", "2")
    refused(table, ", line 3: mark '2'")
    change_lines(table, lambda rows: rows.__setitem__(1, rows[1] + ",1"))
    refused(table, ", line 2: 6 columns")


@pytest.mark.parametrize("start", ["", "\n", "\r\n\r\n", "  \n", "\ufeff"])
@pytest.mark.parametrize("between", ["", "\n", "   \n", "\t\r\n"])
def test_blank_lines_count(table, start, between):
    """A line number is the editor's, whatever lines were passed over."""
    rows = [ROWS[0], ROWS[1] + "2", *ROWS[2:]]
    write(table, start + f"{HEADER}\n{between}" + "\n".join(rows) + "\n")
    line = 3 + start.count("\n") + between.count("\n")
    refused(table, f", line {line}: mark '2' must be one of")


def test_an_open_quote(table):
    change_lines(table, lambda rows: rows.__setitem__(2, '"' + rows[2]))
    refused(table, ", line ", "1 columns")


def test_a_field_without_end(table):
    change_lines(table, lambda rows: rows.append("x" * 200_000))
    refused(table, "line 6", "field limit", "mend")


@pytest.mark.parametrize("bad", ["Zo\xeb".encode("latin-1"), b"\xff", "é".encode()[:1]])
@pytest.mark.parametrize("column", COLUMNS)
def test_not_utf8(table, column, bad):
    change_field(table, 4, column, "@")
    write(table, read(table).encode().replace(b"@", bad))
    refused(table, f", line 4: {column}", COLUMNS[column].must)


def test_not_utf8_header(table):
    write(table, read(table).encode().replace(b"unread", b"\xff"))
    refused(table, "UTF-8", "mend")


def test_utf16(table):
    write(table, read(table).encode("utf-16"))
    refused(table, "UTF-8" if sys.version_info >= (3, 11) else "NUL", "mend")


@pytest.mark.parametrize("content", ["", "\n\n", "\ufeff", "  \r\n"])
def test_empty_table(table, content):
    write(table, content)
    refused(table, "no column", "fetch it again")


@pytest.mark.parametrize("end", ["\n", "", "\n\n\r\n"])
def test_header_only(table, end):
    write(table, HEADER + end)
    refused(table, "no row below its header", "fetch it again")


@pytest.mark.parametrize("left", [5, 40, 0.5, -1, -8, -9])
def test_cut_gzip(packed, left):
    content = packed.read_bytes()
    left = int(left * len(content)) if isinstance(left, float) else left
    packed.write_bytes(content[:left])
    refused(packed, "line", "ended", "mend")


def test_damaged_gzip(packed):
    content = bytearray(packed.read_bytes())
    # Its checksum, its text, and (byte 10) a kind of block that there is not.
    for place in (len(content) - 6, len(content) // 2, 10):
        flipped = 255 if place == 10 else content[place] ^ 255
        packed.write_bytes(content[:place] + bytes([flipped]) + content[place + 1 :])
        refused(packed)
    packed.write_bytes(gzip.decompress(content))
    refused(packed, "ot a gzipped file", "mend")
    packed.write_bytes(b"")
    refused(packed, "fetch it again")


# Many rows

STEP = tables.ROWS_AT_ONCE
MANY = 8 * STEP + 5


def many_rows(path, bad=None):
    """Rows 0 to MANY - 1; about the end of the first step the rows take two lines each."""
    rows = []
    for i in range(MANY):
        unread = '"a\nb"' if STEP - 12 < i < STEP + 8 else "F"
        mark = "2" if i == bad else ("", "0", "1.0")[i % 3]
        rows.append(f"{unread},{i}.png,{i},PA,{mark}")
    write(path, lines(HEADER, rows))


def test_many_rows(table):
    many_rows(table)
    name, number, mark = read_table(table, COLUMNS)
    assert name.tolist() == [f"{i}.png".encode() for i in range(MANY)]
    np.testing.assert_array_equal(number, np.arange(MANY))
    np.testing.assert_array_equal(mark, np.resize(np.array([np.nan, 0, 1], np.float32), MANY))


@pytest.mark.parametrize(
    "row, line",
    [(0, 2), (STEP - 12, STEP - 10), (STEP - 11, STEP - 8), (STEP - 1, STEP + 12)]
    + [(STEP, STEP + 14), (STEP + 8, STEP + 29), (4 * STEP, 4 * STEP + 21), (MANY - 1, MANY + 20)],
)
def test_the_line_of_a_bad_row_of_many(table, row, line):
    """The 19 rows whose text holds a line end take two lines; their marks stand on the second."""
    many_rows(table, bad=row)
    refused(table, f", line {line}: mark '2'")


def test_a_long_gzip_file_is_cut(packed):
    """The last whole line is named, not the first of the file."""
    rows = [f"{i * 2654435761 % 2**32:08x},{i}.png,{i},PA,0" for i in range(40_000)]
    write(packed, lines(HEADER, rows))
    content = packed.read_bytes()
    packed.write_bytes(content[: len(content) * 3 // 4])
    with pytest.raises(ValueError, match="mend it") as caught:
        read_table(packed, COLUMNS)
    assert 20_000 < int(str(caught.value).split("line ")[1].split()[0]) < 34_000


def test_no_object_a_row(tmp_path):
    """Beside the arrays, of which there are two copies at the end, only some rows are in memory."""
    path, peaks = tmp_path / "table.csv", []
    for count in (4_000, 12_000):
        write(path, lines(HEADER, [f"unread,{i:08d}.png,{i},PA,0" for i in range(count)]))
        tracemalloc.start()
        arrays = read_table(path, COLUMNS)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    a_row = sum(array.nbytes for array in arrays) / 12_000
    assert a_row == 12 + 8 + 4 and (peaks[1] - peaks[0]) / 8_000 < 2 * a_row


# Lists, repeats and positions


def test_lists(tmp_path):
    path = tmp_path / "list.txt"
    path.write_bytes(b"\xef\xbb\xbfb.png\r\n\r\n  a b.png \n\t\n\xc3\xa9.png")
    assert read_list(path) == [(1, "b.png"), (3, "a b.png"), (5, "é.png")]
    path.write_text("\n \r\n")
    refuses(ValueError, partial(read_list, path), path, "no image")
    path.write_bytes("Zoë.png\n".encode("latin-1"))
    refuses(ValueError, partial(read_list, path), path, "UTF-8")


def test_repeats():
    refuse_repeats(np.array([3, 1, 2]), "x.csv")
    refuse_repeats(np.array([], "S1"), "x.csv")
    call = partial(refuse_repeats, np.array(["é".encode(), b"a", "é".encode()]), "x.csv")
    refuses(ValueError, call, "x.csv: é occurs more than once; keep one")


def test_positions(rng):
    values = rng.permutation(1000)
    assert positions(values, values, "x").tolist() == list(range(1000))
    keys = rng.integers(-200, 1200, size=5000)
    reference = {value: place for place, value in enumerate(values.tolist())}
    assert positions(keys, values, "x").tolist() == [reference.get(k, -1) for k in keys.tolist()]
    texts = np.array([b"b", b"a", b"cc"])
    assert positions(np.array([b"cc", b"c", b"b"]), texts, "x").tolist() == [2, -1, 0]
    refuses(ValueError, partial(positions, keys, np.array([1, 2, 1]), "x.csv"), "x.csv: 1 occurs")

"""CSV tables as users spoil them: what is legal is read rightly, what is not is named."""

import csv
import gzip
import io
import sys
from functools import partial

import numpy as np
import pandas
import pytest
from conftest import refuses
from pandas._libs.parsers import STR_NA_VALUES
from trees import lines, read, replaced, write

from readers import tables
from readers.tables import NUMBER, TEXT, read_table

MARK = tables.one_of({"": np.nan, "0": 0, "1.0": 1}, np.float32)
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


def is_expected(path):
    for array, (name, expected) in zip(read_table(path, COLUMNS), EXPECTED.items()):
        assert array.dtype == expected.dtype, name
        np.testing.assert_array_equal(array, expected)


# What is legal


def noted(note, text):
    """A new first column of that note in each row."""
    header, *rows = text.splitlines()
    return lines(f"Note,{header}", [f"{note},{row}" for row in rows])


def rewritten(text, change_rows=list, quoting=csv.QUOTE_MINIMAL):
    """The same table, its list of rows changed, by the csv module's writer."""
    out = io.StringIO()
    writer = csv.writer(out, quoting=quoting, lineterminator="\n")
    writer.writerows(change_rows(csv.reader(text.splitlines())))
    return out.getvalue()


LEGAL = {
    "as it is": str,
    "CR": lambda text: text.replace("\n", "\r"),
    "BOM, CRLF, quotes": lambda t: "\ufeff" + rewritten(t, quoting=1).replace("\n", "\r\n"),
    "lines of blanks": lambda text: text.replace("\n", "\n  \n\t\n"),
    "all quoted": partial(rewritten, quoting=csv.QUOTE_ALL),
    "quoted commas": partial(noted, '"CHEST (PA, LAT), 2 views"'),
    "quoted quotes": partial(noted, '"a ""b"", c"'),
    "quoted CRLF": lambda text: noted('"a\r\nb"', text).replace("\n", "\r\n"),
    "quoted blank lines": partial(noted, '"a\n\nb, c\n"'),
    "a quoted line end in the header": lambda text: text.replace("unread", '"un\nread"'),
    "not ASCII": partial(noted, "Zoë 𝄞 読影"),
    "columns in another order": lambda t: rewritten(t, lambda rows: [row[::-1] for row in rows]),
    "an unknown column twice": lambda text: noted("1", noted("2", text)),
    "blanks around a number": lambda text: text.replace(",12,", ", 12 ,"),
}


@pytest.mark.parametrize("change", LEGAL.values(), ids=LEGAL)
def test_legal(table, change):
    write(table, change(read(table)))
    is_expected(table)


def test_columns_that_are_not_read_may_hold_anything_or_be_absent(table):
    columns = {"view": TEXT, "else": NUMBER}
    view, missing = read_table(table, columns, optional=("else",))
    assert view.tolist() == [b"PA", b"", b"L", b"PA"] and missing is None
    write(table, lines(HEADER, ROWS).encode().replace(b"x,", b"Zo\xeb \xff" * 100 + b","))
    is_expected(table)


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


def test_what_is_missing_is_what_pandas_takes_as_missing(tmp_path):
    odd = ["", "Nan", "NONE", "none", " nan", "NA ", "na", "-", "?", "['nan']", "0"]
    texts = [*odd, *STR_NA_VALUES]
    write(tmp_path / "x.csv", lines("text,n", [f'"{text}",1' for text in texts]))
    reference = pandas.read_csv(tmp_path / "x.csv")["text"].fillna("")
    (text,) = read_table(tmp_path / "x.csv", {"text": tables.may_be_missing(TEXT)})
    assert [value.decode() for value in text] == reference.tolist()
    assert (text == b"").sum() == len(STR_NA_VALUES) + 1


# What is not


BAD = [
    *((lambda t, c=c: t.replace(c, "x", 1), ["no column", repr(c), "mend"]) for c in COLUMNS),
    (lambda t: t.replace(",", ";"), ["no column", "unread;name", "separated by commas"]),
    (lambda t: "", ["no column", "fetch it again"]),
    (lambda t: t.encode("utf-16").decode("utf-8", "surrogateescape"), ["mend"]),
    (lambda t: t.replace("view", "name"), ["2 columns 'name'", "keep one"]),
    (lambda t: HEADER + "\n\n", ["no row below its header", "fetch it again"]),
    (lambda t: t.replace("0,,", "0,"), ["line 3: 4 columns, the header has 5"]),
    (lambda t: t.replace(",L,", ",L,,"), ["line 4: 6 columns, the header has 5"]),
    (lambda t: lines(HEADER, ["x," + row for row in ROWS]), ["line 2: 6 columns"]),
    # A line number is the editor's, whatever lines were passed over.
    (lambda t: "\ufeff\n  \n" + t.replace("x,é,0,,", "\nx,é,0,,2"), ["line 6: mark '2' must be"]),
    # The first bad row is named, not the first bad column.
    (lambda t: t.replace("PA,\n", "PA\n").replace(",,", ",,2"), ["line 3: mark '2'"]),
    (lambda t: t.replace("x,é", '"x,é'), ["line ", "1 columns"]),  # an open quote
    (lambda t: t + "x" * 200_000, ["line 6", "field limit", "mend"]),
    *(
        (partial(replaced, "mark", text), [f"line 4: mark {text!r} must be one of , 0, 1.0"])
        for text in ("2", "nan", " 1", "01", "é")
    ),
    *(
        (partial(replaced, "number", text), [f"line 4: number {text!r} must be a whole number"])
        for text in ("", "p10", "1.0", "-5", "9" * 19, "1e3", "1_000", "１", "²")
    ),
    *(
        (partial(replaced, "name", text), ["line 4: name", "must be UTF-8 of less than 256 bytes"])
        for text in ("x" * 256, "é" * 128, "Zo\udceb")
    ),
]


@pytest.mark.parametrize("change, words", BAD)
def test_bad_tables(table, change, words):
    write(table, change(read(table)).encode(errors="surrogateescape"))
    refuses(ValueError, partial(read_table, table, COLUMNS), table, *words)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="csv itself refuses a NUL before 3.11")
def test_a_nul_is_no_text(table):
    """numpy would drop it at the end of a text."""
    write(table, replaced("name", "1.0\0", read(table)))
    refuses(ValueError, partial(read_table, table, COLUMNS), table, "line 4: name '1.0\\x00' must")


def test_gzip(tmp_path):
    path = tmp_path / "table.csv.gz"
    content = lines(HEADER, ROWS).encode()
    path.write_bytes(gzip.compress(content[:60]) + gzip.compress(content[60:]))  # as cat joins them
    is_expected(path)
    packed = gzip.compress(content)
    flipped = packed[:-6] + bytes([packed[-6] ^ 255]) + packed[-5:]  # the checksum
    for bad in (packed[:40], packed[: len(packed) // 2], packed[:-1], flipped, content):
        path.write_bytes(bad)
        refuses(ValueError, partial(read_table, path, COLUMNS), path, "mend")


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
    for row, line in ((STEP - 11, STEP - 8), (STEP, STEP + 14), (MANY - 1, MANY + 20)):
        many_rows(table, bad=row)  # the 19 rows of two lines: their marks stand on the second
        refuses(ValueError, partial(read_table, table, COLUMNS), f", line {line}: mark '2'")
    many_rows(table)
    name, number, mark = read_table(table, COLUMNS)
    assert name.tolist() == [f"{i}.png".encode() for i in range(MANY)]
    np.testing.assert_array_equal(number, np.arange(MANY))
    np.testing.assert_array_equal(mark, np.resize(np.array([np.nan, 0, 1], np.float32), MANY))


# Lists, repeats and positions


def test_lists(tmp_path):
    path = tmp_path / "list.txt"
    path.write_bytes(b"\xef\xbb\xbfb.png\r\n\r\n  a b.png \n\t\n\xc3\xa9.png")
    assert tables.read_list(path) == [(1, "b.png"), (3, "a b.png"), (5, "é.png")]
    path.write_text("\n \r\n")
    refuses(ValueError, partial(tables.read_list, path), path, "no image")
    path.write_bytes("Zoë.png\n".encode("latin-1"))
    refuses(ValueError, partial(tables.read_list, path), path, "UTF-8")


def test_repeats():
    tables.refuse_repeats(np.array([3, 1, 2]), "x.csv")
    tables.refuse_repeats(np.array([], "S1"), "x.csv")
    call = partial(tables.refuse_repeats, np.array(["é".encode(), b"a", "é".encode()]), "x.csv")
    refuses(ValueError, call, "x.csv: é occurs more than once; keep one")


def test_positions(rng):
    values = rng.permutation(1000)
    assert tables.positions(values, values, "x").tolist() == list(range(1000))
    keys = rng.integers(-200, 1200, size=5000)
    reference = {value: place for place, value in enumerate(values.tolist())}
    expected = [reference.get(key, -1) for key in keys.tolist()]
    assert tables.positions(keys, values, "x").tolist() == expected
    texts = np.array([b"b", b"a", b"cc"])
    assert tables.positions(np.array([b"cc", b"c", b"b"]), texts, "x").tolist() == [2, -1, 0]
    call = partial(tables.positions, keys, np.array([1, 2, 1]), "x.csv")
    refuses(ValueError, call, "x.csv: 1 occurs")

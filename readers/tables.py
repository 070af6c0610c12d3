"""CSV tables and lists of files as arrays, and how two of them are joined."""

import collections
import csv
import gzip
import itertools
import math
import operator
import os
import zlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

ROWS_AT_ONCE = 2**8  # of more, most of the time goes into Python's search for cycles among them
NOT_VALID = (ValueError, KeyError, OverflowError)


class Column(NamedTuple):
    """How the texts of a table's column are read."""

    convert: Callable  # N texts -> an array of N, or one of NOT_VALID
    must: str  # completes the error "COLUMN 'text' must ..."


# Texts that pandas takes as missing (version 3.1), with which the study read its tables.
MISSING = frozenset(
    ",nan,-nan,NaN,-NaN,NA,N/A,n/a,<NA>,#NA,#N/A,#N/A N/A,null,NULL,None,1.#IND,-1.#IND,1.#QNAN,"
    "-1.#QNAN".split(",")
)


def _texts(texts):
    values = np.array([text.encode() for text in texts])
    if values.itemsize > 255 or "\0" in "".join(texts):  # numpy drops a NUL at a text's end
        raise ValueError("a text too long, or with a NUL")
    return values


def _numbers(texts):
    letters = set("".join(texts))
    if "-" in letters or max(letters, default="") > "9":  # int() reads 1_000 and other digits too
        raise ValueError("not a whole number")
    return np.fromiter(map(int, texts), np.int64, len(texts))


def _below(texts):
    joined = "/" + "/\n/".join(texts) + "/"
    if any(sign in joined for sign in ("//", "/./", "/../", "\\")):
        raise ValueError("not such a path")
    return _texts(texts)


TEXT = Column(_texts, "be UTF-8 of less than 256 bytes")  # (N,) bytes
BELOW = Column(_below, "be a path below the table's directory, like images/a.png")  # (N,) bytes
NUMBER = Column(_numbers, "be a whole number of at most 18 digits")  # (N,) int64


def one_of(values, dtype, must=None):
    """The Column of texts that are keys of `values`, read as their values: (N,) of that dtype."""
    # Of the dtype already, which is twice as fast.
    values = {text: np.array(value, dtype).item() for text, value in values.items()}

    def convert(texts):
        return np.fromiter(map(values.__getitem__, texts), dtype, len(texts))

    return Column(convert, must or f"be one of {', '.join(values)}")


def may_be_missing(column):
    """The Column to which each text of MISSING is the empty one."""
    return column._replace(
        convert=lambda texts: column.convert(["" if text in MISSING else text for text in texts])
    )


def finding(uncertain="ignore", blank="ignore"):
    """(the Column of a finding, the options that say how its marks are read).

    1 present, 0 absent, -1 uncertain, blank unmentioned; (N,) float32. uncertain, blank: what these
    are read as, "ignore" (NaN) or "negative"; uncertain also "positive".
    """
    read_as = {"ignore": math.nan, "negative": 0, "positive": 1}
    if uncertain not in read_as:
        raise ValueError(f"--uncertain {uncertain}: must be ignore, positive or negative")
    if blank not in ("ignore", "negative"):
        raise ValueError(f"--blank {blank}: must be ignore or negative")
    values = dict.fromkeys(MISSING, read_as[blank]) | {"0": 0, "0.0": 0, "1": 1, "1.0": 1}
    values |= dict.fromkeys(("-1", "-1.0"), read_as[uncertain])
    options = {"uncertain": uncertain, "blank": blank}.items()
    options = {option: value for option, value in options if value != "ignore"}
    return one_of(values, np.float32, "be 1, 0, -1 or blank"), options


class Names:
    """A Column of texts, which are numbered in the order in which they first come: (N,) int64."""

    def __init__(self):
        self.numbers = collections.defaultdict(itertools.count().__next__)
        self.must = "not be blank, nor begin or end with a blank"

    def convert(self, texts):
        if not all(texts) or any(map(operator.ne, texts, map(str.strip, texts))):
            raise ValueError("blank")
        return np.fromiter(map(self.numbers.__getitem__, texts), np.int64, len(texts))


def rows(path, at_once=1):
    """Yields (the line in which they end, at most `at_once` rows [texts]) of a CSV file, blank ones
    left out. Bytes that are no UTF-8 come as surrogates. Raises ValueError for a damaged file.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file)
        try:
            while chunk := list(itertools.islice(reader, at_once)):
                if chunk := [row for row in chunk if len(row) > 1 or "".join(row).strip()]:
                    yield reader.line_num, chunk
        except (csv.Error, EOFError, zlib.error, gzip.BadGzipFile) as error:
            after = f"unreadable after line {reader.line_num}"
            raise ValueError(f"{path}: {after} ({error}); mend it") from error


def line_of(path, row):
    """In which line of the file that row of a table ends, the first below the header being 0."""
    return next(itertools.islice(rows(path), row + 1, None))[0]


def read_table(path, columns, optional=()):
    """The named columns of a CSV file (RFC 4180, UTF-8, gzipped or not) as a list of arrays.

    columns: {name: Column}. optional: names of columns that may be missing; their array is None.
    Lines of blanks are passed over. Raises ValueError naming the file and, of a row, its line.
    """
    chunks = rows(path, ROWS_AT_ONCE)
    _, (header, *first) = next(chunks, (0, [[]]))
    for name in columns:
        if name not in header and name not in optional:
            has = f"has no column {name!r}, only: {', '.join(header)} (is it separated by commas?)"
            raise ValueError(f"{path}: {has}; mend it or fetch it again")
        if header.count(name) > 1:
            raise ValueError(f"{path}: has {header.count(name)} columns {name!r}; keep one")
    parts = {name: [] for name in columns if name in header}
    for _, chunk in itertools.chain([(0, first)] * bool(first), chunks):
        try:
            for name, texts in zip(header, zip(*chunk, strict=True), strict=True):
                if name in parts:
                    parts[name].append(columns[name].convert(texts))
        except NOT_VALID:
            _refuse_bad_row(path, header, columns)
            raise
    if not any(parts.values()):
        raise ValueError(f"{path}: has no row below its header; fetch it again")
    return [np.concatenate(parts.pop(name)) if name in parts else None for name in columns]


def _refuse_bad_row(path, header, columns):
    """Raises ValueError naming the first row that is not as its columns must be."""
    for line, (row,) in itertools.islice(rows(path), 1, None):
        count, of = len(row), len(header)
        if count != of:
            raise ValueError(f"{path}, line {line}: {count} columns, the header has {of}")
        for name, text in zip(header, row):
            try:
                if name in columns:
                    columns[name].convert([text])
            except NOT_VALID as error:
                must = columns[name].must
                raise ValueError(f"{path}, line {line}: {name} {text!r} must {must}") from error


def read_list(path):
    """[(line number, text)] of a text file, blank lines aside."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error}); save it as such") from error
    lines = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    if not lines:
        raise ValueError(f"{path}: lists no image; fetch it again")
    return lines


def refuse_repeats(values, where, rows=False):
    """Raises ValueError naming a value that occurs twice in the file `where`.

    rows: whether they are those of all its rows, so that the line of the second can be named.
    """
    ordered = np.sort(values)  # far faster than np.unique, of bytes
    again = ordered[1:][ordered[1:] == ordered[:-1]]
    if len(again):
        line = f", line {line_of(where, np.flatnonzero(values == again[0])[1])}" if rows else ""
        value = os.fsdecode(again[0]) if isinstance(again[0], bytes) else again[0]
        raise ValueError(f"{where}{line}: {value} occurs more than once; keep one")


def positions(keys, table, where, source=None):
    """Where each key stands in `table`, the keys of the file `where`: (N,) int64, -1 where nowhere.

    Raises ValueError for a key that `table` has twice or, given their source, for one it has not.
    """
    order = np.argsort(table)
    ordered = table[order]
    refuse_repeats(ordered, where)
    places = order[np.minimum(np.searchsorted(ordered, keys), len(table) - 1)]
    found = table[places] == keys
    if source and not found.all():
        lost = os.fsdecode(keys[~found][0])
        raise ValueError(f"{where}: has no row of {lost}, listed in {source}; fetch both again")
    return np.where(found, places, -1)

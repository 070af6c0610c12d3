"""CSV tables and lists of files as arrays, and how two of them are joined."""

import csv
import gzip
import itertools
import os
import zlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

# Rows of a table that are Python objects at a time: of more, most of the time goes into Python's
# search for cycles among them.
ROWS_AT_ONCE = 2**8


class Column(NamedTuple):
    """How the texts of a table's column are read.

    convert: a list of N texts -> an array of N; raises one of NOT_VALID where a text is not as it
    `must` be, which completes the error "COLUMN 'text' must ...".
    """

    convert: Callable
    must: str


NOT_VALID = (ValueError, KeyError, OverflowError)
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


TEXT = Column(_texts, "be UTF-8 of less than 256 bytes")  # (N,) bytes
NUMBER = Column(_numbers, "be a whole number of at most 18 digits")  # (N,) int64


def one_of(values, dtype, must=None):
    """The Column of texts that are keys of `values`, read as their values: (N,) of that dtype."""

    def convert(texts):
        return np.fromiter(map(values.__getitem__, texts), dtype, len(texts))

    return Column(convert, must or f"be one of {', '.join(values)}")


def may_be_missing(column):
    """The Column to which each text of MISSING is the empty one."""

    def convert(texts):
        return column.convert(["" if text in MISSING else text for text in texts])

    return Column(convert, column.must)


def read_table(path, columns, optional=()):
    """The named columns of a CSV file (RFC 4180, UTF-8, gzipped or not) as a list of arrays.

    columns: {name: Column}. optional: names of columns that may be missing; their array is None.
    Lines of blanks are passed over. Raises ValueError naming the file and, of a row, its line.
    """
    rows = _rows(path)
    header = next(rows, (0, []))[1]
    for name in columns:
        if name not in header and name not in optional:
            raise ValueError(
                f"{path}: has no column {name!r}, only: {', '.join(header)} (is it separated by "
                "commas?); mend it or fetch it again"
            )
        if header.count(name) > 1:
            raise ValueError(f"{path}: has {header.count(name)} columns {name!r}; keep one")
    parts = {name: [] for name in columns if name in header}
    while chunk := list(itertools.islice(rows, ROWS_AT_ONCE)):
        try:
            by_column = zip(*(row for _, row in chunk), strict=True)
            for name, texts in zip(header, by_column, strict=True):
                if name in parts:
                    parts[name].append(columns[name].convert(texts))
        except NOT_VALID:
            _refuse_bad_row(path, header, columns, chunk)
            raise
    if not any(parts.values()):
        raise ValueError(f"{path}: has no row below its header; fetch it again")
    return [np.concatenate(parts.pop(name)) if name in parts else None for name in columns]


def _rows(path):
    """Yields (line number, texts) of each row; bytes that are no UTF-8 come as surrogates."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file)
        try:
            for row in reader:
                if len(row) > 1 or "".join(row).strip():
                    yield reader.line_num, row
        except (csv.Error, EOFError, zlib.error, gzip.BadGzipFile) as error:
            line = reader.line_num
            raise ValueError(f"{path}: unreadable after line {line} ({error}); mend it") from error


def _refuse_bad_row(path, header, columns, chunk):
    """Raises ValueError naming the first of these rows that is not as its columns must be."""
    for line, row in chunk:
        if len(row) != len(header):
            raise ValueError(
                f"{path}, line {line}: {len(row)} columns, the header has {len(header)}"
            )
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


def refuse_repeats(values, where):
    """Raises ValueError naming a value that occurs twice; where: the file that lists them."""
    values, counts = np.unique(values, return_counts=True)
    if counts.max(initial=0) > 1:
        value = values[counts.argmax()]
        value = os.fsdecode(value) if isinstance(value, bytes) else value
        raise ValueError(f"{where}: {value} occurs more than once; keep one")


def positions(keys, table, where, source=None):
    """Where each key stands in `table`, the keys of the file `where`: (N,) int64, -1 where nowhere.

    Raises ValueError for a key that `table` has twice or, given their source, for one it has not.
    """
    refuse_repeats(table, where)
    order = np.argsort(table)
    places = order[np.minimum(np.searchsorted(table, keys, sorter=order), len(table) - 1)]
    found = table[places] == keys
    if source and not found.all():
        lost = os.fsdecode(keys[~found][0])
        raise ValueError(f"{where}: has no row of {lost}, listed in {source}; fetch both again")
    return np.where(found, places, -1)

"""Rows of comma-, tab- or semicolon-separated text with a header line (standard library only).

    for number, row in read(path, text, "\t", quotes=None): ...

Quotation marks: a cell that is quoted by RFC 4180 may contain separators and line breaks, but other programs write
marks as text. `quotes` True or False chooses. Without it the text is read both ways, and a reading is consistent if
every row has as many cells as the header:

* One reading is consistent: it is taken.
* Both are, with the same number of rows: they differ only in the marks around cells, and quoting wins. This is the
  ordinary quoted .csv file.
* Both are, with different numbers of rows: quoting would merge lines into one row. The file is refused.

Only quoting writes cells such as `"the ""old"" inn"` and column names in marks: a text with them is not read without
it.
"""

import csv
import logging
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from prefixlib.system.errors import UserError

SEPARATORS = (",", "\t", ";")
QUOTES_FLAG = "--quotes"
logger = logging.getLogger(__name__)


@dataclass
class Reading:
    """The cells of a text, read with or without quoting."""

    head: list[str] = field(default_factory=list)
    rows: list[tuple[int, int, list[str]]] = field(default_factory=list)  # number, first line, cells
    fault: str | None = None  # why it is not consistent: the first row that is wrong


def read(path: Path, text: str, usual: str, quotes: bool | None) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield (number, row). usual: the separator that the file's name suggests; the header may have another one.

    Rows whose cells are all empty are left out and counted. Raises UserError for an ambiguous or ragged text and for a
    column name that appears twice.
    """
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the default of 128 KiB is too small for a document
    if "\n" not in text:
        text = text.replace("\r", "\n")  # old line ends
    lines = [f"{line}\n" for line in text.split("\n")]
    if lines and (named := re.fullmatch(r"sep=(.)\s*", lines[0])):  # Excel's way to name it
        lines[0], separator = "\n", named[1]
    else:
        separator = _separator(lines, usual, quotes)
    reading = _chosen(path, lines, separator, quotes)
    _check_names(path, reading.head)
    empty = 0
    for number, _, cells in reading.rows:
        if any(cell.strip() for cell in cells):
            yield number, dict(zip(reading.head, cells, strict=True))
        else:
            empty += 1
    if empty:
        logger.warning("%s: %d empty rows left out", path, empty)


def has_table(text: str) -> bool:
    """Whether a text, whatever its file's name, looks like a table: a header of several columns, rows equally wide."""
    lines = [f"{line}\n" for line in text.split("\n")]
    reading = _read(lines, _separator(lines, ",", None), True)
    return len(reading.head) > 1 and bool(reading.rows) and reading.fault is None


def _separator(lines: Sequence[str], usual: str, quotes: bool | None) -> str:
    """The separator that splits the header into several columns; the usual one if several do, or none does."""
    head = next((line for line in lines if line.strip()), "")
    order = sorted(SEPARATORS, key=lambda separator: separator != usual)
    cutting = [separator for separator in order if len(_read([head], separator, quotes is not False).head) > 1]
    if len(cutting) > 1:
        fitting = [each for each in cutting if any(_read(lines, each, way).fault is None for way in (True, False))]
        cutting = fitting or cutting
    return (cutting or order)[0]


def _chosen(path: Path, lines: Sequence[str], separator: str, quotes: bool | None) -> Reading:
    """The reading to use. Raises UserError if none is consistent, or if two are but differ in their rows."""
    if quotes is not None or not any('"' in line for line in lines):
        return _consistent(path, _read(lines, separator, quoting=quotes is not False))
    quoted, plain = (_read(lines, separator, quoting) for quoting in (True, False))
    if plain.fault or _is_quoted(plain):
        return _consistent(path, quoted)
    if quoted.fault:
        logger.info("%s: every line is read as a row and quotation marks as text: it does not fit quoting", path)
        return plain
    if len(quoted.rows) != len(plain.rows):
        number, line, cells = next(row for row in quoted.rows if any("\n" in cell for cell in row[2]))
        raise UserError(
            f"{path}: row {number}, line {line}: quotation marks can be read in two ways: with quoting, several lines "
            f"are the one row {_short(cells)}; pass {QUOTES_FLAG} yes if so, {QUOTES_FLAG} no if every line is a row"
        )
    return quoted


def _is_quoted(plain: Reading) -> bool:
    """Whether marks that only a quoting program writes are left: around a column's name, or doubled in a cell."""
    return any(name.startswith('"') and name.endswith('"') for name in plain.head) or any(
        _is_doubled(cell) for _, _, cells in plain.rows for cell in cells
    )


def _is_doubled(cell: str) -> bool:
    """Whether a cell is in marks, and each mark inside it is written twice."""
    inside = cell[1:-1]
    return f'"{inside}"' == cell and '""' in inside and '"' not in inside.replace('""', "")


def _consistent(path: Path, reading: Reading) -> Reading:
    if reading.fault:
        raise UserError(f"{path}: {reading.fault}")
    return reading


def _read(lines: Sequence[str], separator: str, quoting: bool) -> Reading:
    """All rows up to the first fault. Extra empty cells are ignored: some programs end every row with one."""
    found = Reading()
    head = next((line for line in lines if line.strip()), "").split(separator)
    spaced = len(head) > 1 and all(name.startswith(" ") for name in head[1:])  # "source, target"
    kind = csv.QUOTE_MINIMAL if quoting else csv.QUOTE_NONE
    table = csv.reader(lines, delimiter=separator, quoting=kind, skipinitialspace=spaced, strict=True)
    number, line = 0, 1
    try:
        for cells in table:
            first, line = line, table.line_num + 1
            if not cells or cells == [""]:
                continue
            if not found.head:
                found.head = [name.strip() for name in cells]
                while len(found.head) > 1 and not found.head[-1]:
                    found.head.pop()
                continue
            number, width = number + 1, len(found.head)
            wrong = len(cells) < width or any(cells[width:])
            if wrong and any(cells):
                found.fault = (
                    f"row {number}: {len(cells)} values for the {width} columns of the first line; put cells that hold "
                    "the separator in quotation marks, or write the file as .jsonl"
                )
                return found
            found.rows.append((number, first, [*cells, *[""] * width][:width]))
    except csv.Error as error:
        remedy = f"close the quotation mark, or pass {QUOTES_FLAG} no"
        if "new-line" in str(error):
            error = "a carriage return inside a cell"
            remedy = "end all lines in the same way, or put the cell in quotation marks"
        found.fault = f"row {number + 1}, line {table.line_num}: {error}; {remedy}"
    return found


def _check_names(path: Path, head: Sequence[str]) -> None:
    twice = next((name for n, name in enumerate(head) if name and name in head[:n]), None)
    if twice is not None:
        raise UserError(f'{path}: the column "{twice}" appears twice in the first line; rename one of the two')


def _short(cells: Sequence[str]) -> str:
    shown = repr(list(cells))
    return shown if len(shown) <= 60 else f"{shown[:59]}…"

"""Reads records from CSV with commas, semicolons, tabs or `|` as delimiter.

The header decides which: it has to name the columns of a heartbeat, in any case. A line may be told
apart from the next only while quotes are in pairs: a quote that isn't closed ends the file there.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator

from hb_assets.core.errors import ImportFileError
from hb_assets.core.schema import BOUNDS
from hb_assets.pipeline.importing.columns import field_of, fields_of
from hb_assets.pipeline.importing.sources import MOST, NOT_UTF8, TOO_LONG, Content, Row, Unreadable

_DELIMITERS = ",;\t|"
_NUMBER = re.compile(r"-?[0-9]{1,20}(\.[0-9]{1,20})?")
_NOT_UTF8 = re.compile("[\udc80-\udcff]")
_SEP = re.compile(r"sep=(.)[\r\n]*", re.IGNORECASE)


class _Lines:
    """The lines of a text; `fault` is what was wrong with one since `begin`."""

    def __init__(self, content: Content) -> None:
        self._text = io.TextIOWrapper(content, "utf-8-sig", "surrogateescape", newline="")
        self.number = 0
        self.fault: Unreadable | None = None
        self._size = 0

    def begin(self) -> int:
        """A record begins: forget the fault; the number of its first line."""
        self.fault, self._size = None, 0
        return self.number + 1

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._text.readline(MOST)
        if not line:
            raise StopIteration
        self.number += 1
        self._size += len(line)
        if self._size > 2 * MOST:
            raise csv.Error("a record over more lines than anybody means")
        if len(line) >= MOST and line[-1] not in "\r\n":
            while line and line[-1] not in "\r\n":
                line = self._text.readline(MOST)
            self.fault = TOO_LONG
            return "\n"
        if not line.isascii() and _NOT_UTF8.search(line):
            self.fault = NOT_UTF8
        return line


def records(name: str, content: Content) -> Iterator[tuple[int, Row]]:
    """Records with the numbers of the lines that they begin on.

    Raises:
        ImportFileError: no header with the columns of a heartbeat, or a quote that isn't closed.
    """
    csv.field_size_limit(MOST)
    lines = _Lines(content)
    delimiter, header, spaced = _header(name, lines)
    fields = fields_of(
        name,
        header,
        " (a CSV file needs a header; its cells are parted by commas, semicolons, tabs or bars)",
    )
    rows = csv.reader(lines, delimiter=delimiter, skipinitialspace=spaced, strict=True)
    while True:
        first = lines.begin()
        try:
            cells = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            if lines.number > first or "end of data" in str(error):
                raise ImportFileError(
                    f"{name}: line {first:,}: a quote that is opened there isn't closed where a "
                    "cell ends: nothing was read from that line on"
                ) from None
            yield first, Unreadable("record_bad_quotes", "text follows behind a closing quote")
            continue
        surplus = cells[len(fields) :]
        if lines.fault is not None:
            yield first, lines.fault
        elif any(cell.strip() for cell in surplus):
            yield first, _too_many(len(cells), len(fields))
        elif cells:
            pairs = zip(fields, cells, strict=False)  # what a short row lacks is absent
            # CSV has only text: an empty cell is an absent one
            yield first, {field: _value(field, cell) for field, cell in pairs if cell}


def _header(name: str, lines: _Lines) -> tuple[str, list[str], bool]:
    """Delimiter and names of the columns, and whether spaces stand behind the delimiters."""
    line = next(lines, "")
    delimiters = _DELIMITERS
    if said := _SEP.fullmatch(line):
        delimiters, line = said[1], next(lines, "")
    while line and not line.strip():
        line = next(lines, "")
    if lines.fault is not None:
        raise ImportFileError(f"{name}: its first line is no header: {lines.fault.message}")
    found: list[str] = []
    delimiter, spaced = delimiters[0], False
    for one in delimiters:
        cells = _cells(line, one, spaced=True)
        if sum(map(bool, map(field_of, cells))) > sum(map(bool, map(field_of, found))):
            found, delimiter = cells, one
            spaced = any(cell.startswith(" ") for cell in _cells(line, one, spaced=False))
    for cell in found:
        if cell != cell.strip() and field_of(cell):
            raise ImportFileError(
                f"{name}: spaces stand around the name {field_of(cell)} in its header: take them "
                "away, and those in its rows"
            )
    while found and not found[-1].strip():
        found.pop()  # trailing delimiters
    return delimiter, found, spaced


def _cells(line: str, delimiter: str, *, spaced: bool) -> list[str]:
    try:
        return next(csv.reader([line], delimiter=delimiter, skipinitialspace=spaced, strict=True))
    except (csv.Error, StopIteration):
        return []


def _too_many(cells: int, columns: int) -> Unreadable:
    return Unreadable(
        "record_too_many_cells",
        f"the row has {cells} cells, the header {columns}: a cell that holds the delimiter (a "
        "decimal comma, say) has to stand in quotes",
    )


_NUMBERS = {"timestamp_ms", *BOUNDS}


def _value(field: str, text: str) -> object:
    """Numbers are read as such where a heartbeat has them."""
    if field in _NUMBERS and _NUMBER.fullmatch(text):
        return float(text) if "." in text else int(text)
    return text

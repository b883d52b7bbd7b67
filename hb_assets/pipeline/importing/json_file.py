"""Reads records from JSON: one object on each line, an array of them, or indented objects.

What the file begins with tells which: `[` begins an array, `{` alone on a line an indented object,
and anything else is NDJSON, where a line that is no record leaves the others alone. The text is
never held whole.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator

from hb_assets.core.errors import ImportFileError
from hb_assets.pipeline.importing.sources import MOST, TOO_LONG, Content, Row

_BLANK = re.compile(r"[ \t\r\n]*")


def records(name: str, content: Content) -> Iterator[tuple[int, Row]]:
    """Records with their numbers: the line; of an array and of indented objects which one it is.

    Raises:
        ImportFileError: what follows in an array, or behind an indented object, isn't JSON.
    """
    blank, line = 0, content.readline(MOST).removeprefix(codecs.BOM_UTF8)
    while line and line.isspace():
        blank, line = blank + 1, content.readline(MOST)
    start = line.strip()
    if start.startswith(b"["):
        return _array(name, _Text(line, content))
    if start == b"{":
        return _objects(name, _Text(line, content))
    return _lines(blank, line, content)


def _lines(number: int, line: bytes, content: Content) -> Iterator[tuple[int, Row]]:
    while line:
        number += 1
        if len(line) >= MOST and not line.endswith(b"\n"):
            while line and not line.endswith(b"\n"):
                line = content.readline(MOST)
            yield number, TOO_LONG
        elif text := line.strip():
            yield number, text
        line = content.readline(MOST)


def _nothing(_: str) -> None:
    """Numbers are read where the record is judged."""


class _Text:
    """The text ahead, of which only as much is held as the next value takes."""

    def __init__(self, start: bytes, content: Content) -> None:
        # what isn't UTF-8 comes out again as it was, for the one record that holds it
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._content = content
        self._ahead = self._decoder.decode(start)
        self._at = 0
        self._whole = False
        self._json = json.JSONDecoder(
            parse_int=_nothing, parse_float=_nothing, parse_constant=_nothing
        )

    def character(self) -> str:
        """The next character that isn't blank; empty at the end."""
        while True:
            blank = _BLANK.match(self._ahead, self._at)
            self._at = blank.end() if blank else self._at
            if self._at < len(self._ahead) or not self._more():
                return self._ahead[self._at : self._at + 1]

    def take(self, wanted: str) -> bool:
        """Pass over that character if it is this one; whether it was."""
        found = self.character() == wanted
        self._at += found
        return found

    def value(self) -> bytes:
        """The text of the JSON value that is next. Raises ValueError when it is none."""
        while True:
            try:
                _, end = self._json.raw_decode(self._ahead, self._at)
            except (ValueError, RecursionError):
                if len(self._ahead) - self._at > MOST or not self._more():
                    raise ValueError from None
                continue
            if end == len(self._ahead) and self._more():
                continue  # a number, say, may go on
            text = self._ahead[self._at : end]
            self._at = end
            return text.encode("utf-8", "surrogateescape")

    def _more(self) -> bool:
        if self._whole:
            return False
        read = self._content.read(MOST)
        self._whole = not read
        self._ahead = self._ahead[self._at :] + self._decoder.decode(read, final=self._whole)
        self._at = 0
        return True


def _array(name: str, text: _Text) -> Iterator[tuple[int, Row]]:
    number = 0
    text.take("[")
    more = not text.take("]")
    while more:
        number += 1
        yield number, _value(name, text, number)
        more = text.take(",")
        if not more and not text.take("]"):
            raise ImportFileError(f"{name}: the array isn't closed behind record {number:,}")
    if text.character():
        raise ImportFileError(f"{name}: something follows behind the array's {number:,} records")


def _objects(name: str, text: _Text) -> Iterator[tuple[int, Row]]:
    number = 0
    while text.character():
        number += 1
        yield number, _value(name, text, number)


def _value(name: str, text: _Text, number: int) -> bytes:
    if not text.character():
        raise ImportFileError(f"{name}: ends where record {number:,} is due")
    try:
        return text.value()
    except ValueError:
        raise ImportFileError(
            f"{name}: record {number:,} isn't JSON, or is longer than {MOST:,} bytes: it and what "
            "follows can't be told apart"
        ) from None

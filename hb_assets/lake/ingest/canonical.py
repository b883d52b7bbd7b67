"""Fast columnar reader of canonical lines, the one spelling that our own appends write.

It accepts only the spelling of `record.encode`, and proves that a line has it. Whatever isn't
proved to be canonical is left out, valid or not, and read by `decode`.

A canonical line, cut at its commas, has four cells with constant beginnings; pyarrow's CSV reader
cuts, and gathers the few different users, devices and heart rates in dictionaries, so that what is
examined closely is each of these once, and the digits of the timestamps.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv

from hb_assets.core.record import ID_LENGTH, Heartbeat, encode
from hb_assets.core.schema import BOUNDS, VALUES

_USER, _DEVICE, _TIME, *_VALUES = encode(Heartbeat("", "", 0, *(0 for _ in VALUES))).split(b",")
_INSTANT, _DIGITS = _TIME.removesuffix(b"0"), 13
"""Thirteen digits reach from 2001 to 2286."""
# Its beginning as two words that overlap: comparing those takes a tenth of the time of its bytes.
_WORDS = np.dtype(
    {
        "names": ["first", "last", "digits"],
        "formats": ["u8", "u8", (np.uint8, _DIGITS)],
        "offsets": [0, len(_INSTANT) - 8, len(_INSTANT)],
        "itemsize": len(_INSTANT) + _DIGITS,
    }
)
_SPLIT = 6
"""Digits before it, and behind it, make numbers of 32 bits."""
_INTEGER = "(-?[1-9][0-9]*|0|null)"
_PATTERNS = [re.compile(re.escape(cell.decode()).replace("0", _INTEGER)) for cell in _VALUES]
_NAMES = ["user", "device", "time", *(field.name for field in VALUES)]
_FEW = pa.dictionary(pa.int32(), pa.string())
_BLOCK = 2**20
_MOST_SKIPPED = 1000
"""Lines without four cells that are left out one by one: each costs a call."""


@dataclass(frozen=True, slots=True)
class Lines:
    """The canonical lines of a text, as columns.

    Attributes:
        number: which lines, counted from 0, in order.
        user_id: of each of them, as a dictionary.
        device_id: likewise.
        instant: epoch milliseconds.
        values: a column for each of `schema.VALUES`.
    """

    number: npt.NDArray[np.int64]
    user_id: pa.DictionaryArray
    device_id: pa.DictionaryArray
    instant: npt.NDArray[np.int64]
    values: list[pa.Array]


def read(text: bytes, lines: int) -> Lines | None:
    """Read the canonical lines of a text that has so many lines; None where that isn't possible.

    Timestamps aren't held against any bounds.
    """
    # The reader takes a return for a line's end, and drops a byte order mark.
    if b"\r" in text or text.startswith(b"\xef\xbb\xbf"):
        return None
    skipped: list[int] = []

    def skip(row: csv.InvalidRow) -> str:
        skipped.append(row.number - 1)
        return "error" if len(skipped) > _MOST_SKIPPED else "skip"

    try:
        _text(text).validate(full=True)
        cells = csv.read_csv(
            pa.BufferReader(text),
            csv.ReadOptions(use_threads=False, block_size=_BLOCK, column_names=_NAMES),
            csv.ParseOptions(
                quote_char=False,
                escape_char=False,
                ignore_empty_lines=False,
                invalid_row_handler=skip,
            ),
            csv.ConvertOptions(
                check_utf8=False,  # it would be too late for a line that is skipped
                column_types={
                    "user": _FEW,
                    "device": _FEW,
                    "time": pa.binary(len(_INSTANT) + _DIGITS),
                    **dict.fromkeys(_NAMES[3:], _FEW),
                },
            ),
        )
    except pa.ArrowException:
        return None  # not UTF-8, a timestamp of another length, a line that is far too long ...
    if cells.num_rows == 0 or cells.num_rows + len(skipped) != lines:
        return None
    cells = cells.unify_dictionaries().combine_chunks()
    user, device, time, *values = (column.chunk(0) for column in cells.columns)
    users, user_fit = _names(user.dictionary, _USER)
    devices, device_fit = _names(device.dictionary, _DEVICE)
    instants, fit = _instants(time)
    user_codes, device_codes = user.indices.to_numpy(), device.indices.to_numpy()
    fit &= user_fit[user_codes] & device_fit[device_codes]
    found = []
    for field, pattern, column in zip(VALUES, _PATTERNS, values, strict=True):
        numbers, numbers_fit = _numbers(column.dictionary, field, pattern)
        found.append(numbers.take(column.indices))
        fit &= numbers_fit[column.indices.to_numpy()]
    number = np.arange(lines)
    if skipped:
        number = np.delete(number, skipped)
    if not fit.all():
        number, instants = number[fit], instants[fit]
        found = [column.filter(pa.array(fit)) for column in found]
        user_codes, device_codes = user_codes[fit], device_codes[fit]
    return Lines(
        number,
        pa.DictionaryArray.from_arrays(user_codes, users),
        pa.DictionaryArray.from_arrays(device_codes, devices),
        instants,
        found,
    )


def _text(text: bytes) -> pa.LargeStringArray:
    offsets = np.array([0, len(text)])
    return pa.LargeStringArray.from_buffers(1, pa.py_buffer(offsets), pa.py_buffer(text))


def _names(cells: pa.StringArray, empty: bytes) -> tuple[pa.StringArray, npt.NDArray[np.bool_]]:
    """The names in cells such as `"device_id":"device_a"`, and which cells are plainly that.

    A name with an escape isn't plain; `empty` is the cell of one without a character.
    """
    text = empty.decode()
    opening, length = text[:-1], pc.utf8_length(cells)
    conditions = [
        pc.starts_with(cells, opening),
        pc.ends_with(cells, '"'),
        pc.equal(pc.count_substring(cells, '"'), text.count('"')),
        pc.invert(pc.match_substring_regex(cells, r"[\\\x00-\x1f]")),
        pc.greater_equal(length, len(text) + ID_LENGTH[0]),
        pc.less_equal(length, len(text) + ID_LENGTH[1]),
    ]
    fit = np.logical_and.reduce([one.to_numpy(zero_copy_only=False) for one in conditions])
    return pc.utf8_slice_codeunits(cells, len(opening), -1), fit


def _numbers(
    cells: pa.StringArray, field: pa.Field, pattern: re.Pattern[str]
) -> tuple[pa.Array, npt.NDArray[np.bool_]]:
    """The values in cells such as `"heart_rate":75}`, and which cells have one that is valid."""
    least, most = BOUNDS[field.name]
    found: list[int | None] = [None] * len(cells)
    fit = np.zeros(len(cells), bool)
    for at, cell in enumerate(cells.to_pylist()):
        match = pattern.fullmatch(cell)
        if match and match[1] == "null":
            fit[at] = field.nullable
        elif match and least <= int(match[1]) <= most:
            found[at], fit[at] = int(match[1]), True
    return pa.array(found, field.type), fit


def _instants(
    cells: pa.FixedSizeBinaryArray,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Epoch milliseconds in cells such as `"timestamp_ms":1736935200000`, and which are plain."""
    words = np.frombuffer(cells.buffers()[1], _WORDS, count=len(cells))
    opening = np.frombuffer(_INSTANT + bytes(_DIGITS), _WORDS)[0]
    fit = (words["first"] == opening["first"]) & (words["last"] == opening["last"])
    # one digit of all timestamps after the other: side by side in memory that is quick
    digits = np.ascontiguousarray(words["digits"].T) - np.uint8(ord("0"))
    fit &= (digits.max(axis=0, initial=0) <= 9) & (digits[0] > 0)
    upper, lower = _number(digits[:_SPLIT]), _number(digits[_SPLIT:])
    return upper.astype(np.int64) * 10 ** (_DIGITS - _SPLIT) + lower, fit


def _number(digits: npt.NDArray[np.uint8]) -> npt.NDArray[np.int32]:
    number = np.zeros(digits.shape[1], np.int32)
    for digit in digits:
        number *= 10
        number += digit
    return number

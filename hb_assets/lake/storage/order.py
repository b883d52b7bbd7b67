"""Order of rows in memory, by columns of integers that sort as their values do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

Numbers: TypeAlias = npt.NDArray[Any]


def ranks(column: pa.ChunkedArray) -> Numbers:
    """A column without nulls as numbers that sort as its values do; of texts the ranks."""
    if pa.types.is_integer(column.type) or pa.types.is_timestamp(column.type):
        return _of_chunk(column.combine_chunks())
    whole = column if pa.types.is_dictionary(column.type) else column.dictionary_encode()
    whole = whole.unify_dictionaries().combine_chunks()
    order = pc.sort_indices(whole.dictionary).to_numpy()
    found = np.empty(len(order), np.int32)
    found[order] = np.arange(len(order), dtype=np.int32)
    of_rows: Numbers = found[whole.indices.to_numpy()]
    return of_rows


def neighbours(
    columns: Sequence[Numbers],
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Of each row whether it is less than the one before it, and whether it is the same."""
    less = np.zeros(len(columns[0]), bool)
    same = np.ones(len(less), bool)
    same[:1] = False
    for column in columns:
        this, before = column[1:], column[:-1]
        less[1:] |= same[1:] & (this < before)
        same[1:] &= this == before
    return less, same


def order_of(columns: Sequence[Numbers]) -> npt.NDArray[np.intp]:
    """The stable order of rows by integers, the most significant column first.

    One number that holds them all is sorted several times as fast as columns.
    """
    words = in_one_word(columns)
    if words is None:
        return np.lexsort(tuple(reversed(columns)))
    return np.argsort(words, kind="stable")


def _of_chunk(chunk: pa.Array) -> Numbers:
    if pa.types.is_timestamp(chunk.type):
        chunk = chunk.cast(pa.int64())
    found: Numbers = chunk.to_numpy()
    return found


_WORD = 63
"""Bits of a signed integer that is never negative."""


def in_one_word(columns: Sequence[Numbers]) -> Numbers | None:
    """Numbers side by side in an integer, which sorts as they do; None where it can't hold them."""
    least = [int(column.min(initial=np.iinfo(column.dtype).max)) for column in columns]
    widths = [
        max(0, int(column.max(initial=low)) - low).bit_length()
        for column, low in zip(columns, least, strict=True)
    ]
    if sum(widths) > _WORD:
        return None
    word = np.zeros(len(columns[0]), np.int64)
    for column, low, width in zip(columns, least, widths, strict=True):
        word <<= width
        word |= column.astype(np.int64, copy=False) - low
    return word

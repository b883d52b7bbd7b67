"""Rows of one shard as arrays, sorted in memory; a text stands there as its rank in its column.

Belongs here: reading tables into arrays, and their order. Doesn't belong here: which row of a key
survives (`merge`), and what doesn't fit into memory (`external_sort`).

Ranks turn the sort by two texts and an instant into the sort of one integer. That is a merge of the
sorted runs that fragments are: NumPy's stable sort finds them.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from hb_assets.core.schema import ARRIVAL, HEARTBEATS, ORDER

Numbers: TypeAlias = npt.NDArray[Any]

TEXTS = tuple(field.name for field in HEARTBEATS if pa.types.is_string(field.type))
ENCODED: pa.Schema = pa.schema(
    field.with_type(pa.dictionary(pa.int32(), pa.string())) if field.name in TEXTS else field
    for field in HEARTBEATS
)
"""The schema HEARTBEATS with texts as dictionaries, as Parquet stores them."""


def _kind(field: pa.Field) -> np.dtype[Any]:
    if pa.types.is_string(field.type):
        return np.dtype(np.int32)
    if pa.types.is_timestamp(field.type):
        return np.dtype(np.int64)
    kind: np.dtype[Any] = np.dtype(field.type.to_pandas_dtype())
    return kind


_KINDS = {field.name: _kind(field) for field in HEARTBEATS}
BYTES_PER_ROW = sum(kind.itemsize for kind in _KINDS.values()) + 3 * np.dtype(np.int64).itemsize
"""Memory that a row takes while it is sorted: its numbers, its key twice, and its place. Texts come
on top, once each."""


@dataclass(slots=True)
class Columns:
    """Rows: by column an array of numbers, and the sorted texts that ranks point into.

    `order` holds the places of the rows as they are sorted; rows are brought into that order when
    they are taken out.
    """

    numbers: Mapping[str, Numbers]
    texts: Mapping[str, pa.LargeStringArray]
    order: Numbers

    @classmethod
    def of(
        cls, tables: Iterable[pa.Table], rows: int, names: Sequence[str] = HEARTBEATS.names
    ) -> Columns:
        """Take in tables of the schema HEARTBEATS, texts as dictionaries or as they are.

        Args:
            tables: they may go once they were taken in.
            rows: how many all of them have together.
            names: only these columns.
        """
        numbers: dict[str, Numbers] = {name: np.empty(rows, _KINDS[name]) for name in names}
        entries: dict[str, list[pa.Array]] = {name: [] for name in names if name in TEXTS}
        known = dict.fromkeys(TEXTS, 0)
        start = 0
        for table in tables:
            for name in names:
                place = start
                for chunk in table[name].chunks:
                    into = numbers[name][place : place + len(chunk)]
                    place += len(chunk)
                    if name not in TEXTS:
                        into[:] = _of_chunk(chunk)
                        continue
                    encoded = (
                        chunk if pa.types.is_dictionary(chunk.type) else chunk.dictionary_encode()
                    )
                    np.add(_of_chunk(encoded.indices), known[name], out=into, casting="unsafe")
                    entries[name].append(encoded.dictionary.cast(pa.large_string()))
                    known[name] += len(encoded.dictionary)
            start += table.num_rows
        texts = {}
        for name, found in entries.items():
            texts[name], ranks = _ranked(found)
            numbers[name] = ranks[numbers[name]]
        return cls(numbers, texts, np.arange(rows))

    @property
    def rows(self) -> int:
        """How many."""
        return len(self.numbers["timestamp"])

    def sort(self) -> Numbers:
        """Sort by key and arrival; returns places of rows that share their key with a neighbour."""
        columns = [self.numbers[name] for name in ORDER]
        order = order_of(columns)
        _, same = neighbours([column[order] for column in columns])
        (twins,) = np.nonzero(np.append(same[1:], False) | same)
        arrivals = [self.numbers[name][order[twins]] for name in ARRIVAL]
        # Fragments are read in the order of their arrival, so that twins hardly ever aren't in it.
        descending, _ = neighbours(arrivals)
        if np.any(descending & same[twins]):
            group = np.cumsum(~same)[twins]
            order[twins] = order[twins][np.lexsort((*reversed(arrivals), group))]
        self.order = order
        return twins

    def table(self, rows: slice | Numbers) -> pa.Table:
        """These rows of the sorted ones, in the schema ENCODED."""
        places, arrays = self.order[rows], []
        for field in HEARTBEATS:
            numbers = self.numbers[field.name][places]
            if field.name in TEXTS:
                arrays.append(_encoded(numbers, self.texts[field.name]))
            else:
                arrays.append(pa.array(numbers).cast(field.type))
        return pa.Table.from_arrays(arrays, schema=ENCODED)

    def place_after(self, key: Mapping[str, Any]) -> int:
        """In sorted rows, the place behind all rows whose key isn't after this one.

        Args:
            key: by column of ORDER a text, or epoch milliseconds.
        """
        low, high = 0, self.rows
        for name in ORDER:
            numbers, places = self.numbers[name], self.order[low:high]
            low, high = (
                low + bisect.bisect_left(places, n, key=numbers.__getitem__)
                for n in self._bounds(name, key[name])
            )
        return high

    def _bounds(self, name: str, value: Any) -> tuple[int, int]:
        """The number that stands for a value, and the next one; the same where it isn't there."""
        if name not in TEXTS:
            return value, value + 1
        texts = self.texts[name]
        places = range(len(texts))

        def text(place: int) -> Any:
            return texts[place].as_py()

        left = bisect.bisect_left(places, value, key=text)
        return left, bisect.bisect_right(places, value, left, key=text)


def ranks(column: pa.ChunkedArray) -> Numbers:
    """A column without nulls as numbers that sort as its values do; of texts the ranks."""
    if pa.types.is_integer(column.type) or pa.types.is_timestamp(column.type):
        return _of_chunk(column.combine_chunks())
    whole = column if pa.types.is_dictionary(column.type) else column.dictionary_encode()
    whole = whole.unify_dictionaries().combine_chunks()
    _, found = _ranked([whole.dictionary.cast(pa.large_string())])
    of_rows: Numbers = found[whole.indices.to_numpy()]
    return of_rows


def encoded(rows: pa.Table) -> pa.Table:
    """Rows of the schema HEARTBEATS in the schema ENCODED."""
    for place, field in enumerate(ENCODED):
        if field.name in TEXTS:
            rows = rows.set_column(place, field, rows[field.name].dictionary_encode())
    return rows


def _encoded(ranks: Numbers, texts: pa.LargeStringArray) -> pa.DictionaryArray:
    """Texts as a dictionary that holds few others: each row group is written with its own."""
    low, high = (int(ranks.min()), int(ranks.max()) + 1) if len(ranks) else (0, 0)
    if high - low > max(len(ranks), _SMALL):
        return texts.take(pa.array(ranks)).cast(pa.string()).dictionary_encode()
    part = texts.slice(low, high - low).cast(pa.string())
    return pa.DictionaryArray.from_arrays(pa.array(ranks - low), part)


_SMALL = 1024


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


def _ranked(entries: Sequence[pa.Array]) -> tuple[pa.LargeStringArray, Numbers]:
    """Distinct texts in order, and of each entry its rank among them."""
    encoded = pa.concat_arrays([pa.array([], pa.large_string()), *entries]).dictionary_encode()
    order = pc.sort_indices(encoded.dictionary)
    ranks = np.empty(len(order), np.int32)
    ranks[order.to_numpy()] = np.arange(len(order), dtype=np.int32)
    return encoded.dictionary.take(order), ranks[encoded.indices.to_numpy()]


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

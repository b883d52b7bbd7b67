"""Row groups of a consolidated file that is merged into: which of them to sort, and the others.

A row group that holds no key of a pending row needn't be sorted again: the sorted rows are put
between its rows, and where none falls into it, it is passed on as it is.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from hb_assets.core.schema import ENCODED, HEARTBEATS, KEY, ORDER
from hb_assets.lake.storage.order import order_of, ranks
from hb_assets.lake.storage.verified import VerifiedFile

if TYPE_CHECKING:
    import duckdb


@dataclass(frozen=True, slots=True)
class RowGroups:
    """Some row groups of an open file, whose texts are read as dictionaries."""

    file: VerifiedFile
    numbers: Sequence[int]

    def tables(self, columns: Sequence[str] = HEARTBEATS.names) -> Iterator[pa.Table]:
        """Their rows, a row group at a time."""
        for number in self.numbers:
            yield self.file.read_row_group(number, columns=list(columns), use_threads=False)

    def encoded(self, columns: Sequence[str] = HEARTBEATS.names) -> Iterator[pa.Table]:
        """The same in the schema ENCODED, as far as it has these columns."""
        schema = _only(columns)
        return (rows.cast(schema) for rows in self.tables(columns))

    def reader(self, columns: Sequence[str] = HEARTBEATS.names) -> pa.RecordBatchReader:
        """The same as a stream, for DuckDB."""
        batches = (batch for rows in self.encoded(columns) for batch in rows.to_batches())
        return pa.RecordBatchReader.from_batches(_only(columns), batches)


def _only(columns: Sequence[str]) -> pa.Schema:
    return pa.schema([ENCODED.field(name) for name in columns])


# Of these rows it isn't certain that they survive.
_CONTESTED = f"""
SELECT DISTINCT number FROM (
    SELECT file_row_number FROM base SEMI JOIN new USING ({", ".join(KEY)})
    UNION ALL SELECT file_row_number FROM base SEMI JOIN erased ON user_id = forgotten
) ASOF JOIN row_groups ON file_row_number < row_groups.behind
"""
_BEHIND = pa.schema([("number", pa.int64()), ("behind", pa.int64())])


def split(file: VerifiedFile, connection: duckdb.DuckDBPyConnection) -> tuple[RowGroups, RowGroups]:
    """The row groups with a pending row's key, or a forgotten user's row, and all others.

    Args:
        file: the consolidated file.
        connection: an engine with the relations `base` (of that file), `new` and `erased`.
    """
    groups = range(file.num_row_groups)
    behind = accumulate(file.metadata.row_group(number).num_rows for number in groups)
    connection.register("row_groups", pa.table([[*groups], [*behind]], schema=_BEHIND))
    contested = {number for (number,) in connection.sql(_CONTESTED).fetchall()}
    others = [number for number in groups if number not in contested]
    return RowGroups(file, sorted(contested)), RowGroups(file, others)


def in_order(one: Iterator[pa.Table], other: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """Two streams of sorted rows in the schema ENCODED, without a common key, as one.

    A table of one that no row of the other falls into is passed on as it is.
    """
    this, that = next(one, None), next(other, None)
    while this is not None and that is not None:
        end = min(_key(this, -1), _key(that, -1))
        first, this = _cut(this, end)
        second, that = _cut(that, end)
        yield _together([part for part in (first, second) if part.num_rows])
        this = next(one, None) if this is None else this
        that = next(other, None) if that is None else that
    for rest in (this, that):
        if rest is not None:
            yield rest
    yield from one
    yield from other


def _cut(rows: pa.Table, key: tuple[Any, ...]) -> tuple[pa.Table, pa.Table | None]:
    """Sorted rows up to a key, and the rest, where there is any."""
    place = bisect.bisect_right(range(rows.num_rows), key, key=partial(_key, rows))
    return rows.slice(0, place), rows.slice(place) if place < rows.num_rows else None


def _together(parts: Sequence[pa.Table]) -> pa.Table:
    """One sorted table, or two of them as one."""
    whole = pa.concat_tables(parts)
    if len(parts) == 1 or _key(parts[0], -1) < _key(parts[1], 0):
        return whole
    whole = whole.unify_dictionaries().combine_chunks()
    return whole.take(pa.array(order_of([ranks(whole[name]) for name in ORDER])))


def _key(rows: pa.Table, place: int) -> tuple[Any, ...]:
    return tuple(rows[name][place].as_py() for name in ORDER)

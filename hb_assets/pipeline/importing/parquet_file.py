"""Reads records from Parquet, whatever types its writer chose for ids, times and numbers."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from decimal import Decimal
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from hb_assets.core.errors import ImportFileError
from hb_assets.core.record import Ignored
from hb_assets.pipeline.importing.columns import field_of, fields_of
from hb_assets.pipeline.importing.sources import UNREADABLE, Row, Unreadable, first_line

_BATCH = 2_000
_BUFFER = 2**20
"""Bytes of a column that are read at once, instead of all of a row group."""
_UNITS = {"s": (1000, 1), "ms": (1, 1), "us": (1, 1000), "ns": (1, 1_000_000)}
"""What a timestamp of each unit is multiplied with, and divided by; finer digits are cut off."""


def records(name: str, file: IO[bytes], ignored: Ignored) -> Iterator[tuple[int, Row]]:
    """Records with the numbers of their rows, from 1.

    Args:
        name: the file, for errors.
        file: one that can seek.
        ignored: counts what unknown columns hold, out of statistics: they aren't read. Where there
            are none, every row counts.

    Raises:
        ImportFileError: not a Parquet file, or one without the columns of a heartbeat.
    """
    try:
        parquet = pq.ParquetFile(
            file,
            buffer_size=_BUFFER,
            pre_buffer=False,
            coerce_int96_timestamp_unit="ms",  # in nanoseconds it is the same after 584 years
            page_checksum_verification=True,
        )
    except UNREADABLE as error:
        raise ImportFileError(f"{name}: not a Parquet file: {first_line(error)}") from None
    columns = parquet.schema_arrow.names
    fields = dict(zip(columns, fields_of(name, columns), strict=True))
    wanted = [column for column in columns if field_of(column)]
    unknown = [
        one.name
        for one in parquet.schema_arrow
        if not field_of(one.name) and not pa.types.is_null(one.type)
    ]
    number = 0
    for group in range(parquet.num_row_groups):
        _count_unknown(parquet.metadata.row_group(group), unknown, ignored)
        for batch in parquet.iter_batches(_BATCH, row_groups=[group], columns=wanted):
            names = [fields[column] for column in batch.schema.names]
            for values in zip(*map(_values, names, batch.columns), strict=True):
                number += 1
                yield number, _row(dict(zip(names, values, strict=True)))


def _row(fields: dict[str, Any]) -> Row:
    for value in fields.values():
        if isinstance(value, Unreadable):
            return value
    moment = fields.get("timestamp")
    if isinstance(moment, _EpochMs):
        del fields["timestamp"]
        if fields.get("timestamp_ms") is None:
            fields["timestamp_ms"] = int(moment)
    return fields


class _EpochMs(int):
    """Epoch milliseconds out of a column of timestamps, not of numbers that might be anything."""


_TIMES = {"timestamp": _EpochMs, "timestamp_ms": int}


def _values(field: str, column: pa.Array) -> list[Any]:
    """The values of a column as JSON would have them; Unreadable where one can't be read."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_timestamp(column.type) and field in _TIMES:
        times, by = _UNITS[column.type.unit]
        made = _TIMES[field]
        # as numbers: those need neither the calendar nor the zone, which is only for display
        return _each(column.cast(pa.int64()), lambda value: made(value * times // by), field)
    if pa.types.is_fixed_size_binary(column.type):
        return list(column.to_pylist())  # bytes that nobody calls a UUID are no text either
    return _each(column, _plain, field)


def _plain(value: Any) -> Any:
    if isinstance(value, Decimal) and value == value.to_integral_value():
        return int(value)
    if isinstance(value, bytes):
        return value.decode()
    return str(value) if isinstance(value, uuid.UUID) else value


def _each(column: pa.Array, made: Callable[[Any], Any], field: str) -> list[Any]:
    found: list[Any] = []
    for scalar in column:
        try:
            value = scalar.as_py()
            found.append(value if value is None else made(value))
        except (ValueError, OverflowError, pa.ArrowException):
            found.append(Unreadable("record_unreadable", f"{field} isn't UTF-8, or no such date"))
    return found


def _count_unknown(group: Any, unknown: list[str], ignored: Ignored) -> None:
    """Count the values of unknown columns in a row group."""
    flat = {}
    for at in range(group.num_columns):
        chunk = group.column(at)
        told = chunk.statistics
        if told is not None and told.has_null_count:
            flat[chunk.path_in_schema] = group.num_rows - told.null_count
    for column in unknown:
        if count := flat.get(column, group.num_rows):
            ignored.add([column], count)

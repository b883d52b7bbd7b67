"""pandera models that every file of the lake has to satisfy, derived from the record.

They check column types, nulls, ranges and the partition's day. What spans a whole file (order,
unique keys, counts) is computed by DuckDB in `lake.integrity.checks`. Apart from `schema`, since
importing pandera takes seconds that a gateway needn't spend.
"""

from __future__ import annotations

import datetime as dt
from functools import cache
from typing import Any

import msgspec
import pandera.polars as pa
import polars as pl
from msgspec import inspect

from hb_assets.core import days
from hb_assets.core.record import Arrival, Heartbeat
from hb_assets.core.schema import HEARTBEATS, MINUTES, plain


def _checks(struct: type[msgspec.Struct]) -> dict[str, list[Any]]:
    info = inspect.type_info(struct)
    assert isinstance(info, inspect.StructType)
    checks: dict[str, list[Any]] = {}
    for field in info.fields:
        kind, _ = plain(field.type)
        found: list[Any] = []
        if isinstance(kind, inspect.StrType):
            found = [pa.Check.str_length(kind.min_length, kind.max_length)]
        elif isinstance(kind, inspect.IntType) and kind.le is not None:
            # A bound below alone is 0, and that of an unsigned column.
            found = [pa.Check.in_range(kind.ge, kind.le)]
        checks["timestamp" if field.name == "timestamp_ms" else field.name] = found
    return checks


@cache
def heartbeats_model() -> pa.DataFrameSchema:
    """The pandera schema of a fragment or a consolidated file: columns, types, nulls, ranges."""
    checks = _checks(Heartbeat) | _checks(Arrival)
    types: dict[str, Any] = dict(pl.from_arrow(HEARTBEATS.empty_table()).schema)  # type: ignore[union-attr]  # a table gives a frame
    return pa.DataFrameSchema(
        {
            name: pa.Column(dtype, checks=checks[name], nullable=HEARTBEATS.field(name).nullable)
            for name, dtype in types.items()
        },
        strict=True,
        ordered=True,
        name="heartbeats",
    )


@cache
def day_model(day: dt.date) -> pa.DataFrameSchema:
    """The pandera schema of the one rule that depends on the partition: its day."""
    first = days.EPOCH + dt.timedelta(milliseconds=days.start_ms(day))
    last = first + dt.timedelta(milliseconds=days.MS_PER_DAY - 1)
    return pa.DataFrameSchema(
        {"timestamp": pa.Column(checks=pa.Check.in_range(first, last))},
        name="partition_day",
    )


@cache
def minutes_model() -> pa.DataFrameSchema:
    """The pandera schema of a minute-level file."""
    types: dict[str, Any] = dict(pl.from_arrow(MINUTES.empty_table()).schema)  # type: ignore[union-attr]  # a table gives a frame
    bpm = _checks(Heartbeat)["heart_rate"]
    checks: dict[str, list[Any]] = {
        "count": [pa.Check.ge(1)],
        "kept_count": [pa.Check.ge(0)],
        "min": bpm,
        "max": bpm,
        "kept_min": bpm,
        "kept_max": bpm,
    }
    return pa.DataFrameSchema(
        {
            name: pa.Column(
                dtype, checks=checks.get(name, []), nullable=MINUTES.field(name).nullable
            )
            for name, dtype in types.items()
        },
        strict=True,
        ordered=True,
        name="minutes",
    )

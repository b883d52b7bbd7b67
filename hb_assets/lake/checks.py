"""Checks of a file before it is published: pandera for values, DuckDB for what spans the file.

Belongs here: rules, their figures, and their names (Dagster shows them under these names). Doesn't
belong here: publishing. A figure is a count or a bound of something that is no health data; the
values that failed are never shown (invariant 7). pandera and Polars are imported where a check
runs: the gateway, which only reads the lake, starts without them.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import duckdb

from hb_assets.errors import CheckFailedError
from hb_assets.lake.engine import figures
from hb_assets.schema import KEY, ORDER

if TYPE_CHECKING:
    from pandera.polars import DataFrameSchema

SCHEMA_AND_RANGES = "schema_and_ranges"
PARTITION_DAY = "partition_day"
KEY_UNIQUE = "key_unique"
SORTED = "sorted"
COUNTS_ADD_UP = "counts_add_up"
HEARTBEAT_CHECKS = (SCHEMA_AND_RANGES, PARTITION_DAY, KEY_UNIQUE, SORTED, COUNTS_ADD_UP)
MINUTES_SCHEMA = "minutes_schema_and_ranges"
MINUTES_ADD_UP = "minutes_add_up"
MINUTE_CHECKS = (MINUTES_SCHEMA, MINUTES_ADD_UP)

DESCRIPTIONS = {
    SCHEMA_AND_RANGES: "columns, types, nulls, lengths and ranges are as the record says (pandera)",
    PARTITION_DAY: "every timestamp lies within the partition's UTC day (pandera)",
    KEY_UNIQUE: "(user_id, device_id, timestamp) is unique",
    SORTED: "rows are sorted by user_id, timestamp, device_id",
    COUNTS_ADD_UP: "distinct rows of the listed fragments = unique + superseded + erased; unique = rows",
    MINUTES_SCHEMA: "columns, types, nulls and ranges of the minutes (pandera)",
    MINUTES_ADD_UP: "the minutes count every consolidated reading once, and keep no more than all",
}


@dataclass(frozen=True, slots=True)
class Figure:
    """Result of one check: whether it passed, counts that tell why, and one line when it didn't."""

    name: str
    passed: bool
    figures: dict[str, int] = field(default_factory=dict)
    message: str = ""


def values(path: Path, model: DataFrameSchema, name: str) -> Figure:
    """Validate every row of the file against a pandera model, at full depth."""
    import polars as pl
    from pandera.config import ValidationDepth, config_context
    from pandera.errors import SchemaErrors

    rows = pl.scan_parquet(path, hive_partitioning=False)
    with config_context(validation_enabled=True, validation_depth=ValidationDepth.SCHEMA_AND_DATA):
        try:
            model.validate(rows, lazy=True)
        except SchemaErrors as errors:
            faults = sorted(
                {
                    f"{fault.schema.name}: {fault.check or fault.reason_code}"
                    for fault in errors.schema_errors
                }
            )
            return Figure(name, False, {"faults": len(faults)}, "; ".join(faults[:5]))
    return Figure(name, True, {"faults": 0})


def schema_and_ranges(path: Path) -> Figure:
    """Columns, types, nulls, lengths and ranges of heartbeats."""
    from hb_assets import contracts

    return values(path, contracts.heartbeats_model(), SCHEMA_AND_RANGES)


def partition_day(path: Path, day: dt.date) -> Figure:
    """Every timestamp lies within the day."""
    from hb_assets import contracts

    return values(path, contracts.day_model(day), PARTITION_DAY)


def minutes_schema_and_ranges(path: Path) -> Figure:
    """Columns, types, nulls and ranges of minutes."""
    from hb_assets import contracts

    return values(path, contracts.minutes_model(), MINUTES_SCHEMA)


_FILE = "read_parquet($path, hive_partitioning = false)"
_KEY = ", ".join(KEY)
_ROW = f"({', '.join(ORDER)})"
_DISORDER = f"""
SELECT count(*) AS rows, count(*) FILTER (this < before) AS disorder,
    count(*) FILTER (this = before) AS twins
FROM (SELECT row{_ROW} AS this, lag(row{_ROW}) OVER () AS before FROM {_FILE})
"""
_DUPLICATES = f"""
SELECT coalesce(sum(n - 1), 0) FROM (SELECT count(*) AS n FROM {_FILE} GROUP BY {_KEY})
"""


def order_and_key(connection: duckdb.DuckDBPyConnection, path: Path) -> tuple[Figure, Figure]:
    """Whether rows are sorted, and keys unique.

    In a sorted file twins stand side by side, so that one pass over it settles both; only a file
    that isn't sorted is grouped by its keys.
    """
    parameters = {"path": str(path)}
    rows, disorder, twins = figures(connection, _DISORDER, parameters)
    if disorder:
        (twins,) = figures(connection, _DUPLICATES, parameters)
    in_order = Figure(
        SORTED,
        disorder == 0,
        {"rows": rows, "out_of_order": disorder},
        f"{disorder} rows stand before a row they should follow" if disorder else "",
    )
    unique = Figure(
        KEY_UNIQUE,
        twins == 0,
        {"rows": rows, "duplicates": twins},
        f"{twins} rows repeat a key" if twins else "",
    )
    return in_order, unique


def counts_add_up(
    *, rows_in: int, unique: int, superseded: int, erased: int, rows_in_file: int
) -> Figure:
    """The ledger of one file.

    Args:
        rows_in: distinct rows of the fragments that the file lists, counted from them.
        unique: rows that survived, as the consolidation counted.
        superseded: rows that didn't, likewise.
        erased: rows that were forgotten, likewise.
        rows_in_file: rows that the file really has.
    """
    faults = []
    if rows_in != unique + superseded + erased:
        faults.append(f"{rows_in} rows came in, {unique} + {superseded} + {erased} went out")
    if rows_in_file != unique:
        faults.append(f"the file has {rows_in_file} rows, {unique} survived")
    counted = {
        "rows_in": rows_in,
        "unique": unique,
        "superseded": superseded,
        "erased": erased,
        "rows_in_file": rows_in_file,
    }
    return Figure(COUNTS_ADD_UP, not faults, counted, "; ".join(faults))


def minutes_add_up(*, readings: int, counted: int, kept: int, rows: int) -> Figure:
    """The ledger of one minute-level file.

    Args:
        readings: rows of the consolidated file.
        counted: sum of `count` over the minutes.
        kept: sum of `kept_count` over the minutes.
        rows: minutes.
    """
    passed = readings == counted and kept <= counted and rows <= counted
    message = "" if passed else f"{readings} readings, {counted} counted, {kept} kept"
    counts = {"readings": readings, "counted": counted, "kept": kept, "minutes": rows}
    return Figure(MINUTES_ADD_UP, passed, counts, message)


def require(results: Iterable[Figure], what: str) -> None:
    """Stop a publication whose file failed a check.

    Raises:
        CheckFailedError: names the file's day and shard, each failed check and its figures.
    """
    figures = tuple(results)
    failed = [figure for figure in figures if not figure.passed]
    if failed:
        faults = "; ".join(f"{figure.name}: {figure.message}" for figure in failed)
        raise CheckFailedError(
            f"{what} failed its checks and was not published: {faults}", figures=figures
        )


def summed(results: Sequence[Figure]) -> list[Figure]:
    """One figure per check over all shards of a day: counts added up, messages joined."""
    result: dict[str, Figure] = {}
    for figure in results:
        before = result.get(figure.name)
        if before is None:
            result[figure.name] = figure
            continue
        names = before.figures.keys() | figure.figures.keys()
        result[figure.name] = Figure(
            figure.name,
            before.passed and figure.passed,
            {n: before.figures.get(n, 0) + figure.figures.get(n, 0) for n in sorted(names)},
            "; ".join(text for text in (before.message, figure.message) if text),
        )
    return list(result.values())

"""Storage types and pandera's models: derived from the record, and they refuse what it refuses."""

from __future__ import annotations

import datetime as dt
from typing import Any

import duckdb
import msgspec
import pandera.errors
import polars as pl
import pyarrow as pa
import pytest
from pandera.config import ValidationDepth, config_context

from hb_assets.core import contracts, record, schema

DAY = dt.date(2025, 1, 15)
MIDNIGHT = dt.datetime(2025, 1, 15, tzinfo=dt.UTC)
ROW: dict[str, Any] = {
    "user_id": "u1",
    "device_id": "device_a",
    "timestamp": MIDNIGHT,
    "heart_rate": 75,
    "arrival_ms": 1_736_935_200_000,
    "arrival_seq": 0,
    "arrival_shard": 9,
    "arrival_pos": 0,
}
MINUTE: dict[str, Any] = {
    "user_id": "u1",
    "minute": MIDNIGHT,
    "device_id": "device_a",
    "sum": 150,
    "count": 2,
    "min": 70,
    "max": 80,
    "kept_sum": 0,
    "kept_count": 0,
    "kept_min": None,
    "kept_max": None,
}


def frame(columns: pa.Schema, row: dict[str, Any]) -> pl.DataFrame:
    found = pl.from_arrow(pa.Table.from_pylist([row], schema=columns))
    assert isinstance(found, pl.DataFrame)
    return found


def validate(model: Any, rows: pl.DataFrame) -> None:
    with config_context(validation_depth=ValidationDepth.SCHEMA_AND_DATA):
        model.validate(rows, lazy=True)


def test_columns_of_the_lake() -> None:
    """An interface: users read these files directly (docs/lake.md)."""
    assert {field.name: str(field.type) for field in schema.HEARTBEATS} == {
        "user_id": "string",
        "device_id": "string",
        "timestamp": "timestamp[ms, tz=UTC]",
        "heart_rate": "int16",
        "arrival_ms": "uint64",
        "arrival_seq": "uint64",
        "arrival_shard": "int16",
        "arrival_pos": "int32",
    }
    assert {field.name: str(field.type) for field in schema.MINUTES} == {
        "user_id": "string",
        "minute": "timestamp[ms, tz=UTC]",
        "device_id": "string",
        "sum": "int64",
        "count": "int32",
        "min": "int16",
        "max": "int16",
        "kept_sum": "int64",
        "kept_count": "int32",
        "kept_min": "int16",
        "kept_max": "int16",
    }


def test_every_column_is_described() -> None:
    for columns in (schema.HEARTBEATS, schema.MINUTES, schema.QUARANTINE):
        assert all(field.metadata and field.metadata[b"comment"] for field in columns)


def test_key_and_order_are_columns_of_the_record() -> None:
    fields = [field.name for field in msgspec.structs.fields(record.Heartbeat)]
    assert set(schema.KEY) == set(schema.ORDER)
    assert {"timestamp_ms" if name == "timestamp" else name for name in schema.KEY} < set(fields)


@pytest.mark.parametrize("columns", [schema.HEARTBEATS, schema.MINUTES, schema.QUARANTINE])
def test_duckdb_gives_the_arrow_types_back(columns: pa.Schema) -> None:
    ddl = ", ".join(f'"{name}" {kind}' for name, kind in schema.duckdb_columns(columns).items())
    with duckdb.connect() as engine:
        engine.execute("SET TimeZone = 'UTC'")
        engine.execute(f"CREATE TABLE t ({ddl})")
        found = engine.sql("FROM t").to_arrow_table().schema
    for ours, theirs in zip(columns, found, strict=True):
        assert ours.name == theirs.name
        if pa.types.is_timestamp(ours.type):
            assert pa.types.is_timestamp(theirs.type)
            assert theirs.type.tz
        else:
            assert ours.type == theirs.type


def test_good_rows_pass() -> None:
    validate(contracts.heartbeats_model(), frame(schema.HEARTBEATS, ROW))
    validate(contracts.day_model(DAY), frame(schema.HEARTBEATS, ROW))
    validate(contracts.minutes_model(), frame(schema.MINUTES, MINUTE))


@pytest.mark.parametrize(
    "changes",
    [
        {"user_id": None},
        {"user_id": ""},
        {"user_id": "u" * 129},
        {"device_id": ""},
        {"timestamp": None},
        {"heart_rate": None},
        {"heart_rate": record.BPM_RANGE[0] - 1},
        {"heart_rate": record.BPM_RANGE[1] + 1},
        {"arrival_shard": 100},
        {"arrival_pos": -1},
    ],
)
def test_bad_rows_fail(changes: dict[str, Any]) -> None:
    with pytest.raises(pandera.errors.SchemaErrors):
        validate(contracts.heartbeats_model(), frame(schema.HEARTBEATS, ROW | changes))


@pytest.mark.parametrize(
    "bad",
    [
        frame(schema.HEARTBEATS, ROW).drop("arrival_pos"),
        frame(schema.HEARTBEATS, ROW).with_columns(extra=1),
        frame(schema.HEARTBEATS, ROW).cast({"heart_rate": pl.Int32}),
        frame(schema.HEARTBEATS, ROW).cast({"timestamp": pl.Datetime("us", "UTC")}),
        frame(schema.HEARTBEATS, ROW).select(*reversed(schema.HEARTBEATS.names)),
    ],
    ids=["missing", "extra", "type", "unit", "order"],
)
def test_other_columns_fail(bad: pl.DataFrame) -> None:
    with pytest.raises(pandera.errors.SchemaErrors):
        validate(contracts.heartbeats_model(), bad)


@pytest.mark.parametrize("off", [dt.timedelta(milliseconds=-1), dt.timedelta(days=1)])
def test_another_days_rows_fail(off: dt.timedelta) -> None:
    last = frame(
        schema.HEARTBEATS, ROW | {"timestamp": MIDNIGHT + dt.timedelta(days=1, seconds=-1)}
    )
    validate(contracts.day_model(DAY), last)
    with pytest.raises(pandera.errors.SchemaErrors):
        validate(
            contracts.day_model(DAY), frame(schema.HEARTBEATS, ROW | {"timestamp": MIDNIGHT + off})
        )


@pytest.mark.parametrize(
    "changes", [{"count": 0}, {"kept_count": -1}, {"min": 29}, {"max": 221}, {"kept_max": 221}]
)
def test_bad_minutes_fail(changes: dict[str, Any]) -> None:
    with pytest.raises(pandera.errors.SchemaErrors):
        validate(contracts.minutes_model(), frame(schema.MINUTES, MINUTE | changes))

"""Arrow and DuckDB column types, derived from the record.

Every column comes from a field of `record`, except those of the minute-level table, which exists
only in the lake. pandera's models are in `contracts`.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
import pyarrow as pa
from msgspec import inspect

from hb_assets.core.record import Arrival, Heartbeat

TIMESTAMP = pa.timestamp("ms", tz="UTC")
KEY = ("user_id", "device_id", "timestamp")
"""What makes a heartbeat unique; the latest arrival of a key wins."""
ORDER = ("user_id", "timestamp", "device_id")
"""Sort order of consolidated files: one user's readings side by side, in time order."""
ARRIVAL = tuple(field.name for field in msgspec.structs.fields(Arrival))
"""Columns of a row's identity, in arrival order."""
IDENTITY = ", ".join(ARRIVAL)
"""The same columns as a list in SQL."""


def plain(kind: inspect.Type) -> tuple[inspect.Type, bool]:
    """A field's type without its annotations, and whether it may be null."""
    kind = kind.type if isinstance(kind, inspect.Metadata) else kind
    if not isinstance(kind, inspect.UnionType):
        return kind, False
    [some] = [one for one in kind.types if not isinstance(one, inspect.NoneType)]
    return plain(some)[0], True


def _integer(field: inspect.IntType) -> pa.DataType:
    """Smallest signed type that holds the field's bounds; 64 unsigned bits for entry ids."""
    if field.le is None:
        return pa.uint64()
    for arrow in (pa.int16(), pa.int32()):
        if field.le < 2 ** (arrow.bit_width - 1):
            return arrow
    return pa.int64()


def _fields(struct: type[msgspec.Struct]) -> list[pa.Field]:
    info = inspect.type_info(struct)
    assert isinstance(info, inspect.StructType)
    fields = []
    for field in info.fields:
        described = field.type
        extra = described.extra_json_schema if isinstance(described, inspect.Metadata) else {}
        kind, nullable = plain(described)
        note = {"comment": (extra or {}).get("description", "")}
        if field.name == "timestamp_ms":
            fields.append(pa.field("timestamp", TIMESTAMP, nullable=False, metadata=note))
        elif isinstance(kind, inspect.StrType):
            fields.append(pa.field(field.name, pa.string(), nullable=nullable, metadata=note))
        elif isinstance(kind, inspect.IntType):
            fields.append(pa.field(field.name, _integer(kind), nullable=nullable, metadata=note))
        else:
            raise TypeError(f"no storage type for field {field.name}")
    return fields


HEARTBEATS: pa.Schema = pa.schema(_fields(Heartbeat) + _fields(Arrival))
"""Columns of fragments and consolidated files alike: the record and its row's identity."""
BOUNDS: Mapping[str, tuple[int, int]] = {
    field.name: (kind.ge, kind.le)
    for field in msgspec.structs.fields(Heartbeat)
    if isinstance(kind := plain(inspect.type_info(field.type))[0], inspect.IntType)
    and kind.ge is not None
    and kind.le is not None
}
"""Least and greatest value of the record's numbers that have bounds."""
VALUES = tuple(field for field in HEARTBEATS if field.name not in (*KEY, *ARRIVAL))
"""Columns that say something of a key: a later arrival may say something else."""

TEXTS = tuple(field.name for field in HEARTBEATS if pa.types.is_string(field.type))
"""Its columns of text."""
ENCODED: pa.Schema = pa.schema(
    field.with_type(pa.dictionary(pa.int32(), pa.string())) if field.name in TEXTS else field
    for field in HEARTBEATS
)
"""The same with texts as dictionaries, as Parquet stores them."""

MINUTES: pa.Schema = pa.schema(
    [
        HEARTBEATS.field("user_id"),
        pa.field("minute", TIMESTAMP, nullable=False, metadata={"comment": "start of the minute"}),
        HEARTBEATS.field("device_id"),
    ]
    + [
        pa.field(prefix + name, arrow, nullable=name in ("min", "max"), metadata={"comment": text})
        for prefix, which in (("", "all readings"), ("kept_", "readings that device priority kept"))
        for name, arrow, text in (
            ("sum", pa.int64(), f"sum of bpm over {which}"),
            ("count", pa.int32(), f"number of {which}"),
            ("min", HEARTBEATS.field("heart_rate").type, f"lowest bpm of {which}"),
            ("max", HEARTBEATS.field("heart_rate").type, f"highest bpm of {which}"),
        )
    ]
)
"""One row per user, minute and device; `kept_min`, `kept_max` are null where nothing was kept."""

QUARANTINE: pa.Schema = pa.schema(
    [
        pa.field(
            "raw", pa.binary(), nullable=False, metadata={"comment": "the bytes as they came"}
        ),
        pa.field("reason", pa.string(), nullable=False, metadata={"comment": "reason code"}),
        pa.field("message", pa.string(), nullable=False, metadata={"comment": "what was wrong"}),
        *_fields(Arrival),
        pa.field("attempts", pa.int32(), nullable=False, metadata={"comment": "deliveries so far"}),
        pa.field("quarantined_at", TIMESTAMP, nullable=False, metadata={"comment": "drain's time"}),
    ]
)

_DUCKDB = {
    pa.string(): "VARCHAR",
    pa.binary(): "BLOB",
    pa.int16(): "SMALLINT",
    pa.int32(): "INTEGER",
    pa.int64(): "BIGINT",
    pa.uint64(): "UBIGINT",
    TIMESTAMP: "TIMESTAMP WITH TIME ZONE",
}


def duckdb_columns(schema: pa.Schema) -> dict[str, str]:
    """Column names and DuckDB types of an Arrow schema of ours."""
    return {field.name: _DUCKDB[field.type] for field in schema}

"""Metadata that Dagster shows beside an asset: counts, columns and previews.

It never holds a heart rate or a clear id; ids are masked, and the column of heart rates is not
even read (invariant 7).
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeAlias

import dagster as dg
import pyarrow as pa

from hb_assets.core.errors import HbError
from hb_assets.core.settings import Settings
from hb_assets.lake.compaction.consolidation import Consolidated
from hb_assets.lake.inventory import DayState
from hb_assets.lake.minutes import MinutesBuilt
from hb_assets.lake.storage import layout, verified
from hb_assets.lake.storage.store import Lake

Metadata: TypeAlias = dict[str, dg.MetadataValue]

_PREVIEW_ROWS = 8
_MASKED = ("user_id", "device_id")


def columns(schema: pa.Schema) -> dg.TableSchema:
    """The columns of one of our Arrow schemas."""
    return dg.TableSchema(
        columns=[
            dg.TableColumn(
                field.name,
                str(field.type),
                description=(field.metadata or {}).get(b"comment", b"").decode() or None,
                constraints=dg.TableColumnConstraints(nullable=field.nullable),
            )
            for field in schema
        ]
    )


def of_raw(lake: Lake, state: DayState) -> Metadata:
    """Metadata of a day's fragments."""
    counts = {
        "dagster/row_count": state.fragment_rows,
        "fragments": state.fragments,
        "bytes": state.fragment_bytes,
        "pending_fragments": state.pending_fragments,
        "pending_rows": state.pending_rows,
    }
    return {**_integers(counts), "folder": _folder(lake, layout.RAW, state.day)}


def of_heartbeats(lake: Lake, done: Consolidated) -> Metadata:
    """Metadata of a day's consolidation, and a few of its rows."""
    files = [layout.consolidated_file(lake.root, done.day, shard) for shard in range(lake.shards)]
    return {
        **of_consolidated(done),
        "folder": _folder(lake, layout.HEARTBEATS, done.day),
        "preview": preview(lake, files, ("user_id", "device_id", "timestamp")),
    }


def of_consolidated(done: Consolidated) -> Metadata:
    """Metadata of a consolidation."""
    counts = {
        "dagster/row_count": done.unique,
        **done.counts(),
        "bytes": done.bytes,
        "written_rows": done.written,
        "written_files": done.shards_written,
        "fragments_taken_in": done.pending,
        "damaged_files_set_aside": len(done.set_aside),
    }
    return _integers(counts)


def of_minutes(lake: Lake, done: MinutesBuilt, settings: Settings) -> Metadata:
    """Metadata of a day's minutes, and a few of them."""
    counts = {
        "dagster/row_count": done.rows,
        "readings": done.readings,
        "kept_readings": done.kept,
        "bytes": done.bytes,
        "written_files": done.shards_written,
    }
    files = [layout.minutes_file(lake.root, done.day, shard) for shard in range(lake.shards)]
    return {
        **_integers(counts),
        "device_priority": dg.MetadataValue.text(", ".join(settings.device_priority)),
        "folder": _folder(lake, layout.MINUTES, done.day),
        "preview": preview(lake, files, ("user_id", "device_id", "minute", "count", "kept_count")),
    }


def _integers(counts: Mapping[str, int]) -> Metadata:
    return {name: dg.MetadataValue.int(count) for name, count in counts.items()}


def _folder(lake: Lake, kind: str, day: dt.date) -> dg.MetadataValue:
    return dg.MetadataValue.path(layout.day_folder(lake.root, kind, day))


def preview(lake: Lake, files: Iterable[Path], names: Iterable[str]) -> dg.MetadataValue:
    """The first row of each of a few files, ids masked.

    Files that aren't there, or can't be read, are left out: that is reported elsewhere.
    """
    shown = list(names)
    records: list[dg.TableRecord] = []
    for path in files:
        if len(records) == _PREVIEW_ROWS:
            break
        try:
            with verified.opened(path) as file:
                batch = next(file.iter_batches(batch_size=1, columns=shown), None)
        except (HbError, OSError):
            continue
        records += [
            dg.TableRecord({name: _shown(lake, name, row[name]) for name in shown})
            for row in (batch.to_pylist() if batch is not None else ())
        ]
    schema = dg.TableSchema(columns=[dg.TableColumn(name) for name in shown])
    return dg.MetadataValue.table(records, schema=schema)


def _shown(lake: Lake, name: str, value: object) -> str | int:
    if name in _MASKED:
        return lake.mask(str(value))
    if isinstance(value, dt.datetime):
        return value.isoformat(timespec="milliseconds")
    return value if isinstance(value, int) else str(value)

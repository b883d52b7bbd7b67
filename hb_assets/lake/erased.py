"""Erased heartbeats: their identities, so that the audit still counts them.

Belongs here: the files under `erased/` by arrival date, which hold entry ids and positions and
nothing else: of rows that a drain withheld, and of records that were taken out of quarantine. What
was erased from consolidated files is counted in their footers. Doesn't belong here: erasing.
"""

from __future__ import annotations

import datetime as dt
from pathlib import Path

import msgspec
import pyarrow as pa

from hb_assets.days import day_of
from hb_assets.lake import layout, parquet
from hb_assets.lake.files import TempFile
from hb_assets.lake.layout import ERASED, FragmentName
from hb_assets.lake.store import FORMAT, Lake
from hb_assets.schema import ARRIVAL, HEARTBEATS

SCHEMA: pa.Schema = pa.schema([HEARTBEATS.field(name) for name in ARRIVAL])


class _Note(msgspec.Struct, frozen=True):
    format: int


def publish(lake: Lake, *identities: pa.Table) -> list[Path]:
    """Make identities durable, one file per source shard and arrival date.

    Args:
        lake: where to.
        identities: tables with the columns of an identity.

    Raises:
        OSError: a write failed; acknowledge nothing.
    """
    rows = pa.concat_tables([table.cast(SCHEMA) for table in identities])
    sources = rows["arrival_shard"].to_pylist()
    places = list(zip(map(day_of, rows["arrival_ms"].to_pylist()), sources, strict=True))
    return [
        _publish(lake, day, rows.filter(pa.array([place == (day, source) for place in places])))
        for day, source in sorted(set(places))
    ]


def _publish(lake: Lake, day: dt.date, rows: pa.Table) -> Path:
    folder = layout.day_folder(lake.root, ERASED, day)
    name = FragmentName.covering(rows)
    with TempFile(lake.root, folder) as temp:
        parquet.write(temp.path, rows, _Note(FORMAT))
        temp.publish_new(folder / str(name))
    return folder / str(name)

"""Identities of erased heartbeats, kept so that the audit still counts them.

The files under `erased/` by arrival date hold entry ids and positions and nothing else: of rows
that a drain withheld, and of records that were taken out of quarantine. What was erased from
consolidated files is counted in their footers.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pyarrow as pa
import pyarrow.compute as pc

from hb_assets.core.days import day_of
from hb_assets.core.schema import ARRIVAL, HEARTBEATS, IDENTITY
from hb_assets.core.settings import Settings
from hb_assets.lake.files import fragments
from hb_assets.lake.storage import layout, parquet, verified
from hb_assets.lake.storage.durable_files import TempFile
from hb_assets.lake.storage.engine import engine
from hb_assets.lake.storage.layout import ERASED, FragmentName
from hb_assets.lake.storage.store import FORMAT, Lake

SCHEMA: pa.Schema = pa.schema([HEARTBEATS.field(name) for name in ARRIVAL])


class _Note(msgspec.Struct, frozen=True):
    format: int


def publish(lake: Lake, settings: Settings, *identities: pa.Table) -> list[Path]:
    """Make identities durable, one file per source shard and arrival date.

    Those that a fragment holds are left out: they count, and are erased, as the fragment's.

    Args:
        lake: where to.
        settings: for memory and threads.
        identities: tables with the columns of an identity.

    Raises:
        OSError: a write failed; acknowledge nothing.
    """
    rows = pa.concat_tables([table.cast(SCHEMA) for table in identities])
    if rows.num_rows:
        rows = _not_in_raw(lake, rows, settings)
    sources = rows["arrival_shard"].to_pylist()
    places = list(zip(map(day_of, rows["arrival_ms"].to_pylist()), sources, strict=True))
    return [
        _publish(lake, day, rows.filter(pa.array([place == (day, source) for place in places])))
        for day, source in sorted(set(places))
    ]


def near(lake: Lake, names: Sequence[FragmentName]) -> list[Path]:
    """Files that may hold identities of fragments with these names."""
    return [
        path
        for path in paths(lake)
        if (found := FragmentName.parse(path.name)) is not None
        and any(found.overlaps(name) for name in names)
    ]


def paths(lake: Lake) -> list[Path]:
    """All files of erased identities."""
    return sorted((lake.root / ERASED).rglob("*.parquet"))


def _not_in_raw(lake: Lake, rows: pa.Table, settings: Settings) -> pa.Table:
    names = [
        FragmentName.covering(rows.filter(pc.equal(rows["arrival_shard"], source)))
        for source in pc.unique(rows["arrival_shard"]).to_pylist()
    ]
    raw = [
        one.path
        for day in layout.days_of(lake.root, layout.RAW)
        for one in fragments.all_listed(lake, day)
        if any(one.name.overlaps(name) for name in names)
    ]
    if not raw:
        return rows
    with engine(settings) as connection, verified.relations(connection, {"raw": raw}):
        connection.register("taken", rows)
        return connection.sql(_NOT_IN_RAW).to_arrow_table().cast(SCHEMA)


_NOT_IN_RAW = f"""
SELECT {IDENTITY} FROM taken
ANTI JOIN (SELECT {IDENTITY} FROM raw) AS known
USING ({IDENTITY})
"""


def _publish(lake: Lake, day: dt.date, rows: pa.Table) -> Path:
    folder = layout.day_folder(lake.root, ERASED, day)
    name = FragmentName.covering(rows)
    with TempFile(lake.root, folder) as temp:
        parquet.write(temp.path, rows, _Note(FORMAT))
        name = name.sealed(temp.path)
        temp.publish_new(folder / str(name))
    return folder / str(name)
